"""No command replaces what it reads, or a file that it did not make; each may replace what it made itself.

The models named here are not there: a refusal that comes after they are loaded would be another one.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMScheduler, ClassifierGuidedUpscalePipeline
from hf_guided.cli import main
from hf_guided.comparison.run import compare
from hf_guided.files import check_outside, check_replaceable, has_json
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.train_classifier import ClassifierArguments
from hf_guided.training.train_diffusion import DiffusionArguments

IS_READ = "is read by this command and would be overwritten"
NOT_OURS = "exists and was not made by this command"
LIES_IN = "which is read here; give one outside of it"
TRAINING = {"seed": 0, "rows": []}
COMPARISON = {"settings": {}, "real": None, "runs": []}
INSPECTION = {"findings": [], "rows": [], "class_names": []}  # as training writes it, beside the classifier


@pytest.fixture
def work(tmp_path, monkeypatch):
    """What users have: samples, statistics, images in folders, and the results of other commands."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "small.npz", images, np.arange(6) % 3)
    np.savez(tmp_path / "real.npz", images)
    np.savez(tmp_path / "published.npz", mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "evaluation").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(images[0]).save(tmp_path / "photos" / name / "0.png")
    for name, content in (("outputs/report", TRAINING), ("comparison/comparison", COMPARISON)):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))
    (tmp_path / "inspection.json").write_text(json.dumps(INSPECTION))
    (tmp_path / "report.json").write_text(json.dumps(TRAINING))
    (tmp_path / "notes.json").write_text("my own")
    Image.fromarray(images[0]).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries where there is no network
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(argv, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["upscale", "no", "small.npz", "--output", "small.npz"], IS_READ),
        (["upscale", "no", "small.npz", "--output", "./photos/../small.npz"], IS_READ),
        (["upscale", "no", "photo.png", "--output", "photo.png"], IS_READ),
        (["upscale", "no", "photos/cat/0.png", "photo.png", "--output", "photo.png"], IS_READ),
        (["upscale", "no", "small.npz", "--output", "real.npz"], NOT_OURS),
        (["upscale", "no", "small.npz", "--output", "photo.png"], NOT_OURS),
        (["evaluate", "small.npz", "real.npz", "--save_statistics", "real.npz"], IS_READ),
        (["evaluate", "small.npz", "real.npz", "--save_statistics", "small.npz"], IS_READ),
        (["evaluate", "real.npz", "real.npz", "--held_out", "small.npz", "--save_statistics", "small.npz"], IS_READ),
        (["evaluate", "small.npz", "real.npz", "--save_statistics", "published.npz"], NOT_OURS),
        (["evaluate", "small.npz", "photos:held_out", "--save_statistics", "real.npz"], NOT_OURS),
        (["evaluate", "small.npz", "real.npz", "--save_statistics", "./evaluation/samples.npz"], "are the same file"),
        (["evaluate", "small.npz", "real.npz", "--output", "outputs"], f"outputs/report.json {NOT_OURS}"),
        (["evaluate", "small.npz", "real.npz", "--output", "."], f"report.json {NOT_OURS}"),
        (["evaluate", "small.npz", "photos", "--output", "photos"], LIES_IN),
        (["evaluate", "small.npz", "photos:held_out", "--output", "photos/cat"], LIES_IN),
        (["evaluate", "photos", "small.npz", "--output", "photos/new"], LIES_IN),
        (["evaluate", "small.npz", "real.npz", "--held_out", "photos", "--output", "./photos/dog/.."], LIES_IN),
        (["sweep", "no", "photos", "--output", "photos/sweep"], LIES_IN),
        (["inspect-classifier", "no", "photos", "--output", "report.png"], f"report.json {NOT_OURS}"),
        (["inspect-classifier", "no", "photos", "--output", "notes.png"], f"notes.json {NOT_OURS}"),
        (["inspect-classifier", "no", "photos", "--output", "inspection.png"], f"inspection.json {NOT_OURS}"),
        (["inspect-classifier", "no", "photos", "--output", "photo.png"], f"photo.png {NOT_OURS}"),
        (["inspect-classifier", "no", "photos", "--output", "photos/cat/x.png"], LIES_IN),
        (["compare", "--data", "photos", "--output", "photos"], LIES_IN),
        (["compare", "--data", "photos", "--output", "photos/new"], LIES_IN),
        (["sample", "no", "--output", "photo.png"], "exists and was not made by this command"),
        (["sample", "no", "--output", "photo.npz"], "photo.png exists and was not made by this command"),
        (
            ["sample", "no", "--output", "photos", "--num_images", "3"],
            "exists and was not made by this command",
        ),
        (["convert", "x", "--checkpoint", "x.pt", "--output", "photos"], "exists already and is not empty"),
        (["convert", "photos", "--to", "openai", "--output", "small.npz"], "exists already"),
    ],
)
def test_nothing_of_others_is_replaced(argv, message, work):
    before = contents(work)
    refused([*argv, *(["--features", "no"] if argv[0] in ("evaluate", "sweep", "compare") else [])], message)
    assert contents(work) == before
    assert not (work / "photos" / "new").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_links_to_inputs_are_inputs(link, work):
    link(work / "small.npz", work / "link.npz")
    before = contents(work)
    refused(["upscale", "no", "small.npz", "--output", "link.npz"], IS_READ)
    refused(["upscale", "no", "link.npz", "--output", "small.npz"], IS_READ)
    refused(["evaluate", "link.npz", "real.npz", "--save_statistics", "small.npz"], IS_READ)
    os.symlink(work / "photos", work / "album")
    refused(["evaluate", "small.npz", "photos", "--features", "no", "--output", "album/cat"], LIES_IN)
    refused(["evaluate", "small.npz", "album", "--features", "no", "--output", "photos"], LIES_IN)
    os.symlink(work / "nowhere", work / "dangling.png")
    refused(["upscale", "no", "small.npz", "--output", "dangling.png"], NOT_OURS)
    refused(["convert", "x", "--checkpoint", "x.pt", "--output", "dangling.png"], "exists already")
    assert contents(work) == before


@pytest.mark.parametrize("name", ["sweep.json", "sweep.png"])
def test_a_sweep_replaces_its_own_files_alone(name, work):
    (work / "swept").mkdir()
    (work / "swept" / name).write_text("{}")
    refused(["sweep", "no", "real.npz", "--features", "no", "--output", "swept"], f"{name} {NOT_OURS}")
    (work / "swept" / "sweep.json").write_text(json.dumps({"settings": {}, "rows": []}))
    refused(["sweep", "no", "real.npz", "--features", "no", "--output", "swept"], "There is no folder no")


def test_an_evaluation_replaces_its_own_files_alone(work):
    argv = ["evaluate", "small.npz", "real.npz", "--features", "no", "--held_out", "real.npz"]
    Image.open("photo.png").save("evaluation/closest-pairs-judge.png")
    refused(argv, f"closest-pairs-judge.png {NOT_OURS}")
    report = {"generated": "x", "reference": "y", "metrics": {}, "settings": {}}
    (work / "evaluation" / "report.json").write_text(json.dumps(report))
    refused(argv, "could be loaded from no")
    refused([*argv, "--save_statistics", "evaluation/report.json"], "--save_statistics .* must end in .npz")


@pytest.mark.parametrize("name", ["plan.json", "comparison.json", "comparison.html", "grids.png"])
def test_a_comparison_replaces_its_own_files_alone(name, work):
    (work / "compared").mkdir()
    (work / "compared" / name).write_text('{"steps": {}}')
    with pytest.raises(ValueError, match=f"{name} {NOT_OURS}"):
        compare("digits", work / "compared")
    (work / "compared" / "plan.json").write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        compare("digits", work / "compared")


STAGES = {"classifier": ClassifierArguments, "diffusion": DiffusionArguments}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_data_dir", "photos", "--output_dir", "photos"], LIES_IN),
        (["--train_data_dir", "photos", "--output_dir", "photos/cat/new"], LIES_IN),
        (["--train_data_dir", "."], LIES_IN),  # output_dir is "outputs" by default
        (["--dataset_name", "./photos", "--output_dir", "photos/new"], LIES_IN),
        (["--output_dir", "mine"], f"mine/classifier/model {NOT_OURS}"),
        (["--output_dir", "trained", "--pretrained_model", "trained/diffusion/pipeline"], IS_READ),
        (["--output_dir", "trained", "--pretrained_model", "./trained/diffusion/pipeline/unet"], IS_READ),
    ],
)
def test_a_training_keeps_away_from_its_images_and_from_others_models(flags, message, work):
    (work / "mine" / "classifier" / "model").mkdir(parents=True)
    (work / "trained" / "diffusion" / "pipeline" / "unet").mkdir(parents=True)
    (work / "trained" / "diffusion" / "history.json").write_text("[]")
    with pytest.raises(ValueError, match=message):
        parse_arguments(STAGES, [*flags, "--recipe", "digits"])
    parse_arguments(STAGES, ["--train_data_dir", "photos", "--output_dir", "trained", "--recipe", "images"])


def test_a_whole_training_keeps_others_reports_and_pipelines(work, monkeypatch):
    from hf_guided.training import train

    monkeypatch.setattr("sys.argv", ["train.py", "--output_dir", "comparison"])
    shutil.copy("notes.json", "comparison/report.json")
    with pytest.raises(ValueError, match=f"comparison/report.json {NOT_OURS}"):
        train.main()
    (work / "comparison" / "report.json").unlink()
    (work / "comparison" / "pipeline").mkdir()
    with pytest.raises(ValueError, match=f"comparison/pipeline {NOT_OURS}"):
        train.main()


def test_the_same_upscaling_may_run_again(work, tiny_unet):
    torch.manual_seed(0)
    unet = tiny_unet(low_res_channels=3, num_class_embeds=3, channel_mult=(1,), attention_resolutions=())
    scheduler, defaults = ADMScheduler(solver_order=2), {"num_inference_steps": 1}
    ClassifierGuidedUpscalePipeline(unet, scheduler, sampling_defaults=defaults).save_pretrained("upscaler")
    for output in ("large.npz", "large.png"):
        for _ in range(2):
            main(["upscale", "upscaler", "small.npz", "--output", output])
        with pytest.raises(SystemExit, match="exists and was not made by this command"):  # of another command's
            main(["sample", "no", "--output", output])
    refused(["upscale", "no", "large.npz", "--output", "large.npz"], IS_READ)


def test_the_helpers(work):
    with pytest.raises(ValueError, match="are the same file"):
        check_replaceable(["new.npz", "./new.npz"], lambda path: True)
    check_replaceable(["new.npz", "photo.png"], lambda path: True, ["digits", None, "user/name", "small.npz"])
    check_outside("photos-2/new", ["photos", "digits", None, "small.npz"])
    assert has_json("report.json", "seed", "rows")
    for path in ("notes.json", "photo.png", "nowhere.json", "photos", "comparison/comparison.json"):
        assert not has_json(path, "seed")
