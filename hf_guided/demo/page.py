"""The demo's page: samples while they are denoised, and the same noise at several values of a trade-off."""

import base64
import html
import io
import math
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image

from ..evaluation.evaluate import check_independent, judged_labels
from ..evaluation.features.extractors import FeatureExtractor
from ..evaluation.features.image_sets import SampledImages
from ..evaluation.sweep import guidance_at
from ..families import family_of
from ..generation.grids import labelled_grid
from ..generation.samples import to_picture
from ..generation.sampling import to_8_bit
from ..guidance import ClassifierGuidance, Guidance, guidance_from_dict
from ..labels import composed, unique_names
from ..pipelines.class_conditional import ClassConditionalPipeline
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..schedulers.diffusers_compat import check_solver
from ..schedulers.gaussian_diffusion import original_of
from ..schedulers.scheduling_adm import FEW_STEPS, ADMScheduler

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The demo needs gradio; install it with: pip install "hf-guided[demo]"') from error
from starlette.middleware import Middleware

from .gate import NOT_WAITED_FOR, QUEUE, Gate, watch

MAX_IMAGES, MAX_PIXELS = 16, 2**20  # images at once, and their pixels in total
MAX_VALUES = 6  # values of a trade-off to compare
MAX_SCALE, MAX_TEMPERATURE, MIN_TRUNCATION, MAX_TRUNCATION = 30, 2, 0.1, 4
MAX_SEED = 2**31 - 1
MAX_WAITING = 64  # requests in the queue
FEWEST_STEPS = 2
_PREVIEWS = 12  # shown of a denoising loop of any speed; slow ones show more
_SECONDS_SHOWN, _SECONDS_BETWEEN = 0.06, 0.3  # time of a preview on screen at least; time between further ones


@dataclass(frozen=True)
class Solver:
    """A solver of the reverse process, with its limits.

    Args:
        name (`str`): Its name on the page.
        make (`Callable`): Gives its scheduler, with the noise schedule of another scheduler.
        max_steps (`int`): The most steps that are useful.
        even_stride (`bool`): Whether its timesteps have a constant integer stride from 0, as published for DDIM.
    """

    name: str
    make: Callable[[Any], Any]
    max_steps: int = 100
    even_stride: bool = False

    def spacing(self, steps: int, num_train_timesteps: int) -> dict[str, Any]:
        """The pipeline's argument for a number of steps."""
        if not self.even_stride:
            return {"num_inference_steps": steps}
        return {"timesteps": list(range(0, num_train_timesteps, num_train_timesteps // steps))[:steps][::-1]}


def _ours(algorithm_type: str, solver_order: int) -> Callable[[Any], Any]:
    options = {"algorithm_type": algorithm_type, "solver_order": solver_order}
    return lambda scheduler: ADMScheduler.from_config(scheduler.config, **options)


def _theirs(kind: str) -> Callable[[Any], Any]:
    return lambda scheduler: getattr(diffusers, kind).from_config(scheduler.config)


OUR_SOLVERS = {
    ("ddpm", 2): Solver("SDE-DPM-Solver++(2M)", _ours("ddpm", 2)),
    ("ddim", 2): Solver("DPM-Solver++(2M)", _ours("ddim", 2)),
    ("ddpm", 1): Solver("DDPM, as published", _ours("ddpm", 1), 250),
    ("ddim", 1): Solver("DDIM, as published", _ours("ddim", 1), 250, even_stride=True),
}
THEIR_SOLVERS = (
    Solver("Euler ancestral", _theirs("EulerAncestralDiscreteScheduler")),
    Solver("Euler", _theirs("EulerDiscreteScheduler")),
    Solver("UniPC", _theirs("UniPCMultistepScheduler")),
)


def solvers_of(pipe: ClassifierGuidedPipeline) -> list[Solver]:
    """The solvers that work with a pipeline, its own first."""
    scheduler = pipe.scheduler
    if isinstance(scheduler, ADMScheduler):
        own = OUR_SOLVERS[scheduler.config.algorithm_type, scheduler.config.solver_order]
        solvers = list(OUR_SOLVERS.values())
    else:
        own = Solver(type(scheduler).__name__, lambda one: type(one).from_config(one.config))
        solvers = []

    def works(solver: Solver) -> bool:
        try:
            check_solver(solver.make(scheduler), shifted=True)
        except ValueError:
            return False
        return True

    return [own, *(solver for solver in solvers if solver != own), *filter(works, THEIR_SOLVERS)]


@dataclass(frozen=True)
class TradeOff:
    """A parameter that trades variety for fidelity.

    Args:
        name (`str`): Its name; the first word is its topic, the last one names its values.
        neutral (`float`), neutral_is (`str`): The value that has no effect, and its description.
        low (`float`), high (`float`): Its bounds.
        start (`float`): Its initial value.
        usual (`str`): Default values of a comparison.
        effect (`str`): Its effect, in a sentence.
        arguments (`Callable`): Gives the arguments of the pipeline's call for a value.
    """

    name: str
    neutral: float
    neutral_is: str
    low: float
    high: float
    start: float
    usual: str
    effect: str
    arguments: Callable[[float], dict[str, Any]]

    @property
    def topic(self) -> str:
        return self.name.split()[0]

    @property
    def noun(self) -> str:
        return self.name.split()[-1]

    def value_of(self, value: Any) -> float:
        """A valid value.

        Raises:
            `ValueError`: If it is out of bounds; the bounds are named.
        """
        return number(f"The {self.name}", value, self.low, self.high)

    def values_of(self, text: Any) -> list[float]:
        """The values in a text such as `"0, 1, 3"`, in their order.

        Raises:
            `ValueError`: If they are invalid or too many.
        """
        parts = text.split(",") if isinstance(text, str) else []
        if not 1 <= len(parts) <= MAX_VALUES:
            raise ValueError(f"Give 1 to {MAX_VALUES} {self.noun}s separated by commas, such as {self.usual}.")
        return [number(f"A {self.noun}", _float(part), self.low, self.high) for part in parts]


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


_LOWER = "Lower values give images that are more typical of their class and less varied."
# Trade-offs of pipelines that map latents to images in one step, by the argument of the pipeline's call.
LATENTS_TRADE_OFFS = {
    "temperature": TradeOff(
        name="temperature",
        neutral=1,
        neutral_is="as trained",
        low=0,
        high=MAX_TEMPERATURE,
        start=1,
        usual="1, 0.7, 0.4, 0",
        effect=_LOWER,
        arguments=lambda value: {"temperature": value},
    ),
    "truncation": TradeOff(
        name="truncation",
        neutral=MAX_TRUNCATION,
        neutral_is="off",
        low=MIN_TRUNCATION,
        high=MAX_TRUNCATION,
        start=MAX_TRUNCATION,
        usual=f"{MAX_TRUNCATION}, 2, 1, 0.3",
        effect=_LOWER,
        arguments=lambda value: {"truncation": None if value == MAX_TRUNCATION else value},
    ),
}


class Session:
    """A pipeline that visitors of the demo sample from, one request at a time, and an evaluation classifier.

    Args:
        pipe ([`ClassifierGuidedPipeline`], [`VAEPipeline`], [`GANPipeline`] or [`FlowPipeline`]): Makes the images.
        judge ([`~hf_guided.evaluation.features.FeatureExtractor`], *optional*): The evaluation
            classifier; not the one that guides.

    Attributes:
        solvers (`dict[str, Solver]`): The solvers by name; empty for pipelines that sample in one
            step.
        trade_off ([`TradeOff`], *optional*): The parameter that trades variety for fidelity.

    Raises:
        `ValueError`: For a pipeline that upsamples or whose images do not have 1 or 3 channels, and for an evaluation
            classifier that guides or lacks classes of the pipeline.
    """

    def __init__(self, pipe: ClassConditionalPipeline, judge: FeatureExtractor | None = None):
        if pipe.main_config.get("low_res_channels") is not None:
            raise ValueError("This pipeline upsamples images, which the demo does not support; use hf-guided upscale.")
        if pipe.image_channels not in (1, 3):
            raise ValueError(f"Images of {pipe.image_channels} channels cannot be shown; the demo supports 1 or 3.")
        self.pipe: Any = pipe
        self.judge = judge
        is_diffusion = isinstance(pipe, ClassifierGuidedPipeline)
        self.solvers = {solver.name: solver for solver in solvers_of(pipe)} if is_diffusion else {}
        height, width = pipe.sample_size
        self.max_images = max(1, min(MAX_IMAGES, MAX_PIXELS // (height * width)))
        self.label_of = _unique_class_names(pipe.id2label, pipe.num_classes or 0)
        self.guidance = self._one_guidance() if is_diffusion else None
        self.trade_off = self._own_trade_off()
        self.can_drop_label = self.guidance is not None and self._works(self.guidance, condition_unet=False)
        self.judged: Any = None if judge is None else self._judged_classes(judge)
        self._computing = threading.Lock()

    def _one_guidance(self) -> Any:
        """The guidance with an adjustable scale: the one saved kind, or the classifier's; `None` without one."""
        saved = self.pipe.default("guidance", None)
        if saved is None:
            scale = self.pipe.default("guidance_scale", 1.0)
            kinds: list[Any] = [] if self.pipe.classifier is None else [ClassifierGuidance(scale)]
        else:
            kinds = [guidance_from_dict(kind) for kind in saved]
        return kinds[0] if len(kinds) == 1 and self._works(kinds[0], condition_unet=True) else None

    def _own_trade_off(self) -> TradeOff | None:
        if self.guidance is not None:
            return guidance_trade_off(self.pipe, self.guidance)
        return LATENTS_TRADE_OFFS.get(family_of(type(self.pipe).__name__).trade_off)

    def _works(self, guidance: Any, condition_unet: bool) -> bool:
        labels = self.pipe.resolve_labels([0]) if self.label_of else None
        try:
            self.pipe.check_inputs(labels, [guidance], condition_unet, "latent", [])
        except ValueError:
            return False
        is_conditional = self.pipe.unet.config.num_class_embeds is not None
        return condition_unet or is_conditional

    def _judged_classes(self, judge: FeatureExtractor) -> Any:
        """The evaluation classifier's id of each class."""
        check_independent(self.pipe, judge)
        if not self.label_of:
            raise ValueError(
                f"This pipeline has no classes, so that {judge.name} cannot evaluate it; leave out --judge."
            )
        notes: list[str] = []
        judged = judged_labels(SampledImages(self.pipe, torch.arange(len(self.label_of))), judge, notes)
        if judged is None:
            reason = notes[0] if notes else "it has no classes with names"
            raise ValueError(f"{judge.name} cannot evaluate this pipeline's samples: {reason}")
        return judged

    def default_steps(self, solver: Solver) -> int:
        """The default number of steps: for the pipeline's own solver the saved one."""
        usual = FEW_STEPS if solver.max_steps <= 100 else 100
        saved = self.pipe.default("num_inference_steps", usual) if solver.name == next(iter(self.solvers)) else usual
        return min(saved, self.max_steps(solver))

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
    ) -> "SampleRequest":
        """A validated request from untrusted input.

        The last three arguments are only used by diffusion models.

        Raises:
            `ValueError`: If a value is not supported; the supported ones are named.
        """
        name = composed(name) if isinstance(name, str) else name
        if self.label_of and not (isinstance(name, str) and name in self.label_of):
            raise ValueError(f"There is no class {_brief(name)}; choose one from the list.")
        wanted: dict[str, Any] = {
            "label": self.label_of[name] if self.label_of else None,
            "name": name if self.label_of else "image",
            "num_images": whole_number("The number of images", num_images, 1, self.max_images),
            "seed": whole_number("The seed", seed, 0, MAX_SEED),
        }
        if not self.solvers:
            return SampleRequest(**wanted)
        solver = self.solver_of(solver_name)
        if not isinstance(condition_unet, bool):
            raise ValueError(f"Whether the UNet is class-conditional is true or false, not {_brief(condition_unet)}.")
        return SampleRequest(
            **wanted,
            solver=solver,
            steps=whole_number("The number of steps", steps, FEWEST_STEPS, self.max_steps(solver)),
            condition_unet=condition_unet or not self.can_drop_label,
        )

    def solver_of(self, name: Any) -> Solver:
        """The solver with a name.

        Raises:
            `ValueError`: If there is none; all names are listed.
        """
        if not isinstance(name, str) or name not in self.solvers:
            raise ValueError(f"There is no solver {_brief(name)}; choose one of {', '.join(self.solvers)}.")
        return self.solvers[name]

    def sample(
        self, request: "SampleRequest", value: float | None, is_wanted: Callable[[], bool] = lambda: True
    ) -> Iterator["Preview"]:
        """Previews of the clean images that a UNet predicts; the last one holds the samples.

        Sampling stops at the next step if the iterator is closed.

        Raises:
            `StoppedError`: If the samples are no longer wanted, at the next step.
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
                    previews.put(self._compute(request, value, previews.put, check))
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

    def _compute(
        self,
        request: "SampleRequest",
        value: float | None,
        show: Callable[["Preview"], None],
        check: Callable[[], None],
    ) -> "Preview":
        pipe, options = self.pipe, dict[str, Any]()
        if request.solver is not None:
            pipe, options = self._denoising(request, request.solver, show, check)
        if self.trade_off is not None and value is not None:
            options |= self.trade_off.arguments(value)
        samples: Any = pipe(
            request.label,
            request.num_images,
            **options,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="latent",
        )
        return Preview(request.steps, request.steps, to_8_bit(samples.images).cpu(), is_last=True)

    def _denoising(
        self, request: "SampleRequest", solver: Solver, show: Callable[["Preview"], None], check: Callable[[], None]
    ) -> tuple[Any, dict[str, Any]]:
        """The pipeline with a solver, and the arguments of its call that show previews and stop it."""
        scheduler = solver.make(self.pipe.scheduler)
        config = self.pipe.config
        pipe = ClassifierGuidedPipeline(
            **{**self.pipe.components, "scheduler": scheduler},
            id2label=config.id2label,
            sampling_defaults=config.sampling_defaults,
        )
        pipe.set_progress_bar_config(disable=True)
        num_steps, channels = request.steps, pipe.image_channels
        before: torch.Tensor | None = None
        shown = time.monotonic()

        def on_step_end(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal before, shown
            check()
            is_due = step % -(-num_steps // _PREVIEWS) == 0 or time.monotonic() - shown > _SECONDS_BETWEEN
            if is_due and step + 1 < num_steps:
                shown = time.monotonic()
                images = tensors["latents"]
                if before is not None:
                    images = expected_images(scheduler, tensors["model_output"][:, :channels], before, timestep)
                elif scheduler.init_noise_sigma != 1:
                    images = images / scheduler.init_noise_sigma
                show(Preview(step + 1, num_steps, to_8_bit(images).cpu()))
            before = tensors["latents"]
            return {}

        return pipe, {
            **solver.spacing(num_steps, scheduler.config.num_train_timesteps),
            "condition_unet": request.condition_unet,
            "callback_on_step_end": on_step_end,
            "callback_on_step_end_tensor_inputs": ["latents", "model_output"],
        }

    def mistakes(self, request: "SampleRequest", images: torch.Tensor) -> list[str | None] | None:
        """For each image `None` if the evaluation classifier predicts the requested class, otherwise the predicted
        class; `None` without a classifier."""
        if self.judge is None:
            return None
        probabilities, names = self.judge(images).probabilities, self.judge.id2label
        assert probabilities is not None
        assert names is not None
        wanted = self.judged[request.label]
        return [None if seen == wanted else names[seen] for seen in probabilities.argmax(axis=1).tolist()]


class StoppedError(Exception):
    """The samples are no longer wanted."""


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
    num_steps: int
    images: torch.Tensor
    is_last: bool = False


def expected_images(scheduler: Any, prediction: torch.Tensor, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    """The clean images that the UNet predicts from noisy ones, with enough precision for a preview."""
    alpha_bar = scheduler.alphas_cumprod[int(timestep)].item()
    if scheduler.init_noise_sigma != 1:  # such schedulers use image + sigma * noise
        sample = sample * alpha_bar**0.5
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    return original_of(prediction, sample, alpha_bar, prediction_type).clamp(-1, 1)


def whole_number(what: str, value: Any, low: int, high: int) -> int:
    """A validated integer.

    Raises:
        `ValueError`: If it is out of bounds; the bounds are named.
    """
    return int(number(what, value, low, high, kind="whole number"))


def number(what: str, value: Any, low: float, high: float, kind: str = "number") -> float:
    """A validated number.

    Raises:
        `ValueError`: If it is out of bounds; the bounds are named.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (kind == "whole number" and value != int(value)):
        raise ValueError(f"{what} must be a {kind} from {low:,} to {high:,}, not {_brief(value)}.")
    return value


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _brief(value: Any) -> str:
    """A value of any type as short text for an error."""
    text = str(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 40 else text[:39] + "…"


def _unique_class_names(id2label: dict[int, str], num_classes: int) -> dict[str, int]:
    """The id of each class by its name; equal names are made unique by their ids."""
    names = unique_names([composed(id2label.get(label, str(label))) for label in range(num_classes)])
    return {name: label for label, name in enumerate(names)}


# HTML


def pictures_html(
    preview: Preview, name: str, *, heading: str = "", columns: int = 0, mistakes: Sequence[str | None] | None = None
) -> str:
    """HTML of images, with small ones enlarged. A click saves the image at its true size.

    Args:
        preview ([`Preview`]): The images; only samples can be saved, not previews.
        name (`str`): Name of the saved files, before a number.
        heading (`str`): HTML above them.
        columns (`int`): Images per row; 0 for as many as fit.
        mistakes (`Sequence[str]`, *optional*): See [`Session.mistakes`].
    """
    height, width = preview.images.shape[-2:]
    side = width * -(-96 // width) if width < 96 else min(width, 256)
    sharp = " sharp" if width < 96 else ""
    figures = []
    for i, picture in enumerate(_pictures(preview.images)):
        image = f'<img src="{_data_url(picture, whole=preview.is_last)}" alt="picture {i + 1}" decoding="sync">'
        caption = ""
        if preview.is_last:
            # the URL is set on click, since it would double the size of the page
            file, click = f"{name}-{i + 1}.png", "this.href = this.firstElementChild.src"
            image = f'<a href="#" download="{html.escape(file)}" title="Save as PNG" onclick="{click}">{image}</a>'
        if mistakes is not None:
            seen = mistakes[i]
            kind, text = ("right", "✓") if seen is None else ("wrong", f"✗ {html.escape(seen)}")
            caption = f'<figcaption class="{kind}">{text}</figcaption>'
        figures.append(f"<figure>{image}{caption}</figure>")
    repeated = f"{columns}, minmax(0, {side}px)" if columns else f"auto-fill, minmax(min({side}px, 22%), {side}px)"
    style = f"grid-template-columns: repeat({repeated}); --shape: {width} / {height}; --side: {side}px"
    return f'{heading}<div class="pictures{sharp}" style="{style}">{"".join(figures)}</div>'


def _pictures(images: torch.Tensor) -> list[Image.Image]:
    return [to_picture(image) for image in images.permute(0, 2, 3, 1).numpy()]


def _data_url(picture: Image.Image, whole: bool = True) -> str:
    """An image as a data URL; large previews are compressed as JPEG."""
    kind, options = ("PNG", {}) if whole or picture.width < 96 else ("JPEG", {"quality": 85})
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def accuracy_html(mistakes: Sequence[str | None] | None) -> str:
    """HTML of the accuracy: in how many samples the evaluation classifier predicts the requested class."""
    if mistakes is None:
        return ""
    right = sum(seen is None for seen in mistakes)
    return (
        f'<span class="accuracy">Classified correctly: {right} of {len(mistakes)} ({right / len(mistakes):.0%})</span>'
    )


def grid_html(rows: Sequence[tuple[str, torch.Tensor]], name: str) -> str:
    """HTML of a link that saves all images as one grid, with a named row for each set."""
    pictures = [picture for _, images in rows for picture in _pictures(images)]
    width = pictures[0].width
    grid = labelled_grid(pictures, [heading for heading, _ in rows], cell_size=None if width < 256 else 256)
    return f'<a download="{html.escape(name)}.png" href="{_data_url(grid)}">Save all as one image</a>'


def file_name(request: SampleRequest) -> str:
    """The name of a request's files, without extension."""
    name = re.sub(r"[^\w-]+", "-", request.name.split(",")[0]).strip("-")
    return f"{name[:40] or 'class'}-seed{request.seed}"


CSS = """
.pictures { display: grid; gap: 6px; align-items: start; }
.pictures * { margin: 0 !important; }
.pictures figure { min-width: 0; }
.pictures img { display: block; width: 100%; max-width: var(--side); border-radius: 4px; }
.pictures img { aspect-ratio: var(--shape); }
.pictures.sharp img { image-rendering: pixelated; }
.pictures figcaption { font-size: 13px; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.right { color: #1a7f37; } .wrong { color: #bc4c00; }
.dark .right { color: #57ab5a; } .dark .wrong { color: #f0883e; }
.row-name { display: flex; flex-wrap: wrap; gap: 2px 12px; margin-bottom: 4px; align-items: baseline; }
.status { min-height: 28px; }
.status a { text-decoration: underline; }
.status a, .accuracy { white-space: nowrap; margin-right: 12px; }
"""
# Options of events that run immediately and only on the page.
_QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
HINT = "Click an image to save it at its true size."


def build_demo(pipe: ClassConditionalPipeline, judge: FeatureExtractor | None = None, title: str = "hf-guided") -> Any:
    """The demo as a Gradio page, which [`launch_demo`] serves.

    Args:
        pipe ([`ClassifierGuidedPipeline`], [`VAEPipeline`], [`GANPipeline`] or [`FlowPipeline`]): Makes the images,
            on its device. It is not changed.
        judge ([`~hf_guided.evaluation.features.FeatureExtractor`], *optional*): The evaluation
            classifier, which gives the accuracy of samples; not the one that guides.
        title (`str`, defaults to `"hf-guided"`): Heading of the page.

    Returns:
        `gradio.Blocks`: The page.

    Raises:
        `ValueError`: For a pipeline that upsamples or whose images do not have 1 or 3 channels, and for an evaluation
            classifier that guides or lacks classes of the pipeline.
    """
    session = Session(pipe, judge)
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\n{_about(session)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                class_name = gr.Dropdown(
                    list(session.label_of), label="Class", visible=bool(session.label_of), elem_id="class"
                )
                most = session.max_images
                num_images = gr.Slider(1, most, min(8, most), step=1, label="Images", elem_id="pictures")
                seed = gr.Number(0, minimum=0, maximum=MAX_SEED, precision=0, label="Seed", elem_id="seed")
                new_seed = gr.Button("Another seed", size="sm", elem_id="new-seed")
                new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=seed, **_QUICK)
                settings = [class_name, num_images, seed]
                if session.solvers:
                    settings += _solver_fields(session)
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Sample"):
                    _sample_tab(session, settings)
                if session.trade_off is not None:
                    with gr.Tab(f"Effect of {session.trade_off.topic}"):
                        _compare_tab(session, session.trade_off, settings)
    return blocks.queue(api_open=False, max_size=MAX_WAITING, default_concurrency_limit=1)


def _solver_fields(session: Session) -> list[Any]:
    first = next(iter(session.solvers.values()))
    solver = gr.Dropdown(list(session.solvers), value=first.name, label="Solver", elem_id="solver")
    most = session.max_steps(first)
    steps = gr.Slider(
        FEWEST_STEPS,
        most,
        session.default_steps(first),
        step=1,
        label=f"Steps, {FEWEST_STEPS} to {most}",
        elem_id="steps",
    )

    def change_solver(name: Any, steps: Any) -> Any:
        with _errors_shown():
            most = session.max_steps(session.solver_of(name))
            fitting = min(number("The number of steps", steps, FEWEST_STEPS, math.inf), most)
        return gr.Slider(maximum=most, value=fitting, label=f"Steps, {FEWEST_STEPS} to {most}")

    solver.input(change_solver, [solver, steps], steps, preprocess=False, **_QUICK)
    return [solver, steps]


def _sample_tab(session: Session, settings: list[Any]) -> None:
    """The tab that shows samples at one value of the trade-off while they are denoised."""
    trade_off = session.trade_off
    trade_off_field = None
    if trade_off is not None:
        trade_off_field = gr.Slider(
            trade_off.low,
            trade_off.high,
            trade_off.start,
            step=0.1,
            label=trade_off.name.capitalize(),
            info=f"{trade_off.neutral:g} is {trade_off.neutral_is}",
            elem_id="scale",
        )
    requested = [*settings, *_condition_box(session, True, "sample-conditional")]
    generate, cancel = _buttons("Generate", "sample")
    status = gr.HTML(elem_classes="status", elem_id="sample-status")
    pictures = gr.HTML(elem_id="sample-pictures")

    def sample(values: dict[Any, Any], gradio_request: gr.Request) -> Iterator[tuple[str, str]]:
        with _errors_shown():
            request = session.check_request(*(values[field] for field in requested))
            value = None if trade_off is None else trade_off.value_of(values[trade_off_field])
            started, file = time.monotonic(), file_name(request)
            for preview in session.sample(request, value, watch(gradio_request)):
                if not preview.is_last:
                    yield f"Step {preview.step} of {preview.num_steps}", pictures_html(preview, file)
            mistakes = session.mistakes(request, preview.images)
            text = f"{_seconds(started)} {accuracy_html(mistakes)} {grid_html([(request.name, preview.images)], file)}"
            yield text, pictures_html(preview, file, mistakes=mistakes)

    _wire(generate, cancel, sample, {*requested, trade_off_field} - {None}, [status, pictures], "sample")


def _compare_tab(session: Session, trade_off: TradeOff, settings: list[Any]) -> None:
    """The tab that compares several values of the trade-off from the same noise, one row per value."""
    gr.Markdown(f"Each column starts from the same noise; only the {trade_off.name} differs. {trade_off.effect}")
    trade_off_field = gr.Textbox(
        trade_off.usual, label=f"{trade_off.noun.capitalize()}s, up to {MAX_VALUES}", elem_id="scales"
    )
    requested = [*settings, *_condition_box(session, False, "compare-conditional")]
    compare_button, cancel = _buttons("Compare", "compare")
    status = gr.HTML(elem_classes="status", elem_id="compare-status")
    rows = [gr.HTML(elem_id=f"row-{i}") for i in range(MAX_VALUES)]

    def compare(values: dict[Any, Any], gradio_request: gr.Request) -> Iterator[dict[Any, str]]:
        with _errors_shown():
            request = session.check_request(*(values[field] for field in requested))
            chosen, is_wanted = trade_off.values_of(values[trade_off_field]), watch(gradio_request)
            started, file = time.monotonic(), file_name(request)
            yield dict.fromkeys(rows, "")
            finished = []
            for row, value in zip(rows, chosen, strict=False):
                row_name = f"{trade_off.noun} {value:g}" + (
                    f", {trade_off.neutral_is}" if value == trade_off.neutral else ""
                )
                for preview in session.sample(request, value, is_wanted):
                    mistakes = session.mistakes(request, preview.images) if preview.is_last else None
                    heading = f'<div class="row-name"><b>{row_name}</b>{accuracy_html(mistakes)}</div>'
                    step = f": step {preview.step} of {preview.num_steps}" if session.solvers else ""
                    yield {
                        status: f"{trade_off.noun.capitalize()} {value:g}{step}",
                        row: pictures_html(
                            preview,
                            f"{file}-{trade_off.noun}{value:g}",
                            heading=heading,
                            columns=request.num_images,
                            mistakes=mistakes,
                        ),
                    }
                finished.append((row_name, preview.images))
            yield {status: f"{_seconds(started)} {grid_html(finished, f'{file}-{trade_off.noun}s')}"}

    _wire(compare_button, cancel, compare, {*requested, trade_off_field}, [status, *rows], "compare")


def _about(session: Session) -> str:
    """A description of the demo, in a sentence or two."""
    height, width = session.pipe.sample_size
    classes = f" of {len(session.label_of)} classes" if session.label_of else ""
    judge = ""
    if session.judge is not None:
        apart = " that does not guide" if session.solvers else ""
        judge = f" An evaluation classifier{apart} ({session.judge.name}) checks the class of each sample."
    return f"Images{classes}, {width}x{height} pixels.{judge} {HINT}"


def _seconds(started: float) -> str:
    return f"Done in {time.monotonic() - started:.1f} s."


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Shows errors on the page instead of the log."""
    try:
        yield
    except StoppedError as error:
        raise gr.Error(NOT_WAITED_FOR, print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error("There is not enough memory; choose fewer images.", print_exception=False) from error
    except (ValueError, RuntimeError) as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error


def _condition_box(session: Session, value: bool, name: str) -> list[Any]:
    """The checkbox of class-conditioning for a UNet, hidden if the UNet needs the class."""
    if not session.solvers:
        return []
    return [
        gr.Checkbox(
            value,
            label="Class-conditional UNet",
            info="otherwise unconditional: only the classifier guides",
            visible=session.can_drop_label,
            elem_id=name,
        )
    ]


def _buttons(text: str, name: str) -> tuple[Any, Any]:
    with gr.Row():
        go = gr.Button(text, variant="primary", min_width=120, elem_id=name)
        cancel = gr.Button("Cancel", interactive=False, min_width=120, elem_id=f"{name}-cancel")
    return go, cancel


def _wire(go: Any, cancel: Any, fn: Callable[..., Any], inputs: set[Any], outputs: list[Any], name: str) -> None:
    """Connects a button to a generator, one of all at a time, and another button that cancels it.

    The generator gets the values of the inputs by component; API clients give them in the order of the page.
    """

    def toggle(running: bool) -> Callable[[], tuple[Any, Any]]:
        return lambda: (gr.Button(interactive=not running), gr.Button(interactive=running))

    status = outputs[0]
    begun = go.click(toggle(True), outputs=[go, cancel], **_QUICK)
    run = begun.then(
        fn,
        inputs,
        outputs,
        api_name=name,
        preprocess=False,  # we validate all inputs ourselves, with the same errors
        concurrency_id=QUEUE,
        show_progress="minimal",
        show_progress_on=status,
    )
    for ended in (run.success, run.failure):
        ended(toggle(False), outputs=[go, cancel], **_QUICK)
    stopped = cancel.click(toggle(False), outputs=[go, cancel], cancels=run, **_QUICK)
    stopped.then(lambda: "Cancelled.", outputs=status, **_QUICK)  # after the page has handled the run's last preview


def launch_demo(blocks: Any, host: str = "127.0.0.1", port: int = 7860) -> str:
    """The address of the demo, after serving it from a thread, without any network access.

    Args:
        blocks (`gradio.Blocks`): The page from [`build_demo`].
        host (`str`, defaults to `"127.0.0.1"`): The address to listen on: by default only this machine can reach it,
            with `"0.0.0.0"` everyone who can reach the machine.
        port (`int`, defaults to 7860): The port.

    Returns:
        `str`: Its URL.

    Raises:
        `ValueError`: If the port is taken.
    """
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css=CSS,
            show_error=True,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            state_session_capacity=1000,
            app_kwargs={"middleware": [Middleware(Gate)]},
        )
    except OSError as error:
        raise ValueError(f"Port {port} of {host} is not available; give another --port.") from error
    return url
