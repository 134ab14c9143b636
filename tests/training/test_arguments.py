"""Flags and recipes."""

import dataclasses

import pytest
import yaml

from hf_guided import ADMClassifierConfig, ADMForImageClassification, ADMUNet2DModel
from hf_guided.data import load_labelled_images
from hf_guided.training.arguments import RECIPES, parse_arguments, read_recipe
from hf_guided.training.train import ReportArguments, check_stages
from hf_guided.training.train_classifier import ClassifierArguments
from hf_guided.training.train_diffusion import DiffusionArguments

STAGES = {
    "judge": ClassifierArguments,
    "classifier": ClassifierArguments,
    "diffusion": DiffusionArguments,
    "report": ReportArguments,
}


def test_without_flags_the_digits():
    data, stages = parse_arguments(STAGES, [])
    recipe = read_recipe("digits")
    assert data.dataset_name == "digits"
    for name, section in stages.items():
        for key, value in recipe[name].items():
            assert getattr(section, key) == value
    assert stages["judge"].noisy is False
    assert stages["classifier"].noisy is True


def test_a_flag_is_for_all_stages_or_for_one():
    argv = ["--max_train_steps", "7", "--classifier_max_train_steps", "9", "--diffusion_channel_mult", "1", "2", "2"]
    _, stages = parse_arguments(STAGES, [*argv, "--seed", "3", "--no_classifier_noisy"])
    assert [stages[name].max_train_steps for name in ("judge", "classifier", "diffusion")] == [7, 9, 7]
    assert stages["diffusion"].channel_mult == [1, 2, 2]
    assert stages["classifier"].channel_mult == read_recipe("digits")["classifier"]["channel_mult"]
    assert {stage.seed for stage in stages.values()} == {3}
    assert stages["classifier"].noisy is False


def test_every_key_is_a_flag():
    arguments = {"str": "x", "int": "3", "float": "0.5", "bool": "true"}
    valid = {"lr_scheduler": "linear", "respacing": "7"}
    beside = {
        "push_to_hub": ["--hub_model_id", "me/x"],
        "variance_type": ["--loss_type", "simple"],
        "num_train_timesteps": ["--num_inference_steps", "2"],
    }
    for field in filter(lambda field: field.init, dataclasses.fields(DiffusionArguments)):
        kind = next((name for name in arguments if name in str(field.type)), "str")
        value = valid.get(field.name) or field.metadata.get("choices", [arguments[kind]])[-1]
        argv = [f"--{field.name}", value, *beside.get(field.name, [])]
        given = getattr(parse_arguments({"diffusion": DiffusionArguments}, argv)[1]["diffusion"], field.name)
        assert str(given[0] if isinstance(given, list) else given).lower().removesuffix(".0") == value


def test_own_data_take_the_place_of_the_recipes():
    data, stages = parse_arguments(STAGES, ["--train_data_dir", "photos", "--resolution", "64"])
    assert (data.dataset_name, data.train_data_dir, data.resolution) == (None, "photos", [64])
    assert stages["diffusion"].max_train_steps == read_recipe("images")["diffusion"]["max_train_steps"]
    data, stages = parse_arguments(STAGES, ["--dataset_name", "digits"])
    assert stages["diffusion"].max_train_steps == read_recipe("digits")["diffusion"]["max_train_steps"]
    data, _ = parse_arguments(STAGES, ["--recipe", "cifar10", "--train_data_dir", "photos"])
    assert (data.dataset_name, data.resolution) == (None, [32])


RECIPES_OF_THE_WALK = [path for path in sorted(RECIPES.glob("*.yaml")) if path.stem != "photographs"]


@pytest.mark.parametrize("path", RECIPES_OF_THE_WALK, ids=lambda path: path.stem)
def test_every_recipe_makes_its_models(path):
    import torch

    data, stages = parse_arguments(STAGES, ["--recipe", path.stem])
    resolution = (data.resolution or [8 if data.dataset_name == "digits" else 64])[0]
    with torch.device("meta"):
        unet = ADMUNet2DModel(sample_size=resolution, num_class_embeds=10, **stages["diffusion"].architecture())
        for name in ("judge", "classifier"):
            config = {"sample_size": resolution, "num_labels": 10, "pool": stages[name].pool}
            ADMForImageClassification(ADMClassifierConfig(**config, **stages[name].architecture()))
    published = {"imagenet64": 295904454, "imagenet128": 421529606, "imagenet256": 553838086, "imagenet512": 558997638}
    if path.stem in published:  # of 1,000 classes
        width = unet.class_embedding.weight.shape[1]
        assert unet.num_parameters() + 990 * width == published[path.stem]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'digit'; give a YAML file, or one of .*digits"):
        parse_arguments(STAGES, ["--recipe", "digit"])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"diffusion": {"learning_rat": 1}}))
    with pytest.raises(ValueError, match="section 'diffusion' has unknown keys: learning_rat"):
        parse_arguments(STAGES, ["--recipe", str(recipe)])
    recipe.write_text(yaml.safe_dump({"unet": {}}))
    with pytest.raises(ValueError, match="sections that no script knows: unet"):
        parse_arguments(STAGES, ["--recipe", str(recipe)])
    for argv, message in [
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--respacing", "x"], "not understood"),
        (["--num_inference_steps", "1000"], "does not lie between 1 and 999"),
        (["--num_train_timesteps", "9"], "--num_inference_steps 10 does not lie between 1 and 8"),
        (["--lr_scheduler", "nonsense"], "nonsense is not one of .*cosine"),
        (["--classifier_train_batch_size", "0"], "--train_batch_size 0 is too small"),
        (["--checkpoints_total_limit", "0"], "must be 1 or more"),
        (["--variance_type", "fixed_small"], "add --loss_type simple"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_arguments(STAGES, argv)


def test_stages_that_contradict_each_other_are_refused():
    for argv, message in [
        (["--classifier_beta_schedule", "linear"], "both must see the same noise"),
        (["--label_dropout", "0"], "must always be told"),
        (["--report_respacing", "ddim7777"], "no integer stride"),
        (["--no_classifier_noisy"], "must be trained on noised images"),
        (["--judge_noisy"], "must be trained on noised images"),
        (["--sampling_batch_size", "0"], "give 1 or more"),
        (["--default_scale", "-1"], "finite number from 0 up"),
        (["--num_images", "3"], "take 6 or more"),
        (["--diffusion_channel_mult", "1", "1", "1", "1", "1"], "cannot be halved 4 times"),
        (["--classifier_num_heads", "5"], "do not divide into 5 attention heads"),
        (["--judge_model_channels", "20"], "multiple of 32"),
    ]:
        data, stages = parse_arguments(STAGES, argv)
        images = load_labelled_images(data, seed=0)[0]
        with pytest.raises(ValueError, match=message):
            check_stages(stages, images)
