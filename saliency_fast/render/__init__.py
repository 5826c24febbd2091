"""Pictures of maps: overlays as frames, picture files and HTML pages."""

from saliency_fast.render.frames import frames

__all__ = ["frames"]
