"""Wrong flags, recipes and folders for every training script: each ends in one sentence, and leaves nothing behind."""

import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_refused

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline
from hf_guided.training.arguments import run_script

HUGE = 10**26
MODEL = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 2}
TINY = "--model_channels 32 --channel_mult 1 --num_res_blocks 1 --attention_resolutions 4 --num_heads 2"
RUN = "--train_batch_size 4 --report_to none --validation_steps 0 --preview_steps 0 --max_train_steps 1"
BASELINE = f"--channel_mult 1 --model_channels 8 {RUN}"
START = {
    "train": f"train {TINY} {RUN} --num_images 20 --num_inference_steps 2",
    "classifier": f"train_classifier {TINY} {RUN}",
    "diffusion": f"train_diffusion {TINY} {RUN} --num_inference_steps 2",
    "upscaler": f"train_upscaler {TINY} {RUN} --num_inference_steps 2",
    "vae": f"train_baseline --family vae --num_res_blocks 1 {BASELINE}",
    "gan": f"train_baseline --family gan --discriminator_channels 8 {BASELINE}",
    "flow": f"train_baseline --family flow --num_levels 1 --num_blocks 1 --hidden_channels 8 {RUN}",
}
PHOTOS = "--train_data_dir photos --resolution 8"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Pictures, models, files and folders that are in the way."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    unet = {"sample_size": 8, "in_channels": 3, "out_channels": 6, **MODEL}
    ADMUNet2DModel(**unet).save_pretrained(folder / "unet")
    ClassifierGuidedPipeline(
        ADMUNet2DModel(**unet, num_class_embeds=3, null_class_label=True), ADMScheduler()
    ).save_pretrained(folder / "pipeline")
    upsampler = ADMUNet2DModel(**unet, low_res_channels=3)
    ClassifierGuidedUpscalePipeline(upsampler, ADMScheduler(), low_res_size=4).save_pretrained(folder / "upsampler")
    for name, changes in {"bad-width": {"model_channels": "x"}, "no-levels": {"channel_mult": []}}.items():
        shutil.copytree(folder / "unet", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    for name, text in {"list-config": "[1, 2]", "no-json": "no json"}.items():
        shutil.copytree(folder / "unet", folder / name)
        (folder / name / "config.json").write_text(text)
    for name, index in {"list-index": "[]", "no-class": "{}", "bad-names": '{"id2label": [1, 2]}'}.items():
        shutil.copytree(folder / "pipeline", folder / name)
        known = json.loads((folder / name / "model_index.json").read_text())
        content = json.loads(index)
        content = {**known, **content} if content else content
        (folder / name / "model_index.json").write_text(json.dumps(content))
    random = np.random.default_rng(0)
    for name in ("apple", "banana", "cherry"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                folder / "photos" / name / f"{i}.png"
            )
    (folder / "one-class" / "apple").mkdir(parents=True)
    shutil.copy(folder / "photos" / "apple" / "0.png", folder / "one-class" / "apple")
    for name in ("apple", "banana"):
        (folder / "no-pictures" / name).mkdir(parents=True)
        (folder / "no-pictures" / name / "0.png").write_text("no picture")
        (folder / "empty-classes" / name).mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "text.parquet").write_text("no table")
    (folder / "samples.npz").write_bytes(b"")
    (folder / "recipe.yaml").mkdir()
    return folder


@pytest.fixture
def place(inputs, monkeypatch) -> Path:
    """The inputs, which every refusal leaves as they are, where a script runs as if there were no network."""
    monkeypatch.chdir(inputs)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return inputs


def refused(line: str, place: Path, capsys, monkeypatch) -> str:
    """Runs `script flag value ...` as a user does, and returns the sentence."""
    name, *argv = shlex.split(line)
    main = importlib.import_module(f"hf_guided.training.{name}").main
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    return assert_refused(lambda: run_script(main), place, capsys)


def each(start: str, flag: str, *values: object) -> list[str]:
    return [f"{start} {flag} {value}" for value in values]


INTEGERS = ["x", "1.5", "nan", "inf", "-1", "1e3", "''", HUGE]
POSITIVE = ["0", *INTEGERS]
NUMBERS = ["x", "nan", "inf", "-inf", "-1", "''", "1e400"]
SHARES = ["1", "1.5", *NUMBERS]
SEEDS = ["-1", 2**63, 2**64, HUGE, "x", "1.5", "''"]
DIFFUSION, CLASSIFIER, UPSCALER, WHOLE = (START[name] for name in ("diffusion", "classifier", "upscaler", "train"))
FLAGS = [
    # every script
    *(line for start in START.values() for line in (
        f"{start} --unknown 3", f"{start} --seed -1", f"{start} --seed {2**64}", f"{start} --max_train_steps 0",
        f"{start} --max_train_steps {HUGE}", f"{start} --learning_rate nan", f"{start} --train_batch_size -1",
        f"{start} --output_dir ''", f"{start} --output_dir notes.txt", f"{start} --output_dir notes.txt/new",
        f"{start} --train_data_dir nowhere --resolution 8", f"{start} --train_data_dir empty",
        f"{start} --train_data_dir photos --resolution 0", f"{start} --recipe nope", f"{start} --recipe notes.txt",
        f"{start} --train_data_dir photos --resolution 8 --output_dir photos/new", f"{start} stray",
        f"{start} --resume_from_checkpoint nowhere", f"{start} --mixed_precision fp8", f"{start} --push_to_hub",
        f"{start} --train_batch_size {10**9}", f"{start} --resolution {10**7}",
    )),
    # the loop
    *each(DIFFUSION, "--train_batch_size", *POSITIVE),
    *each(DIFFUSION, "--gradient_accumulation_steps", *POSITIVE),
    *each(DIFFUSION, "--max_train_steps", *POSITIVE),
    *each(DIFFUSION, "--learning_rate", "0", *NUMBERS),
    *each(DIFFUSION, "--lr_warmup_steps", *INTEGERS),
    *each(DIFFUSION, "--lr_scheduler", "nope", "''", "piecewise_constant", "3"),
    *each(DIFFUSION, "--adam_beta1", *SHARES),
    *each(DIFFUSION, "--adam_beta2", "1", "nan"),
    *each(DIFFUSION, "--adam_weight_decay", *NUMBERS),
    *each(DIFFUSION, "--adam_epsilon", "0", "nan"),
    *each(DIFFUSION, "--max_grad_norm", "0", "inf", "nan", "-1"),
    *each(DIFFUSION, "--ema_decay", *SHARES),
    *each(DIFFUSION, "--checkpointing_steps", *POSITIVE),
    *each(DIFFUSION, "--checkpoints_total_limit", *POSITIVE),
    *each(DIFFUSION, "--resume_from_checkpoint", "nowhere", "notes.txt", "photos", "pipeline", "''", "empty"),
    *each(DIFFUSION, "--validation_steps", *INTEGERS),
    *each(DIFFUSION, "--preview_steps", *INTEGERS),
    *each(DIFFUSION, "--logging_steps", *POSITIVE),
    *each(DIFFUSION, "--report_to", "nope", "''"),
    *each(DIFFUSION, "--mixed_precision", "fp8", "half", "''", "16"),
    *each(DIFFUSION, "--seed", *SEEDS),
    *each(DIFFUSION, "--gradient_checkpointing", "perhaps", "2", "''"),
    # the Hub
    *each(DIFFUSION, "--push_to_hub --hub_model_id", "a/b/c", "'a b'", "''", "..", "-x/y", "user/"),
    *each(DIFFUSION, "--push_to_hub", "--hub_private"),
    # the data
    *each(DIFFUSION, "--resolution 8 --train_data_dir", "nowhere", "empty", "notes.txt", "no-pictures", "one-class",
          "empty-classes", "''", "samples.npz", "text.parquet", "pipeline", "photos/apple/0.png"),
    *each(DIFFUSION, "--resolution 8 --dataset_name", "nowhere", "user/nowhere", "notes.txt", "text.parquet", "empty",
          "''", "a/b/c", "one-class"),
    *each(DIFFUSION, "--train_data_dir photos --resolution", "0", "-8", "x", "8.5", "nan", "''", "8 8 8", "8 0", HUGE),
    f"{DIFFUSION} --train_data_dir photos --dataset_name digits",
    *each(f"{DIFFUSION} {PHOTOS}", "--train_split", "nope", "''", "test"),
    *each(f"{DIFFUSION} {PHOTOS}", "--validation_split", "nope", "train", "''"),
    *each(f"{DIFFUSION} {PHOTOS}", "--held_out_fraction", *SHARES),
    *each(f"{DIFFUSION} {PHOTOS}", "--image_column", "nope", "label", "''"),
    *each(f"{DIFFUSION} {PHOTOS}", "--label_column", "nope", "image", "''"),
    *each(f"{DIFFUSION} {PHOTOS}", "--image_channels", "2", "0", "-1", "x", "4"),
    *each(f"{DIFFUSION} {PHOTOS}", "--dataloader_num_workers", *INTEGERS),
    *each(f"{DIFFUSION} {PHOTOS}", "--random_flip", "perhaps"),
    *each(f"{DIFFUSION} {PHOTOS}", "--dataset_config_name", "nope"),
    *each(f"{DIFFUSION} --dataset_name photos --resolution 8", "--cache_dir", "notes.txt", "notes.txt/new"),
    f"{DIFFUSION} --dataset_name digits --validation_split test",
    # the noise schedule and the steps
    *each(DIFFUSION, "--beta_schedule", "nope", "''", "cosine"),
    *each(DIFFUSION, "--num_train_timesteps", "1", *POSITIVE, 10**12),
    f"{DIFFUSION} --beta_schedule linear --num_train_timesteps 10",
    *each(DIFFUSION, "--num_inference_steps", "1000", "1001", *POSITIVE),
    *each(DIFFUSION, "--respacing", "0", "x", "''", "1001", "ddim", "ddim7000", "5,x", "-3", "nan", HUGE),
    # the models
    *each(DIFFUSION, "--model_channels", "33", "20", "1000000000", *POSITIVE),
    *each(DIFFUSION, "--channel_mult", "0", "-1", "nan", "inf", "x", "''", "1e300", "0.3", HUGE, ""),
    *each(DIFFUSION, "--num_res_blocks", *POSITIVE),
    *each(DIFFUSION, "--attention_resolutions", "0", "x", "-4", "1.5", HUGE),
    *each(DIFFUSION, "--num_heads", "3", "64", *POSITIVE),
    *each(DIFFUSION, "--attention_resolutions 8 --num_heads_upsample", "3", "0", "x"),
    f"{DIFFUSION} --attention_head_dim 16",
    *each(DIFFUSION, "--dropout", *SHARES),
    *each(DIFFUSION, "--label_dropout", *SHARES),
    *each(DIFFUSION, "--variance_type", "nope", "fixed_small", "''"),
    *each(DIFFUSION, "--prediction_type", "nope", "x0"),
    *each(DIFFUSION, "--loss_type", "nope", "''"),
    *each(DIFFUSION, "--snr_gamma", "0", *NUMBERS),
    f"{DIFFUSION} --snr_gamma 5 --loss_type vlb",
    *each(DIFFUSION, "--timestep_sampler", "nope"),
    *each(DIFFUSION, "--class_conditional", "perhaps", "''"),
    f"{DIFFUSION} --variance_type fixed_small --loss_type hybrid",
    *each(f"{DIFFUSION} {PHOTOS} --beta_schedule linear --pretrained_model", "", "nowhere", "user/nowhere", "empty",
          "notes.txt", "photos", "upsampler", "''", "bad-width", "no-levels", "list-config", "no-json", "list-index",
          "no-class", "bad-names", "a/b/c"),
    f"{DIFFUSION} {PHOTOS} --pretrained_model pipeline",
    f"{UPSCALER} {PHOTOS} --beta_schedule linear --low_resolution 4 --pretrained_model pipeline",
    *each(CLASSIFIER, "--pool", "nope", "''", "mean"),
    *each(CLASSIFIER, "--noisy", "perhaps"),
    *each(CLASSIFIER, "--class_conditional", "true"),
    f"{CLASSIFIER} {PHOTOS} --pool spatial --resolution 8 8 8",
    *each(f"{UPSCALER} {PHOTOS}", "--low_resolution", "3", "8", "16", "5", *POSITIVE),
    *each(f"{UPSCALER} {PHOTOS}", "--low_res_noise", *NUMBERS),
    # the other families
    "train_baseline",
    "train_baseline --family nope",
    "train_baseline --family",
    *each(START["vae"], "--latent_dim", *POSITIVE),
    *each(START["vae"], "--kl_weight", *NUMBERS),
    *each(START["vae"], "--decoder_variance", "0", "nan", "x"),
    *each(START["vae"], "--channel_mult", "0", "1.5", "x"),
    *each(START["gan"], "--discriminator_learning_rate", "0", *NUMBERS),
    *each(START["gan"], "--translation", "8", "100", *INTEGERS),
    *each(START["flow"], "--dequantization_width", "0", "0.5", "256", "nan", "x"),
    *each(START["flow"], "--num_levels", *POSITIVE),
    *each(START["flow"], "--hidden_channels", *POSITIVE),
    *each(START["flow"], "--num_blocks", *POSITIVE),
    # the whole job
    *each(WHOLE, "--num_images", "1", *POSITIVE),
    *each(WHOLE, "--guidance_scales", *NUMBERS, "0 nan"),
    *each(WHOLE, "--conditional_scales", *NUMBERS),
    *each(WHOLE, "--default_scale", *NUMBERS),
    *each(WHOLE, "--sampling_batch_size", *POSITIVE),
    *each(WHOLE, "--judge_noisy", "true", "x"),
    f"{WHOLE} --no_classifier_noisy",
    f"{WHOLE} --classifier_beta_schedule linear",
    f"{WHOLE} --classifier_num_train_timesteps 500",
    f"{WHOLE} --classifier_rescale_timesteps true",
    f"{WHOLE} --label_dropout 0",
    f"{WHOLE} --label_dropout 0 --classifier_free true --conditional_scales 2",
    f"{WHOLE} --no_class_conditional --classifier_free true",
    f"{WHOLE} --upscaler_seed 3",
    f"{WHOLE} --nope_seed 3",
    f"{WHOLE} --judge_pool nope",
    f"{WHOLE} --report_num_inference_steps 1000",
    f"{WHOLE} --diffusion_seed -1",
    f"{WHOLE} --train_data_dir one-class --resolution 8",
    f"{WHOLE} --diffusion_pretrained_model nowhere",
]  # fmt: skip


@pytest.mark.parametrize("line", FLAGS)
def test_wrong_flags(line, place, capsys, monkeypatch):
    if "--output_dir" not in line:
        line += " --output_dir new"
    refused(line, place, capsys, monkeypatch)


RECIPES = [
    "", "   \n", "# nothing\n", "null", "[]", "- a\n- b\n", "3", "x", "'text'", "true", "2020-01-01", "!!binary aGk=",
    "{[1, 2]: 3}", "1: {seed: 3}", "null: {seed: 3}", "true: {}", "diffusion", "diffusion:\n- seed\n",
    "diffusion: 3", "diffusion: text", "diffusion: [seed, 3]", "diffusion: true", "data: [photos]", "data: 3",
    "difusion: {seed: 3}", "diffusion: {sed: 3}", "diffusion: {1: 2}", "diffusion: {null: 2}",
    "diffusion: {[1, 2]: 3}", "diffusion: {{a: b}: 3}", "diffusion: {seed: 1, seed: 2}",
    "diffusion: {}\ndiffusion: {}", "diffusion: {seed: '3'}", "diffusion: {seed: 3.5}", "diffusion: {seed: [3]}",
    "diffusion: {seed: {a: 1}}", "diffusion: {seed: null}", "diffusion: {seed: true}", "diffusion: {seed: -1}",
    f"diffusion: {{seed: {2**64}}}", f"diffusion: {{seed: {HUGE}}}", "diffusion: {seed: 2020-01-01}",
    "diffusion: {seed: 0x10}", "diffusion: {seed: 1:30}", "diffusion: {seed: 010}",
    "diffusion: {learning_rate: .nan}", "diffusion: {learning_rate: .inf}", "diffusion: {learning_rate: -.inf}",
    "diffusion: {learning_rate: fast}", "diffusion: {learning_rate: [1e-4]}", "diffusion: {learning_rate: {x: 1}}",
    f"diffusion: {{learning_rate: {10**400}}}", "diffusion: {learning_rate: 1e400}",
    "diffusion: {learning_rate: false}", "diffusion: {learning_rate: 0}",
    "diffusion: {channel_mult: 2}", "diffusion: {channel_mult: '1 2'}", "diffusion: {channel_mult: []}",
    "diffusion: {channel_mult: [[1, 2]]}", "diffusion: {channel_mult: [1, null]}", "diffusion: {channel_mult: {a: 1}}",
    "diffusion: {channel_mult: [1, true]}", "diffusion: {channel_mult: [1, x]}", "diffusion: {channel_mult: null}",
    "diffusion: {attention_resolutions: [4.5]}", "diffusion: {attention_resolutions: 4}",
    "diffusion: {model_channels: 32.0}", "diffusion: {model_channels: '32'}", "diffusion: {model_channels: [32]}",
    "diffusion: {model_channels: 33}", f"diffusion: {{model_channels: {HUGE}}}",
    "diffusion: {class_conditional: 1}", "diffusion: {class_conditional: 'yes'}", "diffusion: {class_conditional: []}",
    "diffusion: {output_dir: 3}", "diffusion: {output_dir: [a]}", "diffusion: {output_dir: ''}",
    "diffusion: {output_dir: null}", "diffusion: {output_dir: notes.txt}", "diffusion: {output_dir: {a: b}}",
    "diffusion: {output_dir: \"a\\0b\"}", "diffusion: {pretrained_model: \"a\\0b\"}",
    "diffusion: {pretrained_model: 3}", "diffusion: {pretrained_model: [unet]}", "diffusion: {respacing: 250}",
    "diffusion: {respacing: [1]}", "diffusion: {lr_scheduler: 3}", "diffusion: {lr_scheduler: null}",
    "diffusion: {mixed_precision: 16}", "diffusion: {mixed_precision: false}", "diffusion: {report_to: []}",
    "diffusion: {report_to: [tensorboard]}", "diffusion: {recipe: digits}", "diffusion: {hub_model_id: 3}",
    "diffusion: {push_to_hub: true}", "diffusion: {beta_schedule: [linear]}", "diffusion: {beta_schedule: {a: 1}}",
    "diffusion: {resume_from_checkpoint: 500}", "diffusion: {resume_from_checkpoint: true}",
    "diffusion: {data: 3}", "diffusion: {data: [1]}", "diffusion: {data: {resolution: x}}",
    "diffusion: {data: {nope: 1}}", "diffusion: {data: {data: {}}}", "diffusion: {diffusion: {seed: 1}}",
    "data: {resolution: 8}", "data: {resolution: [8, 8, 8]}", "data: {resolution: []}", "data: {resolution: [x]}",
    "data: {resolution: ['8']}", "data: {resolution: [0]}", "data: {resolution: {height: 8}}",
    "data: {dataset_name: 3}", "data: {dataset_name: [digits]}",
    "data: {dataset_name: null, train_data_dir: nowhere, resolution: [8]}",
    "data: {dataset_name: digits, train_data_dir: photos}", "data: {image_channels: '3'}",
    "data: {image_channels: 2}", "data: {image_channels: [3]}", "data: {held_out_fraction: 1}",
    "data: {held_out_fraction: '0.1'}",
    "data: {train_data_dir: [photos, photos]}", "data: {train_data_dir: \"a\\0b\", resolution: [8]}",
    "data: {dataset_name: \"a\\0b\", resolution: [8]}", "data: {cache_dir: 3}",
    "judge: {}\nclassifier: {}", "vae: {latent_dim: 3}", "report: {num_images: x}",
    "diffusion: {seed: 3", "diffusion:\n\tseed: 3", "diffusion: seed: 3", "diffusion: *nope", "diffusion: &a [*a]",
    "diffusion: &a {seed: *a}", "diffusion: !!python/object/apply:os.system ['true']", "diffusion: !!nope 3",
    "diffusion: {<<: 3}", "diffusion: {<<: [1]}", "--- {}\n--- {}\n", "%YAML 9.9\n--- {}", "@", "`", "\x00", "\x07",
    "diffusion: {seed: \ufffe}", "[" * 5000, "{a: " * 5000, "diffusion: !!int x", "diffusion: {seed: !!float x}",
    "diffusion: {seed: !!int ''}", "diffusion: 2020-99-99", "diffusion: {seed: 2020-99-99}", "diffusion: !!set {a, b}",
    "diffusion: !!omap [a: 1]", "diffusion: !!pairs [a: 1]", "diffusion: !!binary x",
    "diffusion: {seed: !!timestamp x}", "diffusion: {seed: !!bool x}",
    "diffusion: {lr_warmup_steps: 99999999999999999999}",
    '{"diffusion": {"seed": "x"}}', '{"diffusion": [1]}', '[{"diffusion": {}}]', '{"diffusion": {"seed": 1}',
    b"\xff\xfe", b"\x89PNG\r\n\x1a\n\x00\x00", bytes(range(256)), b"diffusion: {seed: \xe9}",
    b"PK\x03\x04" + bytes(100),
    "diffusion: {seed: 3}\n".encode("utf-16")[:-1], "\ud83d".encode("utf-16-le", "surrogatepass"), b"\x80\x04\x95",
]  # fmt: skip


@pytest.mark.parametrize("content", RECIPES, ids=lambda content: repr(content)[:60])
def test_wrong_recipes(content, place, capsys, monkeypatch):
    """None of them says enough, or all too much; `nowhere` makes those that say nothing wrong end too."""
    (place / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    flags = "--max_train_steps 1 --train_batch_size 4"
    refused(f"train_diffusion --recipe mine.yaml {flags}", place, capsys, monkeypatch)


@pytest.mark.parametrize(
    "recipe", ["nope", "nope.yaml", "recipe.yaml", "''", ".", "..", "notes.txt", "/dev/null", "empty", "photos.yml",
               "nowhere/digits", "digits.json", "mine\x07.yaml", "a" * 300, "a" * 300 + ".yaml", "Digits", "/"],
)  # fmt: skip
@pytest.mark.parametrize("script", ["train", "train_classifier"])
def test_wrong_places_of_recipes(script, recipe, place, capsys, monkeypatch):
    refused(f"{script} --output_dir new --recipe {recipe}", place, capsys, monkeypatch)
