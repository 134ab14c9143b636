"""The guidance of one denoising loop: guided predictions and gradients of log p at each timestep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..schedulers.diffusers_compat import alpha_bar_at
from ..schedulers.gaussian_diffusion import original_of
from ..schedulers.scheduling_adm import model_timesteps
from .base import GradientGuidance, Guidance, Objective, Pipeline, PredictionGuidance, broken_images, frozen
from .monitor import Monitor


class Guider:
    r"""The UNet's guided output and the summed gradient of log p, called at each timestep of a denoising loop.

    Args:
        pipeline ([`ClassifierGuidedPipeline`]): Its components predict and guide.
        kinds (`Sequence[Guidance]`): Kinds of guidance, already checked.
        labels (`torch.Tensor` of shape `(batch,)`, *optional*): Classes to guide to.
        conditions (`dict[str, torch.Tensor]`): Inputs of the UNets besides sample and timestep.
        gradient_batch_size (`int`, *optional*): Images for which a gradient is computed at once; all, by default.
        nonfinite_gradient (`str`): `"raise"` or `"skip"`.
        timed (`bool`): Measure seconds, which synchronises with the GPU.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        kinds: Sequence[Guidance],
        labels: torch.Tensor | None,
        conditions: dict[str, torch.Tensor],
        gradient_batch_size: int | None = None,
        nonfinite_gradient: str = "raise",
        timed: bool = False,
    ):
        self.pipeline = pipeline
        self.conditions = conditions
        self.gradient_batch_size = gradient_batch_size
        self.monitor = Monitor(skip_gradients=nonfinite_gradient == "skip", timed=timed)
        # Sorted, since floating-point sums depend on the order.
        kinds = sorted(kinds, key=lambda kind: (type(kind).__name__, repr(kind)))
        self.comparisons = [kind for kind in kinds if isinstance(kind, PredictionGuidance)]
        self.gradients = [
            _Gradient(kind, kind.objective(pipeline, labels)) for kind in kinds if isinstance(kind, GradientGuidance)
        ]

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, value: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The UNet's output with its prediction guided, and the scaled gradient of log p, if any.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t, scaled for the UNet.
            timestep (`torch.Tensor` of shape `()`): Of the training schedule; `value`: the same on the host.
            step (`int`): Index of the step.
        """
        model_timestep = model_timesteps(self.pipeline.scheduler, timestep)
        comparisons = [kind for kind in self.comparisons if kind.acts_at(value)]
        acting = [gradient for gradient in self.gradients if gradient.kind.acts_at(value)]
        due = [gradient for gradient in acting if gradient.takes_turn()]
        through_unet = any(gradient.kind.through_unet for gradient in due)

        unets = (self.pipeline.unet, self.pipeline.guide_unet) if through_unet else ()
        outputs = []
        found: list[list[torch.Tensor]] = [[] for _ in due]
        for rows in self.parts(sample, all_at_once=not through_unet):
            with torch.set_grad_enabled(through_unet), frozen(*unets):
                noisy = sample[rows].detach().float().requires_grad_(through_unet)
                output = self.predict(noisy, model_timestep, value, rows, comparisons)
                denoised = any(gradient.kind.denoised for gradient in due)
                original = self.predicted_original(output, noisy, value) if denoised else noisy
            for place, (kind, objective) in enumerate((gradient.kind, gradient.objective) for gradient in due):
                term = self.gradient_of(objective, original if kind.denoised else noisy, value, rows)
                if kind.through_unet:
                    broken = broken_images(term)
                    with self.monitor.measured("unet", calls=0):
                        (term,) = torch.autograd.grad(original, noisy, term, retain_graph=True)
                    term[broken] = torch.nan  # clipping may have hidden it
                found[place].append(term)
            outputs.append(output.detach())
            del output, original  # frees the graph of this part before the next one

        output = torch.cat(outputs)
        self.monitor.watch(broken_images(output), "unet", value, step)
        total = None
        for gradient, terms in zip(due, found, strict=True):
            gradient.last = torch.cat(terms)
        for gradient in acting:
            if gradient.last is not None and (gradient in due or gradient.kind.reuse):
                term = gradient.last * gradient.kind.scale_at(value)
                term = self.monitor.finite(term, type(gradient.kind).__name__, value, step)
                total = term if total is None else total + term
        return output, total

    def predict(
        self,
        sample: torch.Tensor,
        model_timestep: torch.Tensor,
        timestep: float,
        rows: torch.Tensor,
        comparisons: list[PredictionGuidance],
    ) -> torch.Tensor:
        """The UNet's output, its prediction extrapolated from those of weaker models."""
        unet, guide_unet = self.pipeline.unet, self.pipeline.guide_unet
        components = {kind.component for kind in comparisons}
        conditions = {name: condition[rows] for name, condition in self.conditions.items()}
        others = {}
        if "guide_unet" in components:
            known = dict(conditions)
            if guide_unet.config.num_class_embeds is None:
                known.pop("class_labels", None)
            with self.monitor.measured("guide_unet"):
                others["guide_unet"] = guide_unet(sample.to(guide_unet.dtype), model_timestep, **known).sample.float()
        unet_input = sample
        if "unet" in components:  # conditional and unconditional, in one doubled batch
            null_label = torch.full_like(rows, unet.config.num_class_embeds)
            unconditional = {**conditions, "class_labels": null_label}
            conditions = {name: torch.cat([known, unconditional[name]]) for name, known in conditions.items()}
            unet_input = torch.cat([sample, sample])
        with self.monitor.measured("unet"):
            output = unet(unet_input.to(unet.dtype), model_timestep, **conditions).sample.float()
        if "unet" in components:
            output, others["unet"] = output.chunk(2)

        prediction, variance = output.tensor_split([sample.shape[1]], dim=1)
        guided = prediction
        for kind in comparisons:
            other = others[kind.component][:, : sample.shape[1]]
            guided = guided + kind.difference(prediction, other, timestep)
        return torch.cat([guided, variance], dim=1) if comparisons else output

    def predicted_original(self, output: torch.Tensor, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        """The predicted clean image x_0, clipped if the scheduler clips."""
        config = self.pipeline.scheduler.config
        alpha_bar = alpha_bar_at(self.pipeline.scheduler, timestep)
        original = original_of(output[:, : sample.shape[1]], sample, alpha_bar, config.prediction_type)
        return original.clamp(-1, 1) if config.get("clip_sample", False) else original

    def gradient_of(
        self, objective: Objective, images: torch.Tensor, timestep: float, rows: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of log p with respect to images, in float32 for a model of any dtype."""
        gradients = []
        for part in self.parts(images):
            with torch.enable_grad(), frozen(objective.model), self.monitor.measured(objective.component):
                leaf = images[part].detach().requires_grad_()
                log_p = objective.log_probability(leaf, timestep, rows[part]).sum()
                if not log_p.requires_grad:
                    raise ValueError("The loss of LossGuidance has no gradient: compute it from the images with torch.")
                # Loss scaling: small gradients would underflow in half precision.
                headroom = 2.0**10 if getattr(objective.model, "dtype", None) == torch.float16 else 1.0
                gradients.append(torch.autograd.grad(log_p * headroom, leaf)[0] / headroom)
        return torch.cat(gradients)

    def parts(self, images: torch.Tensor, all_at_once: bool = False) -> list[torch.Tensor]:
        """Indices of the batch in parts of at most `gradient_batch_size` images."""
        rows = torch.arange(len(images), device=images.device)
        return [rows] if all_at_once or self.gradient_batch_size is None else list(rows.split(self.gradient_batch_size))


@dataclass(eq=False)
class _Gradient:
    """The state of one kind of gradient guidance in a denoising loop: its objective and its last gradient."""

    kind: GradientGuidance
    objective: Objective
    steps: int = 0
    last: torch.Tensor | None = None

    def takes_turn(self) -> bool:
        """Whether the gradient is computed at this step where it acts; counts these steps."""
        self.steps += 1
        return (self.steps - 1) % self.kind.every == 0
