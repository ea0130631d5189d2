"""Dreams to look at: text while they form, a heatmap, a page."""
