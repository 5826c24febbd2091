"""Reports: a suite of metrics over rows of methods, as tables, JSON and a page."""
