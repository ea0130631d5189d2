"""How the dream engine learns, phase by phase, on a finished backbone."""
