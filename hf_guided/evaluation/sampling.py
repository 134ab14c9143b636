"""Many samples, a batch at a time."""

from collections.abc import Iterator
from typing import Any

import torch


def sample_batches(
    pipeline: Any, labels: torch.Tensor | int, batch_size: int, seed: int = 0, **arguments: Any
) -> Iterator[Any]:
    """Yields the images of each batch; image i of a seed has the same noise for every batch size.

    Args:
        pipeline ([`ClassifierGuidedPipeline`] or one called like it): Makes the images.
        labels (`torch.Tensor` of shape `(n,)`, or `int`): The class of each image; or so many images without a class.
        batch_size (`int`): Images at once.
        seed (`int`, defaults to 0): Seed of all images together.
        arguments: Go to the pipeline.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(labels, int):
        sizes = [len(batch) for batch in torch.arange(labels).split(batch_size)]
        batches: list[dict[str, Any]] = [{"num_images_per_label": size} for size in sizes]
    else:
        batches = [{"class_labels": batch} for batch in labels.split(batch_size)]
    for batch in batches:
        yield pipeline(**batch, generator=generator, return_dict=False, **arguments)[0]
