"""The gradient of log p that guides one denoising loop: the sum of those of all kinds of guidance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..schedulers.diffusers_compat import alpha_bar_at
from ..schedulers.gaussian_diffusion import original_of
from ..settings import whole_number
from .base import GradientGuidance, Guidance, Objective, Pipeline, PredictionGuidance, frozen
from .monitor import Monitor, broken_images


@dataclass(eq=False)
class _Gradient:
    """One kind of gradient guidance in a denoising loop: its objective and its last gradient."""

    kind: GradientGuidance
    objective: Objective
    steps: int = 0  # at which it has acted
    parts: list[torch.Tensor] = field(default_factory=list)  # the gradient, of each part of the batch


class Guider:
    r"""Composes the kinds of guidance of one denoising loop.

    At each timestep: `begin_step`; for each part of the batch that it returns the UNet's call under `differentiable`,
    and `add_gradient`; then `gradient`.

    Args:
        pipeline ([`ClassifierGuidedPipeline`]): Its components guide.
        kinds (`Sequence[Guidance]`): Kinds of guidance, already checked.
        labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes to guide to.
        gradient_batch_size (`int`, *optional*): Images for which a gradient is computed at once; all, by default.
        nonfinite_gradient (`str`): `"raise"` or `"skip"`.
        timed (`bool`): Measure seconds, which synchronises with the GPU.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        kinds: Sequence[Guidance],
        labels: torch.Tensor | None,
        gradient_batch_size: int | None,
        nonfinite_gradient: str,
        timed: bool,
    ):
        if gradient_batch_size is not None and whole_number("gradient_batch_size", gradient_batch_size) < 1:
            raise ValueError(f"gradient_batch_size={gradient_batch_size} is too small; give 1 or more.")
        if nonfinite_gradient not in ("raise", "skip"):
            raise ValueError(f"nonfinite_gradient={nonfinite_gradient!r} is not one of 'raise', 'skip'.")
        self.pipeline = pipeline
        self.gradient_batch_size = gradient_batch_size
        self.monitor = Monitor(skip_gradients=nonfinite_gradient == "skip", timed=timed)
        # Sorted, since floating-point sums depend on the order.
        kinds = sorted(kinds, key=lambda kind: (type(kind).__name__, repr(kind)))
        self.prediction_kinds = [kind for kind in kinds if isinstance(kind, PredictionGuidance)]
        self.gradients = [
            _Gradient(kind, kind.objective(pipeline, labels)) for kind in kinds if isinstance(kind, GradientGuidance)
        ]

    def begin_step(self, step: int, timestep: float, sample: torch.Tensor) -> list[torch.Tensor]:
        """Indices of the images of each part of the batch for which the UNet is called at a step.

        It is one part, but for gradients through the UNet in smaller ones. `timestep` is of the training schedule, and
        `sample` is x_t.
        """
        self.step, self.timestep = step, timestep
        self.acting_predictions = [kind for kind in self.prediction_kinds if kind.acts_at(timestep)]
        self.acting_gradients = [gradient for gradient in self.gradients if gradient.kind.acts_at(timestep)]
        self.due = [gradient for gradient in self.acting_gradients if gradient.steps % gradient.kind.every == 0]
        for gradient in self.acting_gradients:
            gradient.steps += 1
        for gradient in self.due:
            gradient.parts.clear()
        self.through_unet = any(gradient.kind.through_unet for gradient in self.due)
        return parts_of(sample, self.gradient_batch_size if self.through_unet else None)

    @contextmanager
    def differentiable(self, sample: torch.Tensor) -> Iterator[torch.Tensor]:
        """The sample in float32, for the UNet; calls with it are recorded if a gradient goes through the UNet."""
        unets = (self.pipeline.unet, self.pipeline.guide_unet) if self.through_unet else ()
        with torch.set_grad_enabled(self.through_unet), frozen(*unets):
            yield sample.detach().float().requires_grad_(self.through_unet)

    def add_gradient(self, sample: torch.Tensor, model_output: torch.Tensor, rows: torch.Tensor) -> None:
        """Computes the gradients that are due at this step, of the images of a part of the batch.

        `sample` is x_t as `differentiable` gave it, `model_output` the UNet's for it, `rows` the images' indices.
        """
        if any(gradient.kind.denoised for gradient in self.due):
            with torch.set_grad_enabled(self.through_unet):
                original = self.predicted_original(model_output, sample)
        for gradient in self.due:
            kind = gradient.kind
            term = self.gradient_of(gradient, original if kind.denoised else sample, rows)
            if kind.through_unet:
                broken = broken_images(term)
                with self.monitor.measured("unet", calls=0):
                    (term,) = torch.autograd.grad(original, sample, term, retain_graph=True)
                term[broken] = torch.nan  # clipping may have hidden it
            gradient.parts.append(term)

    def gradient(self) -> torch.Tensor | None:
        """The scaled gradient of log p with respect to x_t, summed over the kinds; `None` if none acts."""
        total = None
        for gradient in self.acting_gradients:
            if gradient.parts and (gradient in self.due or gradient.kind.reuse):
                term = torch.cat(gradient.parts) * gradient.kind.scale_at(self.timestep)
                term = self.monitor.zero_nonfinite(term, type(gradient.kind).__name__, self.timestep, self.step)
                total = term if total is None else total + term
        return total

    def predicted_original(self, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The predicted clean image x_0, clipped if the scheduler clips."""
        config = self.pipeline.scheduler.config
        alpha_bar = alpha_bar_at(self.pipeline.scheduler, self.timestep)
        original = original_of(model_output[:, : sample.shape[1]], sample, alpha_bar, config.prediction_type)
        return original.clamp(-1, 1) if config.get("clip_sample", False) else original

    def gradient_of(self, gradient: _Gradient, images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The gradient of log p with respect to images, in float32 for a model of any dtype."""
        objective = gradient.objective
        gradients = []
        for part in parts_of(images, self.gradient_batch_size):
            with torch.enable_grad(), frozen(objective.model), self.monitor.measured(objective.component):
                leaf = images[part].detach().requires_grad_()
                log_p = objective.log_probability(leaf, self.timestep, rows[part]).sum()
                if not log_p.requires_grad:
                    name = type(gradient.kind).__name__
                    raise ValueError(f"The loss of {name} has no gradient: compute it from the images with torch.")
                # Loss scaling: small gradients would underflow in half precision.
                headroom = 2.0**10 if getattr(objective.model, "dtype", None) == torch.float16 else 1.0
                gradients.append(torch.autograd.grad(log_p * headroom, leaf)[0] / headroom)
        return torch.cat(gradients)


def parts_of(images: torch.Tensor, size: int | None) -> list[torch.Tensor]:
    """Indices of a batch in parts of at most `size` images; all at once, if that is `None`."""
    return list(torch.arange(len(images), device=images.device).split(size or len(images)))
