"""Pictures of maps: frames, files and the page that shows them."""

from saliency_fast.render.frames import frames

__all__ = ["frames"]
