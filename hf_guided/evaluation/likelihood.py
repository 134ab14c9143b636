"""Likelihood in bits per dimension: the variational bound of a diffusion model, term by term."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin

from ..generation.sampling import compiled_if
from ..guidance.monitor import Monitor, broken_images
from ..labels import match_classes, resolve_labels
from ..losses import mean_over_pixels, normal_kl, variational_bound_term
from ..models.modes import evaluating
from ..schedulers.gaussian_diffusion import GaussianDiffusion, upcast
from ..schedulers.schedules import space_timesteps
from ..schedulers.scheduling_adm import ADMScheduler, model_timesteps
from .features.feature_sets import gather_to_main
from .features.image_sets import ImageSet


class BitsPerDim(NamedTuple):
    """The variational bound of a batch of images, in bits per dimension."""

    total_bpd: torch.Tensor  # (batch,): the bound on the negative log-likelihood
    prior_bpd: torch.Tensor  # (batch,): the signal left at the last timestep, which does not depend on the model
    vb: torch.Tensor  # (batch, timesteps): the other terms of the bound, last timestep first
    mse: torch.Tensor  # (batch, timesteps): mean squared error of the noise that the predicted clean image implies
    xstart_mse: torch.Tensor  # (batch, timesteps): mean squared error of the predicted clean image


@torch.no_grad()
def bits_per_dim(
    unet: ModelMixin,
    scheduler: ADMScheduler,
    images: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    respacing: str | None = None,
    noise: torch.Tensor | None = None,
) -> BitsPerDim:
    r"""The variational bound of images under a diffusion model (Improved DDPM, arXiv 2102.09672, equations 4 to 7).

    Args:
        unet ([`ADMUNet2DModel`] or like it): Predicts noise; it is in evaluation mode during the call.
        scheduler ([`ADMScheduler`]): It is not changed. With its `clip_sample`, predicted clean images are clipped.
        images (`torch.Tensor` of shape `(batch, C, height, width)`): 8-bit images, scaled to [-1, 1].
        class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class ids, for a class-conditional UNet.
        respacing (`str`, *optional*): Timesteps to use, in OpenAI's notation; all of them by default.
        noise (`torch.Tensor` of shape `(timesteps, batch, C, height, width)`, *optional*): The noise of each timestep,
            last timestep first; drawn if not given.

    Raises:
        `ValueError`: If `noise` has another shape, the respacing cannot be satisfied, or labels are not class ids.
        [`NotFiniteError`]: If an output of the UNet is not finite, which clipping would hide.
    """
    diffusion = _diffusion(scheduler, respacing)
    descending = diffusion.timesteps[::-1]
    images = upcast(images)
    shape = (len(descending), *images.shape)
    if noise is not None and noise.shape != shape:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; {shape[0]} timesteps of images of shape {shape[1:]} need {shape}."
        )
    conditions = {} if class_labels is None else {"class_labels": class_labels}
    if class_labels is not None and (num_classes := unet.config.get("num_class_embeds")) is not None:
        labels = resolve_labels(class_labels, {}, num_classes + unet.config.get("null_class_label", False))
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} class_labels were given for {len(images)} images; give one each.")
        conditions = {"class_labels": torch.tensor(labels, device=images.device)}
    monitor = Monitor()
    vb, mse, xstart_mse = [], [], []
    with evaluating(unet):
        for i, timestep in enumerate(descending):
            timesteps = torch.full((len(images),), timestep, device=images.device)
            step_noise = torch.randn_like(images) if noise is None else noise[i].to(images)
            sample = diffusion.add_noise(images, step_noise, timesteps)
            unet_timesteps = model_timesteps(scheduler, timesteps)
            model_output = unet(sample.to(unet.dtype), unet_timesteps, **conditions).sample
            monitor.record(broken_images(model_output), "unet", timestep, i)
            predicted = diffusion.predict(model_output, timesteps, sample, scheduler.config.clip_sample)
            original = predicted.pred_original_sample
            vb.append(variational_bound_term(diffusion, predicted, images, sample, timesteps))
            mse.append(mean_over_pixels((diffusion.epsilon_of(original, timesteps, sample) - step_noise) ** 2))
            xstart_mse.append(mean_over_pixels((original - images) ** 2))
        monitor.check()

    # in float64: the signal at the last timestep is below the precision of float32
    signal, alpha_bar = diffusion.at(descending[0], images.double(), "sqrt_alpha_bar", "alpha_bar")
    zero = torch.zeros_like(alpha_bar)
    prior = normal_kl(signal * images.double(), (1 - alpha_bar).log(), zero, zero)
    prior_bpd = (mean_over_pixels(prior) / math.log(2)).to(images.dtype)
    terms = torch.stack(vb, dim=1)
    total_bpd = terms.sum(dim=1) + prior_bpd
    return BitsPerDim(total_bpd, prior_bpd, terms, torch.stack(mse, dim=1), torch.stack(xstart_mse, dim=1))


def _diffusion(scheduler: ADMScheduler, respacing: str | None) -> GaussianDiffusion:
    total = scheduler.config.num_train_timesteps
    return scheduler.diffusion_on(space_timesteps(total, respacing) if respacing else range(total))


@dataclass
class Likelihood:
    """The likelihood of a set of images, in bits per dimension."""

    num_images: int
    total_bpd: float  # the mean over images
    standard_error: float  # of that mean
    kind: str = "bound"  # or "exact"
    prior_bpd: float = 0.0  # the prior term of a diffusion model
    timesteps: list[int] = field(default_factory=list)  # last first; empty for other families
    vb: list[float] = field(default_factory=list)  # means over images of [`BitsPerDim`], by timestep, as the next two
    mse: list[float] = field(default_factory=list)
    xstart_mse: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"Likelihood: {'at most ' if self.kind == 'bound' else ''}{self.total_bpd:.4f} bits per dimension "
            f"(standard error {self.standard_error:.4f}) over {self.num_images:,} images"
        )
        if not self.timesteps:
            return f"{text}."
        quarters = np.array_split(np.array(self.vb[::-1]), 4)
        names = ("first", "second", "third", "last")
        listed = ", ".join(f"{name} {part.sum():.3f}" for name, part in zip(names, quarters, strict=True))
        return f"{text}; prior term {self.prior_bpd:.2g}, by quarters of the timesteps: {listed}."


def likelihood(
    pipeline: Any,
    images: ImageSet,
    class_labels: np.ndarray | None = None,
    respacing: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Likelihood | None:
    """Bits per dimension of a set of images, computed by all processes that run this call.

    Args:
        pipeline ([`ClassifierGuidedPipeline`]): Its UNet and scheduler are measured by [`bits_per_dim`]; another
            pipeline by its own `bits_per_dim`.
        images ([`ImageSet`]): The images.
        class_labels (`np.ndarray` of shape `(n,)`, *optional*): The class id of each, see [`likelihood_labels`].
        respacing (`str`, *optional*): See [`bits_per_dim`].
        batch_size (`int`, defaults to 64): Images at once in each process.
        seed (`int`, defaults to 0): Seed of the noise, drawn for each batch, on any number of processes.

    Returns:
        [`Likelihood`]: In the main process; `None` in the others.
    """
    measured: list[list[torch.Tensor]] = []
    for indices, batch in images.share(batch_size, "bits per dimension"):
        labels = None if class_labels is None else torch.from_numpy(class_labels[indices]).to(pipeline.device)
        pixels = batch.to(pipeline.device) / 127.5 - 1
        with torch.random.fork_rng(), compiled_if(len(batch) == batch_size):
            torch.manual_seed(seed + indices[0] // batch_size)
            if hasattr(pipeline, "bits_per_dim"):
                parts = [pipeline.bits_per_dim(pixels, labels)]
                if not parts[0].isfinite().all():
                    raise ValueError(
                        f"The likelihood of {images.name} is not finite: the model's training diverged, or its file is "
                        f"damaged."
                    )
            else:
                parts = list(bits_per_dim(pipeline.unet, pipeline.scheduler, pixels, labels, respacing))
        measured.append([part.cpu().double() for part in parts])
    gathered = gather_to_main(measured)
    if gathered is None:
        return None
    total, *terms = (torch.cat(part) for part in zip(*(batch for share in gathered for batch in share), strict=True))
    result = Likelihood(
        num_images=len(images),
        total_bpd=total.mean().item(),
        standard_error=(total.std() / math.sqrt(len(images))).item(),
        kind=getattr(pipeline, "likelihood_kind", "bound"),
    )
    if terms:
        result.timesteps = list(_diffusion(pipeline.scheduler, respacing).timesteps)[::-1]
        result.prior_bpd = terms[0].mean().item()
        result.vb, result.mse, result.xstart_mse = (term.mean(dim=0).tolist() for term in terms[1:])
    return result


def likelihood_labels(pipeline: Any, images: ImageSet) -> np.ndarray | None:
    """The labels that condition the model on real images: matched by name, the null label without labels, or `None`.

    Raises:
        `ValueError`: For a model without likelihood, or one that needs labels that the images do not have.
    """
    if reason := getattr(pipeline, "no_likelihood", None):
        raise ValueError(f"{type(pipeline).__name__} has no likelihood: {reason}.")
    if not hasattr(pipeline, "bits_per_dim") and not isinstance(pipeline.scheduler, ADMScheduler):
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no likelihood; give the pipeline an ADMScheduler.")
    config = pipeline.main_config
    if images.channels != pipeline.image_channels:
        needed = pipeline.image_channels
        raise ValueError(f"{images.name} has images of {images.channels} channels; give the model images of {needed}.")
    if config.num_class_embeds is None:
        return None
    if images.labels is None:
        if not config.get("null_class_label", False):
            raise ValueError(f"This model is class-conditional without a null label, and {images.name} has no labels.")
        return np.full(len(images), config.num_class_embeds)
    names = pipeline.id2label or {label: f"LABEL_{label}" for label in range(config.num_class_embeds)}
    matched = match_classes(images.id2label or names, names, set(np.unique(images.labels).tolist()), "of the pipeline")
    return np.array([matched[label] for label in images.labels.tolist()])
