"""Reports: a suite of metrics over methods and controls, as tables, JSON and a page."""
