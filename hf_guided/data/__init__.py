"""From a dataset (Hub name, folder, built-in) to batches, and the checks of a dataset before training."""

from .arguments import DataArguments, source_argument
from .batch_sampler import StepBatchSampler
from .built_in import BUILT_IN
from .dataset import LabelledImages, load_labelled_images
from .preflight import ImageReport, check_images

__all__ = [
    "BUILT_IN",
    "DataArguments",
    "ImageReport",
    "LabelledImages",
    "StepBatchSampler",
    "check_images",
    "load_labelled_images",
    "source_argument",
]
