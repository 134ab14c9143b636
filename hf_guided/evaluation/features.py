"""From images to the numbers of a report: features of any transformers image classifier, and the judge's verdict."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from .distances import frechet_distance, precision_recall


@torch.no_grad()
def classifier_features(
    classifier: PreTrainedModel, images: torch.Tensor, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Features and class probabilities of images, computed where the classifier is, in evaluation mode.

    Args:
        classifier (`PreTrainedModel`): An image classifier that returns `.logits` and `.hidden_states`. The features
            are its last hidden state, maps `(batch, dim, h, w)` or tokens `(batch, n, dim)`, averaged over positions.
        images (`torch.Tensor` of shape `(n, channels, height, width)`): Images in [-1, 1], or as the classifier wants
            its `pixel_values`.
        batch_size (`int`, defaults to 256): Images per call. It changes speed and memory, never the order.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Features `(n, dim)` and probabilities `(n, classes)`, both float32.
    """
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise ValueError(
            "The images must be a floating-point tensor of shape (n, channels, height, width) with values in [-1, 1], "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    features, probabilities = [], []
    was_training = classifier.training
    classifier.eval()
    try:
        for batch in images.split(batch_size):
            output = classifier(batch.to(classifier.device, classifier.dtype), output_hidden_states=True)
            hidden_state = output.hidden_states[-1].float()
            features.append(hidden_state.mean(dim=(2, 3) if hidden_state.ndim == 4 else 1).cpu())
            probabilities.append(output.logits.float().softmax(dim=-1).cpu())
    finally:
        classifier.train(was_training)
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy()


def judge_features(
    features: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[int] | torch.Tensor,
    reference_features: np.ndarray,
) -> dict[str, float]:
    """What an independent classifier says of generated samples: one row of a report.

    The judge must not be the classifier that guided the samples: guidance would be asked whether it pleased itself.

    Args:
        features (`np.ndarray` of shape `(n, dim)`), probabilities (`np.ndarray` of shape `(n, classes)`): What
            [`classifier_features`] gives for the samples with a classifier trained apart from the one that guides.
        labels (`Sequence[int]` or `torch.Tensor` of shape `(n,)`): The class id that each sample was asked to show.
        reference_features (`np.ndarray` of shape `(m, dim)`): The same classifier's features of real images, computed
            once for all rows of a report.

    Returns:
        `dict[str, float]`: `accuracy`, the fraction of samples that the judge finds to be what was asked; `fid`,
        `precision` and `recall` (k = 3), in the judge's features.
    """
    requested = np.asarray(torch.as_tensor(labels).cpu())
    if requested.shape != (len(features),):
        raise ValueError(f"Each sample needs one label, got labels of shape {requested.shape} for {len(features)}.")
    precision, recall = precision_recall(features, reference_features)
    return {
        "accuracy": float((probabilities.argmax(axis=1) == requested).mean()),
        "fid": frechet_distance(features, reference_features),
        "precision": precision,
        "recall": recall,
    }
