"""The families side by side: what the budget comes to, and a whole comparison of tiny models."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from hf_guided import VAEPipeline
from hf_guided.cli import main
from hf_guided.comparison.run import compare
from hf_guided.comparison.trainer import CLASSIFIER_SHARE, STAGES, Budget, Trainer, num_parameters
from hf_guided.data import load_labelled_images
from hf_guided.training.arguments import parse_arguments

UNET = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 4}
LOOP = {"train_batch_size": 8, "max_train_steps": 2, "ema_decay": 0.9}
RECIPE = {
    "data": {"dataset_name": "digits"},
    "judge": {**UNET, **LOOP, "noisy": False, "pool": "adaptive", "max_train_steps": 30, "learning_rate": 1e-3},
    "classifier": {**UNET, **LOOP, "pool": "adaptive", "num_train_timesteps": 25},
    "diffusion": {**UNET, **LOOP, "num_train_timesteps": 25, "num_inference_steps": 2, "label_dropout": 0.5},
    "vae": {**LOOP, "latent_dim": 4, "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1},
    "gan": {**LOOP, "latent_dim": 4, "model_channels": 8, "discriminator_channels": 8, "channel_mult": [1, 2]},
    "flow": {**LOOP, "num_levels": 1, "num_blocks": 2, "hidden_channels": 8, "dequantization_width": 16.0},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


@pytest.fixture
def trainer(recipe):
    """Of a budget that each test gives."""
    data_args, flags = parse_arguments({name: stage.arguments for name, stage in STAGES.items()}, ["--recipe", recipe])
    return Trainer(data_args, load_labelled_images(data_args, seed=0), flags, Budget(900, "steps"))


@pytest.mark.parametrize(
    ("text", "amount", "unit", "words"),
    [
        ("5m", 300, "seconds", "5 minutes"),
        ("90s", 90, "seconds", "1.5 minutes"),
        ("20s", 20, "seconds", "20 seconds"),
        ("1.5h", 5400, "seconds", "90 minutes"),
        ("2ksteps", 2000, "steps", "2,000 steps"),
        ("500kparameters", 500_000, "parameters", "500,000 parameters"),
        ("1.2Mparameters", 1_200_000, "parameters", "1,200,000 parameters"),
    ],
)
def test_budgets(text, amount, unit, words):
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit, str(budget)) == (amount, unit, words)


@pytest.mark.parametrize("text", ["", "5", "5 parsecs", "0m", "-5m", "m", "9" * 400 + "m"])
def test_no_budgets(text):
    with pytest.raises(ValueError, match="give 5m, 300s"):
        Budget.parse(text)


def test_steps_are_shared_out_among_the_parts(trainer):
    for family in ("gan", "guided"):
        trainer.fit(family)
    assert trainer.plan["steps"]["gan"] == {"gan": 900}
    assert trainer.plan["steps"]["guided"] == {"diffusion": 600, "classifier": 300}
    assert sum(trainer.plan["steps"]["guided"].values()) == 900
    assert pytest.approx(1 / 3) == CLASSIFIER_SHARE


def test_time_becomes_steps_by_the_speed_measured(trainer):
    trainer.budget = Budget(60, "seconds")
    trainer.fit("vae")
    seconds = trainer.plan["seconds_per_step"]["vae"]
    assert 0 < seconds < 1
    assert trainer.plan["steps"]["vae"]["vae"] == int(60 / seconds)
    trainer.budget = Budget(1, "steps")
    trainer.fit("vae")  # is planned already
    assert trainer.plan["steps"]["vae"]["vae"] == int(60 / seconds)


@pytest.mark.parametrize("stage", ["vae", "gan", "flow", "diffusion", "classifier"])
def test_widths_come_as_near_as_can_be(stage, trainer):
    def count(width):
        return num_parameters(trainer.task(stage, **dict.fromkeys(widths, width)).model)

    widths = trainer.widths_of(stage, 300_000)
    (width,) = set(widths.values())
    distance = abs(math.log(count(width) / 300_000))
    assert all(abs(math.log(count(other) / 300_000)) >= distance for other in {max(32, width - 32), width + 32})


@pytest.fixture(scope="module")
def comparison(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    options = {"recipe": recipe, "budget": "3steps", "seeds": [0], "num_images": 40, "guidance_scales": [0.0, 2.0]}
    compare("digits", folder, **options)
    return folder, options


def test_a_whole_comparison(comparison):
    folder, _ = comparison
    found = json.loads((folder / "comparison.json").read_text())
    families = ["vae", "gan", "flow", "diffusion", "guided"]
    assert [(run["family"], run["seed"]) for run in found["runs"]] == [(family, 0) for family in families]
    assert all(run["steps"] == 3 for run in found["runs"])
    assert all({"fid", "kid", "precision", "recall", "density", "coverage", "accuracy"} <= run["metrics"].keys()
               for run in found["runs"])  # fmt: skip
    by_family = {run["family"]: run for run in found["runs"]}
    assert {name: run["bits_kind"] for name, run in by_family.items()} == {
        "vae": "bound", "gan": None, "flow": "exact", "diffusion": "bound", "guided": None
    }  # fmt: skip
    assert "never says how likely" in by_family["gan"]["no_bits"]
    assert by_family["gan"]["curve"]["name"] == "truncation"
    guided = by_family["guided"]["curve"]
    assert [point["value"] for point in guided["points"]] == [0.0, 2.0]
    assert by_family["guided"]["parameters"] > by_family["diffusion"]["parameters"]
    assert all(run["losses"]["loss"] and run["train_seconds"] > 0 for run in found["runs"])
    assert any("dequantised over 16 steps" in note for note in by_family["flow"]["notes"])
    for name in ("comparison.md", "comparison.html", "grids.png", "curves.png"):
        assert (folder / name).stat().st_size > 1000
    assert str(folder) not in (folder / "comparison.md").read_text()


def test_the_same_command_resumes(comparison, caplog):
    """What is measured is not measured again; what is missing is trained and measured, to the same numbers."""
    folder, options = comparison
    lost = folder / "seed-0" / "vae"
    before = json.loads((lost / "run.json").read_text())
    kept = folder / "seed-0" / "gan" / "run.json"
    marked = {**json.loads(kept.read_text()), "notes": ["kept"]}
    kept.write_text(json.dumps(marked))
    (lost / "run.json").write_text("{}")

    compare("digits", folder, **options)
    assert "vae/run.json is damaged" in caplog.text
    assert json.loads((lost / "run.json").read_text())["metrics"] == before["metrics"]
    assert "GAN, seed 0: kept" in (folder / "comparison.md").read_text()
    with pytest.raises(ValueError, match=r"other settings \(budget\)"):
        compare("digits", folder, **{**options, "budget": "4steps"})


def test_trained_models(comparison, recipe, tmp_path, capsys):
    folder, _ = comparison
    models = [f"{name}={folder / 'seed-0' / name / 'pipeline'}" for name in ("vae", "guided")]
    reversed_classes = VAEPipeline.from_pretrained(folder / "seed-0" / "vae" / "pipeline")
    reversed_classes.vae.class_embedding.weight.data = reversed_classes.vae.class_embedding.weight.data.flip(0)
    reversed_classes.register_to_config(id2label={label: str(9 - label) for label in range(10)})
    reversed_classes.save_pretrained(tmp_path / "reversed")
    models.append(str(tmp_path / "reversed"))
    judge = f"judge={folder / 'judge' / 'model'}"
    main(["compare", *models, "--recipe", recipe, "--features", judge, "--num_images", "40", "--scales", "0,1",
          "--output", str(tmp_path / "out")])  # fmt: skip
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    trained = {run["family"]: run for run in json.loads((folder / "comparison.json").read_text())["runs"]}
    trained["reversed"] = trained["vae"]  # the same classes by name
    assert [run["family"] for run in found["runs"]] == ["vae", "guided", "reversed"]
    for run in found["runs"]:  # as it was measured after its training
        assert run["metrics"] == pytest.approx(trained[run["family"]]["metrics"], rel=1e-4)
    shown = capsys.readouterr().out
    assert "trained before" in shown
    assert "| guided |" in shown


def test_images_and_judge_are_known_by_their_content(comparison, recipe, photos, tmp_path, monkeypatch):
    judge = shutil.copytree(comparison[0] / "judge" / "model", tmp_path / "judge")
    shutil.copytree(photos, tmp_path / "fruits")
    monkeypatch.chdir(tmp_path)
    options = {"recipe": recipe, "budget": "1steps", "seeds": [0], "num_images": 40, "resolution": [8]}
    options |= {"families": ["gan"]}
    compare("fruits", "out", **options, features=str(judge))
    trained = Path("out/seed-0/gan/run.json").stat().st_mtime_ns
    shutil.copytree("fruits", "moved/other")
    shutil.copytree(judge, "moved/judge")
    compare("./moved/other/", "out", **options, features="moved/judge/")
    assert Path("out/seed-0/gan/run.json").stat().st_mtime_ns == trained
    next(Path("moved/other").rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"other settings \(.*images"):
        compare("moved/other", "out", **options, features="moved/judge")


@pytest.mark.parametrize("content", ["[]", "{}", "null", "", '{"settings": {', "\xff", '{"settings": {}, "steps": []}'])
def test_a_damaged_plan_is_refused(content, recipe, tmp_path):
    (tmp_path / "plan.json").write_bytes(content.encode("latin1"))
    with pytest.raises(
        ValueError, match=r"plan\.json .*(give another --output, or remove|remove it, or give another output)"
    ):
        compare("digits", tmp_path, recipe=recipe, num_images=40)


def test_refusals(tmp_path, recipe):
    with pytest.raises(ValueError, match="--families vae,nope"):
        compare("digits", tmp_path, families=["vae", "nope"])
    for wrong, message in [
        ({"families": ["vae", "vae"]}, "--families vae,vae: give each value once"),
        ({"seeds": [1, 1]}, "--seeds 1,1: give each value once"),
        ({"seeds": [0, -1]}, "--seed -1 is not allowed"),
        ({"guidance_scale": float("nan")}, "finite number from 0 up"),
        ({"guidance_scales": [0.5, -1.0]}, "finite number from 0 up"),
        ({"resolution": [0]}, "--resolution 0 is not allowed"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare("digits", tmp_path / "refused", recipe=recipe, **wrong)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="a comparison needs at least"):
        compare("digits", tmp_path, recipe=recipe, num_images=3)
    with pytest.raises(SystemExit, match="Two models are called vae"):
        main(["compare", "vae=a", "vae=b", "--output", str(tmp_path)])
