"""The scale is found by measurement, chosen against noise, saved, and the sweep resumes."""

import json

import numpy as np
import pytest
import torch
from evaluation_helpers import Pixels, pixels

from hf_guided import ADMScheduler, ClassifierGuidedPipeline
from hf_guided.evaluation.evaluate import measure
from hf_guided.evaluation.features.feature_sets import collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages, SampledImages
from hf_guided.evaluation.plots import sweep_curve
from hf_guided.evaluation.sweep import SweepSettings, choose_scale, guidance_at, parse_scales, save_choice, sweep
from hf_guided.guidance import ClassifierFreeGuidance, ClassifierGuidance


@pytest.fixture(scope="module")
def pipe(tiny_unet, tiny_classifier):
    classifier = tiny_classifier(num_labels=5)
    pipe = ClassifierGuidedPipeline(tiny_unet(null_class_label=True), ADMScheduler(solver_order=2), classifier)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_rows_are_the_measurements_and_none_is_made_twice(pipe):
    reference = collect_features(ArrayImages(pixels(40, size=16)), Pixels())
    labels = torch.arange(12) % 5
    asked = SweepSettings("model", "reference", scales=[0.0, 2.0], steps=[2, 3], seeds=[4, 7], batch_size=5)
    seen = []
    rows = sweep(asked, pipe, reference, Pixels(), labels, on_row=lambda rows: seen.append(list(rows)))
    settings = [(row["num_inference_steps"], row["guidance_scale"], row["seed"]) for row in rows]
    assert settings == [(n, s, seed) for seed in (4, 7) for n in (2, 3) for s in (0.0, 2.0)]
    samples = SampledImages(pipe, labels, 7, guidance_scale=2.0, num_inference_steps=3)
    expected = measure(collect_features(samples, Pixels(), batch_size=5), reference)
    assert {name: rows[-1][name] for name in expected} == expected
    assert len({row["fid/pixels"] for row in rows}) == 8
    assert [len(rows) for rows in seen] == list(range(1, 9))

    again = []
    asked.scales = [0.0, 1.0, 2.0]
    more = sweep(asked, pipe, reference, Pixels(), labels, done=rows[:7], on_row=lambda rows: again.append(1))
    assert len(again) == 5  # four of the new scale, and the one that was missing
    assert [row for row in more if row["guidance_scale"] != 1.0] == rows


def rows_of(values, steps=(None,)):
    """Rows of `{(steps, scale): [a value per seed]}`."""
    return [
        {"num_inference_steps": count, "guidance_scale": scale, "seed": seed, "fid/judge": value}
        for (count, scale), of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def test_noise_does_not_choose():
    noisy = {(None, 1.0): [4.0, 6.0, 5.0], (None, 2.0): [4.2, 5.5, 5.2], (None, 5.0): [4.1, 5.4, 5.1]}
    chosen, reason = choose_scale(rows_of(noisy), "fid/judge")
    assert chosen == {"num_inference_steps": None, "guidance_scale": 1.0, "fid/judge": 5.0}
    assert reason == "Scale 1: FID in judge features 5 (4 to 6 over 3 seeds); scale 5 has 4.87, but 4% can be noise."

    # The same means, but every seed agrees that 5 is better than 1.
    certain = {(None, 1.0): [4.2, 5.55, 5.25], (None, 2.0): [4.9, 6.3, 5.9], (None, 5.0): [4.1, 5.4, 5.1]}
    chosen, reason = choose_scale(rows_of(certain), "fid/judge")
    assert chosen["guidance_scale"] == 5.0
    assert "noise" not in reason


def test_noise_is_measured_and_seeds_are_no_noise():
    """Over many sweeps of equal settings the difference that counts as noise is one standard error."""
    rng = np.random.default_rng(0)
    for seeds_differ in (0.0, 2.0):
        kept = []
        for _ in range(400):
            seeds = seeds_differ * rng.standard_normal(3)
            logs = {(None, float(s)): np.exp(seeds + 0.1 * rng.standard_normal(3)) for s in range(2)}
            chosen, _ = choose_scale(rows_of(logs), "fid/judge")
            kept.append(chosen["guidance_scale"] == 0.0)
        # 0 is kept where it is better, or worse by less than one error: half of the time, and that of Student's t with
        # 2 degrees of freedom between 0 and 1.
        assert abs(np.mean(kept) - (0.5 + 0.2887)) < 0.06


def test_a_worse_setting_is_not_kept_for_being_cheap():
    """Two seeds differ by a factor of two, and by chance this one hardly less: few differences say little of noise."""
    values = {(5, 0.0): [0.58, 1.71], (5, 2.0): [2.0, 1.9], (10, 0.0): [3.5, 3.0], (10, 2.0): [0.60, 0.82]}
    values |= {(10, 0.5): [1.6, 1.9], (5, 0.5): [2.7, 2.9]}
    chosen, _ = choose_scale(rows_of(values), "fid/judge")
    assert (chosen["num_inference_steps"], chosen["guidance_scale"]) == (10, 2.0)


def test_fewest_steps_that_are_as_good():
    values = {(25, 1.0): [3.0, 3.2], (50, 1.0): [2.9, 3.2], (50, 2.0): [4.0, 4.0], (10, 1.0): [9.0, 9.1]}
    chosen, _ = choose_scale(rows_of(values), "fid/judge")
    assert (chosen["num_inference_steps"], chosen["guidance_scale"]) == (25, 1.0)
    _, reason = choose_scale(rows_of({(10, 1.0): [3.0], (10, 2.0): [2.0]}), "fid/judge")
    assert "with one seed" in reason


def test_scales_of_the_command_line():
    assert parse_scales("0:10") == [0, 0.2, 0.5, 1, 2, 5, 10]
    assert parse_scales("1:4") == [1, 2, 4]
    assert parse_scales("3,0,1.5") == [0, 1.5, 3]
    for text in ("a", "1:", "4:1", "0:inf", "-1:2", ""):
        with pytest.raises(ValueError, match=f"--scales {text} is not a list of guidance scales"):
            parse_scales(text)


def test_what_is_swept_is_the_guidance_that_is_saved(pipe):
    assert guidance_at(pipe, 2.0) == {"guidance_scale": 2.0}
    free = ClassifierGuidedPipeline(pipe.unet, pipe.scheduler, pipe.classifier)
    free.set_sampling_defaults(guidance=ClassifierFreeGuidance(1.5, interval=(100, 800)))
    kind = guidance_at(free, 3.0)["guidance"]
    assert isinstance(kind, ClassifierFreeGuidance)
    assert (kind.scale, kind.interval) == (3.0, (100, 800))
    free.set_sampling_defaults(guidance=[ClassifierFreeGuidance(1.5), ClassifierGuidance(1.0)])
    with pytest.raises(ValueError, match="saves 2 kinds of guidance"):
        guidance_at(free, 3.0)


def test_the_choice_is_saved_and_loaded(pipe, tmp_path):
    chosen = {"num_inference_steps": 3, "guidance_scale": 2.5, "fid/pixels": 1.0}
    pipe.set_sampling_defaults(respacing="10", eta=0.5)
    pipe.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save_choice(tmp_path, chosen)
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path)
    assert loaded.config.sampling_defaults == {"eta": 0.5, "guidance_scale": 2.5, "num_inference_steps": 3}
    changed = [path.name for path in before if path.read_bytes() != before[path]]
    assert changed == ["model_index.json"]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(before)

    pipe.set_sampling_defaults(guidance=ClassifierGuidance(1.0, interval=(100, 900)), respacing="10")
    pipe.save_pretrained(tmp_path)
    save_choice(tmp_path, {**chosen, "num_inference_steps": None})
    saved = json.loads((tmp_path / "model_index.json").read_text())["sampling_defaults"]
    assert saved["respacing"] == "10"
    assert "guidance_scale" not in saved
    assert ClassifierGuidedPipeline.from_pretrained(tmp_path).default("guidance", None)[0]["scale"] == 2.5
    pipe.set_sampling_defaults()


def test_the_picture(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"num_inference_steps": count, "guidance_scale": scale, "seed": seed,
         **{f"{name}/judge": float(rng.uniform(0.2, 0.9)) for name in ("fid", "precision", "recall", "accuracy")}}
        for count in (25, 50) for scale in (0.0, 1.0, 5.0) for seed in (0, 1)
    ]  # fmt: skip
    from PIL import Image

    sweep_curve(rows, "judge", tmp_path / "one.png", chosen=rows[0])
    sweep_curve(rows, "judge", tmp_path / "two.png")
    one, two = (np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png"))
    assert one.shape == two.shape
    assert (one != two).any()
    assert not list(tmp_path.glob("*.tmp"))
