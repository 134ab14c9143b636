"""What the demo samples: checked requests, their images while they are denoised, and values of a trade-off."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from ..evaluation.evaluate import check_independent, expected_labels
from ..evaluation.features.extractors import FeatureExtractor
from ..evaluation.features.image_sets import SampledImages
from ..evaluation.sweep import guidance_at
from ..families import family_of
from ..generation.grids import shortened
from ..generation.sampling import to_8_bit
from ..guidance import ClassifierGuidance, Guidance, guidance_from_dict
from ..labels import composed, unique_names
from ..pipelines.class_conditional import ClassConditionalPipeline
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..schedulers.diffusers_compat import check_solver
from ..schedulers.gaussian_diffusion import original_of
from ..schedulers.scheduling_adm import FEW_STEPS, ADMScheduler

MAX_IMAGES, MAX_PIXELS = 16, 2**20  # images at once, and their pixels in total
MAX_VALUES = 6  # values of a trade-off to compare
MAX_SCALE, MAX_TRUNCATION = 30, 4
MAX_SEED = 2**31 - 1
MIN_STEPS = 2
_PREVIEWS = 12  # shown of a denoising loop of any speed; slow ones show more
_SECONDS_SHOWN, _SECONDS_BETWEEN = 0.06, 0.3  # time of a preview on screen at least; time between further ones


@dataclass(frozen=True)
class Solver:
    """A solver of the reverse process."""

    name: str  # on the page
    kind: Any  # the scheduler's class
    options: Mapping[str, Any] = field(default_factory=dict)  # of its config
    max_steps: int = 100  # the most that are useful
    even_stride: bool = False  # whether its timesteps have a constant integer stride from 0, as published for DDIM

    def make(self, scheduler: Any) -> Any:
        """Its scheduler, with the noise schedule of another one."""
        return self.kind.from_config(scheduler.config, **self.options)

    def spacing(self, steps: int, num_train_timesteps: int) -> dict[str, Any]:
        """The pipeline's argument for a number of steps."""
        if not self.even_stride:
            return {"num_inference_steps": steps}
        return {"timesteps": list(range(0, num_train_timesteps, num_train_timesteps // steps))[:steps][::-1]}


_OURS = (
    Solver("SDE-DPM-Solver++(2M)", ADMScheduler, {"algorithm_type": "ddpm", "solver_order": 2}),
    Solver("DPM-Solver++(2M)", ADMScheduler, {"algorithm_type": "ddim", "solver_order": 2}),
    Solver("DDPM, as published", ADMScheduler, {"algorithm_type": "ddpm", "solver_order": 1}, 250),
    Solver("DDIM, as published", ADMScheduler, {"algorithm_type": "ddim", "solver_order": 1}, 250, even_stride=True),
)
_THEIRS = (
    Solver("Euler ancestral", diffusers.EulerAncestralDiscreteScheduler),
    Solver("Euler", diffusers.EulerDiscreteScheduler),
    Solver("UniPC", diffusers.UniPCMultistepScheduler),
)


def solvers_of(scheduler: Any) -> dict[str, Solver]:
    """The solvers that work with a pipeline's scheduler by name, its own first."""
    if isinstance(scheduler, ADMScheduler):
        solvers = sorted(_OURS, key=lambda solver: not solver.options.items() <= scheduler.config.items())
    else:
        solvers = [Solver(type(scheduler).__name__, type(scheduler))]
    for solver in _THEIRS:
        with suppress(ValueError):
            check_solver(solver.make(scheduler), shifted=True)
            solvers.append(solver)
    return {solver.name: solver for solver in solvers}


@dataclass(frozen=True)
class TradeOff:
    """A parameter that trades variety for fidelity."""

    name: str  # its first word is its topic, the last one names its values
    neutral: float  # has no effect
    neutral_is: str  # in words
    low: float
    high: float
    start: float
    usual: str  # values of a comparison
    arguments: Callable[[float], dict[str, Any]]  # of the pipeline's call, for a value
    effect: str = "Lower values give images that are more typical of their class and less varied."

    @property
    def noun(self) -> str:
        return self.name.split()[-1]

    def values_of(self, text: Any) -> list[float]:
        """The values in a text such as `"0, 1, 3"`, in their order; a `ValueError` if they are invalid or too many."""
        parts: list[Any] = text.split(",") if isinstance(text, str) else []
        if not 1 <= len(parts) <= MAX_VALUES:
            raise ValueError(f"Give 1 to {MAX_VALUES} {self.noun}s separated by commas, such as {self.usual}.")
        for i, part in enumerate(parts):
            with suppress(ValueError):
                parts[i] = float(part)
        return [number(f"A {self.noun}", part, self.low, self.high) for part in parts]


def guidance_trade_off(pipe: ClassConditionalPipeline, guidance: Guidance) -> TradeOff:
    """The guidance scale of a pipeline as its trade-off."""
    scale = getattr(guidance, "scale", 1.0)
    return TradeOff(
        name="guidance scale",
        neutral=guidance.neutral_scale,
        neutral_is="no guidance",
        low=0,
        high=MAX_SCALE,
        start=scale if isinstance(scale, int | float) else 1.0,
        usual="0, 1, 3, 10" if guidance.neutral_scale == 0 else "1, 1.5, 3, 7",
        effect="A larger scale gives images that are more typical of their class and less varied.",
        arguments=lambda value: guidance_at(pipe, value),
    )


# Trade-offs of pipelines that map latents to images in one step, by the argument of the pipeline's call.
LATENTS_TRADE_OFFS = {
    "temperature": TradeOff(
        "temperature", 1, "as trained", low=0, high=2, start=1, usual="1, 0.7, 0.4, 0",
        arguments=lambda value: {"temperature": value},
    ),
    "truncation": TradeOff(
        "truncation", MAX_TRUNCATION, "off", low=0.1, high=MAX_TRUNCATION, start=MAX_TRUNCATION, usual="4, 2, 1, 0.3",
        arguments=lambda value: {"truncation": None if value == MAX_TRUNCATION else value},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SampleRequest:
    """A validated request for samples; without a solver they are sampled in one step."""

    label: int | None
    name: str
    num_images: int
    seed: int
    solver: Solver | None = None
    steps: int = 1
    condition_unet: bool = True


@dataclass(frozen=True)
class Preview:
    """Images `(n, channels, height, width)`, uint8, after a denoising step."""

    step: int
    images: torch.Tensor
    is_last: bool = False


class StoppedError(Exception):
    """The samples are no longer wanted."""


class Session:
    """A pipeline that visitors of the demo sample from, one request at a time, and an evaluation classifier.

    The arguments and errors are those of [`build_demo`]. `solvers` by name is empty for pipelines that sample in one
    step; `trade_off` is the parameter that trades variety for fidelity, if there is one.
    """

    def __init__(self, pipe: ClassConditionalPipeline, judge: FeatureExtractor | None = None):
        if pipe.main_config.get("low_res_channels") is not None:
            raise ValueError("This pipeline upsamples images, which the demo does not support; use hf-guided upscale.")
        if pipe.image_channels not in (1, 3):
            raise ValueError(f"Images of {pipe.image_channels} channels cannot be shown; the demo supports 1 or 3.")
        self.pipe: Any = pipe
        self.judge: Any = judge
        is_diffusion = isinstance(pipe, ClassifierGuidedPipeline)
        self.solvers = solvers_of(self.pipe.scheduler) if is_diffusion else {}
        height, width = pipe.sample_size
        self.max_images = max(1, min(MAX_IMAGES, MAX_PIXELS // (height * width)))
        names = [composed(pipe.id2label.get(label, str(label))) for label in range(pipe.num_classes or 0)]
        self.label_of = {name: label for label, name in enumerate(unique_names(names))}
        self.guidance = self._adjustable_guidance() if is_diffusion else None
        self.can_drop_label = self.guidance is not None and self._works(self.guidance, condition_unet=False)
        if self.guidance is None:
            self.trade_off = LATENTS_TRADE_OFFS.get(family_of(type(pipe).__name__).trade_off)
        else:
            self.trade_off = guidance_trade_off(pipe, self.guidance)
        self.judged: Any = None if judge is None else self._judged_classes(judge)
        self._computing = threading.Lock()

    def _adjustable_guidance(self) -> Any:
        """The one saved kind of guidance, or the classifier's; `None` without or with several."""
        saved = self.pipe.default("guidance", None)
        if saved is not None:
            kinds: list[Any] = [guidance_from_dict(kind) for kind in saved]
        else:
            scale = self.pipe.default("guidance_scale", 1.0)
            kinds = [] if self.pipe.classifier is None else [ClassifierGuidance(scale)]
        return kinds[0] if len(kinds) == 1 and self._works(kinds[0], condition_unet=True) else None

    def _works(self, guidance: Any, condition_unet: bool) -> bool:
        labels = self.pipe.resolve_labels([0]) if self.label_of else None
        try:
            self.pipe.check_inputs(labels, condition_unet, "latent", None, [])
            self.pipe.check_guidance([guidance], labels, condition_unet)
        except ValueError:
            return False
        return condition_unet or self.pipe.unet.config.num_class_embeds is not None

    def _judged_classes(self, judge: FeatureExtractor) -> Any:
        """The evaluation classifier's id of each class."""
        check_independent(self.pipe, judge)
        if not self.label_of:
            raise ValueError(
                f"This pipeline has no classes, so that {judge.name} cannot evaluate it; leave out --judge."
            )
        notes: list[str] = []
        judged = expected_labels(SampledImages(self.pipe, torch.arange(len(self.label_of))), judge, notes)
        if judged is None:
            reason = [*notes, "it has no classes with names"][0]
            raise ValueError(f"{judge.name} cannot evaluate this pipeline's samples: {reason}")
        return judged

    def default_steps(self, solver: Solver) -> int:
        """The saved number of steps of the pipeline's own solver."""
        usual = FEW_STEPS if solver.max_steps <= 100 else 100
        return min(self.pipe.default("num_inference_steps", usual), self.max_steps(solver))

    def max_steps(self, solver: Solver) -> int:
        return min(solver.max_steps, self.pipe.scheduler.config.num_train_timesteps - 1)

    def check_request(
        self,
        name: Any,
        num_images: Any,
        seed: Any,
        solver_name: Any = None,
        steps: Any = None,
        condition_unet: Any = None,
    ) -> SampleRequest:
        """A validated request from untrusted input; the last three arguments are only used by diffusion models.

        A `ValueError` names the values that are supported.
        """
        name = composed(name) if isinstance(name, str) else name
        if self.label_of and not (isinstance(name, str) and name in self.label_of):
            raise ValueError(f"There is no class {_brief(name)}; choose one from the list.")
        label, name = (self.label_of[name], name) if self.label_of else (None, "image")
        num_images = number("The number of images", num_images, 1, self.max_images, whole=True)
        seed = number("The seed", seed, 0, MAX_SEED, whole=True)
        if not self.solvers:
            return SampleRequest(label, name, num_images, seed)
        solver = self.solver_of(solver_name)
        if not isinstance(condition_unet, bool):
            raise ValueError(f"Whether the UNet is class-conditional is true or false, not {_brief(condition_unet)}.")
        steps = number("The number of steps", steps, MIN_STEPS, self.max_steps(solver), whole=True)
        condition_unet = condition_unet or not self.can_drop_label
        return SampleRequest(label, name, num_images, seed, solver, steps, condition_unet)

    def solver_of(self, name: Any) -> Solver:
        """The solver with a name; a `ValueError` lists all of them."""
        if not isinstance(name, str) or name not in self.solvers:
            raise ValueError(f"There is no solver {_brief(name)}; choose one of {', '.join(self.solvers)}.")
        return self.solvers[name]

    def sample(
        self, request: SampleRequest, value: float | None, is_wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[Preview]:
        """Previews of the clean images that a UNet predicts; the last one holds the samples.

        Sampling stops at the next step if the iterator is closed; with a [`StoppedError`] if it is no longer wanted.
        """
        previews: queue.SimpleQueue[Preview | Exception] = queue.SimpleQueue()
        stopped = threading.Event()

        def check() -> None:
            if stopped.is_set() or not is_wanted():
                raise StoppedError

        def compute() -> None:
            try:
                with self._computing:  # a step of a stopped request may still be running
                    check()
                    pipe, options = self.pipe, dict[str, Any]()
                    if request.solver is not None:
                        pipe, options = self._denoising(request, request.solver, previews.put, check)
                    if self.trade_off is not None and value is not None:
                        options |= self.trade_off.arguments(value)
                    options["generator"] = torch.Generator().manual_seed(request.seed)
                    samples = pipe(request.label, request.num_images, **options, output_type="latent").images
                    previews.put(Preview(request.steps, to_8_bit(samples).cpu(), is_last=True))
            except Exception as error:
                previews.put(error)

        threading.Thread(target=compute, daemon=True).start()
        try:
            while True:
                preview = previews.get()
                if isinstance(preview, Exception):
                    raise preview
                yield preview
                if preview.is_last:
                    return
                time.sleep(_SECONDS_SHOWN)
        finally:
            stopped.set()

    def _denoising(
        self, request: SampleRequest, solver: Solver, show: Callable[[Preview], None], check: Callable[[], None]
    ) -> tuple[Any, dict[str, Any]]:
        """The pipeline with a solver, and the arguments of its call that show previews and stop it."""
        scheduler, config = solver.make(self.pipe.scheduler), self.pipe.config
        components = {**self.pipe.components, "scheduler": scheduler}
        defaults = config.sampling_defaults
        pipe = ClassifierGuidedPipeline(**components, id2label=config.id2label, sampling_defaults=defaults)
        pipe.set_progress_bar_config(disable=True)
        before: torch.Tensor | None = None
        shown = time.monotonic()

        def on_step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal before, shown
            check()
            is_due = step % -(-request.steps // _PREVIEWS) == 0 or time.monotonic() - shown > _SECONDS_BETWEEN
            if is_due and step + 1 < request.steps:
                shown = time.monotonic()
                images = tensors["latents"] / scheduler.init_noise_sigma
                if before is not None:
                    prediction = tensors["model_output"][:, : pipe.image_channels]
                    images = expected_images(scheduler, prediction, before, timestep)
                show(Preview(step + 1, to_8_bit(images).cpu()))
            before = tensors["latents"]
            return {}

        return pipe, {
            **solver.spacing(request.steps, scheduler.config.num_train_timesteps),
            "condition_unet": request.condition_unet,
            "callback_on_step_end": on_step_end,
            "callback_on_step_end_tensor_inputs": ["latents", "model_output"],
        }

    def mistakes(self, request: SampleRequest, images: torch.Tensor) -> list[str | None] | None:
        """For each image `None` if the evaluation classifier sees the requested class, else the class that it sees."""
        if self.judge is None:
            return None
        names, wanted = self.judge.id2label, self.judged[request.label]
        seen = self.judge(images).probabilities.argmax(axis=1).tolist()
        return [None if label == wanted else names[label] for label in seen]


def expected_images(scheduler: Any, prediction: torch.Tensor, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    """The clean images that the UNet predicts from noisy ones, with enough precision for a preview."""
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].item()
    if scheduler.init_noise_sigma != 1:  # such schedulers use image + sigma * noise
        sample = sample * alpha_bar**0.5
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    return original_of(prediction, sample, alpha_bar, prediction_type).clamp(-1, 1)


def number(what: str, value: Any, low: float, high: float, whole: bool = False) -> Any:
    """A validated number, an `int` if it is a whole one; a `ValueError` names the bounds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{what} must be a {kind} from {low:,} to {high:,}, not {_brief(value)}.")
    return int(value) if whole else value


def _brief(value: Any) -> str:
    """A value of any type as short text for an error."""
    return shortened(str(value).strip() if isinstance(value, str | int | float | None) else type(value).__name__, 40)
