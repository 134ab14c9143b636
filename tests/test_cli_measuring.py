"""`hf-guided evaluate` and `sweep` on small saved pipelines, files and folders."""

import contextlib
import json
import os
import shutil
import sys

import forked
import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.cli import main
from hf_guided.evaluation import frechet_distance
from hf_guided.evaluation.features.extractors import load_features
from hf_guided.evaluation.features.image_sets import open_images

NAMES = {0: "cat", 1: "dog", 2: "owl"}


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_unet, tiny_classifier):
    """A pipeline, a judge, a file of samples, and a folder of real images."""
    path = tmp_path_factory.mktemp("measuring")
    shared = {"id2label": NAMES, "label2id": {name: label for label, name in NAMES.items()}}
    guide, judge = tiny_classifier(**shared), tiny_classifier(**shared)
    judge.head.classifier.to_out.bias.data += 1  # another one than guides
    ClassifierGuidedPipeline(
        tiny_unet(num_class_embeds=3, null_class_label=True),
        ADMScheduler(solver_order=2),
        guide,
        sampling_defaults={"num_inference_steps": 2, "guidance_scale": 1.0},
    ).save_pretrained(path / "pipeline")
    judge.save_pretrained(path / "judge" / "model")
    random = np.random.default_rng(0)
    np.savez(path / "samples.npz", random.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8), np.arange(30) % 3)
    for label, name in NAMES.items():
        (path / "real" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "real" / name / f"{label}{i}.png")
    return path


@pytest.fixture(autouse=True)
def caches(work, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(work / "hf"))
    monkeypatch.setattr("hf_guided.evaluation.features.feature_sets.CACHE_DIR", work / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries where there is no network
    monkeypatch.chdir(work)


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_file_against_a_folder(work, tmp_path, capsys):
    arguments = ["samples.npz", "real", "--features", "judge/model", "--held_out", "real:held_out"]
    main(["evaluate", *arguments, "--output", str(tmp_path / "first")])
    said = capsys.readouterr().out
    assert "real has images of 20x24 pixels; they are resized to 16x16 as in training" in said
    assert said.index("Note: FID falls with the number") < said.index("30 images of samples.npz against 36 of real")
    found = report(tmp_path / "first")
    extractor = load_features("judge/model")
    ours, real = (
        extractor(next(iter(images.batches([range(len(images))])))).features
        for images in (open_images("samples.npz"), open_images("real", size=(16, 16)))
    )
    assert found["metrics"]["fid/judge"] == pytest.approx(frechet_distance(ours, real), rel=1e-5)
    assert set(found["class_accuracy"]["judge"]) == set(NAMES.values())
    assert found["memorisation"]["judge"]["finding"] in said
    Image.open(tmp_path / "first" / "closest-pairs-judge.png").verify()

    # again with what is kept, and anew
    main(["evaluate", *arguments, "--output", str(tmp_path / "second")])
    main(["evaluate", *arguments, "--no_cache", "--output", str(tmp_path / "third")])
    assert found["metrics"] == report(tmp_path / "second")["metrics"] == report(tmp_path / "third")["metrics"]


def test_the_library_does_what_the_commands_do(work, tmp_path, capsys):
    from hf_guided.evaluation.run import EvaluationSettings, run_evaluation
    from hf_guided.evaluation.sweep import SweepSettings, run_sweep

    main(["evaluate", "samples.npz", "real", "--features", "judge/model", "--output", str(tmp_path / "command")])
    settings = EvaluationSettings("samples.npz", "real", str(tmp_path / "library"), features=["judge/model"])
    result = run_evaluation(settings)
    assert str(result) in capsys.readouterr().out  # of the command
    found = {name: report(tmp_path / name) for name in ("command", "library")}
    for content in found.values():
        del content["seconds"], content["settings"]["output"]
    assert found["command"] == found["library"]

    flags = ["--features", "judge/model", "--num_images", "12", "--scales", "0,2", "--seeds", "0", "--no_save"]
    main(["sweep", "pipeline", "real", *flags, "--output", str(tmp_path / "sweep")])
    arguments = {"features": ["judge/model"], "num_images": 12, "scales": [0, 2], "seeds": [0], "no_save": True}
    swept = run_sweep(SweepSettings("pipeline", "real", str(tmp_path / "again"), **arguments))
    assert swept.reason == str(swept) in capsys.readouterr().out
    first, again = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("sweep", "again"))
    assert first == again
    path = tmp_path / "again" / "sweep.json"  # as earlier versions wrote it: resumed, not measured again
    record = first
    record["settings"]["num_images_per_label"] = None
    path.write_text(json.dumps(record))
    assert run_sweep(SweepSettings("pipeline", "real", str(path.parent), **arguments)).rows == swept.rows


def test_what_a_folder_leaves_out_is_told(work, tmp_path, capsys):
    random = np.random.default_rng(1)
    for name in ("cat", "train", "__dog"):
        (tmp_path / "photos [1]" / name / "2023").mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos [1]" / name / "2023" / f"test_{i}.png")
    (tmp_path / "photos [1]" / "cat" / "x.heic").write_bytes(b"")
    folder = str(tmp_path / "photos [1]")
    flags = ["--held_out", f"{folder}:held_out", "--features", "judge/model", "--output", str(tmp_path / "out")]
    main(["evaluate", "samples.npz", folder, *flags])
    shown = capsys.readouterr().out
    assert "30 images of samples.npz against 30 of " in shown
    note = "skipped: files that are not images in a supported format (1; .heic 1): cat/x.heic"
    assert shown.split("30 images of")[0].count(note) == 1  # before the work, once for both parts of one folder
    assert sum(note in line for line in report(tmp_path / "out")["notes"]) == 1


def test_statistics_take_the_place_of_the_images(work, tmp_path):
    shared = ["--features", "judge/model", "--output"]
    saved = str(tmp_path / "real.npz")
    main(["evaluate", "samples.npz", "real", "--save_statistics", saved, *shared, str(tmp_path / "images")])
    main(["evaluate", "samples.npz", saved, *shared, str(tmp_path / "statistics")])
    assert report(tmp_path / "statistics")["metrics"] == report(tmp_path / "images")["metrics"]
    with np.load(saved) as file:
        alone = {"mu": file["mu"], "sigma": file["sigma"]}
    np.savez(tmp_path / "published.npz", **alone)
    with pytest.raises(SystemExit, match="of inception and the samples of judge"):
        main(["evaluate", "samples.npz", str(tmp_path / "published.npz"), *shared, str(tmp_path / "other")])


def test_a_pipeline_is_sampled_and_measured(work, tmp_path, capsys):
    flags = ["--features", "named=judge/model", "--num_images", "12", "--batch_size", "5", "--interval"]
    command = ["evaluate", "pipeline", "real", *flags, "--likelihood", "--respacing", "2"]
    main([*command, "--output", str(tmp_path)])
    found = report(tmp_path)
    assert found["num_generated"] == 12
    assert set(found["class_accuracy"]["named"]) == set(NAMES.values())
    low, high = found["intervals"]["fid/named"]
    assert low < found["metrics"]["fid/named"] < high
    bits = found["likelihood"]
    assert bits["num_images"] == 36
    assert bits["timesteps"] == [999, 0]
    assert bits["total_bpd"] == pytest.approx(sum(bits["vb"]) + bits["prior_bpd"], rel=1e-5)
    assert "bits per dimension" in capsys.readouterr().out
    for picture in ("samples.png", "likelihood.png"):
        Image.open(tmp_path / picture).verify()
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_1"].tolist() == [0, 1, 2] * 4


def test_two_processes_measure_the_same(work, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    flags = ["--features", "judge/model", "--num_images", "22", "--batch_size", "4", "--likelihood", "--respacing", "2"]
    reports = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        module = ["-m", "hf_guided.cli", "evaluate", "pipeline", "real", *flags, "--output", str(folder)]
        result = forked.run([sys.executable, *module], processes=processes, cwd=work, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("22 images of pipeline") == 1
        reports.append(report(folder))
    one, two = reports
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-7), name  # processors round up to 5e-9 otherwise
    assert two["likelihood"]["vb"] == pytest.approx(one["likelihood"]["vb"], rel=1e-12)
    assert (tmp_path / "1" / "samples.npz").read_bytes() == (tmp_path / "2" / "samples.npz").read_bytes()


def test_measuring_what_is_compiled(work, tmp_path, monkeypatch):
    """The same commands, with the compiler's place taken by one that changes nothing and counts."""
    monkeypatch.setenv("CXX", "sh")
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    flags = ["--features", "judge/model", "--num_images", "6", "--batch_size", "4", "--compile"]
    for command in (["evaluate", "pipeline", "real"], ["sweep", "pipeline", "real", "--scales", "1", "--no_save"]):
        compiled.clear()
        torch.compiler.reset()
        folder = tmp_path / command[0]
        with torch.compiler.set_stance("default", force_backend=backend):
            main([*command, *flags, "--output", str(folder)])
        assert compiled
        assert (folder / {"evaluate": "report.json", "sweep": "sweep.json"}[command[0]]).is_file()
    with pytest.raises(SystemExit, match="--compile is of a pipeline, and real is none"):
        main(["evaluate", "real", "real", *flags, "--output", str(tmp_path / "images")])


def test_a_sweep_is_gone_on_with_and_its_choice_saved(work, tmp_path, capsys):
    flags = ["--features", "judge/model", "--num_images", "9", "--seeds", "0,1", "--output", str(tmp_path / "sweep")]
    command = ["sweep", "pipeline", "real", *flags]
    index = work / "pipeline" / "model_index.json"
    before = index.read_text()
    main([*command, "--scales", "0,2", "--no_save"])
    assert index.read_text() == before
    path = tmp_path / "sweep" / "sweep.json"
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4
    rows[0]["fid/judge"] = 123.0  # a mark: this is not measured again
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": rows}))

    shutil.copytree(work / "pipeline", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.copytree(work / "real", tmp_path / "pictures", copy_function=shutil.copyfile)
    main(["sweep", str(tmp_path / "copy"), str(tmp_path / "pictures"), *flags, "--scales", "0,2"])
    assert json.loads(path.read_text())["rows"] == rows
    changed = min((tmp_path / "pictures").rglob("*.png"))
    changed.unlink()
    with pytest.raises(SystemExit, match=r"was measured otherwise \(.*images"):
        main(["sweep", "pipeline", str(tmp_path / "pictures"), *flags, "--scales", "0,2"])

    main([*command, "--scales", "0,1,2"])
    swept = json.loads(path.read_text())
    assert len(swept["rows"]) == 6
    assert swept["rows"][0]["fid/judge"] == 123.0
    assert swept["reason"] in capsys.readouterr().out
    defaults = json.loads(index.read_text())["sampling_defaults"]
    assert defaults == {"num_inference_steps": 2, "guidance_scale": swept["chosen"]["guidance_scale"]}
    Image.open(tmp_path / "sweep" / "sweep.png").verify()
    index.write_text(before)

    with pytest.raises(SystemExit, match=r"was measured otherwise \(num_images\)"):
        main([*command, "--num_images", "12"])
    main([*command, "--scales", "0", "--no-condition_unet", "--output", str(tmp_path / "alone")])
    assert "Nothing is saved" in capsys.readouterr().out
    assert index.read_text() == before


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", "", '{"settings": {', "\xff", '{"settings": {}, "rows": [{}]}']
)
def test_a_damaged_sweep_is_refused(content, work, tmp_path):
    (tmp_path / "sweep.json").write_bytes(content.encode("latin1"))
    with pytest.raises(
        SystemExit,
        match=r"error: .*sweep\.json .*(give another --output, or remove it|remove it, or give another output)",
    ):
        main(["sweep", "pipeline", "real", "--features", "judge/model", "--num_images", "9", "--output", str(tmp_path)])


def write(command, disk):
    """A command that writes onto a disk."""
    flags = ["--features", "judge/model", "--num_images", "6", "--output"]
    return {
        "evaluate": ["evaluate", "samples.npz", "real", *flags, f"{disk}/out"],
        "evaluate a pipeline": ["evaluate", "pipeline", "real", *flags, f"{disk}/out"],
        "sweep": ["sweep", "pipeline", "real", "--scales", "1", "--seeds", "0", "--no_save", *flags, f"{disk}/out"],
        "sample": ["sample", "pipeline", "--num_images", "6", "--output", f"{disk}/samples.png"],
        "statistics": ["evaluate", "samples.npz", "real", *flags, "out", "--save_statistics", f"{disk}/real.npz"],
    }[command]


@pytest.mark.parametrize("command", ["evaluate", "evaluate a pipeline", "sweep", "sample", "statistics"])
def test_a_full_disk_is_one_sentence_and_the_rerun_completes(command, work, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_guided.evaluation.features.feature_sets.CACHE_DIR", tmp_path / "cache")
    (small_disk / "out").mkdir()
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))
    with pytest.raises(SystemExit) as caught:
        main(write(command, small_disk))
    assert str(caught.value).startswith("error: ")
    assert "The disk is full" in str(caught.value) or "make room" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in small_disk.rglob("*") if path.is_file()] == [filler]
    filler.unlink()
    main(write(command, small_disk))
    assert not list(small_disk.rglob(".*.tmp"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PAR1", bytes(99), b"PK\x05\x06" + bytes(18)])
@pytest.mark.parametrize("name", ["samples.npz", "samples.parquet"])
def test_damaged_samples_are_named(name, content, work, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="error: ") as caught:
        main(["evaluate", str(tmp_path / name), "real", "--features", "judge/model", "--output", str(tmp_path / "out")])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["evaluate", "samples.npz", "real", "--features", "pipeline"],
            "is a pipeline, and the classifier that guides",
        ),
        (["evaluate", "pipeline", "real", "--features", "pipeline/classifier"], "is the pipeline's own classifier"),
        (["evaluate", "samples.npz", "real", "--likelihood", "--features", "judge/model"], "samples.npz is none"),
        (["evaluate", "nowhere.npz", "real", "--features", "judge/model"], "There is no file nowhere.npz"),
        (["evaluate", "samples.npz", "nowhere", "--features", "judge/model"], "Cannot load"),
        (["evaluate", "samples.npz", "real", "--features", "judge/model", "judge/model"], "are called judge"),
        (["evaluate", "samples.npz", "real", "--features", "judge/model", "--output", "samples.npz"], "cannot be made"),
        (["sweep", "pipeline", "real", "--features", "judge/model", "--scales", "x"], "--scales x is not a list"),
        (["sweep", "pipeline", "real", "--features", "judge/model", "--steps", "1.5"], "--steps 1.5 are no whole"),
        (["sweep", "pipeline", "nowhere.npz", "--features", "judge/model"], "There is no file nowhere.npz"),
    ],
)
def test_mistakes_are_told_in_a_sentence(argv, message, work, tmp_path):
    output = [] if "--output" in argv else ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="error: ") as caught:
        main([*argv, *output])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
