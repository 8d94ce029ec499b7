"""The demo: the worlds that it renders, and what it measures of a finished chain."""
