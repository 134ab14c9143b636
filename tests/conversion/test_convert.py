"""`hf-guided convert`: from the published files to folders, on the reference models and under every published name."""

import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conversion_helpers import (
    SCHEDULE,
    all_flags,
    contents,
    needed_flags,
    script_made,
    write_random_checkpoint,
)
from safetensors.torch import load_file
from test_openai import CHECKPOINTS, CLASSIFIERS, TOLERANCE, UNETS
from transformers import AutoModelForImageClassification

import hf_guided.conversion as conversion
import hf_guided.conversion.files as files_module
from hf_guided import (
    ADMForImageClassification,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
)
from hf_guided.cli import main
from hf_guided.conversion import (
    convert_checkpoint,
    convert_openai_classifier,
    convert_openai_unet,
    export_checkpoint,
    to_openai_state_dict,
)
from hf_guided.conversion.openai import published_shapes
from hf_guided.conversion.published import PUBLISHED, kind_of

RESIDENT = Path("/proc/self/clear_refs")


@pytest.mark.parametrize("flags", [needed_flags, all_flags], ids=["needed flags", "all flags"])
@pytest.mark.parametrize("name", UNETS)
def test_unets_agree_with_the_published_code(reference, checkpoint, convert, error, tmp_path, name, flags):
    stored = reference(name)
    told = flags(stored.config)
    if name == "superres":  # the published scripts for upsampling have no flag for widths
        told = re.sub(r"--channel_mult \S+", "", told)
    out = convert("--checkpoint", checkpoint(name), "--flags", told, "--output", tmp_path / "out")
    assert "million parameters" in out
    pipe = ClassifierGuidedPipeline if name != "superres" else ClassifierGuidedUpscalePipeline
    unet = pipe.from_pretrained(tmp_path / "out").unet
    inputs = {"class_labels": stored.tensors.get("y"), "low_res": stored.tensors.get("low_res")}
    with torch.no_grad():
        output = unet(stored.tensors["x"], stored.tensors["timesteps"], **inputs).sample
    assert error(output, stored.tensors["output"]) < TOLERANCE


@pytest.mark.parametrize("flags", [needed_flags, all_flags], ids=["needed flags", "all flags"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_agree_with_the_published_code(reference, checkpoint, convert, error, tmp_path, name, flags):
    stored = reference(name)
    convert("--checkpoint", checkpoint(name), "--flags", flags(stored.config), "--output", tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(stored.tensors["x"], stored.tensors["timesteps"]).logits
    assert error(logits, stored.tensors["logits"]) < TOLERANCE
    assert model.config.id2label == {i: str(i) for i in range(logits.shape[1])}


def test_a_lone_classifier_in_half_precision_is_loaded_as_it_is_asked_for(checkpoint, reference, convert, tmp_path):
    flags = ["--flags", needed_flags(reference("classifier_attention").config), "--dtype", "fp16"]
    convert("--checkpoint", checkpoint("classifier_attention"), *flags, "--output", tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").dtype == torch.float32
    half = AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert half.dtype == torch.float16
    assert "dtype=torch.float16)" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["ddim_linear_ddim10", "ddim_linear_eta08", "ddpm_cosine_10", "ddpm_linear_sections", "ddpm_unguided"],
)
def test_converted_pipelines_sample_like_the_published_code(reference, checkpoint, convert, tmp_path, name):
    """Steps, sampler and scale are the saved defaults."""
    config, tensors = reference(f"trajectory_{name}").config, reference(f"trajectory_{name}").tensors
    scale = config["classifier_scale"]
    flags = needed_flags(
        reference("sampler_unet").config,
        f"--noise_schedule {config['beta_schedule']} --diffusion_steps 1000 --timestep_respacing {config['respacing']} "
        f"--use_ddim {config['sampler'] == 'ddim'} --classifier_scale {scale} --classifier_num_head_channels 16",
    )
    arguments = ["--checkpoint", checkpoint("sampler_unet"), "--classifier", checkpoint("sampler_classifier")]
    convert(*arguments, "--flags", flags, "--output", tmp_path / "out")
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.sampling_defaults == {"respacing": config["respacing"], "guidance_scale": scale}
    steps = []
    pipe(
        tensors["y"],
        eta=config["eta"],
        latents=tensors["initial_noise"],
        variance_noise=tensors["step_noise"],
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kept: steps.append((int(t), kept["latents"])) or {},
    )
    assert [t for t, _ in steps] == tensors["timesteps"].tolist()
    for (_, latents), expected in zip(steps, tensors["samples"], strict=True):
        assert (latents - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_folder_is_what_save_pretrained_writes(reference, checkpoint, convert, tmp_path):
    unet, classifier = reference("sampler_unet"), reference("sampler_classifier")
    flags = needed_flags(unet.config) + " --classifier_num_head_channels 16 --classifier_scale 2"
    files = ["--checkpoint", checkpoint("sampler_unet"), "--classifier", checkpoint("sampler_classifier")]
    convert(*files, "--flags", flags, "--output", tmp_path / "out")
    loaded = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(
        loaded.unet.parameters(), convert_openai_unet(unet.weights, unet.config).parameters(), strict=True
    ))  # fmt: skip
    ClassifierGuidedPipeline(
        convert_openai_unet(unet.weights, unet.config),
        loaded.scheduler,
        convert_openai_classifier(
            classifier.weights,
            {**classifier.config, "id2label": loaded.id2label, "label2id": {str(i): i for i in range(5)}},
        ),
        id2label=loaded.id2label,
        sampling_defaults={"num_inference_steps": 20, "guidance_scale": 2.0},
    ).save_pretrained(tmp_path / "expected")
    ours, expected = contents(tmp_path / "out"), contents(tmp_path / "expected")
    assert ours.keys() - expected.keys() == {"README.md", "openai_flags.json"}
    for name, content in expected.items():
        if name.endswith(".json"):
            found, wanted = json.loads(ours[name]), json.loads(content)
            assert {k: v for k, v in found.items() if k != "_name_or_path"} == {
                k: v for k, v in wanted.items() if k != "_name_or_path"
            }, name
        else:
            found, wanted = load_file(tmp_path / "out" / name), load_file(tmp_path / "expected" / name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)


DEFAULTS = {
    "64x64_diffusion": {"num_inference_steps": 20, "guidance_scale": 1.0},
    "128x128_diffusion": {"num_inference_steps": 20, "guidance_scale": 0.5},
    "256x256_diffusion": {"num_inference_steps": 20, "guidance_scale": 1.0},
    "256x256_diffusion_uncond": {"num_inference_steps": 20, "guidance_scale": 10.0},
    "512x512_diffusion": {"num_inference_steps": 20, "guidance_scale": 4.0},
    "64_256_upsampler": {"num_inference_steps": 20},
    "128_512_upsampler": {"num_inference_steps": 20},
    "lsun_bedroom": {"num_inference_steps": 20},
    "lsun_cat": {"num_inference_steps": 20},
    "lsun_horse": {"num_inference_steps": 20},
    "lsun_horse_nodropout": {"num_inference_steps": 20},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_published_name_at_full_size(full_size, convert, reference_json, tmp_path, name):
    folder, kind = tmp_path / "out", kind_of(name)
    guide = PUBLISHED[name].classifier
    files = ["--checkpoint", full_size(name), *(["--classifier", full_size(guide)] if guide else [])]
    convert(name, *files, "--output", folder)
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert f"`{name}`" in card
    assert ("ILSVRC/imagenet-1k" in card) == ("lsun" not in name)
    assert '- "' not in card.split("---")[1]
    if kind == "classifier":
        config = ADMForImageClassification.config_class.from_pretrained(folder)
        assert config.id2label[207] == "golden retriever"
        assert config.num_labels == 1000
        schedule = {"cosine": "squaredcos_cap_v2"}.get(reference_json("published_checkpoints")[name]["noise_schedule"])
        assert config.beta_schedule == (schedule or "linear")
        shapes = json.loads((folder / "model.safetensors").read_text())
        with torch.device("meta"):
            assert {k: list(v.shape) for k, v in ADMForImageClassification(config).state_dict().items()} == shapes
        return

    index = json.loads((folder / "model_index.json").read_text())
    upsampler = kind == "upsampler"
    assert index["_class_name"] == f"ClassifierGuided{'Upscale' * upsampler}Pipeline"
    assert index["sampling_defaults"] == DEFAULTS[name]
    assert index.get("low_res_size") == {"64_256_upsampler": 64, "128_512_upsampler": 128}.get(name)
    assert index["id2label"]["207"] == "golden retriever"
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["beta_schedule"] == ("squaredcos_cap_v2" if name == "64x64_diffusion" else "linear")
    assert scheduler["variance_type"] == "learned_range"
    shapes = json.loads((folder / "unet" / "diffusion_pytorch_model.safetensors").read_text())
    with torch.device("meta"):
        unet = ADMUNet2DModel.from_config(ADMUNet2DModel.load_config(folder / "unet"))
    assert {key: list(value.shape) for key, value in unet.state_dict().items()} == shapes
    assert unet.num_parameters() == reference_json("published_checkpoints")[name]["parameters"]
    if guide:
        config = ADMForImageClassification.config_class.from_pretrained(folder / "classifier")
        assert config.sample_size == unet.config.sample_size
        assert config.beta_schedule == scheduler["beta_schedule"]


def test_without_a_classifier_no_scale_is_saved(full_size, convert, tmp_path):
    convert("128x128_diffusion", "--checkpoint", full_size("128x128_diffusion"), "--output", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["sampling_defaults"] == {"num_inference_steps": 20}
    assert index["classifier"] == [None, None]


def test_the_512_model_is_said_to_need_float32(full_size, convert, tmp_path):
    path = full_size("512x512_diffusion")
    assert "float32" not in convert("512x512_diffusion", "--checkpoint", path, "--output", tmp_path / "a")
    out = convert("512x512_diffusion", "--checkpoint", path, "--dtype", "fp16", "--output", tmp_path / "b")
    assert "published samples were computed in float32" in out


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("256x256_diffusion", "256x256_diffusion_uncond", "--class_cond True contradicts .* tensors say False"),
        ("64x64_diffusion", "128x128_diffusion", "--num_channels 192 contradicts .* tensors say 256"),
        ("256x256_diffusion", "512x512_diffusion", "--image_size 256 means widths of 1,1,2,2,4,4 .* 0.5,1,1,2,2,4,4"),
        ("256x256_diffusion", "64_256_upsampler", "256x256_diffusion is a UNet, .* those of an upsampler"),
        ("64_256_upsampler", "256x256_diffusion", "64_256_upsampler is an upsampler, .* those of a UNet"),
        ("128_512_upsampler", "64_256_upsampler", "--attention_resolutions 32,16 contradicts"),
        ("64x64_classifier", "64x64_diffusion", "64x64_classifier is a classifier, .* those of a UNet"),
        ("128x128_classifier", "256x256_classifier", "128x128_classifier: .*image_size"),
    ],
)
def test_a_name_that_is_another_checkpoints_is_refused(full_size, refused, tmp_path, name, file, message):
    path = full_size(file)
    sentence = refused(name, "--checkpoint", path, "--output", tmp_path / "out")
    assert re.search(message, sentence), sentence
    assert f"{path} is not {name}" in sentence
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_classifier_of_another_size_is_refused(full_size, refused, tmp_path):
    files = ["--checkpoint", full_size("128x128_diffusion"), "--classifier", full_size("256x256_classifier")]
    sentence = refused("128x128_diffusion", *files, "--output", tmp_path / "out")
    assert "256x256_classifier.pt is not 128x128_classifier" in sentence
    assert not (tmp_path / "out").exists()


def test_names_that_are_none_are_refused(checkpoint, refused, tmp_path):
    rest = ["--checkpoint", checkpoint("sampler_unet"), "--output", tmp_path / "out"]
    assert "did you mean 256x256_diffusion?" in refused("256x256_difusion", *rest)
    assert "neither was given" in refused(*rest)
    assert "both were given" in refused("256x256_diffusion", *rest, "--flags", SCHEDULE)
    alone = refused("64x64_classifier", *rest, "--classifier", tmp_path / "sampler_unet.pt")
    assert "64x64_classifier has no published classifier" in alone
    assert "--checkpoint is missing" in refused("lsun_cat", "--output", tmp_path / "out")
    small = refused("64x64_diffusion", *rest)
    assert "1000 classes or none, but the tensors have 5" in small
    assert not (tmp_path / "out").exists()


class Pest:
    def __reduce__(self):
        return os.mkdir, (os.environ["PEST"],)


def damaged_files(weights, folder):
    """File -> what is said of it."""
    good = folder / "good.pt"
    torch.save(weights, good)
    data = good.read_bytes()
    (folder / "short.pt").write_bytes(data[: len(data) * 2 // 3])
    (folder / "page.pt").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "empty.pt").write_bytes(b"")
    torch.save({**weights, "x": Pest()}, folder / "pest.pt")
    (folder / "raw_pest.pt").write_bytes(pickle.dumps({"x": Pest()}, protocol=2))
    with zipfile.ZipFile(folder / "zip.pt", "w") as file:
        file.writestr("a.txt", "no checkpoint")
    torch.save(weights, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "old_short.pt").write_bytes((folder / "old.pt").read_bytes()[:20_000])
    torch.save({"state_dict": weights, "step": 3}, folder / "nested.pt")
    torch.save(torch.optim.Adam([torch.zeros(1, requires_grad=True)]).state_dict(), folder / "opt.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save({**weights, "step": 3}, folder / "step.pt")
    torch.save({**weights, "out.2.bias": weights["out.2.bias"].long()}, folder / "whole.pt")
    torch.save({**weights, "out.2.bias": weights["out.2.bias"] * float("nan")}, folder / "nan.pt")
    torch.save({**weights, "stray.weight": torch.zeros(1)}, folder / "stray.pt")
    torch.save({k: v for k, v in weights.items() if k != "middle_block.1.norm.bias"}, folder / "less.pt")
    torch.save({f"module.{k}": v for k, v in weights.items()}, folder / "wrapped.pt")
    (folder / "a folder").mkdir()
    return {
        "missing.pt": "There is no file .*missing.pt",
        "a folder": "is a folder",
        "short.pt": r"short.pt ends too early \([\d,]+ bytes\): download it again",
        "page.pt": "page.pt is a web page, not a checkpoint: download it again",
        "empty.pt": "empty.pt is empty, not a checkpoint: download it again",
        "pest.pt": "pest.pt holds more than tensors",
        "raw_pest.pt": "raw_pest.pt holds more than tensors",
        "zip.pt": "zip.pt is damaged or ends too early .*: download it again",
        "old_short.pt": "old_short.pt is damaged.*: download it again",
        "nested.pt": r"nested.pt holds a state dict inside another, under 'state_dict'; save the inner one",
        "opt.pt": "opt.pt holds the state of an optimizer",
        "list.pt": "list.pt holds a list, not a state dict",
        "nothing.pt": "nothing.pt holds no tensors",
        "step.pt": "step.pt holds a int under 'step'",
        "whole.pt": "whole.pt holds torch.int64 values under 'out.2.bias'",
        "nan.pt": r"nan.pt: The tensor conv_out.bias has values that are not finite",
        "stray.pt": "stray.pt: The checkpoint holds 1 tensors that are not in the config, such as stray.weight",
        "less.pt": "less.pt: The checkpoint has no tensor middle_block.1.norm.bias",
        "wrapped.pt": "wrapped.pt: It has no tensor time_embed.0.weight",
    }


def test_damaged_and_foreign_files_are_refused_and_nothing_is_written(reference, refused, tmp_path, monkeypatch):
    stored = reference("unet_class_cond")
    monkeypatch.setenv("PEST", str(tmp_path / "pest was here"))
    expected = damaged_files(stored.weights, tmp_path)
    before = sorted(tmp_path.iterdir())
    for file, message in expected.items():
        rest = ["--flags", needed_flags(stored.config), "--output", tmp_path / "new" / "out"]
        sentence = refused("--checkpoint", tmp_path / file, *rest)
        assert re.search(message, sentence), sentence
        assert sorted(tmp_path.iterdir()) == before
    main_file, classifier = tmp_path / "good.pt", tmp_path / "short.pt"
    rest = ["--flags", needed_flags(stored.config), "--output", tmp_path / "out"]
    assert "short.pt ends too early" in refused("--checkpoint", main_file, "--classifier", classifier, *rest)
    assert "good.pt is a UNet; give a classifier" in refused(
        "--checkpoint", main_file, "--classifier", main_file, *rest
    )
    assert sorted(tmp_path.iterdir()) == before


def test_old_files_convert_too(reference, checkpoint, convert, tmp_path):
    stored = reference("unet_class_cond")
    flags = ["--flags", needed_flags(stored.config)]
    convert("--checkpoint", checkpoint("unet_class_cond"), *flags, "--output", tmp_path / "new")
    old = checkpoint("unet_class_cond", _use_new_zipfile_serialization=False)
    convert("--checkpoint", old, *flags, "--output", tmp_path / "old")
    ours, theirs = contents(tmp_path / "old" / "unet"), contents(tmp_path / "new" / "unet")
    assert ours == theirs


def test_files_of_the_other_byte_order_convert_too(reference, checkpoint, convert, tmp_path, monkeypatch):
    """They are converted in memory, whose pages must not be released."""
    stored = reference("unet_class_cond")
    flags = ["--flags", needed_flags(stored.config)]
    path = checkpoint("unet_class_cond")
    convert("--checkpoint", path, *flags, "--output", tmp_path / "expected")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if "/data/" in name:
                content = b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4))
            archive.writestr(name, b"big" if name.endswith("/byteorder") else content)
    monkeypatch.setattr(files_module, "RESIDENT_BYTES", 0)
    convert("--checkpoint", path, *flags, "--output", tmp_path / "out")
    assert contents(tmp_path / "out" / "unet") == contents(tmp_path / "expected" / "unet")


def test_an_output_that_holds_something_is_refused_before_the_work(checkpoint, reference, refused, convert, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    flags = ["--flags", needed_flags(reference("unet_class_cond").config), "--output", output]
    convert("--checkpoint", checkpoint("unet_class_cond"), *flags)  # an empty folder is in nobody's way
    before = contents(output)
    assert "exists already and is not empty" in refused("--checkpoint", tmp_path / "missing.pt", *flags)
    assert contents(output) == before


def test_pairs_that_do_not_belong_together_are_refused(checkpoint, reference, refused, tmp_path):
    def pair(unet, classifier, flags=""):
        told = f"{needed_flags(reference(unet).config)} --classifier_num_heads 2 {flags}"
        files = ["--checkpoint", checkpoint(unet), "--classifier", checkpoint(classifier)]
        return refused(*files, "--flags", told, "--output", tmp_path / "out")

    assert "images of 1 channels" in pair("unet_class_cond", "classifier_adaptive")
    assert "has 4 classes, but " in pair("unet_class_cond", "classifier_spatial")
    assert "is a classifier itself" in pair("classifier_adaptive", "classifier_spatial")
    assert "respacing='11000' asks for" in pair("unet_class_cond", "classifier_attention", "--timestep_respacing 11000")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_rounds_every_weight(checkpoint, reference, convert, tmp_path, dtype):
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    unet, classifier = reference("sampler_unet"), reference("sampler_classifier")
    files = ["--checkpoint", checkpoint("sampler_unet"), "--classifier", checkpoint("sampler_classifier")]
    flags = f"{needed_flags(unet.config)} --classifier_num_head_channels 16 --timestep_respacing 3"
    convert(*files, "--flags", flags, "--dtype", dtype, "--output", tmp_path / "out")
    for part, expected in {
        "unet/diffusion_pytorch_model": convert_openai_unet(unet.weights, unet.config),
        "classifier/model": convert_openai_classifier(classifier.weights, classifier.config),
    }.items():
        saved = load_file(tmp_path / "out" / f"{part}.safetensors")
        state = expected.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key].to(kind)) for key in state)
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    assert {pipe.unet.dtype, pipe.classifier.dtype} == {torch.float32}
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out", torch_dtype=kind)
    assert {pipe.unet.dtype, pipe.classifier.dtype} == {kind}
    variant = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out", variant=dtype, torch_dtype=kind)
    assert all(map(torch.equal, variant.unet.parameters(), pipe.unet.parameters()))
    assert all(map(torch.equal, variant.classifier.parameters(), pipe.classifier.parameters()))
    weights = list((tmp_path / "out").rglob("*.safetensors"))
    assert len(weights) == 4
    assert len({path.stat().st_ino for path in weights}) == 2  # two names, one file
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained(".", dtype={kind})' in card
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], output_type="pt").images.isfinite().all()


def test_weights_that_half_precision_cannot_hold_are_refused(reference, refused, tmp_path):
    stored = reference("unet_class_cond")
    torch.save({**stored.weights, "out.2.bias": stored.weights["out.2.bias"] + 1e6}, tmp_path / "model.pt")
    rest = ["--flags", needed_flags(stored.config), "--output", tmp_path / "out", "--dtype", "fp16"]
    sentence = refused("--checkpoint", tmp_path / "model.pt", *rest)
    assert "conv_out.bias has values that torch.float16 cannot hold; convert with --dtype bf16 or fp32" in sentence
    assert os.listdir(tmp_path) == ["model.pt"]


def test_labels_name_the_classes(checkpoint, reference, convert, refused, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("eins\nzwei\n\ndrei\nvier\nfünf\n", encoding="utf-8")
    rest = ["--checkpoint", checkpoint("unet_class_cond"), "--flags", needed_flags(reference("unet_class_cond").config)]
    convert(*rest, "--labels", names, "--output", tmp_path / "out")
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    assert pipe.id2label == dict(enumerate(["eins", "zwei", "drei", "vier", "fünf"]))
    assert 'class_labels=["eins"]' in (tmp_path / "out" / "README.md").read_text()
    names.write_text("one\ntwo")
    assert "has 2 names, but the model has 5 classes" in refused(*rest, "--labels", names, "--output", tmp_path / "b")
    rest = ["--checkpoint", checkpoint("unet_no_conv_resample"), "--output", tmp_path / "b"]
    flags = ["--flags", needed_flags(reference("unet_no_conv_resample").config)]
    assert "has 2 names, but the model has no classes" in refused(*rest, *flags, "--labels", names)
    names.write_bytes("fünf".encode("latin-1"))
    assert f"{names} is not a text file in UTF-8" in refused(*rest, *flags, "--labels", names)
    assert f"There is no file {tmp_path / 'none.txt'}" in refused(*rest, *flags, "--labels", tmp_path / "none.txt")


def test_improved_diffusions_strings_are_taken_as_they_are(convert, tmp_path):
    """Its defaults, four heads and rescaled timesteps, are used if the flags omit them, and are reported."""
    path = tmp_path / "ema.pt"
    write_random_checkpoint(script_made(64), path)
    told = "--image_size 64 --num_channels 32 --num_res_blocks 1 --diffusion_steps 4000 --noise_schedule cosine --lr 1"
    out = convert("--checkpoint", path, "--flags", told, "--output", tmp_path / "out")
    assert "improved-diffusion's defaults are used: --num_heads 4 --rescale_timesteps True" in out
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.config.num_heads == 4
    assert pipe.scheduler.config.rescale_timesteps
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert pipe.scheduler.config.num_train_timesteps == 4000
    stated = f"{told} --num_heads 2 --rescale_timesteps False"
    assert "default" not in convert("--checkpoint", path, "--flags", stated, "--output", tmp_path / "b")
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "b")
    assert pipe.unet.config.num_heads == 2
    assert not pipe.scheduler.config.rescale_timesteps
    guided = f"{told} --num_heads 2 --channel_mult 1,2,3,4"
    out = convert("--checkpoint", path, "--flags", guided, "--output", tmp_path / "c")
    assert "4000 timesteps without rescaling" in out
    assert not ClassifierGuidedPipeline.from_pretrained(tmp_path / "c").scheduler.config.rescale_timesteps


def test_its_defaults_are_no_guess_for_models_that_it_did_not_make(checkpoint, refused, tmp_path):
    rest = ["--checkpoint", checkpoint("unet_uncond_legacy"), "--output", tmp_path / "out", "--flags"]
    told = "--image_size 16 --diffusion_steps 4000 --noise_schedule cosine"
    assert "--num_heads or --num_head_channels is missing" in refused(*rest, told)
    assert "--rescale_timesteps is missing" in refused(*rest, f"{told} --num_heads 4")


def test_a_classifier_that_no_published_script_makes_has_the_flags_heads(checkpoint, reference, convert, tmp_path):
    files = ["--checkpoint", checkpoint("sampler_unet"), "--classifier", checkpoint("sampler_classifier")]
    flags = needed_flags(reference("sampler_unet").config)
    assert "--num_head_channels 16" in flags
    for name, more, expected in (("same", "", 16), ("own", " --classifier_num_head_channels 32", 32)):
        out = convert(*files, "--output", tmp_path / name, "--flags", flags + more)
        assert ("the UNet's --num_head_channels 16 is assumed" in out) == (name == "same")
        config = ADMForImageClassification.config_class.from_pretrained(tmp_path / name / "classifier")
        assert config.attention_head_dim == expected


def test_a_classifier_taken_for_a_unet_is_said_to_be_one(checkpoint, refused, tmp_path):
    flags = f"--image_size 16 --num_channels 64 --num_heads 2 {SCHEDULE}"
    sentence = refused("--checkpoint", checkpoint("sampler_classifier"), "--flags", flags, "--output", tmp_path / "out")
    assert "--num_channels 64 contradicts the checkpoint" in sentence
    assert "Its tensors are a classifier's: give it as --classifier with its UNet" in sentence


def test_a_classifiers_heads_are_never_guessed(checkpoint, reference, refused, tmp_path):
    rest = ["--output", tmp_path / "out", "--flags", "--image_size 16 --diffusion_steps 1000 --noise_schedule linear"]
    sentence = refused("--checkpoint", checkpoint("sampler_classifier"), *rest)
    assert "--classifier_num_heads or --classifier_num_head_channels is missing" in sentence
    assert "sampler_classifier.pt" in sentence


def test_a_lone_classifiers_attention_order_is_honoured(reference, convert, error, tmp_path):
    stored = reference("classifier_attention")
    model = convert_openai_classifier(stored.weights, stored.config)
    weights = to_openai_state_dict(model, new_attention_order=True)
    torch.save(weights, tmp_path / "classifier.pt")
    flags = f"{needed_flags(stored.config)} --use_new_attention_order True"
    convert("--checkpoint", tmp_path / "classifier.pt", "--flags", flags, "--output", tmp_path / "out")
    loaded = ADMForImageClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = loaded(stored.tensors["x"], stored.tensors["timesteps"]).logits
    assert error(logits, stored.tensors["logits"]) < TOLERANCE
    told = convert(tmp_path / "out", "--to", "openai", "--output", tmp_path / "back.pt")
    assert "set use_new_attention_order=True" in told
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_beside_a_unet_the_attention_order_is_the_unets(reference, checkpoint, convert, tmp_path):
    unet, classifier = reference("sampler_unet"), reference("sampler_classifier")
    weights = {
        "unet": to_openai_state_dict(convert_openai_unet(unet.weights, unet.config), new_attention_order=True),
        "classifier": classifier.weights,
    }
    torch.save(weights["unet"], tmp_path / "unet.pt")
    flags = f"{needed_flags(unet.config)} --use_new_attention_order True --classifier_num_head_channels 16"
    files = ["--checkpoint", tmp_path / "unet.pt", "--classifier", checkpoint("sampler_classifier")]
    convert(*files, "--flags", flags, "--output", tmp_path / "out")
    pipe = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out")
    for ours, stored, theirs in (
        (pipe.unet, unet, convert_openai_unet),
        (pipe.classifier, classifier, convert_openai_classifier),
    ):
        expected = theirs(stored.weights, stored.config)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))
    back = ["--output", tmp_path / "a.pt", "--classifier", tmp_path / "b.pt"]
    convert(tmp_path / "out", "--to", "openai", *back)
    for file, part in (("a.pt", "unet"), ("b.pt", "classifier")):
        exported = torch.load(tmp_path / file, weights_only=True)
        assert all(torch.equal(exported[key], weights[part][key]) for key in exported)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--diffusion_steps 10", "--diffusion_steps 10 is too few .*--noise_schedule cosine"),
        ("--timestep_respacing ddim7000", "respacing='ddim7000'"),
        ("--classifier_scale nan", "scale of ClassifierGuidance must be a finite number"),
        ("--classifier_scale -1", "scale of ClassifierGuidance must be a finite number"),
    ],
)
def test_what_no_pipeline_takes_is_refused_before_the_work(checkpoint, reference, capsys, flags, message):
    path = checkpoint("unet_class_cond")
    told = f"{needed_flags(reference('unet_class_cond').config)} {flags}"
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--checkpoint", str(path), "--flags", told, "--output", str(path.parent / "out")])
    assert re.search(message, str(caught.value)), caught.value
    assert "Writing" not in capsys.readouterr().out


def test_flags_are_one_word_whatever_they_begin_with(checkpoint, reference, refused, tmp_path):
    rest = ["--checkpoint", checkpoint("unet_class_cond"), "--output", tmp_path / "out"]
    assert "--num_heads or --num_head_channels is missing" in refused(*rest, "--flags", "--image_size=16")
    assert "--num_heads or --num_head_channels is missing" in refused(*rest, "--flags=--image_size=16")
    assert "--image_size has no value" in refused("--flags", "--image_size", *rest)


def test_functions_raise_as_documented(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*missing\.pt"):
        convert_checkpoint(tmp_path / "missing.pt", tmp_path / "out", flags=SCHEDULE)
    with pytest.raises(ValueError, match="There is no folder"):
        export_checkpoint(tmp_path / "missing", tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"_class_name": "ADMUNet2DModel"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        export_checkpoint(tmp_path, tmp_path / "model.pt")
    assert os.listdir(tmp_path) == ["config.json"]


def test_the_package_opens_without_its_weight():
    code = "import sys, hf_guided.conversion; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"convert_checkpoint", "export_checkpoint", "to_openai_state_dict"} < set(conversion.__all__)
    for name in conversion.__all__:
        assert getattr(conversion, name).__name__ == name
        assert name in dir(conversion)


def test_pages_that_are_given_back_are_read_again(checkpoint, reference, convert, tmp_path, monkeypatch):
    flags = ["--flags", needed_flags(reference("unet_class_cond").config)]
    convert("--checkpoint", checkpoint("unet_class_cond"), *flags, "--output", tmp_path / "expected")
    monkeypatch.setattr(files_module, "RESIDENT_BYTES", 0)
    convert("--checkpoint", tmp_path / "unet_class_cond.pt", *flags, "--output", tmp_path / "out")
    assert contents(tmp_path / "out" / "unet") == contents(tmp_path / "expected" / "unet")


@pytest.mark.skipif(not os.access(RESIDENT, os.W_OK), reason="this system does not tell the peak of a moment")
def test_memory_does_not_grow_with_the_model(convert, tmp_path, monkeypatch):
    with torch.device("meta"):
        model = ADMUNet2DModel(
            sample_size=8, model_channels=512, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(8, 4)
        )
    path = tmp_path / "model.pt"
    torch.save({name: torch.zeros(shape) for name, shape in published_shapes(model).items()}, path)
    size = path.stat().st_size
    assert size > 150e6
    monkeypatch.setattr(files_module, "RESIDENT_BYTES", 8 * 2**20)
    status = Path("/proc/self/status")
    RESIDENT.write_text("5")  # the peak counts from now

    def kilobytes(field):
        return int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])

    before = kilobytes("VmRSS")
    flags = f"--image_size 8 --num_head_channels 64 {SCHEDULE}"
    convert("--checkpoint", path, "--flags", flags, "--output", tmp_path / "out")
    assert (kilobytes("VmHWM") - before) * 1024 < 0.4 * size
