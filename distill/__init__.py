"""Learns: teacher → corpus → mining → knowledge → tokens → student → dream → training → exam → report → sweep."""
