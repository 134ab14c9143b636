"""What to train in a given time: size of the images, widths, batches and steps of every stage.

Only numbers come in: those of the pictures, the seconds of a step and the bytes of a batch on some [`Machine`]. The
rule and the measurements behind it: `tests/benchmarks/budgets.py`, and the table in `tests/benchmarks/README.md`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..data.dataset import halvable
from ..fields import MOST_COUNT

Flags = dict[str, Any]

# Shares of the time that is left when they are planned; the UNet gets the rest.
SHARES = {"judge": 0.12, "classifier": 0.12, "report": 0.15}
BATCH_SIZES = (64, 32, 16)  # the first that gets ENOUGH_UPDATES
ENOUGH_UPDATES = 800
WIDTHS = (32, 64, 96, 128, 192, 256)
# That the narrowest UNet must see to draw anything; wider ones see more, by the cube of the width.
ENOUGH_IMAGES = 20_000
FEWEST_SAMPLES, MOST_SAMPLES = 60, 1000
FEW_IMAGES, FEW_OF_A_CLASS = 500, 20
FEWEST_LOOKS, BETWEEN_LOOKS = 3, 1200.0  # at a stage while it trains: at least, and seconds between them
_VALIDATED, _PREVIEWED, _OF_GRID = 1024, 80, 100  # images
NUM_INFERENCE_STEPS = (20, 10, 5)  # the first whose grid of samples takes little of the time
MOST_INSPECTED = 2000
LEAST_TO_CROP = 16  # pixels, for random crops to help a classifier
_INSPECTION = 11 * 4 / 3  # training steps of an image at 11 noise levels, with its gradient, and one of training
MEMORY_SHARE = 0.6  # of the memory that is free
SAVING, REPORTING = 1.5, 6.0  # seconds to save a stage, and to draw and to save a report

# Width of each level, by their number: the last ones as published for 64, 128, 256 and 512 pixels.
_LEVELS = {
    1: [1],
    2: [1, 2],
    3: [1, 2, 2],
    4: [1, 2, 3, 4],
    5: [1, 1, 2, 3, 4],
    6: [1, 1, 2, 2, 4, 4],
    7: [1, 1, 1, 2, 2, 4, 4],
}
_SHARED = {"lr_scheduler": "cosine", "ema_decay": 0.9999}  # whose ramp averages the last tenth of the steps
_UNET = {"num_res_blocks": 1, "num_heads": 4, "resblock_updown": False}
_CLASSIFIER = {**_UNET, "adam_weight_decay": 0.05, "dropout": 0.1}
# Flags of each stage that do not depend on pictures or time, and its learning rate at a width of 32.
FLAGS: dict[str, Flags] = {
    "judge": {**_CLASSIFIER, "noisy": False, "pool": "attention", "learning_rate": 3e-3},
    "classifier": {**_CLASSIFIER, "pool": "attention", "learning_rate": 2e-3},
    "diffusion": {**_UNET, "prediction_type": "v_prediction", "label_dropout": 0.1, "learning_rate": 2e-3},
    "upscaler": {**_UNET, "prediction_type": "v_prediction", "label_dropout": 0.1, "learning_rate": 2e-3},
    "vae": {"num_res_blocks": 1, "latent_dim": 32, "learning_rate": 2e-3},
    "gan": {
        "latent_dim": 64,
        "learning_rate": 2e-4,
        "discriminator_learning_rate": 8e-4,
        "max_grad_norm": 1000.0,  # BigGAN does not clip
    },
    "flow": {"num_blocks": 8, "learning_rate": 2e-3},
}


@dataclass(frozen=True)
class Pictures:
    """The images of a plan: their own size, channels, the training images of each class, those held out."""

    resolution: tuple[int, int]
    image_channels: int
    images_of_class: tuple[int, ...]
    num_held_out: int

    @property
    def num_images(self) -> int:
        return sum(self.images_of_class)

    def __str__(self) -> str:
        height, width = self.resolution
        kind, classes = "gray" if self.image_channels == 1 else "colour", len(self.images_of_class)
        return (
            f"{self.num_images:,} {kind} images of {height}x{width} in {classes:,} class{'es' * (classes != 1)}, and "
            f"{self.num_held_out:,} held out"
        )


class Machine(Protocol):
    """Where it is trained."""

    memory: int  # bytes that are free

    def seconds(self, stage: str, flags: Flags, resolution: tuple[int, int]) -> float:
        """Seconds of a step of a stage with some flags."""

    def bytes(self, stage: str, flags: Flags, resolution: tuple[int, int]) -> int:
        """Bytes that a stage with some flags takes."""


@dataclass
class Plan:
    """The flags of each stage within a budget, as the sections of a recipe, and what is doubtful."""

    budget: float  # seconds
    pictures: Pictures
    recipe: dict[str, Flags]
    seconds: dict[str, float] = field(default_factory=dict)  # that each stage is expected to take
    training_seconds: dict[str, float] = field(default_factory=dict)  # of these, in the loop
    seconds_per_step: dict[str, float] = field(default_factory=dict)  # of each stage
    doubts: list[str] = field(default_factory=list)


def make_plan(
    pictures: Pictures, budget: float, stages: Mapping[str, Flags], machine: Machine, data: Flags, spent: float = 0.0
) -> Plan:
    """The plan for pictures and a time.

    Args:
        pictures ([`Pictures`]): What is trained on.
        budget (`float`): Seconds of everything, from the start of the program to its end.
        stages (`Mapping[str, dict]`): The names of the stages, each with the flags that are given for it.
        machine ([`Machine`]): Tells the speed.
        data (`dict`): The flags that are given for the images.
        spent (`float`, defaults to 0): Seconds that have passed.
    """
    plan = Plan(budget, pictures, {"data": {}})
    has_guidance = "report" in stages
    trained = [name for name in stages if name != "report"]
    why = cannot_classify(pictures) if has_guidance else ""
    if why or stages.get("report", {}).get("classifier_free"):
        plan.doubts += [why] if why else []
        trained.remove("classifier")
    main = "diffusion" if has_guidance else trained[-1]
    shares = {name: SHARES[name] for name in stages if has_guidance and name in (*trained, "report") and name != main}
    shares[main] = 1 - sum(shares.values())
    left = budget - spent

    resolution = pictures.resolution
    if "resolution" not in data:
        resolution = affordable_size(pictures, left * shares[main], main, stages[main], machine)
        plan.recipe["data"]["resolution"] = list(resolution)
        if resolution != pictures.resolution:
            plan.doubts.append(
                f"Images of {_sides(pictures.resolution)} take longer than there is time for, so they are trained at "
                f"{_sides(resolution)}; give --resolution to have another size."
            )
    for name in trained:
        flags, step = best_flags(name, stages[name], resolution, left * shares[name], pictures, machine)
        plan.recipe[name], plan.seconds_per_step[name] = flags, step
        fit_steps(plan, name, left * shares[name], stages[name])
    if has_guidance:
        plan.recipe["report"] = {}
        fit_report(plan, left * shares["report"], stages)
    plan.doubts += doubts(pictures, plan, main, stages[main])
    return plan


def levels(resolution: tuple[int, int]) -> int:
    """Levels of a network: the shorter side is halved while it is even and above 8 pixels, at most six times."""
    number, sides = 1, resolution
    while min(sides) > 8 and not any(side % 2 for side in sides) and number < max(_LEVELS):
        number, sides = number + 1, (sides[0] // 2, sides[1] // 2)
    return max(number, 2 if not any(side % 2 for side in resolution) else 1)


def flags_at(stage: str, width: int, batch_size: int, resolution: tuple[int, int], pictures: Pictures) -> Flags:
    """The flags of a stage at a width and a batch size, without those that the time decides."""
    number = levels(resolution)
    flags = {**_SHARED, **FLAGS[stage], "train_batch_size": min(batch_size, pictures.num_images)}
    if stage != "gan":
        flags["learning_rate"] = round(flags["learning_rate"] * 32 / width * (batch_size / 64) ** 0.5, 6)
    if stage == "flow":
        return {**flags, "num_levels": max(1, min(number - 1, 4)), "hidden_channels": 2 * width}
    flags |= {"model_channels": width, "channel_mult": _LEVELS[number]}
    if stage == "gan":
        flags["discriminator_channels"] = width
    elif stage != "vae":
        if stage == "judge":
            return {**flags, "attention_resolutions": [], "augment": min(resolution) >= LEAST_TO_CROP}
        flags["attention_resolutions"] = [resolution[0] >> (number - 1)]
        if len(pictures.images_of_class) < 2:
            flags["label_dropout"] = 0.0
    return flags


def affordable_size(pictures: Pictures, seconds: float, stage: str, given: Flags, machine: Machine) -> tuple[int, int]:
    """The largest size, up to the pictures' own, at which the narrowest network sees enough images.

    The time of a step is measured at about 32 pixels and grows with the number of pixels.
    """
    own = pictures.resolution
    sizes = [own]
    for side in (384, 256, 192, 128, 96, 64, 48, 32, 24, 16):
        if side < min(own):
            sizes.append((halvable(round(own[0] * side / min(own))), halvable(round(own[1] * side / min(own)))))
    small = next(size for size in sizes if min(size) <= 32 or size == sizes[-1])
    flags = {**flags_at(stage, WIDTHS[0], BATCH_SIZES[-1], small, pictures), **given}
    per_pixel = machine.seconds(stage, flags, small) / math.prod(small) / flags["train_batch_size"]
    affords = (size for size in sizes if per_pixel * math.prod(size) * ENOUGH_IMAGES <= seconds)
    return next(affords, sizes[-1])


def best_flags(
    stage: str, given: Flags, resolution: tuple[int, int], seconds: float, pictures: Pictures, machine: Machine
) -> tuple[Flags, float]:
    """The flags of the widest network that gets enough updates in some seconds, in the faster precision.

    Returns:
        The flags, those given included, and the seconds of a step.
    """
    best: tuple[Flags, float] | None = None
    for width in WIDTHS:
        wanted = ENOUGH_IMAGES * (width / WIDTHS[0]) ** 3
        # An image of the next width takes at least half as long again
        if best is not None and 1.5 * best[1] / images_of_step(best[0]) * wanted > seconds:
            break
        found = flags, step = best_batch(stage, width, given, resolution, seconds, pictures, machine)
        is_enough = step / images_of_step(flags) * wanted <= seconds
        if best is None or is_enough:
            best = found
        if not is_enough or given.get("model_channels") or given.get("hidden_channels"):
            break
    assert best is not None
    flags, step = best
    if "mixed_precision" not in given:
        half = {**flags, "mixed_precision": "bf16"}
        if (faster := machine.seconds(stage, half, resolution)) < 0.9 * step:
            return half, faster
    return flags, step


def best_batch(
    stage: str,
    width: int,
    given: Flags,
    resolution: tuple[int, int],
    seconds: float,
    pictures: Pictures,
    machine: Machine,
) -> tuple[Flags, float]:
    """The flags at a width with the largest batch that gets enough updates, or else the smallest; seconds of a step."""
    step, previous = 0.0, 1
    for batch_size in BATCH_SIZES[:1] if stage == "gan" else BATCH_SIZES:  # adversaries want large batches
        is_last = batch_size == BATCH_SIZES[-1] or "train_batch_size" in given
        if step and not is_last and step * batch_size / previous * ENOUGH_UPDATES > seconds:
            continue  # cannot be enough
        flags = in_memory(
            stage, {**flags_at(stage, width, batch_size, resolution, pictures), **given}, resolution, machine
        )
        step, previous = machine.seconds(stage, flags, resolution), batch_size
        if is_last or step * ENOUGH_UPDATES <= seconds:
            break
    return flags, step


def images_of_step(flags: Flags) -> int:
    """Images of an update of the weights."""
    return flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1)


def in_memory(stage: str, flags: Flags, resolution: tuple[int, int], machine: Machine) -> Flags:
    """The flags with a batch in as many parts as fit into memory one after the other."""
    whole, parts = flags["train_batch_size"], 1
    while machine.bytes(stage, flags, resolution) > MEMORY_SHARE * machine.memory and flags["train_batch_size"] > 1:
        parts *= 2
        flags = {**flags, "train_batch_size": max(1, whole // parts), "gradient_accumulation_steps": parts}
    return flags


def fit_steps(plan: Plan, stage: str, seconds: float, given: Flags) -> None:
    """Sets the steps of a stage to what some seconds allow, unless they are given, and what follows from them."""
    flags, step, num_held_out = plan.recipe[stage], plan.seconds_per_step[stage], plan.pictures.num_held_out
    samples = images_of_step(flags)
    updates, looks, previews = max(0.0, seconds - SAVING) / step, max(FEWEST_LOOKS, int(seconds / BETWEEN_LOOKS)), 0
    # What is done beside updates and after them, in their time: a forward pass is a third of a step
    beside, after = looks * min(num_held_out, _VALIDATED) / 3 / samples, 0.0
    if stage == "classifier":
        inspected = min(num_held_out, MOST_INSPECTED, int(0.1 * updates * samples / _INSPECTION))
        flags["inspected_images"] = max(1, inspected)
        after = inspected * _INSPECTION / samples
    elif stage != "judge":
        if stage in ("diffusion", "upscaler"):
            affords = (number for number in NUM_INFERENCE_STEPS if _PREVIEWED * number / 3 / samples <= 0.2 * updates)
            flags["num_inference_steps"] = next(affords, NUM_INFERENCE_STEPS[-1])
        num_steps = {"num_inference_steps": 1, **flags, **given}["num_inference_steps"]
        after = _PREVIEWED * num_steps / 3 / samples
        previews = looks if looks * after < 0.1 * updates else 0
        beside += previews * after
    steps = given.get("max_train_steps", min(MOST_COUNT, max(1, int(updates - beside - after))))
    flags |= {
        "max_train_steps": steps,
        "lr_warmup_steps": max(1, min(500, steps // 20)),
        "checkpointing_steps": max(1, min(math.ceil(steps / 4), int(300 / step))),
        "validation_steps": math.ceil(steps / looks),
        "preview_steps": math.ceil(steps / previews) if previews else 0,
        **given,
    }
    plan.training_seconds[stage] = (steps + beside) * step
    plan.seconds[stage] = plan.training_seconds[stage] + after * step + SAVING


def report_scales(has_classifier: bool, is_conditional: bool) -> list[tuple[Flags, int]]:
    """Guidance scales for a report, from those one likes to see to the fewest, with the samples that each must afford.

    The pipeline saves the best of the conditional ones.
    """
    if not is_conditional:
        return [
            ({"guidance_scales": [0.0, 1.0, 3.0, 10.0], "conditional_scales": []}, 120),
            ({"guidance_scales": [1.0, 3.0], "conditional_scales": []}, 0),
        ]
    if not has_classifier:
        return [({"guidance_scales": [], "conditional_scales": [1.0, 1.5, 2.0, 4.0]}, 0)]
    return [
        ({"guidance_scales": [0.0, 3.0], "conditional_scales": [0.0, 0.5, 1.0, 3.0]}, 300),
        ({"guidance_scales": [], "conditional_scales": [0.0, 0.5, 1.0, 3.0]}, 200),
        ({"guidance_scales": [], "conditional_scales": [0.0, 0.5, 1.0]}, 0),
    ]


def fit_report(plan: Plan, seconds: float, stages: Mapping[str, Flags]) -> None:
    """Sets scales, samples and their steps to what some seconds allow, unless they are given."""
    given, flags = stages["report"], plan.recipe["report"]
    has_classifier = "classifier" in plan.recipe
    num_steps = {**plan.recipe["diffusion"], **given}["num_inference_steps"]

    def affordable(scales: Flags, num_steps: int) -> tuple[int, float, float]:
        """The samples at each scale, seconds of one at all of them, and as many as the last grid takes."""
        used = {**scales, **given}
        each = num_steps * seconds_per_evaluation(plan, used)
        of_grid = _OF_GRID / (len(used["guidance_scales"]) + len(used["conditional_scales"]))
        return int(max(0.0, seconds - REPORTING) / each - of_grid), each, of_grid

    for scales, fewest in report_scales(has_classifier, stages["diffusion"].get("class_conditional", True)):
        number, each, of_grid = affordable(scales, num_steps)
        if number >= fewest:
            break
    if number < 2 * FEWEST_SAMPLES and "num_inference_steps" not in given:
        num_steps = max(5, num_steps // 2)
        number, each, of_grid = affordable(scales, num_steps)
    flags |= {
        **scales,
        "default_scale": None,
        "classifier_free": not has_classifier,
        "num_inference_steps": num_steps,
        "num_images": max(FEWEST_SAMPLES, min(MOST_SAMPLES, number)),
        "sampling_batch_size": min(250, 8 * plan.recipe["diffusion"]["train_batch_size"]),
        **given,
    }
    plan.seconds["report"] = (flags["num_images"] + of_grid) * each + REPORTING


def seconds_per_evaluation(plan: Plan, report: Flags) -> float:
    """Seconds of a sampling step of one image at every setting of the report, and of half a step at the dearest."""
    per_image = {name: step / images_of_step(plan.recipe[name]) for name, step in plan.seconds_per_step.items()}
    seconds = []
    for scale in report["guidance_scales"] + report["conditional_scales"]:
        if "classifier" in per_image:
            guiding = (scale > 0) * per_image["classifier"] * 2 / 3  # the gradient of the images
        else:
            guiding = (scale != 1) * per_image["diffusion"] / 3  # classifier-free guidance compares two predictions
        seconds.append(per_image["diffusion"] / 3 + guiding)
    return sum(seconds) + (report.get("default_scale") is None) * max(seconds, default=0) / 2


def cannot_classify(pictures: Pictures) -> str:
    """Why no noisy classifier is trained, in a sentence; empty if one is."""
    counts = sorted(pictures.images_of_class)
    if (usual := counts[len(counts) // 2]) < FEW_OF_A_CLASS:
        return (
            f"With {usual} images of most classes a classifier cannot learn to guide: none is trained, and "
            f"classifier-free guidance takes its place."
        )
    return ""


def doubts(pictures: Pictures, plan: Plan, main: str, given: Flags) -> list[str]:
    """What is doubtful about a plan, a sentence each."""
    found = []
    if pictures.num_images < FEW_IMAGES:
        found.append(
            f"{pictures.num_images} images are few: a model may memorise them; the report has the share of copies."
        )
    few = sum(count < FEW_OF_A_CLASS for count in pictures.images_of_class)
    if few and len(pictures.images_of_class) > 1:
        found.append(f"{few} class{'es have' if few > 1 else ' has'} fewer than {FEW_OF_A_CLASS} images.")
    if not pictures.num_held_out:
        found.append("No images are held out, so nothing shows what the best possible numbers are.")
    flags = plan.recipe[main]
    if flags["max_train_steps"] * images_of_step(flags) < ENOUGH_IMAGES / 2 and "max_train_steps" not in given:
        found.append(
            f"There is time for {flags['max_train_steps']:,} steps of {main} only; expect blurred pictures, and give "
            f"a longer --budget for better ones."
        )
    if plan.recipe.get("report", {}).get("num_images", MOST_SAMPLES) < 200:
        number = plan.recipe["report"]["num_images"]
        found.append(f"The report measures {number} samples a row, so its numbers are rough.")
    if (total := sum(plan.seconds.values())) > 1.15 * plan.budget:
        found.append(f"It will take about {total / plan.budget:.1f} times the budget.")
    return found


def _sides(resolution: tuple[int, int]) -> str:
    return "x".join(map(str, resolution))
