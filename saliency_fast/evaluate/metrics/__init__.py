"""Metrics: frozen recipes, a page each."""
