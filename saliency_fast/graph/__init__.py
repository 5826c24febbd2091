"""Programs: what a model calls of PyTorch, recorded, rewritten and run again."""
