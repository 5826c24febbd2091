"""Benchmarks of saliency_fast against its peers."""
