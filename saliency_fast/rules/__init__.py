"""Backward rules: operators of a model pass back something else than their gradients."""
