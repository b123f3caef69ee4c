"""A run, or several, as one page to look at: read from their folders, drawn by Bokeh, with nothing to fetch."""
