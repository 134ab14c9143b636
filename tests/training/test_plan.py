"""Plans for a time: what is chosen for twenty kinds of folders, at speeds that are given."""

import dataclasses
import math

import pytest
import torch

from hf_guided.data.dataset import halvable
from hf_guided.fields import as_flag, check_values
from hf_guided.models.unet_adm import ADMUNet2DModel
from hf_guided.training.plan import ENOUGH_IMAGES, WIDTHS, Pictures, best_flags, images_of_step, levels, make_plan
from hf_guided.training.train import STAGES as MAIN_JOB
from hf_guided.training.train import best_row, check_stages
from hf_guided.training.train_baseline import TRAINERS
from hf_guided.training.train_diffusion import unet_config
from hf_guided.training.train_upscaler import UpscalerArguments

MAIN = {name: {} for name in MAIN_JOB}
MINUTE, HOUR = 60.0, 3600.0


class GivenMachine:
    """A machine whose speed and memory are formulas; a CPU with two cores is about `speed=1`.

    A step takes time for each pixel, about as two convolutions do, and some for itself.
    """

    def __init__(self, speed=1.0, gigabytes=8.0, half=10.0):
        self.speed, self.memory, self.half = speed, int(gigabytes * 2**30), half  # of float32's time, in bfloat16
        self.asked = []

    def seconds(self, stage, flags, resolution):
        self.asked.append((stage, flags["train_batch_size"], resolution))
        width = flags.get("model_channels") or flags["hidden_channels"] / 2
        share = {"judge": 0.3, "classifier": 0.5}.get(stage, 1.0)
        images = flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1)
        seconds = 0.01 + share * images * 0.02 * math.prod(resolution) / 784 * (width / 32) ** 1.6
        return seconds / self.speed * (self.half if flags.get("mixed_precision") == "bf16" else 1)

    def bytes(self, stage, flags, resolution):
        width = flags.get("model_channels") or flags["hidden_channels"] / 2
        return int(5e7 + 600 * flags["train_batch_size"] * math.prod(resolution) * width)


CPU, GPU = {}, {"speed": 300.0, "gigabytes": 80.0, "half": 0.4}
# Height, width, channels, training images of each class, held out, seconds, machine
FOLDERS = {
    "digits in a minute": (8, 8, 1, [150] * 10, 297, MINUTE, CPU),
    "mnist": (28, 28, 1, [400] * 10, 1000, 30 * MINUTE, CPU),
    "mnist in ten minutes": (28, 28, 1, [400] * 10, 1000, 10 * MINUTE, CPU),
    "mnist in a night": (28, 28, 1, [400] * 10, 1000, 8 * HOUR, CPU),
    "odd": (27, 27, 1, [300] * 10, 300, 30 * MINUTE, CPU),
    "tiny and odd": (9, 9, 3, [100] * 3, 30, 5 * MINUTE, CPU),
    "wide": (32, 96, 3, [200] * 4, 80, HOUR, CPU),
    "portrait": (512, 384, 3, [1000] * 5, 500, HOUR, GPU),
    "cifar on a GPU": (32, 32, 3, [5000] * 10, 10_000, 8 * HOUR, GPU),
    "photographs, ten minutes": (256, 256, 3, [50] * 4, 20, 10 * MINUTE, CPU),
    "photographs, a GPU for a night": (512, 512, 3, [500] * 8, 400, 8 * HOUR, GPU),
    "photographs in two days": (64, 64, 3, [500] * 8, 400, 48 * HOUR, CPU),
    "sixty": (64, 64, 3, [20, 20, 14], 6, 10 * MINUTE, CPU),
    "twelve": (48, 48, 3, [6, 6], 0, 5 * MINUTE, CPU),
    "two classes": (32, 32, 3, [600, 300], 60, 10 * MINUTE, CPU),
    "one class of three images": (32, 32, 3, [400, 400, 3], 80, 10 * MINUTE, CPU),
    "hundreds of classes": (64, 64, 3, [60] * 300, 1800, 2 * HOUR, GPU),
    "a thousand classes of few": (32, 32, 3, [10] * 1000, 1000, HOUR, CPU),
    "a hundred thousand": (64, 64, 3, [1000] * 100, 5000, 24 * HOUR, GPU),
    "little memory": (128, 128, 3, [500] * 4, 200, 8 * HOUR, {"speed": 30.0, "gigabytes": 1.0}),
}


def planned(name, **given):
    height, width, channels, counts, held_out, seconds, machine = FOLDERS[name]
    own = (halvable(height), halvable(width))  # as images are loaded
    pictures = Pictures(own, channels, tuple(counts), held_out)
    data = given.pop("data", {})
    return make_plan(pictures, seconds, MAIN | given, GivenMachine(**machine), data)


def filled(plan):
    """The stages' flags, checked as a recipe's are."""
    for name, stage in MAIN_JOB.items():
        check_values(stage, plan.recipe.get(name, {}), as_flag)
    return {name: stage(**plan.recipe.get(name, {})) for name, stage in MAIN_JOB.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_plan_takes_the_time_there_is(name):
    plan = planned(name)
    assert 0.85 * plan.budget < sum(plan.seconds.values()) < 1.05 * plan.budget
    assert plan.seconds["diffusion"] > 0.5 * plan.budget


@pytest.mark.parametrize("name", FOLDERS)
def test_a_plan_is_a_recipe_that_trains(name):
    """Its flags are allowed, the stages fit together, and the UNet takes images of the planned size."""
    plan = planned(name)
    stages = filled(plan)
    check_stages(stages)
    resolution, pictures = tuple(plan.recipe["data"]["resolution"]), plan.pictures
    images = type("Images", (), {"resolution": resolution, "num_classes": len(pictures.images_of_class)})
    images.image_channels = pictures.image_channels
    with torch.device("meta"):
        unet = ADMUNet2DModel(**unet_config(stages["diffusion"], images))
        labels = torch.zeros(2, dtype=torch.long)
        noisy = torch.empty(2, images.image_channels, *resolution)
        assert unet(noisy, torch.zeros(2), labels).sample.shape[-2:] == resolution


@pytest.mark.parametrize("name", FOLDERS)
def test_a_plan_fits_the_machine(name):
    plan = planned(name)
    machine = GivenMachine(**FOLDERS[name][-1])
    resolution = tuple(plan.recipe["data"]["resolution"])
    for stage in plan.recipe.keys() & {"judge", "classifier", "diffusion"}:
        flags = plan.recipe[stage]
        assert machine.bytes(stage, flags, resolution) < machine.memory
        assert flags["train_batch_size"] * flags.get("gradient_accumulation_steps", 1) <= plan.pictures.num_images
        assert flags.get("mixed_precision") == ("bf16" if machine.half < 1 else None)


def test_pictures_keep_their_size_as_far_as_there_is_time():
    assert planned("mnist").recipe["data"]["resolution"] == [28, 28]
    assert planned("odd").recipe["data"]["resolution"] == [28, 28]
    assert planned("photographs, a GPU for a night").recipe["data"]["resolution"][0] >= 128
    height, width = planned("photographs, ten minutes").recipe["data"]["resolution"]
    assert height == width < 64
    assert any("256x256" in doubt and "--resolution" in doubt for doubt in planned("photographs, ten minutes").doubts)
    height, width = planned("wide").recipe["data"]["resolution"]
    assert width == 3 * height


def test_more_time_or_a_faster_machine_affords_more():
    def width(name):
        return planned(name).recipe["diffusion"]["model_channels"]

    assert width("mnist in ten minutes") == WIDTHS[0] < width("mnist in a night")
    pictures = Pictures((32, 32), 3, (500,) * 4, 100)
    widths = []
    for speed in (1, 30, 1000):
        flags, step = best_flags("diffusion", {}, (32, 32), HOUR, pictures, GivenMachine(speed))
        widths.append(flags["model_channels"])
        seen = HOUR / step * images_of_step(flags)
        assert seen >= ENOUGH_IMAGES * (widths[-1] / WIDTHS[0]) ** 3 or widths[-1] == WIDTHS[0]
    assert widths == sorted(set(widths))
    assert len(widths) == 3


def test_what_would_take_too_long_is_not_measured():
    """A step of 512 pixels takes minutes there."""
    machine = GivenMachine(speed=0.1)
    make_plan(Pictures((512, 512), 3, (500,) * 4, 100), 10 * MINUTE, MAIN, machine, {})
    assert all(max(resolution) <= 32 for _, _, resolution in machine.asked)


def test_given_flags_win():
    plan = planned(
        "mnist", diffusion={"max_train_steps": 7, "model_channels": 64, "prediction_type": "epsilon"},
        report={"num_images": 321, "num_inference_steps": 9}, data={"resolution": [14]},
    )  # fmt: skip
    assert "resolution" not in plan.recipe["data"]
    given = {"max_train_steps": 7, "model_channels": 64, "prediction_type": "epsilon"}
    assert given.items() <= plan.recipe["diffusion"].items()
    assert plan.recipe["report"]["num_images"] == 321
    assert plan.recipe["report"]["num_inference_steps"] == 9
    assert plan.seconds["diffusion"] < 0.2 * plan.budget


def test_small_folders_fall_back_and_say_so():
    twelve = planned("twelve")
    assert filled(twelve)["report"].classifier_free
    assert "classifier" not in twelve.recipe
    assert any("classifier-free guidance" in doubt for doubt in twelve.doubts)
    assert any("memorise" in doubt for doubt in twelve.doubts)
    assert any("held out" in doubt for doubt in twelve.doubts)
    assert any("1 class has fewer" in doubt for doubt in planned("one class of three images").doubts)
    assert filled(planned("a thousand classes of few"))["report"].classifier_free
    assert not planned("mnist").doubts


def test_too_little_time_is_named():
    plan = make_plan(Pictures((64, 64), 3, (100,) * 4, 40), MINUTE, MAIN, GivenMachine(), {})
    assert any("longer --budget" in doubt for doubt in plan.doubts)


@pytest.mark.parametrize("stage", ["diffusion", "upscaler", *TRAINERS])
def test_a_single_stage_has_all_the_time(stage):
    arguments = {"diffusion": MAIN_JOB["diffusion"], "upscaler": UpscalerArguments}
    arguments |= {name: kinds[0] for name, kinds in TRAINERS.items()}
    pictures = Pictures((32, 32), 3, (500,) * 4, 100)
    plan = make_plan(pictures, HOUR, {stage: {}}, GivenMachine(), {}, spent=60)
    assert 0.9 * (HOUR - 60) < plan.seconds[stage] < HOUR
    check_values(arguments[stage], plan.recipe[stage], as_flag)
    assert dataclasses.asdict(arguments[stage](**plan.recipe[stage]))["max_train_steps"] > 100


def test_an_unconditional_unet_is_reported_with_the_classifier_alone():
    plan = planned("mnist", diffusion={"class_conditional": False})
    check_stages(filled(plan))
    assert plan.recipe["report"]["conditional_scales"] == []
    assert max(plan.recipe["report"]["guidance_scales"]) >= 1
    assert 0.85 * plan.budget < sum(plan.seconds.values()) < 1.05 * plan.budget


@pytest.mark.parametrize(
    ("held_out", "accuracies", "best"),
    [
        (0.97, [0.90, 0.962, 0.98], 0.5),  # recognised as often as real images, and nearer to them than at scale 1
        (0.97, [0.965, 0.97, 0.98], 0.0),
        (0.97, [0.50, 0.60, 0.70], 1.0),  # none is: the most often
        (None, [0.90, 0.962, 0.98], 1.0),
    ],
)
def test_the_saved_scale_is_the_nearest_to_the_images_among_those_recognised(held_out, accuracies, best):
    rows = [] if held_out is None else [{"guidance_scale": None, "condition_unet": None, "accuracy/judge": held_out}]
    rows.append({"guidance_scale": 3.0, "condition_unet": False, "accuracy/judge": 0.99, "fid/judge": 0.01})
    for scale, accuracy, fid in zip((0.0, 0.5, 1.0), accuracies, (0.15, 0.2, 0.4), strict=True):
        rows.append({"guidance_scale": scale, "condition_unet": True, "accuracy/judge": accuracy, "fid/judge": fid})
    assert best_row(rows)["guidance_scale"] == best


def test_little_time_goes_into_training_not_into_samples():
    pictures, machine = Pictures((64, 64), 3, (45,) * 3, 14), GivenMachine(0.1)
    steps = {}
    for budget in (90, HOUR):
        flags = make_plan(pictures, budget, MAIN, machine, {}).recipe["diffusion"]
        steps[budget] = flags["num_inference_steps"]
        drawn = 80 * flags["num_inference_steps"] / 3
        assert flags["max_train_steps"] * images_of_step(flags) > 2 * drawn
    assert steps[90] < steps[HOUR] == 20


def test_one_class_is_planned_without_labels():
    pictures = Pictures((32, 32), 3, (600,), 60)
    plan = make_plan(pictures, HOUR, {"diffusion": {"class_conditional": False}}, GivenMachine(), {})
    check_values(MAIN_JOB["diffusion"], plan.recipe["diffusion"], as_flag)
    assert MAIN_JOB["diffusion"](**plan.recipe["diffusion"]).label_dropout == 0


@pytest.mark.parametrize(
    ("resolution", "number"),
    [
        ((8, 8), 2),
        ((28, 28), 3),
        ((32, 32), 3),
        ((32, 96), 3),
        ((64, 64), 4),
        ((12, 12), 2),
        ((256, 256), 6),
        ((4, 4), 2),
    ],
)
def test_levels_halve_down_to_about_eight_pixels(resolution, number):
    assert levels(resolution) == number
