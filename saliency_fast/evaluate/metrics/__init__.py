"""Metrics of maps, one family per module."""
