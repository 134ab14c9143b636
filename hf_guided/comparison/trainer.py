"""Trains the families of a comparison, each within the budget."""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from torch import nn
from transformers import AutoModelForImageClassification

from hf_guided.comparison.measuring import Images, Measuring
from hf_guided.data import DataArguments
from hf_guided.families import BASELINES, DIFFUSION
from hf_guided.files import read_json, write_json
from hf_guided.pipelines.auto_pipeline import load_pipeline
from hf_guided.processes import join_processes
from hf_guided.training.arguments import LoopArguments
from hf_guided.training.checkpoints import read_history
from hf_guided.training.divergence import DivergedError
from hf_guided.training.preflight import estimate_memory
from hf_guided.training.saving import save_folder
from hf_guided.training.task import Task
from hf_guided.training.timing import in_words, seconds_per_step
from hf_guided.training.train_baseline import COLLAPSED, TRAINERS, train_baseline
from hf_guided.training.train_classifier import ClassifierArguments, ClassifierTask, train_classifier
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask, train_diffusion

logger = logging.getLogger(__name__)

TITLES = {name: family.title for name, family in [*BASELINES.items(), ("diffusion", DIFFUSION)]}
TITLES["guided"] = "Guided diffusion"
CLASSIFIER_SHARE = 1 / 3  # of the budget of guided diffusion
# The stages of each family, and their shares of the budget.
PARTS = {
    **{family: {family: 1.0} for family in (*TRAINERS, "diffusion")},
    "guided": {"diffusion": 1 - CLASSIFIER_SHARE, "classifier": CLASSIFIER_SHARE},
}
_UNITS = {"s": ("seconds", 1), "m": ("seconds", 60), "h": ("seconds", 3600),
          "steps": ("steps", 1), "parameters": ("parameters", 1)}  # fmt: skip
_MOST = {"seconds": 366 * 86400, "steps": 1e11, "parameters": 1e11}
_RUN = {"family": str, "seed": int, "parameters": int, "metrics": dict, "losses": dict, "notes": list}


class Stage(NamedTuple):
    """A stage of training: its flags, its task with a newly initialised model, what trains it to a finished folder."""

    arguments: type[LoopArguments]
    make_task: Callable[[Any, Images], Task]
    train: Callable[[DataArguments, Any, Images], Path]
    widths: Sequence[str] = ("model_channels",)  # flags that make the model larger


STAGES = {
    "judge": Stage(ClassifierArguments, ClassifierTask, partial(train_classifier, name="judge")),
    "classifier": Stage(ClassifierArguments, ClassifierTask, train_classifier),
    "diffusion": Stage(DiffusionArguments, DiffusionTask, train_diffusion),
    **{
        family: Stage(arguments, task, partial(train_baseline, family), task.widths)
        for family, (arguments, task) in TRAINERS.items()
    },
}


@dataclass(frozen=True)
class Budget:
    """The training budget of every family."""

    amount: float
    unit: str  # "seconds" or "steps" of training, or "parameters", trained for the recipe's steps

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """The budget of a text such as `"5m"`, `"300s"`, `"1h"`, `"2000steps"` or `"500kparameters"`."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kM]?)\s*(s|m|h|steps|parameters)", text)
        if match is not None:
            unit, factor = _UNITS[match[3]]
            amount = float(match[1]) * factor * {"": 1, "k": 1e3, "M": 1e6}[match[2]]
            if 0 < amount <= _MOST[unit]:
                return cls(amount, unit)
        raise ValueError(f"--budget {text} is not a budget; give 5m, 300s, 1h, 2000steps or 500kparameters.")

    def __str__(self) -> str:
        if self.unit != "seconds":
            return f"{self.amount:,.0f} {self.unit}"
        return f"{self.amount / 60:g} minutes" if self.amount >= 60 else f"{self.amount:g} seconds"


@dataclass
class Trainer:
    """Trains the families, each within the budget."""

    data_args: DataArguments
    images: Images  # to train on, and held out
    flags: dict[str, Any]  # of each stage
    budget: Budget
    # Steps and widths of each family's stages within the budget, and the seconds per step measured for it
    plan: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"steps": {}, "widths": {}, "seconds_per_step": {}}
    )

    def fit(self, family: str) -> None:
        """Adds a family to the plan."""
        if family in self.plan["steps"]:
            return
        self.plan["steps"][family], self.plan["widths"][family] = {}, {}
        speeds = self.plan["seconds_per_step"]
        for stage, share in PARTS[family].items():
            steps, widths, amount = self.flags[stage].max_train_steps, {}, self.budget.amount * share
            if self.budget.unit == "steps":
                steps = max(1, round(amount))
            elif self.budget.unit == "seconds":
                speeds[stage] = speeds.get(stage) or seconds_per_step(self.task(stage), join_processes().device, 2.0)
                steps = max(1, int(amount / speeds[stage]))
            else:
                widths = self.widths_of(stage, amount)
            self.plan["steps"][family][stage], self.plan["widths"][family][stage] = steps, widths

    def widths_of(self, stage: str, parameters: float) -> dict[str, int]:
        """The widths, multiples of 32, that bring a stage's number of parameters closest to a budget."""
        best: tuple[float, dict[str, int]] = (math.inf, {})
        for width in range(32, 4096, 32):
            widths = dict.fromkeys(STAGES[stage].widths, width)
            count = num_parameters(self.task(stage, **widths).model)
            best = min(best, (abs(math.log(count / parameters)), widths), key=lambda found: found[0])
            if count > parameters:
                break
        if best[0] > math.log(10):  # the smallest has more than ten times as many
            raise ValueError(
                f"--budget: {stage} of this recipe cannot have as few as {parameters:,.0f} parameters; give more."
            )
        return best[1]

    def task(self, stage: str, **flags: Any) -> Task:
        """The task of a stage with some flags replaced, and a newly initialised model."""
        return STAGES[stage].make_task(with_flags(self.flags[stage], **flags), self.images)

    def train(self, stage: str, **flags: Any) -> Path:
        """Trains a stage with some flags replaced; returns the finished folder."""
        return STAGES[stage].train(self.data_args, with_flags(self.flags[stage], **flags), self.images)

    def log_plan(self, families: Sequence[str], seeds: Sequence[int], output: Path) -> None:
        """Logs the steps of each family, the output folder and the estimated time."""
        lines = [f"\n== compare ==\nEach family gets {self.budget}, with {len(seeds)} seed(s)."]
        for family in families:
            parts = [f"{stage} {steps:,} steps" for stage, steps in self.plan["steps"][family].items()]
            widths = self.plan["widths"][family].values()
            parts += [f"{name} {width}" for part in widths for name, width in part.items()]
            lines.append(f"  {TITLES[family]}: {', '.join(parts)}")
        if self.budget.unit == "seconds":
            total = in_words(len(families) * len(seeds) * self.budget.amount)
            lines.append(f"Training takes about {total} in total, plus time for sampling and evaluation.")
        logger.info("\n".join([*lines, f"Writes {output}; rerun the same command to resume."]))

    def run(self, family: str, seed: int, measuring: Measuring, output: Path) -> dict[str, Any]:
        """The results of a family with a seed: trained and measured, or read if it is finished."""
        folder = output / f"seed-{seed}" / family
        if (folder / "run.json").is_file():
            try:
                return read_json(folder / "run.json", _RUN)
            except ValueError as error:
                logger.warning(f"{error} The run is repeated.")
        steps, widths = self.plan["steps"][family], self.plan["widths"][family]
        shared = {"seed": seed, "output_dir": str(folder)}
        flags = {stage: {**shared, "max_train_steps": steps[stage], **widths[stage]} for stage in steps}
        tasks = {stage: self.task(stage, **flags[stage]) for stage in flags}
        run: dict[str, Any] = {
            "family": family,
            "title": TITLES[family],
            "seed": seed,
            "parameters": sum(num_parameters(task.model) for task in tasks.values()),
            "memory_bytes": max(map(estimate_memory, tasks.values())),
            "steps": sum(steps.values()),
        }
        try:
            folders = {stage: self.train(stage, **flags[stage]) for stage in flags}
        except DivergedError as error:
            run |= {"metrics": {}, "curve": None, "losses": {}, "notes": [f"diverged: {error}"]}
        else:
            main, *others = (read_history(folder / stage) for stage in flags)
            run["train_seconds"] = sum(history[-1]["seconds"] for history in (main, *others))
            run["losses"] = {
                name: [[row["seconds"], row[name]] for row in main if name in row] for name in ("loss", "held_out/loss")
            }
            run |= measuring.model(assemble(folders, measuring.guidance_scale, folder / "pipeline"))
            spreads = [row["lowest_spread"] for row in main if "lowest_spread" in row]  # of a GAN
            if spreads and spreads[-1] < COLLAPSED:
                note = f"the spread of samples of a class was only {spreads[-1]:.0%} of its real images'"
                run["notes"].append(f"mode collapse: {note}")
        write_json(run, folder / "run.json")
        return run


def with_flags(args: Any, **flags: Any) -> Any:
    """A stage's flags with some of them replaced."""
    changed = dataclasses.replace(args, **flags)
    changed.recipe = args.recipe
    return changed


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assemble(folders: dict[str, Path], guidance_scale: float, destination: Path) -> Any:
    """The pipeline of a family's trained parts, saved in `destination`."""
    pipeline = load(str(next(iter(folders.values()))))
    if "classifier" in folders:
        classifier = AutoModelForImageClassification.from_pretrained(folders["classifier"])
        pipeline.register_modules(classifier=classifier.to(pipeline.device))
        defaults = pipeline.config.sampling_defaults or {}
        pipeline.set_sampling_defaults(**{**defaults, "guidance_scale": guidance_scale})
    save_folder(pipeline.save_pretrained, destination)
    return pipeline


def load(model: str) -> Any:
    """A pipeline of any family, on this process's device."""
    pipeline = load_pipeline(model, PartialState())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
