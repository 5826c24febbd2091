"""Names of `saliency_fast.record` that other packages still import from here."""

from saliency_fast.record import describe_target, restore_baseline, restore_target

__all__ = ["describe_target", "restore_baseline", "restore_target"]
