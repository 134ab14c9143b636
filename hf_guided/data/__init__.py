"""From a dataset (Hub name, folder, built-in digits) to batches, and what is wrong with it."""

from .dataset import DataArguments, LabelledImages, load_labelled_images
from .preflight import ImageReport, check_images
from .sampling import StepBatchSampler

__all__ = [
    "DataArguments",
    "ImageReport",
    "LabelledImages",
    "StepBatchSampler",
    "check_images",
    "load_labelled_images",
]
