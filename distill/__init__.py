"""Learns: teacher → corpus → tokens → student → training → evaluation."""
