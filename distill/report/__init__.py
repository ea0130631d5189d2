"""Numbers told to people: systems side by side, as tables, as text and as a page."""
