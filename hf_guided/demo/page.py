"""The demo's page: samples while they are denoised, and the same noise at several values of a trade-off.

Images are data URLs in HTML, not Gradio's gallery, which serves files from disk and blurs small images. Values are
checked by [`Session`], whose messages name the field and its bounds, not by Gradio's components, which let NaN pass.
"""

import base64
import html
import io
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ..evaluation.features.extractors import FeatureExtractor
from ..generation.grids import labelled_grid
from ..generation.samples import to_picture
from ..pipelines.class_conditional import ClassConditionalPipeline

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The demo needs gradio; install it with: pip install "hf-guided[demo]"') from error
from starlette.middleware import Middleware

from .gate import NOT_WAITED_FOR, QUEUE, Gate, watch
from .session import MAX_SEED, MAX_VALUES, MIN_STEPS, Preview, SampleRequest, Session, StoppedError, number

MAX_WAITING = 64  # requests in the queue
_ENVIRONMENT = Environment(
    loader=PackageLoader("hf_guided.demo"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
)
_HTML: Any = _ENVIRONMENT.get_template("pictures.jinja").module
# Options of events that run immediately and only on the page.
_QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


def build_demo(pipe: ClassConditionalPipeline, judge: FeatureExtractor | None = None, title: str = "hf-guided") -> Any:
    """The demo as a Gradio page, which [`launch_demo`] serves.

    Args:
        pipe ([`ClassifierGuidedPipeline`], [`VAEPipeline`], [`GANPipeline`] or [`FlowPipeline`]): Makes the images,
            on its device. It is not changed.
        judge ([`~hf_guided.evaluation.features.FeatureExtractor`], *optional*): The evaluation classifier, which gives
            the accuracy of samples; not the one that guides.
        title (`str`, defaults to `"hf-guided"`): Heading of the page.

    Raises:
        `ValueError`: For a pipeline that upsamples or whose images do not have 1 or 3 channels, and for an evaluation
            classifier that guides or lacks classes of the pipeline.
    """
    session = Session(pipe, judge)
    classes, most = list(session.label_of), session.max_images
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\n{_about(session)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                class_name = gr.Dropdown(classes, label="Class", visible=bool(classes), elem_id="class")
                num_images = gr.Slider(1, most, min(8, most), step=1, label="Images", elem_id="pictures")
                seed = gr.Number(0, minimum=0, maximum=MAX_SEED, precision=0, label="Seed", elem_id="seed")
                new_seed = gr.Button("Another seed", size="sm", elem_id="new-seed")
                new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=seed, **_QUICK)
                settings = [class_name, num_images, seed, *(_solver_fields(session) if session.solvers else [])]
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Sample"):
                    _tab(session, settings, comparing=False)
                if session.trade_off is not None:
                    with gr.Tab(f"Effect of {session.trade_off.name.split()[0]}"):
                        _tab(session, settings, comparing=True)
    return blocks.queue(api_open=False, max_size=MAX_WAITING, default_concurrency_limit=1)


def _about(session: Session) -> str:
    height, width = session.pipe.sample_size
    classes = f" of {len(session.label_of)} classes" if session.label_of else ""
    text = f"Images{classes}, {width}x{height} pixels."
    if session.judge is not None:
        apart = " that does not guide" if session.solvers else ""
        text += f" An evaluation classifier{apart} ({session.judge.name}) checks the class of each sample."
    return f"{text} Click an image to save it at its true size."


def _solver_fields(session: Session) -> list[Any]:
    first = next(iter(session.solvers.values()))
    most, usual = session.max_steps(first), session.default_steps(first)
    solver = gr.Dropdown(list(session.solvers), value=first.name, label="Solver", elem_id="solver")
    steps = gr.Slider(MIN_STEPS, most, usual, step=1, label=f"Steps, {MIN_STEPS} to {most}", elem_id="steps")

    def change_solver(name: Any, steps: Any) -> Any:
        with _errors_shown():
            most = session.max_steps(session.solver_of(name))
            fitting = min(number("The number of steps", steps, MIN_STEPS, math.inf), most)
        return gr.Slider(maximum=most, value=fitting, label=f"Steps, {MIN_STEPS} to {most}")

    solver.input(change_solver, [solver, steps], steps, preprocess=False, **_QUICK)
    return [solver, steps]


def _tab(session: Session, settings: list[Any], comparing: bool) -> None:
    """A tab that shows samples while they are denoised: at one value of the trade-off, or one row for each of several
    values, from the same noise."""
    name, trade_off = "compare" if comparing else "sample", session.trade_off
    values_field: Any = None
    noun = "" if trade_off is None else trade_off.noun
    if trade_off is not None and comparing:
        gr.Markdown(f"Each column starts from the same noise; only the {trade_off.name} differs. {trade_off.effect}")
        label = f"{noun.capitalize()}s, up to {MAX_VALUES}"
        values_field = gr.Textbox(trade_off.usual, label=label, elem_id="scales")
    elif trade_off is not None:
        bounds = trade_off.low, trade_off.high, trade_off.start
        label, info = trade_off.name.capitalize(), f"{trade_off.neutral:g} is {trade_off.neutral_is}"
        values_field = gr.Slider(*bounds, step=0.1, label=label, info=info, elem_id="scale")
    requested = [*settings]
    if session.solvers:
        label, info = "Class-conditional UNet", "otherwise unconditional: only the classifier guides"
        can_drop, elem_id = session.can_drop_label, f"{name}-conditional"
        requested.append(gr.Checkbox(not comparing, label=label, info=info, visible=can_drop, elem_id=elem_id))
    with gr.Row():
        go = gr.Button("Compare" if comparing else "Generate", variant="primary", min_width=120, elem_id=name)
        cancel = gr.Button("Cancel", interactive=False, min_width=120, elem_id=f"{name}-cancel")
    status = gr.HTML(elem_classes="status", elem_id=f"{name}-status")
    row_ids = [f"row-{i}" for i in range(MAX_VALUES)] if comparing else ["sample-pictures"]
    rows = [gr.HTML(elem_id=row_id) for row_id in row_ids]

    def chosen_rows(chosen: Any, file: str) -> list[tuple[float | None, str, str]]:
        """For each row the value of the trade-off, the row's name, and the name of its files."""
        if trade_off is None:
            return [(None, "", file)]
        if not comparing:
            return [(number(f"The {trade_off.name}", chosen, trade_off.low, trade_off.high), "", file)]
        described = {trade_off.neutral: f", {trade_off.neutral_is}"}
        values = trade_off.values_of(chosen)
        return [(value, f"{noun} {value:g}{described.get(value, '')}", f"{file}-{noun}{value:g}") for value in values]

    def run(values: dict[Any, Any], gradio_request: gr.Request) -> Iterator[dict[Any, str]]:
        with _errors_shown():
            request = session.check_request(*(values[field] for field in requested))
            is_wanted, started, file = watch(gradio_request), time.monotonic(), file_name(request)
            chosen = chosen_rows(values.get(values_field), file)
            if comparing:
                yield dict.fromkeys(rows, "")
            finished: list[tuple[str, torch.Tensor]] = []
            for row, (value, row_name, row_file) in zip(rows, chosen, strict=False):
                for preview in session.sample(request, value, is_wanted):
                    step = f"step {preview.step} of {request.steps}" if session.solvers else ""
                    text, mistakes = ": ".join(filter(None, [row_name, step])).capitalize(), None
                    if preview.is_last:
                        mistakes = session.mistakes(request, preview.images)
                        finished.append((row_name or request.name, preview.images))
                    if len(finished) == len(chosen):
                        seconds, of_all = time.monotonic() - started, None if comparing else mistakes
                        grid_file = f"{file}-{noun}s" if comparing else file
                        text = str(_HTML.done(seconds, of_all, grid_file, _data_url(grid_of(finished))))
                    columns = request.num_images if comparing else 0
                    yield {status: text, row: pictures_html(preview, columns, row_name, row_file, mistakes)}

    inputs = {*requested, values_field} - {None}
    _wire(go, cancel, run, inputs, [status, *rows], name)


def _wire(go: Any, cancel: Any, fn: Callable[..., Any], inputs: set[Any], outputs: list[Any], name: str) -> None:
    """Connects a button to a generator, one of all at a time, and another button that cancels it.

    The generator gets the values of the inputs by component; API clients give them in the order of the page.
    """

    def toggle(running: bool) -> Callable[[], tuple[Any, Any]]:
        return lambda: (gr.Button(interactive=not running), gr.Button(interactive=running))

    begun = go.click(toggle(True), outputs=[go, cancel], **_QUICK)
    shown: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": outputs[0]}
    run = begun.then(fn, inputs, outputs, api_name=name, preprocess=False, concurrency_id=QUEUE, **shown)
    for ended in (run.success, run.failure):
        ended(toggle(False), outputs=[go, cancel], **_QUICK)
    stopped = cancel.click(toggle(False), outputs=[go, cancel], cancels=run, **_QUICK)
    stopped.then(lambda: "Cancelled.", outputs=outputs[0], **_QUICK)  # after the page has handled the last preview


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


def pictures_html(
    preview: Preview, columns: int, row_name: str, file: str, mistakes: Sequence[str | None] | None
) -> str:
    """HTML of images, small ones enlarged, `columns` in a row (0: as many as fit), under a heading if there is a name.

    A click saves a sample, but no preview, at its true size, as `file` and a number. `mistakes`: see
    [`Session.mistakes`].
    """
    height, width = preview.images.shape[-2:]
    urls = [_data_url(picture, preview.is_last) for picture in _pictures(preview.images)]
    return str(_HTML.pictures(urls, width, height, columns, row_name, file if preview.is_last else "", mistakes))


def _pictures(images: torch.Tensor) -> list[Image.Image]:
    return [to_picture(image) for image in images.permute(0, 2, 3, 1).numpy()]


def _data_url(picture: Image.Image, whole: bool = True) -> str:
    """An image as a data URL; large previews are compressed as JPEG."""
    kind, options = ("PNG", {}) if whole or picture.width < 96 else ("JPEG", {"quality": 85})
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def grid_of(rows: Sequence[tuple[str, torch.Tensor]]) -> Image.Image:
    """All images as one grid, with a named row for each set."""
    pictures = [picture for _, images in rows for picture in _pictures(images)]
    return labelled_grid(pictures, [name for name, _ in rows], cell_size=None if pictures[0].width < 256 else 256)


def file_name(request: SampleRequest) -> str:
    """The name of a request's files, without extension."""
    name = re.sub(r"[^\w-]+", "-", request.name.split(",")[0]).strip("-")
    return f"{name[:40] or 'class'}-seed{request.seed}"


def launch_demo(blocks: Any, host: str = "127.0.0.1", port: int = 7860) -> str:
    """The address of the demo, after serving it from a thread, without any network access.

    Args:
        blocks (`gradio.Blocks`): The page from [`build_demo`].
        host (`str`, defaults to `"127.0.0.1"`): The address to listen on: by default only this machine can reach it,
            with `"0.0.0.0"` everyone who can reach the machine.
        port (`int`, defaults to 7860): The port. A `ValueError` if it is taken.
    """
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    without = dict.fromkeys(("share", "ssr_mode", "run_history", "enable_monitoring", "mcp_server"), False)
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css_paths=Path(__file__).with_name("templates") / "page.css",
            show_error=True,
            state_session_capacity=1000,
            app_kwargs={"middleware": [Middleware(Gate)]},
            **without,
        )
    except OSError as error:
        raise ValueError(f"Port {port} of {host} is not available; give another --port.") from error
    return url
