"""One walk's guidance: the UNet, what its prediction is compared with, and the gradients, at each timestep."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..schedulers.predictions import alpha_bar_at, original_of
from ..schedulers.scheduling_adm import model_timesteps
from .base import (
    GradientGuidance,
    Guidance,
    NotFiniteError,
    Objective,
    Pipeline,
    PredictionGuidance,
    broken_images,
    frozen,
)

_UNET = "unet"
# Outputs and gradients between two looks at whether they were finite, where each look would wait for an accelerator
_LOOK_EVERY = 32


@dataclass
class SamplingCost:
    """What a call of a pipeline cost.

    Attributes:
        calls (`dict[str, int]`): Forward passes by component: `"unet"`, `"classifier"`, `"guide_unet"` …; a doubled
            batch is one.
        seconds (`dict[str, float]`): Time of them by component, with their backward passes.
        skipped_gradients (`int`): Gradients of single images that were not finite and left out.
    """

    calls: dict[str, int] = field(default_factory=lambda: {"unet": 0, "classifier": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"unet": 0.0, "classifier": 0.0})
    skipped_gradients: int = 0


class Steering:
    r"""Gives the UNet's guided prediction and the sum of the gradients at one timestep after another of a walk.

    Args:
        pipeline ([`ClassifierGuidedPipeline`]): Whose components predict and steer.
        kinds (`Sequence[Guidance]`): Which have been checked.
        labels (`torch.Tensor` of shape `(batch,)`, *optional*): What the gradients climb towards.
        conditions (`dict[str, torch.Tensor]`): What the UNets are told beside sample and timestep.
        gradient_batch_size (`int`, *optional*): Images for which a gradient is computed at once; all, by default.
        nonfinite_gradient (`str`): `"raise"` or `"skip"`.
        timed (`bool`): Measure seconds, for which a GPU has to be waited for.
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
        self.nonfinite_gradient = nonfinite_gradient
        self.timed = timed
        self.cost = SamplingCost()
        self.unseen: list[tuple[torch.Tensor, str, float, int]] = []  # which images were broken by what, and where
        # In one order, whatever the list's: floating-point sums depend on it.
        kinds = sorted(kinds, key=lambda kind: (type(kind).__name__, repr(kind)))
        self.comparisons = [kind for kind in kinds if isinstance(kind, PredictionGuidance)]
        self.gradients = [
            _Gradient(kind, kind.objective(pipeline, labels)) for kind in kinds if isinstance(kind, GradientGuidance)
        ]

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, value: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The UNet's output, its prediction guided, and the scaled gradient, if there is one.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t, as the UNet takes it.
            timestep (`torch.Tensor` of shape `()`): Of the training schedule; `value`: the same on the host.
            step (`int`): Its place in the walk.
        """
        told = model_timesteps(self.pipeline.scheduler, timestep)
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
                output = self.predict(noisy, told, value, rows, comparisons)
                denoised = any(gradient.kind.denoised for gradient in due)
                original = self.predicted_original(output, noisy, value) if denoised else noisy
            for place, (kind, objective) in enumerate((gradient.kind, gradient.objective) for gradient in due):
                term = self.climb(objective, original if kind.denoised else noisy, value, rows)
                if kind.through_unet:
                    broken = broken_images(term)
                    with self.measured("unet", calls=0):
                        (term,) = torch.autograd.grad(original, noisy, term, retain_graph=True)
                    term[broken] = torch.nan  # which clipping may have hidden
                found[place].append(term)
            outputs.append(output.detach())
            del output, original  # and the graph of this part, before the next makes its own

        output = torch.cat(outputs)
        self.watch(broken_images(output), _UNET, value, step)
        total = None
        for gradient, terms in zip(due, found, strict=True):
            gradient.last = torch.cat(terms)
        for gradient in acting:
            if gradient.last is not None and (gradient in due or gradient.kind.reuse):
                term = gradient.last * gradient.kind.scale_at(value)
                term = self.finite(term, type(gradient.kind).__name__, value, step)
                total = term if total is None else total + term
        return output, total

    def predict(
        self,
        sample: torch.Tensor,
        told: torch.Tensor,
        timestep: float,
        rows: torch.Tensor,
        comparisons: list[PredictionGuidance],
    ) -> torch.Tensor:
        """The UNet's output, its prediction moved away from those that it is compared with."""
        unet, guide_unet = self.pipeline.unet, self.pipeline.guide_unet
        components = {kind.component for kind in comparisons}
        conditions = {name: condition[rows] for name, condition in self.conditions.items()}
        others = {}
        if "guide_unet" in components:
            known = dict(conditions)
            if guide_unet.config.num_class_embeds is None:
                known.pop("class_labels", None)
            with self.measured("guide_unet"):
                others["guide_unet"] = guide_unet(sample.to(guide_unet.dtype), told, **known).sample.float()
        unet_input = sample
        if "unet" in components:  # with the class and without, in one doubled batch
            null_label = torch.full_like(rows, unet.config.num_class_embeds)
            told_none = {**conditions, "class_labels": null_label}
            conditions = {name: torch.cat([known, told_none[name]]) for name, known in conditions.items()}
            unet_input = torch.cat([sample, sample])
        with self.measured("unet"):
            output = unet(unet_input.to(unet.dtype), told, **conditions).sample.float()
        if "unet" in components:
            output, others["unet"] = output.chunk(2)

        prediction, variance = output.tensor_split([sample.shape[1]], dim=1)
        guided = prediction
        for kind in comparisons:
            other = others[kind.component][:, : sample.shape[1]]
            guided = guided + kind.difference(prediction, other, timestep)
        return torch.cat([guided, variance], dim=1) if comparisons else output

    def predicted_original(self, output: torch.Tensor, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        """The clean image that the UNet predicts, clipped if the scheduler clips."""
        config = self.pipeline.scheduler.config
        alpha_bar = alpha_bar_at(self.pipeline.scheduler, timestep)
        original = original_of(output[:, : sample.shape[1]], sample, alpha_bar, config.prediction_type)
        return original.clamp(-1, 1) if config.get("clip_sample", False) else original

    def climb(self, objective: Objective, images: torch.Tensor, timestep: float, rows: torch.Tensor) -> torch.Tensor:
        """The gradient of a log-probability at images, float32 whatever its model's dtype."""
        gradients = []
        for part in self.parts(images):
            with torch.enable_grad(), frozen(objective.model), self.measured(objective.component):
                leaf = images[part].detach().requires_grad_()
                climbed = objective.log_probability(leaf, timestep, rows[part]).sum()
                if not climbed.requires_grad:
                    raise ValueError("The loss of LossGuidance has no gradient: compute it from the images with torch.")
                # Half precision would lose what is small on its way back.
                headroom = 2.0**10 if getattr(objective.model, "dtype", None) == torch.float16 else 1.0
                gradients.append(torch.autograd.grad(climbed * headroom, leaf)[0] / headroom)
        return torch.cat(gradients)

    def finite(self, gradient: torch.Tensor, name: str, timestep: float, step: int) -> torch.Tensor:
        """The gradient, without what is not finite; an accelerator is asked for such only now and then."""
        is_broken = broken_images(gradient)
        self.watch(is_broken, name, timestep, step)
        return gradient.masked_fill(is_broken.view(-1, 1, 1, 1), 0.0)

    def watch(self, is_broken: torch.Tensor, name: str, timestep: float, step: int) -> None:
        """Keeps in mind which images' gradient or output is not finite, until the next look."""
        self.unseen.append((is_broken, name, timestep, step))
        if is_broken.device.type == "cpu" or len(self.unseen) >= _LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Finds out whether an output or a gradient was not finite since the last look. A walk ends with it.

        Raises:
            [`NotFiniteError`]: If so, unless it is a gradient and such are skipped and counted.
        """
        unseen, self.unseen = self.unseen, []
        if not unseen:
            return
        for flags, (_, name, timestep, step) in zip(
            torch.stack([flags for flags, *_ in unseen]).tolist(), unseen, strict=True
        ):
            broken = [image for image, is_broken in enumerate(flags) if is_broken]
            images = f"image{'s' * (len(broken) > 1)} {', '.join(map(str, broken[:5]))}{' …' * (len(broken) > 5)}"
            where = f"at step {step} (timestep {timestep:g}) for {images} of the batch"
            if broken and name == _UNET:  # which clipping would hide as a clean image
                guides = any(kind.component == "guide_unet" for kind in self.comparisons)
                raise NotFiniteError(
                    f"The output of the UNet{' or of guide_unet' * guides} is not finite {where}: its weights hold "
                    f"infinite values or NaN, or it overflowed. Load it in float32 or bfloat16; if that does not help, "
                    f"its training diverged or its file is damaged."
                )
            if broken and self.nonfinite_gradient == "raise":
                raise NotFiniteError(
                    f"The gradient of {name} is not finite {where}. Take a smaller scale, load the model that guides "
                    f"in float32 or bfloat16, or leave such gradients out: nonfinite_gradient='skip'."
                )
            self.cost.skipped_gradients += len(broken)

    def parts(self, images: torch.Tensor, all_at_once: bool = False) -> list[torch.Tensor]:
        """The rows of a batch, no more at once than gradients may be computed for."""
        rows = torch.arange(len(images), device=images.device)
        return [rows] if all_at_once or self.gradient_batch_size is None else list(rows.split(self.gradient_batch_size))

    @contextmanager
    def measured(self, component: str, calls: int = 1) -> Iterator[None]:
        """Counts calls of a component, and measures their time if asked."""
        self.cost.calls[component] = self.cost.calls.get(component, 0) + calls
        started = self.now()
        yield
        self.cost.seconds[component] = self.cost.seconds.get(component, 0.0) + self.now() - started

    def now(self) -> float:
        """Seconds, when the device has done what it was told; 0 if nobody asks."""
        if not self.timed:
            return 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(eq=False)
class _Gradient:
    """A gradient kind in one walk: what it climbs, and the gradient that it found last."""

    kind: GradientGuidance
    objective: Objective
    steps: int = 0
    last: torch.Tensor | None = None

    def takes_turn(self) -> bool:
        """Counts the steps where it acts, and says whether the gradient is computed at this one."""
        self.steps += 1
        return (self.steps - 1) % self.kind.every == 0
