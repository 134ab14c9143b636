"""Flags and recipes of the training scripts, checked against each field's type and range (`hf_guided/fields.py`).

A recipe is a YAML file with a section for the data and one for each stage; a flag overrides its key. A stage that needs
other data settings has a `data` section of its own. Scripts of several stages take a flag for all stages
(`--max_train_steps`) or for one (`--classifier_max_train_steps`).
"""

import argparse
import copy
import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from ..credentials import log_to_screen
from ..data import BUILT_IN, DataArguments
from ..data.dataset import halvable
from ..families import BASELINES
from ..fields import (
    CheckedFields,
    Depth,
    Factor,
    Length,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    Width,
    as_flag,
    check_values,
    flag,
)
from ..files import check_kind, check_outside, check_place, check_replaceable
from ..models.layers import count_heads, level_widths
from ..processes import resumable, user_command
from ..schedulers.schedules import SCHEDULES, make_betas, space_timesteps
from ..schedulers.scheduling_adm import FEW_STEPS
from .checkpoints import HISTORY, RUN_FILE, check_named

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "recipes"
RECIPE_NAMES = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
SECTIONS = {"data", "judge", "classifier", "diffusion", "upscaler", *BASELINES, "report"}
# All but the one that needs step rules, for which there is no flag
LR_SCHEDULERS = [schedule.value for schedule in SchedulerType if schedule is not SchedulerType.PIECEWISE_CONSTANT]
TRACKERS = [*(tracker.value for tracker in LoggerType), "none"]


@dataclass
class RunArguments(CheckedFields):
    """Flags for the output folder, the seed and the Hub."""

    output_dir: str = flag("outputs", "Folder for checkpoints, previews and the finished model.")
    seed: Annotated[int, Range(at_least=0, at_most=2**63 - 1)] = flag(0, "Seed of everything random.")
    push_to_hub: bool = flag(False, "Push to the Hub: checkpoints in the background, and the finished folder.")
    hub_model_id: str | None = flag(None, "Repository to push to, user/name.")
    hub_private: bool = flag(False, "Make the repository private, if it is new.")
    hub_token: str | None = flag(
        None,
        "Token to push with; the list of processes shows it. Default, and safer: that of `hf auth login` or HF_TOKEN.",
        repr=False,
    )
    hub_license: str | None = flag(None, "Licence of the pushed model, as the Hub spells it: apache-2.0, mit ...")
    recipe: str | None = field(default=None, init=False)  # its name, for the model card

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub needs --hub_model_id user/name to know where.")
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError:
                raise ValueError(
                    f"--hub_model_id {self.hub_model_id} cannot name a repository; give user/name in letters, digits, "
                    f"'-', '_' and '.'."
                ) from None

    def hub_access(self) -> dict[str, Any]:
        """How to push: privately or not, and the token."""
        return {"private": self.hub_private or None, "token": self.hub_token}


@dataclass
class LoopArguments(RunArguments):
    """Flags of the training loop, for every model."""

    train_batch_size: PositiveInt = flag(64, "Images per process and forward pass.")
    gradient_accumulation_steps: PositiveInt = flag(1, "Forward passes per update of the weights.")
    max_train_steps: PositiveInt = flag(1000, "Updates of the weights.")
    learning_rate: PositiveFloat = flag(1e-4, "Learning rate after the warm-up.")
    lr_scheduler: str = flag("constant_with_warmup", "Learning rate schedule, as in diffusers.", choices=LR_SCHEDULERS)
    lr_warmup_steps: NonNegativeInt = flag(0, "Updates of warm-up.")
    adam_beta1: Share = flag(0.9, "AdamW's first decay rate.")
    adam_beta2: Share = flag(0.999, "AdamW's second decay rate.")
    adam_weight_decay: NonNegativeFloat = flag(0.0, "AdamW's weight decay.")
    adam_epsilon: PositiveFloat = flag(1e-8, "AdamW's epsilon.")
    max_grad_norm: PositiveFloat = flag(1.0, "The gradient's norm is clipped to this.")
    mixed_precision: str | None = flag(
        None, "Precision of the forward pass. Default: accelerate's.", choices=("no", "fp16", "bf16")
    )
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass: less memory.")
    ema_decay: Share = flag(0.9999, "Decay of the exponential moving average of the weights, after its ramp.")
    checkpointing_steps: PositiveInt = flag(500, "Updates between two checkpoints.")
    checkpoints_total_limit: PositiveInt = flag(2, "Number of newest checkpoints of this run to keep.")
    resume_from_checkpoint: str = flag(
        "latest", "A checkpoint's folder, or 'latest': the newest complete one of this run in --output_dir, if any."
    )
    validation_steps: NonNegativeInt = flag(250, "Updates between two validations on held-out images; 0 is never.")
    preview_steps: NonNegativeInt = flag(0, "Updates between two grids of samples; 0 is never.")
    logging_steps: PositiveInt = flag(10, "Updates between two log entries.")
    report_to: str = flag("tensorboard", "Tracker, as accelerate names them; 'none' for none.", choices=TRACKERS)


@dataclass
class SamplingArguments(CheckedFields):
    """Flags for the sampling steps, of previews and as the default of the finished pipeline."""

    num_inference_steps: PositiveInt = flag(FEW_STEPS, "Steps of the second-order solver.")
    respacing: str | None = flag(None, "Instead: the published sampler's timesteps, in OpenAI's notation.")

    def steps(self) -> dict[str, Any]:
        """The steps as the pipeline's argument."""
        if self.respacing is not None:
            return {"respacing": self.respacing}
        return {"num_inference_steps": self.num_inference_steps}

    def count_steps(self, num_train_timesteps: int) -> int:
        """Steps of a sample; refuses, before the training, more than the schedule has."""
        if self.respacing is not None:
            return len(space_timesteps(num_train_timesteps, self.respacing))
        if self.num_inference_steps >= num_train_timesteps:
            raise ValueError(
                f"--num_inference_steps {self.num_inference_steps} does not lie between 1 and "
                f"{num_train_timesteps - 1}, one less than --num_train_timesteps."
            )
        return self.num_inference_steps


@dataclass
class ModelArguments(CheckedFields):
    """Flags of UNet and classifier: architecture, for images of 64x64 on one GPU, and the noise schedule they share."""

    model_channels: Width = flag(128, "Base width.")
    channel_mult: Annotated[list[Factor], Length(1)] = flag([1, 2, 3, 4], "Width of each level, relative to the base.")
    num_res_blocks: Depth = flag(2, "Residual blocks per level.")
    attention_resolutions: list[PositiveInt] = flag([32, 16, 8], "Side lengths in pixels with attention.")
    num_heads: PositiveInt | None = flag(None, "Fixed number of attention heads.")
    attention_head_dim: PositiveInt | None = flag(None, "Fixed width of attention heads; 64 if neither is given.")
    dropout: Share = flag(0.0, "Rate of dropout.")
    resblock_updown: bool = flag(True, "Resample with residual blocks.")
    conv_resample: bool = flag(True, "Resample with learned convolutions, without residual blocks.")
    use_scale_shift_norm: bool = flag(True, "Adaptive group normalisation.")
    beta_schedule: str = flag("squaredcos_cap_v2", "Noise schedule.", choices=tuple(SCHEDULES))
    num_train_timesteps: Annotated[int, Range(at_least=2, at_most=10**6)] = flag(1000, "Timesteps of the schedule.")
    rescale_timesteps: bool = flag(False, "Scale the timesteps that models take to [0, 1000).")

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = level_widths(self.model_channels, self.channel_mult)
        count_heads(widths[-1], self.num_heads, self.attention_head_dim)  # the middle block always has attention
        make_betas(self.beta_schedule, self.num_train_timesteps)  # refuses too few timesteps for a linear schedule

    def schedule(self) -> dict[str, Any]:
        """The arguments that the scheduler's constructor and the classifier's config share."""
        return {name: getattr(self, name) for name in ("beta_schedule", "num_train_timesteps", "rescale_timesteps")}

    def architecture(self) -> dict[str, Any]:
        """The arguments that the models' constructors share."""
        names = [field.name for field in dataclasses.fields(ModelArguments)]
        return {name: getattr(self, name) for name in names if name not in self.schedule()}


def parse_arguments(
    stages: dict[str, type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[DataArguments, dict[str, Any]]:
    """The data's arguments, and an instance of each stage's dataclass, from flags and recipe.

    Args:
        stages (`dict[str, type]`): The dataclass of flags of each stage, by its section in the recipe.
        argv (`Sequence[str]`, *optional*): The command line. Default: that of the process.
        description (`str`, *optional*): For `--help`.

    Raises:
        `ValueError`: For a missing recipe, an unknown key, or a value of a flag or key that is not allowed.
    """
    return fill_arguments(stages, vars(make_parser(stages, description).parse_args(argv)))


def make_parser(stages: dict[str, type], description: str | None) -> argparse.ArgumentParser:
    """A parser of the data's and the stages' flags, which returns those that are given."""
    flags = _flags_of([DataArguments, *stages.values()])
    parser = HfArgumentParser(flags, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe",
        help=f"A recipe's name ({RECIPE_NAMES}) or a YAML file. Without one: that of the built-in dataset, digits by "
        f"default; with other images: images. Its values are checked like flags; numbers may be written as 1e-4.",
    )
    if len(stages) > 1:
        for name, stage in stages.items():
            parser._add_dataclass_arguments(_flags_of([stage], prefix=f"{name}_"))
    for action in parser._actions:  # only given flags count: the rest comes from the recipe
        action.default = argparse.SUPPRESS
    return parser


def fill_arguments(
    stages: dict[str, type], given: dict[str, Any], plan: dict[str, dict[str, Any]] | None = None
) -> tuple[DataArguments, dict[str, Any]]:
    """What [`parse_arguments`] returns, from the flags that are given and from their recipe, or that of a plan."""
    given = dict(given)
    dataset = given.get("dataset_name", BUILT_IN[0])
    has_data = "train_data_dir" in given or dataset not in BUILT_IN
    recipe_name = given.pop("recipe", "images" if has_data else dataset)
    if plan is None:
        recipe = read_recipe(recipe_name)
    else:
        recipe_name, recipe = "plan", {"data": {}, **copy.deepcopy(plan)}
    if len(recipe) > 1 and not set(recipe) & set(stages):
        raise ValueError(
            f"The recipe has no section {' or '.join(stages)}, only {', '.join(sorted(set(recipe) - {'data'}))}; "
            f"give another --recipe."
        )
    for name in stages:
        of_stage = _section(recipe.get(name, {}).pop("data", None), f"{name}: data", recipe_name)
        if of_stage and len(stages) > 1:
            raise ValueError(f"The recipe's section {name!r} has data of its own; here all stages share theirs.")
        recipe["data"].update(of_stage)
    if has_data:  # they replace the recipe's own data
        recipe["data"] |= {"dataset_name": None, "train_data_dir": None}
    data = _fill(DataArguments, "data", recipe["data"], recipe_name, given)
    if data.resolution and (even := [halvable(side, lowest=side) for side in data.resolution]) != data.resolution:
        given_sides, used = (" ".join(map(str, sides)) for sides in (data.resolution, even))
        logger.info(f"--resolution {given_sides} has sides that networks cannot halve; {used} is used.")
        data.resolution = even
    filled = {name: _fill(stage, name, recipe.get(name, {}), recipe_name, given) for name, stage in stages.items()}
    for name, stage in filled.items():
        stage.recipe = Path(recipe_name).stem
        check_output_dir(name, stage, data)
    return data, filled


def check_output_dir(name: str, stage: RunArguments, data: DataArguments) -> None:
    """Refuses an `output_dir` that is not writable, lies among the images, or has foreign files where results go."""
    check_place(stage.output_dir, "--output_dir")
    check_outside(stage.output_dir, [data.train_data_dir, data.dataset_name])
    if not isinstance(stage, LoopArguments):
        return
    folder, pretrained = Path(stage.output_dir) / name, getattr(stage, "pretrained_model", None)
    check_place(folder, "--output_dir")
    check_named(stage.resume_from_checkpoint, folder)
    check_kind([folder / part for part in ("pipeline", "model", "logs", "snapshot")], is_folder=True)
    check_kind([folder / HISTORY, folder / RUN_FILE, *folder.glob("preview-*.png")], is_folder=False)
    check_replaceable(
        [folder / "pipeline", folder / "model"],
        lambda path: (folder / HISTORY).is_file(),
        [] if pretrained is None else [pretrained, Path(pretrained).parent],  # a pipeline, or the UNet of one
    )


def read_recipe(name_or_path: str) -> dict[str, dict[str, Any]]:
    """The sections of a recipe, by its name in this package or from a YAML file.

    Raises:
        `ValueError`: If there is no such recipe, or it is not YAML with sections of unique keys.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ValueError(f"There is no recipe {name_or_path!r}; give a YAML file (.yaml), or one of {RECIPE_NAMES}.")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)
    except UnicodeDecodeError:
        raise ValueError(f"The recipe {path} is not in UTF-8; save it as UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise ValueError(f"The recipe {path} cannot be read{line}: {error.problem}; correct its YAML.") from None
    # Raised for invalid characters and dates, and for a value that does not fit its tag
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {' '.join(str(error).split())}; correct it.") from None
    if not isinstance(recipe, dict):
        raise ValueError(
            f"The recipe {path} has no sections; write the name of each, such as diffusion:, above its "
            f"indented lines of key: value."
        )
    if unknown := set(recipe) - SECTIONS:
        raise ValueError(f"The recipe {path} has unknown sections: {_with_suggestions(unknown, SECTIONS)}.")
    return {"data": {}, **{name: _section(values, name, str(path)) for name, values in recipe.items()}}


class _RecipeLoader(yaml.SafeLoader):
    """YAML with numbers such as `1e-4` (a string to YAML 1.1), without duplicate keys and numbers in other bases."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value):
            problem = f"{node.value} is a whole number in another base than 10 to YAML"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_yaml_int(node)


_RecipeLoader.add_constructor("tag:yaml.org,2002:int", _RecipeLoader.construct_yaml_int)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _section(values: Any, name: str, recipe: str) -> dict[str, Any]:
    if not isinstance(values, dict | None):
        raise ValueError(f"Section {name!r} of the recipe {recipe} must be indented lines of key: value.")
    return values or {}


def _with_suggestions(unknown: Collection[Any], known: Collection[str]) -> str:
    """Unknown names, each with the nearest known one."""
    nearest = {str(name): difflib.get_close_matches(str(name), known, n=1) for name in unknown}
    return ", ".join(f"{name} (did you mean {found[0]}?)" if found else name for name, found in sorted(nearest.items()))


def quiet_libraries() -> None:
    """Limits other libraries to warnings."""
    for noisy in ("httpx", "httpx2", "huggingface_hub", "datasets", "transformers", "diffusers", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def run_script(main: Any) -> None:
    """Runs a training script, with its exit status."""
    log_to_screen()
    quiet_libraries()
    with user_command(), resumable("Stopped. Rerun the same command to resume from the last checkpoint."):
        main()


def _flags_of(stages: Iterable[type], prefix: str = "") -> type:
    """A dataclass with every field of some dataclasses, each once, under prefixed names."""
    flags = {f.name: f for stage in stages for f in dataclasses.fields(stage) if f.init}
    return dataclasses.make_dataclass("Flags", [(prefix + name, f.type, copy.copy(f)) for name, f in flags.items()])


def _fill(stage: type, section: str, recipe: dict[str, Any], recipe_name: str, given: dict[str, Any]) -> Any:
    """A stage's dataclass from its section of a recipe, and from its flags, which override it."""
    names = {f.name for f in dataclasses.fields(stage) if f.init}
    if unknown := set(recipe) - names:
        raise ValueError(
            f"In the recipe {recipe_name}, section {section!r} has unknown keys: {_with_suggestions(unknown, names)}."
        )
    check_values(stage, recipe, lambda name, value: f"{name}: {value} in section {section!r} of {recipe_name}")
    return stage(**recipe | flags_of_stage(stage, section, given))


def flags_of_stage(stage: type, section: str, given: dict[str, Any]) -> dict[str, Any]:
    """The flags that are given for a stage: those for all stages, and those for this one, which override them."""
    names = {f.name for f in dataclasses.fields(stage) if f.init}
    values: dict[str, Any] = {}
    for prefix in ("", f"{section}_"):
        flags = {name: given[prefix + name] for name in names if prefix + name in given}
        check_values(stage, flags, partial(as_flag, prefix=prefix))
        values |= flags
    return values
