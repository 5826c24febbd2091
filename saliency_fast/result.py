"""Names of `saliency_fast.attribution` that `engines.py` still imports from here."""

from saliency_fast.attribution import attribution, resident_before, usage_of

__all__ = ["attribution", "resident_before", "usage_of"]
