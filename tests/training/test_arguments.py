"""Flags and recipes: what they may say, and that all else is refused before anything is loaded or written."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import yaml
from launching import run

from hf_guided import ADMClassifierConfig, ADMForImageClassification, ADMUNet2DModel
from hf_guided.data import DataArguments
from hf_guided.fields import CheckedFields, Range
from hf_guided.training.arguments import RECIPES, parse_arguments, read_recipe
from hf_guided.training.train import ReportArguments, check_stages
from hf_guided.training.train_baseline import TRAINERS
from hf_guided.training.train_classifier import ClassifierArguments
from hf_guided.training.train_diffusion import DiffusionArguments
from hf_guided.training.train_upscaler import UpscalerArguments

STAGES = {
    "judge": ClassifierArguments,
    "classifier": ClassifierArguments,
    "diffusion": DiffusionArguments,
    "report": ReportArguments,
}
ALL_STAGES = {**STAGES, "upscaler": UpscalerArguments, **{name: arguments for name, (arguments, _) in TRAINERS.items()}}
NAN, INF = math.nan, math.inf


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
    valid = {"respacing": "7", "resume_from_checkpoint": "latest", "model_channels": "96", "channel_mult": "2"}
    valid |= {"num_heads": "2", "attention_head_dim": "32"}
    beside = {
        "num_heads_upsample": ["--num_heads", "4"],
        "push_to_hub": ["--hub_model_id", "me/x"],
        "variance_type": ["--loss_type", "simple"],
        "num_train_timesteps": ["--num_inference_steps", "2"],
    }
    for field in filter(lambda field: field.init, dataclasses.fields(DiffusionArguments)):
        kind = next((name for name in arguments if name in str(field.type)), "str")
        value = valid.get(field.name) or field.metadata.get("choices", [arguments[kind]])[-1]
        argv = [f"--{field.name}", value, *beside.get(field.name, []), "--recipe", "images"]
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
    with pytest.raises(ValueError, match=r"no recipe 'digit'; give a YAML file \(.yaml\), or one of .*digits"):
        parse_arguments(STAGES, ["--recipe", "digit"])
    for argv, message in [
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--hub_model_id", "me/my model"], "--hub_model_id me/my model cannot name a repository; give user/name"),
        (["--hub_model_id", "a/b/c"], "cannot name a repository"),
        (["--respacing", "x"], "not understood"),
        (["--num_inference_steps", "1000"], "does not lie between 1 and 999"),
        (["--num_train_timesteps", "9"], "--num_inference_steps 10 does not lie between 1 and 8"),
        (["--num_train_timesteps", "20", "--beta_schedule", "linear"], "Use 21 steps or more"),
        (["--classifier_train_batch_size", "0"], "--classifier_train_batch_size 0 is not allowed"),
        (["--variance_type", "fixed_small"], "add --loss_type simple"),
        (["--num_heads", "4", "--attention_head_dim", "32"], "contradict each other"),
        (["--judge_model_channels", "20"], "multiple of 32"),
        (["--classifier_num_heads", "5"], "do not divide into 5 attention heads"),
        (["--recipe", "images", "--num_heads_upsample", "2"], "--num_heads_upsample 2 needs --num_heads"),
        (["--recipe", ""], "There is no recipe ''"),
        (["--train_data_dir", ""], "--train_data_dir '' is not allowed; give a non-empty text"),
        (["--dataset_name", "me/x", "--validation_split", "train"], "is the split to train on"),
        (["--dataset_name", "digits", "--validation_split", "test"], "The digits have no split 'test'"),
        (["--dataset_name", "me/x", "--train_data_dir", "x"], "give only one"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_arguments(STAGES, argv)
    for argv in (["--lr_scheduler", "nonsense"], ["--lr_scheduler", "piecewise_constant"], ["--report_to", "nonsense"]):
        with pytest.raises(SystemExit):
            parse_arguments(STAGES, argv)


def test_stages_that_contradict_each_other_are_refused():
    for argv, message in [
        (["--classifier_beta_schedule", "linear"], "both need one noise schedule"),
        (["--label_dropout", "0"], "has no null label"),
        (["--report_respacing", "ddim7777"], "no integer stride"),
        (["--no_classifier_noisy"], "must be trained on noised images"),
        (["--judge_noisy"], "must be trained on noised images"),
    ]:
        _, stages = parse_arguments(STAGES, argv)
        with pytest.raises(ValueError, match=message):
            check_stages(stages)


# Of each field, values of its type that are out of its range: as flags, as keys of a recipe and in Python.
OUT_OF_RANGE = {
    "seed": [-1, 2**63],
    "learning_rate": [0.0, -1e-4, NAN, INF, 10**400],
    "max_grad_norm": [-1.0, 0.0, NAN, INF],
    "ema_decay": [NAN, 2.0, 1.0, -1.0],
    "label_dropout": [2.0, 1.0, NAN, -0.1],
    "dropout": [1.0, -0.1, NAN],
    "adam_beta1": [1.0, -0.1, NAN],
    "adam_beta2": [1.0, -0.1, INF],
    "adam_weight_decay": [-0.1, INF],
    "adam_epsilon": [0.0, -1e-8, NAN],
    "lr_warmup_steps": [-5],
    "train_batch_size": [0, -1],
    "gradient_accumulation_steps": [0, -2],
    "max_train_steps": [0, -1],
    "checkpointing_steps": [0, -1],
    "checkpoints_total_limit": [0, -1],
    "logging_steps": [0, -1],
    "validation_steps": [-1],
    "preview_steps": [-1],
    "num_train_timesteps": [1, 0, -1],
    "num_inference_steps": [0, -1],
    "model_channels": [0, -32],
    "channel_mult": [[0.0], [1.0, -2.0], [NAN]],
    "num_res_blocks": [0, -1],
    "attention_resolutions": [[0], [8, -4]],
    "num_heads": [0, -4],
    "attention_head_dim": [0, -64],
    "num_heads_upsample": [0, -1],
    "snr_gamma": [0.0, -5.0, NAN],
    "lr_scheduler": ["nonsense"],
    "beta_schedule": ["cubic"],
    "mixed_precision": ["fp8"],
    "report_to": ["paper"],
    "output_dir": ["", " "],
    "pretrained_model": [""],
    "upscaler.low_resolution": [0, -8],
    "upscaler.low_res_noise": [-0.1, NAN, INF],
    "vae.latent_dim": [0],
    "vae.model_channels": [-32],
    "vae.channel_mult": [[0], [1, -1]],
    "vae.num_res_blocks": [-1],
    "vae.kl_weight": [-1.0, NAN, INF],
    "vae.decoder_variance": [0.0, -1.0, INF],
    "gan.discriminator_learning_rate": [0.0, -1e-4, NAN],
    "gan.adam_beta1": [1.0, -0.5],
    "gan.discriminator_channels": [0],
    "gan.translation": [-1],
    "flow.num_levels": [0, -1],
    "flow.num_blocks": [0],
    "flow.hidden_channels": [-8],
    "flow.dequantization_width": [0.0, 0.5, 256.0, NAN],
    "report.num_images": [5, -1],
    "report.sampling_batch_size": [0],
    "report.guidance_scales": [[-1.0], [0.0, NAN], [INF]],
    "report.conditional_scales": [[-0.5]],
    "report.default_scale": [-1.0, NAN, INF],
    "data.resolution": [[0], [-8], [8, 8, 8]],
    "data.held_out_fraction": [1.0, -0.1, NAN],
    "data.image_channels": [0, 2, 4],
    "data.dataloader_num_workers": [-1],
    "data.train_split": [""],
}
# And values that are not of its type, which only recipes and Python can give.
OF_ANOTHER_TYPE = {
    "class_conditional": ["no", "false", 0, 1.0, None],
    "rescale_timesteps": ["yes"],
    "push_to_hub": ["off"],
    "learning_rate": ["0.001", "fast", True, [1e-3], None],
    "adam_epsilon": ["0.1", {}],
    "max_train_steps": ["100", 100.0, 1.5, True, None],
    "seed": [False, "7", 3.0],
    "channel_mult": [2, "1,2", ["1", "2"], [], None, [True]],
    "attention_resolutions": [8, [8.0], {8: 4}],
    "num_heads": ["4", 4.0, False],
    "lr_scheduler": [False, None, 3],
    "mixed_precision": [False, 16],
    "report_to": [False, None],
    "output_dir": [3, None, ["a"]],
    "respacing": [250, True],
    "hub_token": [3],
    "report.guidance_scales": [1.0, ["1.0"], None],
    "vae.channel_mult": [[0.5, 1.0]],
    "data.resolution": [64, "64", [64.0], []],
    "data.held_out_fraction": ["0.1", True],
    "data.random_flip": ["no", None],
    "data.train_split": [2024, None],
}


def rows(table):
    for name, values in table.items():
        stage, _, field = name.rpartition(".")
        yield from (pytest.param(stage or "diffusion", field, value, id=f"{name}={value!r:.20}") for value in values)


def refuses(stages: dict[str, type], argv: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} is not allowed; give .*\.$") as error:
        parse_arguments(stages, argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("stage", "field", "value"), [*rows(OUT_OF_RANGE), *rows(OF_ANOTHER_TYPE)])
def test_recipes_and_python_are_refused_wrong_values(tmp_path, stage, field, value):
    with pytest.raises(ValueError, match=rf"^--{field} .* is not allowed; give "):
        {"data": DataArguments, **ALL_STAGES}[stage](**{field: value})
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"diffusion": {}, stage: {field: value}}))
    name = "diffusion" if stage == "data" else stage
    refuses({name: ALL_STAGES[name]}, ["--recipe", str(recipe)], f"{field}: .* in section '{stage}' of {recipe}")


@pytest.mark.parametrize(("stage", "field", "value"), [*rows(OUT_OF_RANGE)])
def test_flags_are_refused_wrong_values(stage, field, value):
    flag = [f"--{field}", *map(str, value)] if isinstance(value, list) else [f"--{field}={value}"]
    name = "diffusion" if stage == "data" else stage
    arguments = DataArguments if stage == "data" else ALL_STAGES[stage]
    if "choices" in next(f for f in dataclasses.fields(arguments) if f.name == field).metadata:
        with pytest.raises(SystemExit):  # argparse's, which lists them
            parse_arguments({name: ALL_STAGES[name]}, flag)
        return
    refuses({name: ALL_STAGES[name]}, flag, f"--{field} .*")
    if stage != "data":
        flag[0] = f"--{stage}_{flag[0].removeprefix('--')}"
        both = {"judge": ClassifierArguments, stage: ALL_STAGES[stage]}
        refuses(both, [*flag, "--recipe", "images"], f"--{stage}_{field} .*")


def test_how_to_write_it_is_told(tmp_path):
    recipe = tmp_path / "mine.yaml"
    for line, message in [
        ("class_conditional: 'no'", "class_conditional: 'no' in .* give true or false, without quotes"),
        ("learning_rate: '1e-3'", "learning_rate: '1e-3' in .* a finite number above 0, without quotes"),
        ("mixed_precision: no", "mixed_precision: False in .* one of no, fp16, bf16, in quotes"),
        ("channel_mult: 2", "channel_mult: 2 in .* 1 or more finite numbers, .* as a list in square brackets"),
        ("dropout: 1.5", r"dropout: 1\.5 in .* a finite number of at least 0 and below 1"),
    ]:
        recipe.write_text(f"diffusion:\n  {line}\n")
        with pytest.raises(ValueError, match=message):
            parse_arguments({"diffusion": DiffusionArguments}, ["--recipe", str(recipe)])
    with pytest.raises(ValueError, match="--hub_token ") as error:
        DiffusionArguments(hub_token=["hf_secret"])
    assert "hf_secret" not in str(error.value)
    assert "hf_secret" not in repr(DiffusionArguments(hub_token="hf_secret"))


def test_every_number_has_a_range():
    def numbers(hint):
        if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Range):
            return []
        return [hint] if hint in (int, float) else [number for part in get_args(hint) for number in numbers(part)]

    for arguments in {DataArguments, *ALL_STAGES.values()}:
        assert issubclass(arguments, CheckedFields)
        hints = get_type_hints(arguments, include_extras=True)
        for field in dataclasses.fields(arguments):
            assert not numbers(hints[field.name]) or "choices" in field.metadata, f"{arguments.__name__}.{field.name}"


def test_what_is_at_the_edge_of_a_range_is_taken(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "diffusion: {learning_rate: 1, ema_decay: 0, label_dropout: 0, dropout: 0, adam_beta1: 0, preview_steps: 0,\n"
        "  attention_resolutions: [], channel_mult: [0.5, 1], num_heads: null, mixed_precision: 'no', seed: 0}\n"
        "report:\n"
    )
    argv = ["--recipe", str(recipe), "--report_guidance_scales", "0", "--seed", str(2**63 - 1)]
    _, stages = parse_arguments({"diffusion": DiffusionArguments, "report": ReportArguments}, argv)
    diffusion = stages["diffusion"]
    assert (diffusion.learning_rate, diffusion.channel_mult, diffusion.mixed_precision) == (1, [0.5, 1], "no")
    assert (diffusion.seed, stages["report"].guidance_scales) == (2**63 - 1, [0.0])
    python = DiffusionArguments(channel_mult=(1, 2), output_dir=Path("out"))
    assert (python.channel_mult, python.output_dir) == ((1, 2), "out")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-3", 1e-3), ("5e-5", 5e-5), ("2E-4", 2e-4), ("1.0e-3", 1e-3), ("1.e-3", 1e-3), ("1", 1), (".5", 0.5)],
)
def test_numbers_of_recipes_are_what_they_look_like(tmp_path, text, number):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"diffusion:\n  learning_rate: {text}\n")
    _, stages = parse_arguments({"diffusion": DiffusionArguments}, ["--recipe", str(recipe)])
    assert stages["diffusion"].learning_rate == number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffusion:\n  dropout: 0.1\n  seed: 1\n  dropout: 0.2\n", "in line 4: dropout is given twice"),
        ("diffusion: {}\ndata: {}\ndiffusion: {}\n", "in line 3: diffusion is given twice"),
        ("diffusion: {dropout: 0.1\n", "cannot be read in line 2"),
        ("diffusion:\n\tdropout: 0.1\n", "cannot be read in line 2"),
        ("diffusion:\n  seed: 010\n", "in line 2: 010 is a whole number in another base than 10"),
        ("diffusion:\n  seed: 1:30\n", "in line 2: 1:30 is a whole number in another base than 10"),
        ("diffusion:\n  train_split: 2024-13-45\n", "cannot be read: month must be in 1..12"),
        ("a: \0", "cannot be read: unacceptable character"),
        ("diffusion: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("diffusion: {}\n---\ndiffusion: {}\n", "cannot be read in line 2"),
        ("", "has no sections"),
        ("- diffusion\n", "has no sections"),
        ("diffusion", "has no sections"),
        ("diffusion:\n  - dropout: 0.1\n", "Section 'diffusion' of the recipe .* must be indented lines of key: value"),
        ("diffusion: 0.1\n", "Section 'diffusion' of the recipe"),
        ("data: digits\n", "Section 'data' of the recipe"),
        ("vae: false\ndiffusion:\n", "Section 'vae' of the recipe"),
        ("diffusion:\n  data: [digits]\n", "Section 'diffusion: data' of the recipe"),
        ("unet: {}\n", "unknown sections: unet"),
        ("difusion: {}\n", r"unknown sections: difusion \(did you mean diffusion\?\)"),
        ("1: {}\nno: {}\n", "unknown sections: 1, False"),
        (
            "diffusion:\n  learning_rat: 1\n",
            r"section 'diffusion' has unknown keys: learning_rat \(did you mean learning",
        ),
        ("diffusion:\n  1: 2\n", "section 'diffusion' has unknown keys: 1"),
        ("diffusion:\n  recipe: mine\n", "section 'diffusion' has unknown keys: recipe"),
        ("vae: {}\n", "has no section diffusion, only vae"),
    ],
)
def test_recipes_that_are_none_are_refused_in_a_sentence(tmp_path, text, message):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse_arguments({"diffusion": DiffusionArguments}, ["--recipe", str(recipe)])
    assert "\n" not in str(error.value)


def test_recipe_files_that_are_none(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("diffusion: {output_dir: é}".encode("latin-1"))
    (tmp_path / "utf16.yaml").write_text("diffusion: {}", encoding="utf-16")
    for name, message in [
        ("folder.yaml", "There is no recipe"),
        ("missing.yaml", "There is no recipe"),
        ("latin.yaml", "is not in UTF-8"),
        ("utf16.yaml", "is not in UTF-8"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_recipe(str(tmp_path / name))
    (tmp_path / "bom.yaml").write_text("diffusion: {seed: 1}", encoding="utf-8-sig")
    assert read_recipe(str(tmp_path / "bom.yaml"))["diffusion"] == {"seed": 1}
    (tmp_path / "merged.yaml").write_text(
        "vae: &a {seed: 1, latent_dim: 4}\ngan: &b {<<: *a, seed: 2}\nflow: {<<: *b}\n"
    )
    assert read_recipe(str(tmp_path / "merged.yaml"))["flow"] == {"seed": 2, "latent_dim": 4}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_says_what_it_says_in_yaml(path):
    said = {"data": {}, **yaml.safe_load(path.read_text())}
    assert repr(read_recipe(path.stem)) == repr(said)
    for name in set(said) - {"data"}:
        data, stages = parse_arguments({name: ALL_STAGES[name]}, ["--recipe", path.stem])
        own = said[name].pop("data", {})
        assert {key: getattr(data, key) for key in {**said["data"], **own}} == {**said["data"], **own}
        assert {key: repr(getattr(stages[name], key)) for key in said[name]} == {
            key: repr(value) for key, value in said[name].items()
        }


def test_scripts_refuse_before_anything_is_read_or_written(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {train_data_dir: nowhere, resolution: [8]}\ndiffusion: {class_conditional: 'no'}\n")
    for script, argv, message in [
        (
            "train",
            ["--train_data_dir", "nowhere", "--max_grad_norm", "-1"],
            "error: --max_grad_norm -1.0 is not allowed",
        ),
        ("train_diffusion", ["--recipe", str(recipe)], "error: class_conditional: 'no' in section 'diffusion' of"),
    ]:
        ended = run(script, *argv, cwd=tmp_path)
        assert ended.returncode == 1
        assert message in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
