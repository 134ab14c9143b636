"""Wrong inputs for every command: each ends in one sentence, within seconds, and leaves nothing behind."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_refused

from hf_guided import (
    ADMClassifierConfig,
    ADMForImageClassification,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
)
from hf_guided.baselines import ClassConditionalVAE
from hf_guided.cli import main
from hf_guided.pipelines.pipeline_vae import VAEPipeline

SIZES = {"sample_size": 8, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "num_heads": 2}
SIZES |= {"attention_resolutions": []}
NAMES = {0: "apple", 1: "banana", 2: "cherry"}
HUGE = 10**26


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Small models, pictures, samples, statistics and damaged files."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    classifier = ADMForImageClassification(ADMClassifierConfig(**SIZES, id2label=NAMES, pool="adaptive"))
    classifier.save_pretrained(folder / "classifier")
    unet = {"in_channels": 3, "out_channels": 6, **SIZES}
    defaults = {"sampling_defaults": {"respacing": "2"}}
    conditional = ADMUNet2DModel(**unet, num_class_embeds=3, null_class_label=True)
    unconditional = ADMUNet2DModel(**unet)
    upsampler = ADMUNet2DModel(**unet, low_res_channels=3)
    ClassifierGuidedPipeline(conditional, ADMScheduler(), classifier, **defaults).save_pretrained(folder / "pipeline")
    ClassifierGuidedPipeline(unconditional, ADMScheduler(), **defaults).save_pretrained(folder / "unconditional")
    ClassifierGuidedUpscalePipeline(upsampler, ADMScheduler(), **defaults, low_res_size=4).save_pretrained(
        folder / "upscaler"
    )
    vae = ClassConditionalVAE(
        sample_size=8, num_class_embeds=3, latent_dim=4, model_channels=8, channel_mult=[1], num_res_blocks=1
    )
    VAEPipeline(vae, id2label=NAMES).save_pretrained(folder / "vae")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (18, 8, 8, 3), dtype=np.uint8)
    for label, name in NAMES.items():
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(pixels[6 * label + i]).save(folder / "photos" / name / f"{i}.png")
    np.savez(folder / "samples.npz", pixels, np.repeat(np.arange(3), 6))
    np.savez(folder / "small.npz", pixels[:4, :4, :4])
    np.savez(folder / "no-keys.npz", something=np.zeros(3))
    np.savez(folder / "floats.npz", rng.normal(size=(4, 8, 8, 3)))
    np.savez(folder / "flat.npz", np.zeros((4, 8), np.uint8))
    np.savez(folder / "half-statistics.npz", mu=np.zeros(4))
    np.savez(folder / "bad-statistics.npz", mu=np.zeros((2, 2)), sigma=np.full((3, 3), np.nan))
    np.savez(folder / "words.npz", mu=np.array(["a"]), sigma=np.array([["b"]]))
    with open(folder / "pickled.npz", "wb") as file:
        np.savez(file, np.array([{"a": 1}], dtype=object))
    claim(folder / "huge.npz", "(400000000, 224, 224, 3)")
    (folder / "cut.npz").write_bytes((folder / "samples.npz").read_bytes()[:300])
    (folder / "text.npz").write_text("no archive")
    (folder / "empty.npz").write_bytes(b"")
    (folder / "text.parquet").write_text("no table")
    (folder / "text.png").write_text("no picture")
    (folder / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(2)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "empty").mkdir()
    (folder / "one-class" / "cat").mkdir(parents=True)
    Image.fromarray(pixels[0]).save(folder / "one-class" / "cat" / "0.png")
    (folder / "notes.txt").write_text("mine")
    Image.fromarray(pixels[0]).save(folder / "mine.png")
    return folder


def claim(path: Path, shape: str) -> None:
    """A `.npz` file whose header promises an array of another size than it holds."""
    import io
    import zipfile

    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    array = io.BytesIO(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 16)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue())


@pytest.fixture
def place(inputs, monkeypatch) -> Path:
    """The inputs, which every refusal leaves as they are, where a command runs as if there were no network."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return inputs


def product(*tables: list[str]) -> list[str]:
    lines = [""]
    for table in tables:
        lines = [f"{line} {part}".strip() for line in lines for part in table]
    return lines


COUNTS = ["0", "-1", "x", "1.5", "1e3", "''"]
SAMPLING = [
    "--guidance_scale nan", "--guidance_scale inf", "--guidance_scale x", "--num_inference_steps 0",
    "--num_inference_steps 1000000", "--num_inference_steps x", "--respacing ddim",
    "--respacing ddim7000", "--respacing 5,x", "--respacing 0", "--respacing -3", "--respacing 1e3", "--respacing 1001",
    "--respacing 3 --num_inference_steps 3", f"--respacing {HUGE}", f"--num_inference_steps {HUGE}",
    "--seed x", "--seed 1.5", "--seed -1", f"--seed {2**64}", f"--seed {-2**63}",
    *(f"--batch_size {wrong}" for wrong in COUNTS), "--unknown 3",
]  # fmt: skip
LINES = [
    "",
    "unknown",
    # sample
    *product(["sample pipeline --num_images 2 --output new.npz"], SAMPLING),
    *(f"sample pipeline --output new.npz --num_images {wrong}" for wrong in [*COUNTS, HUGE, 2**63]),
    *(f"sample pipeline --output new.npz --num_images_per_label {wrong} --labels all" for wrong in [*COUNTS, HUGE]),
    *(f"sample pipeline --num_images 2 --output new.npz --labels {wrong}" for wrong in
      ["nope", "99", "-1", "1.5", "True", "all uniform", "''", "apple nope", "None"]),
    *(f"sample pipeline --num_images 2 --output {wrong}" for wrong in
      ["new.jpg", "''", ".", "/", "nowhere/new.png", "notes.txt", "pipeline", "mine.png", "samples.npz", "photos/",
       "/proc/new.png", "notes.txt/new.png"]),
    *(f"sample {wrong} --num_images 2 --output new.npz" for wrong in
      ["nowhere", "user/nowhere", "a/b/c", "empty", "notes.txt", "samples.npz", "classifier", "photos", "upscaler",
       "''", ".", "pipeline/unet", "text.pt", "https://example.org/model", "../nowhere"]),
    "sample pipeline --num_images 2 --num_images_per_label 2 --output new.npz",
    "sample pipeline --num_images 2 --truncation 1 --output new.npz",
    "sample pipeline --num_images 2 --temperature 1 --output new.npz",
    "sample unconditional --num_images 2 --labels apple --output new.npz",
    "sample unconditional --num_images 2 --guidance_scale 1 --output new.npz",
    "sample pipeline --output new.npz",
    "sample",
    *(f"sample vae --labels all --num_images 2 --output new.npz {wrong}" for wrong in
      ["--temperature -1", "--temperature nan", "--temperature inf", "--truncation 1", "--guidance_scale 1",
       "--num_inference_steps 3", "--compile"]),
    # upscale
    *product(["upscale upscaler small.npz --output new.npz"], SAMPLING),
    *(f"upscale upscaler {wrong} --output new.npz" for wrong in
      ["nowhere.npz", "no-keys.npz", "floats.npz", "flat.npz", "huge.npz", "cut.npz", "text.npz", "empty.npz",
       "pickled.npz", "text.png", "photos", "small.npz small.npz", "notes.txt", "mine.png nowhere.png", "''"]),
    *(f"upscale upscaler small.npz --output {wrong}" for wrong in
      ["small.npz", "new.jpg", "nowhere/new.npz", "notes.txt", "mine.png", "samples.npz", "''", "."]),
    *(f"upscale {wrong} small.npz --output new.npz" for wrong in ["pipeline", "nowhere", "empty", "vae", "classifier"]),
    "upscale upscaler small.npz --labels apple --output new.npz",
    "upscale upscaler",
    # evaluate
    *product(["evaluate pipeline photos --num_images 4 --features classifier --output new"], SAMPLING),
    *(f"evaluate {wrong} photos --features vae --output new" for wrong in
      ["nowhere", "nowhere.npz", "no-keys.npz", "floats.npz", "flat.npz", "huge.npz", "cut.npz", "text.npz",
       "empty.npz", "pickled.npz", "text.parquet", "empty", "notes.txt", "user/nowhere", "classifier", "mine.png",
       "half-statistics.npz"]),
    *(f"evaluate samples.npz {wrong} --features m=classifier --output new" for wrong in
      ["nowhere", "no-keys.npz", "floats.npz", "huge.npz", "cut.npz", "text.npz", "empty.npz", "pickled.npz",
       "half-statistics.npz", "bad-statistics.npz", "words.npz", "text.parquet", "empty", "notes.txt",
       "user/nowhere:test", "photos:nosplit", "digits:nosplit", "one-class:test"]),
    *(f"evaluate samples.npz photos --features {wrong} --output new" for wrong in
      ["nowhere", "user/nowhere", "inceptoin", "pipeline", "vae", "empty", "notes.txt", "a=classifier a=classifier",
       "=classifier", "a=", "''", "photos"]),
    "evaluate samples.npz photos --features classifier --output samples.npz",
    "evaluate samples.npz photos --features classifier --output photos",
    "evaluate samples.npz photos --features classifier --output notes.txt/new",
    "evaluate samples.npz photos --features classifier --output ''",
    "evaluate samples.npz photos --features classifier --output new --likelihood",
    "evaluate samples.npz photos --features classifier --output new --compile",
    "evaluate samples.npz photos --features classifier --output new --save_statistics samples.npz",
    "evaluate samples.npz photos --features classifier --output new --save_statistics new.txt",
    "evaluate samples.npz photos --features classifier --output new --save_statistics nowhere/new.npz",
    "evaluate samples.npz photos --features classifier --output new --held_out nowhere",
    "evaluate samples.npz photos --features classifier --output new --num_workers -1",
    "evaluate samples.npz photos --features classifier --output new --num_workers x",
    "evaluate samples.npz photos --features classifier --output new --distance_dtype float8",
    "evaluate vae photos --features classifier --output new --num_images 4 --likelihood",
    "evaluate samples.npz",
    # sweep
    *(f"sweep pipeline photos --features m=classifier --num_images 4 --output new {wrong}" for wrong in
      ["--scales 0,nan", "--scales inf", "--scales ''", "--scales x", "--scales 3:1", "--scales -1", "--scales 0:1:2",
       f"--scales 0:{HUGE}", "--steps 0", "--steps x", "--steps 1,1000000", "--steps ''", "--steps 1.5", "--seeds x",
       "--seeds -1", "--seeds ''", f"--seeds {2**64}", "--num_images 0", f"--num_images {HUGE}", "--batch_size 0",
       "--labels nope", "--num_workers -2", "--output photos", "--output notes.txt"]),
    *(f"sweep {wrong} photos --features classifier --num_images 4 --output new" for wrong in
      ["nowhere", "vae", "unconditional", "upscaler", "classifier", "empty"]),
    "sweep pipeline photos --features classifier --num_images 4 --output new",
    "sweep pipeline nowhere --features vae --num_images 4 --output new",
    "sweep pipeline huge.npz --features m=vae --num_images 4 --output new",
    # compare
    *(f"compare --data photos --resolution 8 --output new {wrong}" for wrong in
      ["--families nope", "--families ''", "--families vae,vae", "--budget 0m", "--budget x", "--budget -5m",
       "--budget nanm", "--budget infh", "--budget 1parameters", "--budget 0steps", f"--budget {HUGE}h", "--budget ''",
       "--budget 1e400h", "--seeds x", "--seeds ''", f"--seeds {2**64}", "--num_images 0", f"--num_images {HUGE}",
       "--guidance_scale nan", "--guidance_scale -1", "--guidance_scale inf", "--scales nan", "--scales ''",
       "--scales 0,-1", "--batch_size 0", "--recipe nope", "--recipe notes.txt", "--features nowhere",
       "--resolution 0", "--resolution -8", "--resolution 8 8 8", "--data nowhere", "--data empty", "--data one-class",
       "--output photos", "--output notes.txt"]),
    "compare nowhere --features classifier --data photos --output new",
    "compare a=pipeline a=vae --features classifier --data photos --output new",
    "compare =pipeline --features classifier --data photos --output new",
    "compare a= --features classifier --data photos --output new",
    "compare pipeline vae --data photos --features nowhere --output new",
    "compare pipeline classifier --data photos --features classifier --output new",
    # inspect-classifier
    *(f"inspect-classifier classifier photos --output new.png {wrong}" for wrong in
      ["--num_images 0", f"--num_images {HUGE}0x", "--batch_size -1", "--seed -1", f"--seed {2**64}", "--seed x",
       "--held_out_fraction 0", "--held_out_fraction 1", "--held_out_fraction nan", "--held_out_fraction x",
       "--held_out_fraction -1", "--train_split nope", "--validation_split nope", "--image_column nope",
       "--label_column nope", "--output new.jpg", "--output nowhere/new.png", "--output mine.png",
       "--output photos/new.png", "--output ''"]),
    *(f"inspect-classifier {wrong} photos --output new.png" for wrong in
      ["nowhere", "unconditional", "vae", "empty", "photos", "notes.txt", "user/nowhere", "pipeline/unet"]),
    *(f"inspect-classifier classifier {wrong} --output new.png" for wrong in
      ["nowhere", "empty", "one-class", "notes.txt", "samples.npz", "digits", "user/nowhere"]),
    # convert
    *(f"convert {wrong}" for wrong in
      ["", "nope", "--checkpoint other.pt", "--output new", "--checkpoint nowhere.pt --output new",
       "imagenet64 --checkpoint nowhere.pt --output new", "nope --checkpoint other.pt --output new",
       "--checkpoint other.pt --output new", "--checkpoint other.pt --output new --flags '--image_size 64'",
       "--checkpoint text.pt --output new --flags '--image_size 64'",
       "--checkpoint list.pt --output new --flags '--image_size 64'",
       "--checkpoint photos --output new --flags '--image_size 64'",
       "--checkpoint other.pt --output new --flags '--image_size x'",
       "--checkpoint other.pt --output new --flags '--image_size 17'",
       "--checkpoint other.pt --output new --flags '--nope 3'",
       "--checkpoint other.pt --output new --flags 'image_size'",
       "--checkpoint other.pt --output new --flags \"--image_size 64 --num_channels '\"",
       "--checkpoint other.pt --output new --flags ''",
       "--checkpoint other.pt --output new --dtype fp8",
       "--checkpoint other.pt --output pipeline --flags '--image_size 64'",
       "--checkpoint other.pt --output notes.txt --flags '--image_size 64'",
       "--checkpoint other.pt --output new --flags '--image_size 64' --labels nowhere.txt",
       "--checkpoint other.pt --output new --flags '--image_size 64' --labels photos",
       "--checkpoint other.pt --output new --flags '--image_size 64' --classifier nowhere.pt",
       "--checkpoint other.pt --output new --flags '--image_size 64' --push_to_hub",
       "--checkpoint other.pt --output new --flags '--image_size 64' --push_to_hub --hub_model_id a/b/c",
       "pipeline --to openai --output other.pt", "pipeline --to openai --output new.pt --classifier new.pt",
       "nowhere --to openai --output new.pt", "pipeline --to openai --output nowhere/new.pt",
       "pipeline --to openai --output notes.txt/new.pt", "pipeline --to openai --output ''",
       "pipeline --to openai --output photos", "pipeline --to openai --output new.pt --classifier nowhere/new.pt",
       "photos --to openai --output new.pt", "empty --to openai --output new.pt", "vae --to openai --output new.pt",
       "--to openai --output new.pt", "pipeline --to openai --output new.pt --dtype fp16",
       "pipeline --to diffusers --output new.pt", "unconditional --to openai --output new.pt --classifier c.pt"]),
    # push
    *(f"push {wrong}" for wrong in
      ["", "pipeline", "nowhere user/model", "empty user/model", "photos user/model", "pipeline a/b/c",
       "pipeline 'a b/c'", "pipeline ''", "pipeline user/..", "notes.txt user/model",
       "pipeline user/model --include nothing-like-it", "pipeline --space user/space", "pipeline --include x",
       "pipeline user/model --judge user/judge", "classifier user/model --space a/b/c", "'' user/model",
       "pipeline user/model --revision ''", "pipeline user/model"]),
    # demo
    *(f"demo {wrong}" for wrong in
      ["", "nowhere", "empty", "classifier", "pipeline --port 70000", "pipeline --port 0", "pipeline --port x",
       "pipeline --port -1", "pipeline --judge nowhere", "pipeline --judge pipeline",
       "pipeline --host 'no host' --port 7861", "pipeline --host 300.1.1.1 --port 7861"]),
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_command_line(line, place, capsys):
    assert_refused(lambda: main(shlex.split(line)), place, capsys)
