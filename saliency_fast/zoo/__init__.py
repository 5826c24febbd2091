"""Small trained models and labelled scenes, so that examples and tests need no download."""

from saliency_fast.zoo.networks import MODELS, digits_cnn, digits_vit
from saliency_fast.zoo.scenes import Samples, held_out

__all__ = ["MODELS", "Samples", "digits_cnn", "digits_vit", "held_out"]
