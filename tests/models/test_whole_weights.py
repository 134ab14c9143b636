"""Weights cover their model, or loading is an error that names the tensors, whoever loads it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_guided import ADMForImageClassification, ADMUNet2DModel
from hf_guided.baselines.flow import ClassConditionalGlow
from hf_guided.baselines.gan import BigGANDiscriminator, BigGANGenerator
from hf_guided.baselines.vae import ClassConditionalVAE

KINDS = ("unet", "classifier", "vae", "generator", "discriminator", "flow")


@pytest.fixture(scope="module")
def models(tiny_unet, tiny_classifier):
    small = {"sample_size": 8, "image_channels": 1, "num_class_embeds": 2}
    return {
        "unet": tiny_unet(),
        "classifier": tiny_classifier(),
        "vae": ClassConditionalVAE(**small, latent_dim=4, model_channels=8, channel_mult=(1, 2), num_res_blocks=1),
        "generator": BigGANGenerator(**small, latent_dim=4, model_channels=8, channel_mult=(1, 2)),
        "discriminator": BigGANDiscriminator(**small, model_channels=8, channel_mult=(1, 2)),
        "flow": ClassConditionalGlow(**small, num_levels=2, num_blocks=1, hidden_channels=8),
    }


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for kind, model in models.items():
        model.save_pretrained(path / kind)
    return path


@pytest.fixture
def broken(saved, tmp_path):
    """Copies a saved model and changes its tensors; returns the folder."""

    def make(kind, change):
        folder = tmp_path / kind
        shutil.copytree(saved / kind, folder)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        save_file(change(tensors) or tensors, file, metadata={"format": "pt"})
        return folder

    return make


def drop(tensors):
    del tensors[min(tensors)]


def add(tensors):
    tensors["stray.bias"] = torch.zeros(3)


def reshape(tensors):
    tensors[min(tensors)] = torch.zeros(5, 7)


def rename(tensors):
    tensors["other"] = tensors.pop(min(tensors))


def wrap(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def compile_(tensors):
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


CHANGES = {
    drop: "{first} is missing",
    add: "stray.bias is not of this model",
    reshape: r"{first} \(5x7 instead of .*another shape",
    rename: "{first} is missing; other is not of this model",
    wrap: "All names begin with 'module.'.*save the model inside the wrapper",
    compile_: "All names begin with '_orig_mod.'",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_cover_the_model_are_named(models, broken, kind, change):
    folder = broken(kind, change)
    message = CHANGES[change].format(first=min(models[kind].state_dict()))
    with pytest.raises(ValueError, match=message) as caught:
        type(models[kind]).from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, RuntimeError)  # as torch calls it


@pytest.mark.parametrize("kind", KINDS)
def test_whole_weights_load(models, saved, kind):
    loaded = type(models[kind]).from_pretrained(saved / kind).state_dict()
    assert loaded.keys() == models[kind].state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in models[kind].state_dict().items())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_that_is_not_finite_is_named(models, broken, kind, value):
    """Wherever it is: behind a ReLU minus infinity is a clean zero."""
    names = [name for name in models[kind].state_dict() if name.endswith("bias")]
    name = names[len(names) // 2]
    folder = broken(kind, lambda tensors: {**tensors, name: torch.full_like(tensors[name], value)})
    with pytest.raises(ValueError, match=f"infinite values or NaN .*{name}"):
        type(models[kind]).from_pretrained(folder)


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": False}, {"torch_dtype": torch.float16}])
def test_in_every_way_of_loading(broken, options):
    with pytest.raises(ValueError, match="is missing"):
        ADMUNet2DModel.from_pretrained(broken("unet", drop), **options)


@pytest.mark.parametrize("options", [{}, {"output_loading_info": True}, {"dtype": torch.float16}])
def test_the_auto_class_tells_the_same(broken, options):
    with pytest.raises(ValueError, match="is missing"):
        AutoModelForImageClassification.from_pretrained(broken("classifier", drop), **options)


def test_a_half_precision_variant_is_looked_at_too(tiny_unet, tiny_classifier, tmp_path):
    for model, kind in ((tiny_unet(), ADMUNet2DModel), (tiny_classifier(), ADMForImageClassification)):
        folder = tmp_path / kind.__name__
        model.half().save_pretrained(folder, variant="fp16")
        (file,) = folder.glob("*.fp16.safetensors")
        tensors = load_file(file)
        drop(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="is missing"):
            kind.from_pretrained(folder, variant="fp16")


@pytest.fixture
def sharded(models, tmp_path):
    """A model in several files; returns the folder and the index."""

    def make(kind):
        models[kind].save_pretrained(tmp_path, max_shard_size="60KB")
        (index,) = tmp_path.glob("*.index.json")
        return tmp_path, index

    return make


@pytest.mark.parametrize("kind", ["unet", "classifier"])
def test_shards_are_whole(models, sharded, kind):
    folder, index = sharded(kind)
    loaded = type(models[kind]).from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in models[kind].state_dict().items())

    name, file = next(iter(json.loads(index.read_text())["weight_map"].items()))
    tensors = load_file(folder / file)
    del tensors[name]  # the index names it still
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        type(models[kind]).from_pretrained(folder)
    (folder / file).unlink()
    with pytest.raises(OSError, match=file):
        type(models[kind]).from_pretrained(folder)


@pytest.mark.parametrize("kind", ["unet", "classifier"])
def test_pickled_weights_are_loaded_as_strictly(models, tmp_path, kind):
    name = {"unet": "diffusion_pytorch_model.bin", "classifier": "pytorch_model.bin"}[kind]
    models[kind].save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.unlink()
    tensors = dict(models[kind].state_dict())
    torch.save(tensors, tmp_path / name)
    loaded = type(models[kind]).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in tensors.items())
    with pytest.raises(OSError, match="safetensors"):
        type(models[kind]).from_pretrained(tmp_path, use_safetensors=True)
    drop(tensors)
    torch.save(tensors, tmp_path / name)
    with pytest.raises(ValueError, match="is missing"):
        type(models[kind]).from_pretrained(tmp_path)


def test_reinitialising_on_purpose_stays_possible(models, saved):
    loaded = ADMForImageClassification.from_pretrained(saved / "classifier", num_labels=7, ignore_mismatched_sizes=True)
    assert loaded(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 7)
    with pytest.raises(RuntimeError, match=r"3 instead of 7.*ignore_mismatched_sizes"):
        ADMForImageClassification.from_pretrained(saved / "classifier", num_labels=7)


DAMAGED = {
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "pointer": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"),
    "page": lambda file: file.write_text("<!DOCTYPE html><title>404</title>"),
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 9),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_classifiers_damaged_weights_are_named(saved, tmp_path, damage):
    shutil.copytree(saved / "classifier", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    DAMAGED[damage](file)
    with pytest.raises(ValueError, match=f"{file} is ") as caught:
        ADMForImageClassification.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"a": 1', "", "\x00\x01", "[" * 100_000])
@pytest.mark.parametrize("kind", ["unet", "classifier", "vae"])
def test_a_damaged_config_is_named(models, saved, tmp_path, kind, content):
    shutil.copytree(saved / kind, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} is (damaged|empty)"):
        type(models[kind]).from_pretrained(tmp_path / "model")
