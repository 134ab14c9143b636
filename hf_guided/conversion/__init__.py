"""Published OpenAI checkpoints to this library's models, and back."""

from .openai import convert_openai_classifier, convert_openai_unet, to_openai_state_dict

__all__ = ["convert_openai_classifier", "convert_openai_unet", "to_openai_state_dict"]
