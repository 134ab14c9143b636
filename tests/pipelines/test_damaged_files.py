"""A saved pipeline with damaged, missing or exchanged files ends in one sentence that names the file or the tensors."""

import shutil
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_guided import ADMScheduler, ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline, VAEPipeline
from hf_guided.baselines.vae import ClassConditionalVAE
from hf_guided.cli import main
from hf_guided.hub.standalone import write_standalone

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PIXELS = {"image_size": 16, "patch_size": 8}


def vision_transformer(num_labels=3):
    return ViTForImageClassification(ViTConfig(**TINY, **PIXELS, num_labels=num_labels)).eval()


@pytest.fixture(scope="module")
def saved(tiny_unet, tiny_classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    clip = CLIPModel(
        CLIPConfig(text_config={**TINY, "vocab_size": 99}, vision_config={**TINY, **PIXELS}, projection_dim=8)
    )
    ClassifierGuidedPipeline(
        tiny_unet(num_class_embeds=3),
        ADMScheduler(),
        tiny_classifier(),
        ViTImageProcessor(size={"height": 16, "width": 16}),
        guide_unet=tiny_unet(num_class_embeds=3),
        clean_classifier=vision_transformer(),
        clip_model=clip,
        sampling_defaults={"respacing": "2"},
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "guide_unet/diffusion_pytorch_model.safetensors",
    "classifier/model.safetensors",
    "clean_classifier/model.safetensors",
    "clip_model/model.safetensors",
)
CONFIGS = (
    "model_index.json",
    "unet/config.json",
    "guide_unet/config.json",
    "classifier/config.json",
    "clean_classifier/config.json",
    "clip_model/config.json",
    "scheduler/scheduler_config.json",
    "classifier_processor/preprocessor_config.json",
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"


def refused(folder, load=ClassifierGuidedPipeline.from_pretrained, error=ValueError):
    with pytest.raises(error) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"\x08", POINTER, b"<html>", None])
@pytest.mark.parametrize("path", WEIGHTS)
def test_damaged_weights_are_named(folder, path, content):
    file = folder / path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    message = refused(folder)
    assert f"{file} is " in message
    assert ("git lfs pull" in message) == (content == POINTER)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b'{"a": 1', b"\xff\xfe\x00", b""])
@pytest.mark.parametrize("path", CONFIGS)
def test_damaged_configs_are_named(folder, path, content):
    (folder / path).write_bytes(content)
    assert f"{folder / path} is " in refused(folder)


@pytest.mark.parametrize("path", WEIGHTS)
def test_weights_that_lack_a_tensor_are_named(folder, path):
    tensors = load_file(folder / path)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, folder / path, metadata={"format": "pt"})
    message = refused(folder)
    assert f"{name} is missing" in message
    assert str((folder / path).parent) in message


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.endswith("/config.json")])
def test_weights_without_a_config_are_named(folder, path):
    (folder / path).unlink()
    assert f"{(folder / path).parent} has weights and no config.json" in refused(folder)


def test_exchanged_weights_are_refused(folder):
    shutil.copy(folder / "clean_classifier/model.safetensors", folder / "classifier/model.safetensors")
    assert "vit.embeddings.cls_token" in refused(folder)
    shutil.copy(folder / "classifier/config.json", folder / "unet/config.json")
    refused(folder)


def test_weights_of_other_shapes_are_refused(folder):
    vision_transformer(num_labels=4).save_pretrained(folder / "other")
    shutil.copy(folder / "other/model.safetensors", folder / "clean_classifier/model.safetensors")
    assert f"Weights of {folder} have other shapes" in refused(folder)


@pytest.mark.parametrize("path", ["clean_classifier/model.safetensors", "unet/diffusion_pytorch_model.safetensors"])
def test_a_repository_that_carries_its_code_tells_the_same(folder, tmp_path, path):
    tensors = load_file(folder / path)
    del tensors[min(tensors)]
    save_file(tensors, folder / path, metadata={"format": "pt"})
    write_standalone(folder, tmp_path / "standalone")
    assert "is missing" in refused(
        tmp_path / "standalone", partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)
    )


def test_a_foreign_unet_that_lacks_a_tensor_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )  # fmt: skip
    ClassifierGuidedPipeline(unet, ADMScheduler(variance_type="fixed_small")).save_pretrained(tmp_path)
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    assert "conv_in.bias is missing" in refused(tmp_path)
    alone = UNet2DModel.from_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"conv_in\.bias is missing"):
        ClassifierGuidedPipeline(alone, ADMScheduler(variance_type="fixed_small"))


def test_a_head_that_the_user_has_trained_guides(saved, tmp_path):
    """A new head of another number of classes is the user's wish; saved with a pipeline it is whole."""
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    trained = ViTForImageClassification.from_pretrained(saved / "clean_classifier", **options)
    vision_transformer().save_pretrained(tmp_path / "vit")
    trained = ViTForImageClassification.from_pretrained(tmp_path / "vit", **options)
    pipe = ClassifierGuidedPipeline.from_pretrained(saved, clean_classifier=trained)
    assert pipe.clean_classifier is trained
    pipe.save_pretrained(tmp_path / "again")
    again = ClassifierGuidedPipeline.from_pretrained(tmp_path / "again").clean_classifier
    assert torch.equal(again.classifier.weight, trained.classifier.weight)


def test_other_families_and_the_upscaler_tell_the_same(tiny_unet, tmp_path):
    vae = ClassConditionalVAE(8, 1, 2, latent_dim=4, model_channels=8, channel_mult=(1, 2), num_res_blocks=1)
    VAEPipeline(vae).save_pretrained(tmp_path / "vae")
    ClassifierGuidedUpscalePipeline(tiny_unet(low_res_channels=3), ADMScheduler()).save_pretrained(tmp_path / "upscale")
    for kind, part in ((VAEPipeline, "vae/vae"), (ClassifierGuidedUpscalePipeline, "upscale/unet")):
        file = tmp_path / part / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        assert f"{file} is damaged" in refused(file.parents[1], kind.from_pretrained)


COMMANDS = {
    "sample": ["sample", "{model}", "--labels", "0", "--output", "{out}.png"],
    "evaluate": ["evaluate", "{model}", "digits", "--output", "{out}"],
    "inspect-classifier": ["inspect-classifier", "{model}", "digits", "--output", "{out}.png"],
    "convert": ["convert", "{model}", "--to", "openai", "--output", "{out}.pt"],
}


@pytest.mark.parametrize("damage", ["truncated", "incomplete", "config", "index"])
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_it_in_one_sentence(folder, tmp_path, command, damage):
    file = (
        folder
        / {
            "truncated": "classifier/model.safetensors",
            "incomplete": "classifier/model.safetensors",
            "config": "classifier/config.json",
            "index": "model_index.json",
        }[damage]
    )
    if damage == "incomplete":
        tensors = load_file(file)
        del tensors["head.norm.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:1000] if damage == "truncated" else b"[]")
    before = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    with pytest.raises(SystemExit) as caught:
        main([word.format(model=folder, out=tmp_path / "out") for word in COMMANDS[command]])
    message = str(caught.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert ("head.norm.weight is missing" if damage == "incomplete" else str(file)) in message
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == before


@pytest.mark.parametrize("damage", ["truncated", "incomplete", "config"])
def test_a_foreign_evaluation_classifier_is_refused(saved, tmp_path, damage):
    vision_transformer(10).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    file = tmp_path / "vit" / ("config.json" if damage == "config" else "model.safetensors")
    if damage == "incomplete":
        tensors = load_file(file)
        del tensors["classifier.bias"]
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "digits", "digits", "--features", str(tmp_path / "vit"), "--output", str(tmp_path / "out")])
    assert ("classifier.bias is missing" if damage == "incomplete" else str(file)) in str(caught.value)
