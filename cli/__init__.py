"""Parses, prints, exits. The command is `dream`."""
