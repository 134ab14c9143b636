"""From a folder on disk to a repository on the Hub: the model card, and the push."""

from .model_card import write_model_card
from .push import push_folder

__all__ = ["push_folder", "write_model_card"]
