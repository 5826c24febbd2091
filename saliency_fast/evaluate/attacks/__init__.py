"""Attacks on decisions and on maps, and maps that look unusual."""
