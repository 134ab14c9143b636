"""Likelihood in bits per dimension: the variational bound of a diffusion model, term by term."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers.models.modeling_utils import ModelMixin
from tqdm.auto import tqdm

from ..generation.sampling import compiled_if
from ..guidance.base import broken_images
from ..labels import match_classes, resolve_labels
from ..losses import mean_over_pixels, normal_kl, variational_bound_term
from ..models.modes import evaluating
from ..schedulers.gaussian_diffusion import upcast
from ..schedulers.schedules import space_timesteps
from ..schedulers.scheduling_adm import ADMScheduler, model_timesteps
from .features.feature_sets import gather_to_main
from .features.image_sets import ImageSet


@dataclass
class BitsPerDim:
    """The variational bound of a batch of images, in bits per dimension.

    Attributes:
        total_bpd (`torch.Tensor` of shape `(batch,)`): The bound on the negative log-likelihood, in bits per dimension.
        prior_bpd (`torch.Tensor` of shape `(batch,)`): The prior term, which does not depend on the model: the signal
            that is left at the last timestep.
        vb (`torch.Tensor` of shape `(batch, timesteps)`): Its terms, last timestep first.
        mse (`torch.Tensor` of the same shape): Mean squared error of the noise that the predicted clean image implies.
        xstart_mse (`torch.Tensor` of the same shape): Mean squared error of the predicted clean image.
    """

    total_bpd: torch.Tensor
    prior_bpd: torch.Tensor
    vb: torch.Tensor
    mse: torch.Tensor
    xstart_mse: torch.Tensor


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

    Returns:
        [`BitsPerDim`]

    Raises:
        `ValueError`: If `noise` has another shape, the respacing cannot be satisfied, or labels are not class ids.
        `RuntimeError`: If an output of the UNet is not finite.
    """
    total = scheduler.config.num_train_timesteps
    process = scheduler.process_of(space_timesteps(total, respacing) if respacing else range(total))
    descending = process.timesteps[::-1]
    images = upcast(images)
    if noise is not None and noise.shape != (len(descending), *images.shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; {len(descending)} timesteps of images of shape "
            f"{tuple(images.shape)} need {(len(descending), *images.shape)}."
        )
    conditions = {} if class_labels is None else {"class_labels": class_labels}
    if class_labels is not None and (num_classes := unet.config.get("num_class_embeds")) is not None:
        labels = resolve_labels(class_labels, {}, num_classes + unet.config.get("null_class_label", False))
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} class_labels were given for {len(images)} images; give one each.")
        conditions = {"class_labels": torch.tensor(labels, device=images.device)}
    vb, mse, xstart_mse, broken = [], [], [], []
    with evaluating(unet):
        for i, timestep in enumerate(descending):
            timesteps = torch.full((len(images),), timestep, device=images.device)
            step_noise = torch.randn_like(images) if noise is None else noise[i].to(images)
            sample = process.add_noise(images, step_noise, timesteps)
            unet_timesteps = model_timesteps(scheduler, timesteps)
            model_output = unet(sample.to(unet.dtype), unet_timesteps, **conditions).sample
            broken.append(broken_images(model_output))
            if i in (0, len(descending) - 1):  # a check at each step would wait for the accelerator
                check_finite(broken, descending)
            predicted = process.predict(model_output, timesteps, sample, scheduler.config.clip_sample)
            original = predicted.pred_original_sample
            vb.append(variational_bound_term(process, predicted, images, sample, timesteps))
            mse.append(mean_over_pixels((process.epsilon_of(original, timesteps, sample) - step_noise) ** 2))
            xstart_mse.append(mean_over_pixels((original - images) ** 2))

    # in float64: the signal at the last timestep is below the precision of float32
    signal, alpha_bar = process.at(descending[0], images.double(), "sqrt_alpha_bar", "alpha_bar")
    zero = torch.zeros_like(alpha_bar)
    prior = normal_kl(signal * images.double(), (1 - alpha_bar).log(), zero, zero)
    prior_bpd = (mean_over_pixels(prior) / math.log(2)).to(images.dtype)
    terms = torch.stack(vb, dim=1)
    return BitsPerDim(
        total_bpd=terms.sum(dim=1) + prior_bpd,
        prior_bpd=prior_bpd,
        vb=terms,
        mse=torch.stack(mse, dim=1),
        xstart_mse=torch.stack(xstart_mse, dim=1),
    )


def check_finite(broken: list[torch.Tensor], timesteps: Sequence[int]) -> None:
    """Raises for outputs of a UNet that are not finite, which clipping would hide.

    Args:
        broken (`list` of `torch.Tensor` of shape `(batch,)`): Flags of images whose output is not finite, by timestep.
        timesteps (`Sequence[int]`): The timesteps.

    Raises:
        `RuntimeError`: Naming the first timestep and image.
    """
    for flags, timestep in zip(torch.stack(broken).tolist(), timesteps, strict=False):
        if any(flags):
            raise RuntimeError(
                f"The output of the UNet is not finite at timestep {timestep} for image {flags.index(True)} of the "
                f"batch: its weights hold infinite values or NaN, or it overflowed. Load it in float32 or bfloat16; if "
                f"that does not help, its training diverged or its file is damaged."
            )


PER_TIMESTEP = ("vb", "mse", "xstart_mse")


@dataclass
class Likelihood:
    """The likelihood of a set of images, in bits per dimension.

    Attributes:
        num_images (`int`): Images measured.
        total_bpd (`float`), standard_error (`float`): The mean over images, and its standard error.
        kind (`str`): `"bound"` for an upper bound, or `"exact"`.
        prior_bpd (`float`): The prior term of a diffusion model.
        timesteps (`list[int]`): The timesteps, last first; empty for other families.
        vb, mse, xstart_mse (`list[float]`): Means over images of the terms of [`BitsPerDim`], at each timestep.
    """

    num_images: int
    total_bpd: float
    standard_error: float
    kind: str = "bound"
    prior_bpd: float = 0.0
    timesteps: list[int] = field(default_factory=list)
    vb: list[float] = field(default_factory=list)
    mse: list[float] = field(default_factory=list)
    xstart_mse: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        text = (
            f"Likelihood: {'at most ' if self.kind == 'bound' else ''}{self.total_bpd:.4f} bits per dimension "
            f"(standard error {self.standard_error:.4f}) over {self.num_images:,} images"
        )
        if not self.timesteps:
            return f"{text}."
        halves = {0: "first", 1: "second", 2: "third", 3: "last"}
        shares = [sum(part) for part in np.array_split(np.array(self.vb[::-1]), 4)]
        listed = ", ".join(f"{halves[i]} {share:.3f}" for i, share in enumerate(shares))
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
        seed (`int`, defaults to 0): Seed of the noise, which is drawn for each batch and does not depend on the number
            of processes.

    Returns:
        [`Likelihood`]: In the main process; `None` in the others.
    """
    state = PartialState()
    batches = [part.tolist() for part in torch.arange(len(images)).split(batch_size)]
    mine = range(state.process_index, len(batches), state.num_processes)
    measured: list[list[torch.Tensor]] = []
    loader = images.batches([batches[i] for i in mine])
    progress = tqdm(loader, desc="bits per dimension", unit="batch", disable=not state.is_main_process, leave=False)
    for i, batch in zip(mine, progress, strict=True):
        labels = None if class_labels is None else torch.from_numpy(class_labels[batches[i]]).to(pipeline.device)
        pixels = batch.to(pipeline.device) / 127.5 - 1
        with torch.random.fork_rng(), compiled_if(len(batch) == batch_size):
            torch.manual_seed(seed + i)
            if hasattr(pipeline, "bits_per_dim"):
                bits = pipeline.bits_per_dim(pixels, labels).cpu().double()
                if not bits.isfinite().all():
                    raise ValueError(
                        f"The likelihood of {images.name} is not finite: the model's training diverged, or its file is "
                        f"damaged."
                    )
                measured.append([bits])
                continue
            bits = bits_per_dim(pipeline.unet, pipeline.scheduler, pixels, labels, respacing)
        measured.append([getattr(bits, part).cpu().double() for part in ("total_bpd", "prior_bpd", *PER_TIMESTEP)])
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
        num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
        kept = space_timesteps(num_train_timesteps, respacing) if respacing else range(num_train_timesteps)
        result.timesteps, result.prior_bpd = list(kept)[::-1], terms[0].mean().item()
        result.vb, result.mse, result.xstart_mse = (term.mean(dim=0).tolist() for term in terms[1:])
    return result


def likelihood_labels(pipeline: Any, images: ImageSet) -> np.ndarray | None:
    """The labels that condition the model on real images: matched by name, the null label without labels, or `None`.

    Raises:
        `ValueError`: If the model needs labels and the images have none or unknown ones, or if it has no likelihood.
    """
    if reason := getattr(pipeline, "no_likelihood", None):
        raise ValueError(f"{type(pipeline).__name__} has no likelihood: {reason}.")
    if not hasattr(pipeline, "bits_per_dim") and not isinstance(pipeline.scheduler, ADMScheduler):
        raise ValueError(f"{type(pipeline.scheduler).__name__} has no likelihood; give the pipeline an ADMScheduler.")
    config = pipeline.main_config
    if images.channels != pipeline.image_channels:
        raise ValueError(
            f"{images.name} has images of {images.channels} channels and the model of {pipeline.image_channels}; give "
            f"images of {pipeline.image_channels}."
        )
    if config.num_class_embeds is None:
        return None
    if images.labels is None:
        if not config.get("null_class_label", False):
            raise ValueError(f"This model is class-conditional without a null label, and {images.name} has no labels.")
        return np.full(len(images), config.num_class_embeds)
    names = pipeline.id2label or {label: f"LABEL_{label}" for label in range(config.num_class_embeds)}
    matched = match_classes(images.id2label or names, names, set(np.unique(images.labels).tolist()), "of the pipeline")
    return np.array([matched[label] for label in images.labels.tolist()])
