"""`--budget 30m`: a plan made by measuring this machine, kept in `plan.json`, and fitted to the time that is left."""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ..data import load_labelled_images
from ..data.arguments import DataArguments
from ..files import check_replaceable, has_json, read_json, write_json
from ..processes import from_main, join_processes
from .arguments import fill_arguments, flags_of_stage, make_parser
from .cards import aligned
from .checkpoints import list_checkpoints, read_state
from .plan import Flags, Pictures, Plan, fit_report, fit_steps, images_of_step, make_plan
from .preflight import estimate_memory
from .task import Images, Task
from .timing import in_words, parse_duration, seconds_per_step

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
_SHAPE = {
    "budget": (int, float),
    "pictures": dict,
    "recipe": {str: dict},
    "seconds": {str: (int, float)},
    "training_seconds": {str: (int, float)},
    "seconds_per_step": {str: (int, float)},
    "doubts": [str],
    "started": [str],
    "spent": (int, float),
}
Tasks = Mapping[str, Callable[[Any, Images], Task]]


def parse_planned(
    stages: dict[str, type], tasks: Tasks, argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[DataArguments, dict[str, Any], "Budget"]:
    """What [`~arguments.parse_arguments`] returns, with `--budget` from a plan, and the budget that fits the stages.

    Args:
        stages, argv, description: As for [`~arguments.parse_arguments`].
        tasks (`dict[str, Callable]`): What makes the task of each stage that trains.

    Raises:
        `ValueError`: For flags that are not allowed, or a plan in the folder for another time or other images.
        `SystemExit`: With status 0 after `--dry_run` has shown the plan.
    """
    parser = make_parser(stages, description)
    parser.add_argument(
        "--budget",
        default=argparse.SUPPRESS,
        help="Time for everything: 90s, 30m, 8h, 2d. The size of the images, widths, batches and steps are planned by "
        "measuring this machine; flags that are given win. The plan is kept in plan.json.",
    )
    parser.add_argument(
        "--dry_run", action="store_true", default=argparse.SUPPRESS, help="Show the plan of --budget, and end."
    )
    given = vars(parser.parse_args(argv))
    since = start_of_process()
    text, is_dry = given.pop("budget", None), given.pop("dry_run", False)
    if text is None:
        if is_dry:
            raise ValueError("--dry_run shows the plan of a --budget; give one, such as --budget 30m.")
        return *fill_arguments(stages, given), Budget(None, Path(), {}, None, 0.0)
    if "recipe" in given:
        raise ValueError("--budget makes a recipe of its own; leave out --recipe, or --budget.")
    seconds = parse_duration(text)
    data_args, filled = fill_arguments(stages, given, {"data": {}, **{name: {} for name in stages}})  # checks the flags
    first = next(iter(filled.values()))
    path = Path(first.output_dir) / ("" if len(stages) > 1 else next(iter(stages))) / PLAN_FILE
    is_plan = has_json(path, "budget", "recipe")
    check_replaceable([path], lambda path: is_plan)
    flags = {name: flags_of_stage(stage, name, given) for name, stage in stages.items()}
    state = join_processes()
    conditional = all(of_stage.get("class_conditional", True) for of_stage in flags.values())
    images = load_labelled_images(data_args, seed=first.seed, require_labels=conditional)
    pictures = pictures_of(images)
    saved = from_main(lambda: read_plan(path, seconds, pictures))
    machine = ThisMachine(images, stages, tasks, state.device, seconds)
    if saved is None:
        given_data = flags_of_stage(DataArguments, "data", given)
        made = from_main(lambda: make_plan(pictures, seconds, flags, machine, given_data, time.time() - since))
        saved = {**dataclasses.asdict(made), "started": [], "spent": 0.0}
    budget = Budget(saved, path, flags, machine, since)
    if state.is_main_process:
        logger.info(budget.shown(text))
    if is_dry:
        raise SystemExit(0)
    if state.is_main_process and not budget.started:
        budget.save()
    return *fill_arguments(stages, given, saved["recipe"]), budget


def start_of_process() -> float:
    """When this process started, whose imports count; now, if it has done other things before, as notebooks have."""
    started, now = psutil.Process().create_time(), time.time()
    return started if now - started < 120 else now


def pictures_of(images: Images) -> Pictures:
    """What a plan knows of the images."""
    train, held_out = images
    counts = [len(train)] if train.labels is None else np.bincount(train.labels, minlength=train.num_classes).tolist()
    return Pictures(train.resolution, train.image_channels, tuple(counts), len(held_out or ()))


def read_plan(path: Path, budget: float, pictures: Pictures) -> dict[str, Any] | None:
    """The plan of an earlier call, `None` if there is none; one of another time or other images is refused."""
    if not path.is_file():
        return None
    fix = f"give another --output_dir, or remove {path} to plan again"
    saved = read_json(path, _SHAPE, fix)
    same = json.loads(json.dumps(dataclasses.asdict(pictures)))
    if saved["budget"] == budget and saved["pictures"] == same:
        return saved
    if not saved["started"]:
        return None
    what = "other images" if saved["budget"] == budget else f"--budget {in_words(saved['budget'])}"
    raise ValueError(f"{path} plans for {what}; {fix}.")


class ThisMachine:
    """The speed and the memory of this machine, by a few images of each stage.

    Args:
        images: Training images, and held-out ones.
        stages, tasks: As for [`parse_planned`].
        device (`torch.device`): Where it is trained.
        budget (`float`): Seconds of everything; a measurement takes a small share of it.
    """

    def __init__(self, images: Images, stages: dict[str, type], tasks: Tasks, device: torch.device, budget: float):
        self.images, self.stages, self.tasks, self.device = images, stages, tasks, device
        self.enough = min(2.0, max(0.1, budget / 1000))
        self.memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available

    def task(self, stage: str, flags: Flags, resolution: tuple[int, int]) -> Task:
        """The task of a stage, with a newly initialised model."""
        train = dataclasses.replace(self.images[0], resolution=resolution)
        return self.tasks[stage](self.stages[stage](**flags), (train, None))

    def seconds(self, stage: str, flags: Flags, resolution: tuple[int, int]) -> float:
        # A CPU without bfloat16 takes ten times as long, which a few images show
        enough = self.enough / 10 if flags.get("mixed_precision") == "bf16" else self.enough
        return seconds_per_step(self.task(stage, flags, resolution), self.device, enough)

    def bytes(self, stage: str, flags: Flags, resolution: tuple[int, int]) -> int:
        return estimate_memory(self.task(stage, flags, resolution))


class Budget:
    """A plan under way: the time that is spent, and the steps of what has not started.

    Args:
        saved (`dict`, *optional*): The content of `plan.json`; `None` without `--budget`, when nothing is fitted.
        path (`Path`): Its file.
        given (`dict[str, dict]`): The flags that are given for each stage, which are kept.
        machine ([`ThisMachine`], *optional*): Where the stages train.
        since (`float`): When this process started with it, in seconds since the epoch.
    """

    def __init__(
        self,
        saved: dict[str, Any] | None,
        path: Path,
        given: dict[str, Flags],
        machine: ThisMachine | None,
        since: float,
    ):
        self.path, self.given, self.machine, self.since = path, given, machine, since
        if saved is None:
            self.plan = None
            return
        made = {field.name: saved[field.name] for field in dataclasses.fields(Plan)}
        self.plan = Plan(**{**made, "pictures": Pictures(**saved["pictures"])})
        self.started, self.spent = list(saved["started"]), saved["spent"]
        if self.started and self.started[-1] != "report":  # what its checkpoints tell of the process that was stopped
            self.spent += max([0.0, *(read_state(folder)["seconds"] for folder in list_checkpoints(self.folder(-1)))])

    def folder(self, index: int) -> Path:
        """The folder of a stage that has started."""
        name = self.started[index]
        return self.path.parent if self.path.parent.name == name else self.path.parent / name

    def elapsed(self) -> float:
        """Seconds that are spent, those before a resume included."""
        return self.spent + time.time() - self.since

    def start(self, name: str, args: Any) -> None:
        """Fits a stage that starts now to the time that is left and to the speed of the machine now."""
        if self.plan is None:
            return
        flags = from_main(lambda: self._start(name))
        for flag, value in flags.items():
            setattr(args, flag, value)

    def _start(self, name: str) -> Flags:
        plan = self.plan
        assert plan is not None
        if name in self.started:
            return {}
        self.correct_speeds()
        stages = list(plan.seconds)
        planned = sum(plan.seconds[stage] for stage in stages[stages.index(name) :])
        left = plan.budget - self.elapsed()
        seconds = left * plan.seconds[name] / planned
        if name == "report":
            fit_report(plan, seconds, self.given)
        else:
            assert self.machine is not None
            resolution = tuple(plan.recipe["data"].get("resolution", plan.pictures.resolution))
            plan.seconds_per_step[name] = self.machine.seconds(name, plan.recipe[name], resolution)
            fit_steps(plan, name, seconds, self.given[name])
        self.started.append(name)
        self.save()
        expected = plan.seconds[name]
        what, unit = ("num_images", "samples a row") if name == "report" else ("max_train_steps", "steps")
        is_late = expected > seconds + 0.15 * plan.budget
        logger.info(
            f"{in_words(max(0.0, left))} of {in_words(plan.budget)} are left: {name} takes about {in_words(expected)}, "
            f"{plan.recipe[name][what]:,} {unit}{'; it will be late' if is_late else ''}."
        )
        return plan.recipe[name]

    def correct_speeds(self) -> None:
        """Replaces the speeds of finished stages, which the report depends on, by how long they took."""
        assert self.plan is not None
        for index, name in enumerate(self.started):
            states = [read_state(folder) for folder in list_checkpoints(self.folder(index))]
            if states and states[-1]["step"] == self.plan.recipe[name]["max_train_steps"]:
                slower = states[-1]["seconds"] / self.plan.training_seconds[name]
                self.plan.seconds_per_step[name] *= slower
                self.plan.training_seconds[name] *= slower

    def save(self) -> None:
        """Writes the plan, with the time spent so far."""
        assert self.plan is not None
        content = dataclasses.asdict(self.plan)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json({**content, "started": self.started, "spent": round(self.elapsed(), 1)}, self.path)

    def shown(self, text: str) -> str:
        """The plan as text."""
        assert self.plan is not None
        plan, rows = self.plan, []
        for name, seconds in plan.seconds.items():
            flags = plan.recipe[name]
            if name == "report":
                does = f"{flags['num_images']:,} samples a row, in {flags['num_inference_steps']} steps each"
            else:
                width = flags.get("model_channels", flags.get("hidden_channels"))
                does = f"width {width}, {flags['max_train_steps']:,} steps of {images_of_step(flags)} images"
                does += ", in bfloat16" if flags.get("mixed_precision") == "bf16" else ""
            rows.append([name, f"  {does}".ljust(60), in_words(seconds)])
        lines = [f"\n== plan for {text} ==", str(plan.pictures)]
        if (sides := plan.recipe["data"].get("resolution")) is not None:
            lines.append(f"trained at {sides[0]}x{sides[-1]}")
        total = in_words(sum(plan.seconds.values()))
        return "\n".join([*lines, aligned([*rows, ["all", "", total]]), *plan.doubts])
