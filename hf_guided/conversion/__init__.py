"""Published OpenAI checkpoints to this library's models."""

from .openai import convert_openai_classifier, convert_openai_unet

__all__ = ["convert_openai_classifier", "convert_openai_unet"]
