"""Triton kernels, one file per op family; imports torch and triton only."""
