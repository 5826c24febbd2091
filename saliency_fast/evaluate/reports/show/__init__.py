"""Showing a report: in the terminal, as JSON, as a page."""
