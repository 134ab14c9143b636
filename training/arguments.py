"""Flags and recipes: what a training script may be told, and where it reads the rest.

A recipe is a YAML file with a section for the data and one for each stage; a flag overrides its key. A stage that needs
the data otherwise says so in a `data` of its own. Scripts of several stages take a flag for all stages
(`--max_train_steps`) or for one (`--classifier_max_train_steps`).
"""

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from ..data import BUILT_IN, DataArguments
from ..processes import resumable, user_command
from ..schedulers.schedules import space_timesteps
from ..schedulers.scheduling_adm import FEW_STEPS

RECIPES = Path(__file__).parent / "recipes"
SECTIONS = {"data", "judge", "classifier", "diffusion", "upscaler", "vae", "gan", "flow", "report"}


def flag(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a dataclass that is a flag."""
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunArguments:
    """Where results go."""

    output_dir: str = flag("outputs", "Folder for checkpoints, previews and the finished model.")
    seed: int = flag(0, "Seed of everything random.")
    push_to_hub: bool = flag(False, "Push to the Hub: at checkpoints, beside the training, and the finished folder.")
    hub_model_id: str | None = flag(None, "Repository to push to, user/name.")
    hub_private: bool = flag(False, "Make the repository private, if it is new.")
    hub_token: str | None = flag(None, "Token to push with; the saved login or HF_TOKEN, by default.")
    hub_license: str | None = flag(None, "Licence of what is pushed, as the Hub spells it: apache-2.0, mit ...")
    recipe: str | None = field(default=None, init=False)  # its name, for the model card

    def __post_init__(self) -> None:
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id user/name to know where.")


@dataclass
class LoopArguments(RunArguments):
    """What the training loop needs, whatever it trains."""

    train_batch_size: int = flag(64, "Images per process and forward pass.")
    gradient_accumulation_steps: int = flag(1, "Forward passes per update of the weights.")
    max_train_steps: int = flag(1000, "Updates of the weights.")
    learning_rate: float = flag(1e-4, "Learning rate after the warm-up.")
    lr_scheduler: str = flag("constant_with_warmup", "Schedule of the learning rate, as diffusers names them.")
    lr_warmup_steps: int = flag(0, "Updates of warm-up.")
    adam_beta1: float = flag(0.9, "AdamW's first decay rate.")
    adam_beta2: float = flag(0.999, "AdamW's second decay rate.")
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay.")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = flag(1.0, "The gradient's norm is clipped to this.")
    mixed_precision: str | None = flag(
        None, "Precision of the forward pass; accelerate's, by default.", choices=("no", "fp16", "bf16")
    )
    gradient_checkpointing: bool = flag(False, "Compute activations again instead of keeping them: less memory.")
    ema_decay: float = flag(0.9999, "Decay of the exponential moving average of the weights, after its ramp.")
    checkpointing_steps: int = flag(500, "Save a checkpoint every so many updates.")
    checkpoints_total_limit: int = flag(2, "Keep the newest so many checkpoints.")
    resume_from_checkpoint: str = flag("latest", "A checkpoint's folder, or 'latest': the newest whole one, if any.")
    validation_steps: int = flag(250, "Measure the loss on held-out images every so many updates; 0 is never.")
    preview_steps: int = flag(0, "Draw a grid of samples every so many updates; 0 is never.")
    logging_steps: int = flag(10, "Log every so many updates.")
    report_to: str = flag("tensorboard", "Tracker, as accelerate names them; 'none' for none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [scheduler.value for scheduler in SchedulerType]
        if self.lr_scheduler not in names:
            raise ValueError(f"--lr_scheduler {self.lr_scheduler} is not one of {', '.join(names)}.")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is too small; give 1 or more.")
        if self.checkpoints_total_limit < 1 or self.logging_steps < 1:
            raise ValueError("--checkpoints_total_limit and --logging_steps must be 1 or more.")


@dataclass
class ScheduleArguments:
    """The noise schedule, which classifier and UNet must share."""

    beta_schedule: str = flag("squaredcos_cap_v2", "Noise schedule.", choices=("linear", "squaredcos_cap_v2"))
    num_train_timesteps: int = flag(1000, "Timesteps of the schedule.")
    rescale_timesteps: bool = flag(False, "Tell the models timesteps scaled to [0, 1000).")

    def schedule(self) -> dict[str, Any]:
        """The arguments that the scheduler's constructor and the classifier's config share."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ScheduleArguments)}


@dataclass
class SamplingArguments:
    """How many steps make samples, in previews and by default in the finished pipeline."""

    num_inference_steps: int = flag(FEW_STEPS, "Steps of the second-order solver.")
    respacing: str | None = flag(None, "Instead: the published sampler's timesteps, in OpenAI's notation.")

    def steps(self) -> dict[str, Any]:
        """The pipeline's argument."""
        if self.respacing is not None:
            return {"respacing": self.respacing}
        return {"num_inference_steps": self.num_inference_steps}

    def check_steps(self, num_train_timesteps: int) -> None:
        """Refuses, before the training, what the schedule has not enough timesteps for."""
        if self.respacing is not None:
            space_timesteps(num_train_timesteps, self.respacing)
        elif not 1 <= self.num_inference_steps < num_train_timesteps:
            raise ValueError(
                f"--num_inference_steps {self.num_inference_steps} does not lie between 1 and "
                f"{num_train_timesteps - 1}, one less than --num_train_timesteps."
            )


@dataclass
class ArchitectureArguments:
    """What UNet and classifier have in common; the defaults suit images of 64x64 on one GPU."""

    model_channels: int = flag(128, "Base width.")
    channel_mult: list[float] = flag([1, 2, 3, 4], "Width of each level, as a multiple of the base.")
    num_res_blocks: int = flag(2, "Residual blocks per level.")
    attention_resolutions: list[int] = flag([32, 16, 8], "Side lengths in pixels with attention.")
    num_heads: int | None = flag(None, "Fixed number of attention heads.")
    attention_head_dim: int | None = flag(None, "Fixed width of attention heads; 64 if neither is given.")
    dropout: float = flag(0.0, "Rate of dropout.")
    resblock_updown: bool = flag(True, "Resample with residual blocks.")
    conv_resample: bool = flag(True, "Resample with learned convolutions, without residual blocks.")
    use_scale_shift_norm: bool = flag(True, "Adaptive group normalisation.")

    def architecture(self) -> dict[str, Any]:
        """The arguments of the models' constructors."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(ArchitectureArguments)}


def parse_arguments(
    stages: dict[str, type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[DataArguments, dict[str, Any]]:
    """Reads flags and recipe.

    Args:
        stages (`dict[str, type]`): A dataclass of flags for each stage, by the name of its section in the recipe.
        argv (`Sequence[str]`, *optional*): The command line; the process's, by default.
        description (`str`, *optional*): For `--help`.

    Returns:
        The data's arguments, and an instance of each stage's dataclass.

    Raises:
        `ValueError`: For a recipe that does not exist, or has a key that its section does not know.
    """
    parser = HfArgumentParser(
        [DataArguments, _flags_of(list(stages.values()))],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--recipe",
        help=f"A recipe's name ({', '.join(sorted(path.stem for path in RECIPES.glob('*.yaml')))}) or a YAML file. "
        f"Without one: that of the built-in dataset, digits by default; with other images: images.",
    )
    if len(stages) > 1:
        for name, stage in stages.items():
            parser._add_dataclass_arguments(_flags_of([stage], prefix=f"{name}_"))
    for action in parser._actions:  # only what was said counts: the rest is the recipe's
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))

    dataset = given.get("dataset_name", BUILT_IN[0])
    has_data = "train_data_dir" in given or dataset not in BUILT_IN
    recipe_name = given.pop("recipe", None) or ("images" if has_data else dataset)
    recipe = read_recipe(recipe_name)
    unknown = set(recipe) - SECTIONS
    if unknown:
        raise ValueError(f"The recipe has sections that no script knows: {', '.join(sorted(unknown))}.")
    if len(recipe) > 1 and not set(recipe) & set(stages):
        raise ValueError(
            f"The recipe has nothing for {' or '.join(stages)}, only for {', '.join(sorted(set(recipe) - {'data'}))}; "
            f"give another --recipe."
        )
    for name in stages:
        of_stage = recipe.get(name, {}).pop("data", None) or {}
        if of_stage and len(stages) > 1:
            raise ValueError(f"The recipe's section {name!r} has data of its own; here all stages share theirs.")
        recipe["data"].update(of_stage)
    if has_data:  # the recipe's own data make way
        for key in ("dataset_name", "train_data_dir"):
            recipe["data"].pop(key, None)
    data = _fill(DataArguments, "data", recipe["data"], given)
    prefixed = {
        name: {key.removeprefix(f"{name}_"): value for key, value in given.items() if key.startswith(f"{name}_")}
        for name in stages
    }
    filled = {
        name: _fill(stage, name, recipe.get(name, {}), {**given, **prefixed[name]}) for name, stage in stages.items()
    }
    for stage in filled.values():
        stage.recipe = Path(recipe_name).stem
    return data, filled


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """A recipe of this package by name, or a YAML file."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise ValueError(f"There is no recipe {name_or_path!r}; give a YAML file, or one of {known}.")
    recipe = yaml.safe_load(path.read_text())
    return {"data": {}, **{section: values or {} for section, values in recipe.items()}}


def quiet_libraries() -> None:
    """Leaves the log to this package, and to warnings of others."""
    for noisy in ("httpx", "httpx2", "huggingface_hub", "datasets", "transformers", "diffusers", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def run_script(main: Any) -> None:
    """Runs a training script."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_libraries()
    with user_command(), resumable("Stopped. Rerun the same command to resume from the last checkpoint."):
        main()


def _flags_of(stages: list[type], prefix: str = "") -> type:
    """A dataclass of every field of some dataclasses, each once, under prefixed names."""
    fields = {
        prefix + f.name: (prefix + f.name, f.type, _copy(f))
        for stage in stages
        for f in dataclasses.fields(stage)
        if f.init
    }
    return dataclasses.make_dataclass("Flags", fields.values())


def _copy(f: dataclasses.Field) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return field(default_factory=f.default_factory, metadata=f.metadata)
    return field(default=f.default, metadata=f.metadata)


def _fill(stage: type, name: str, recipe: dict[str, Any], given: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(stage) if f.init}
    unknown = set(recipe) - names
    if unknown:
        raise ValueError(f"The recipe's section {name!r} has unknown keys: {', '.join(sorted(unknown))}.")
    return stage(**{**recipe, **{key: value for key, value in given.items() if key in names}})
