"""Half precision, device maps and offloading, as far as a machine without an accelerator can show."""

import pytest
import torch

from hf_guided import (
    ADMForImageClassification,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
    ClassifierGuidedUpscalePipeline,
)

CPU = torch.device("cpu")


def sample(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(class_labels=[1, 2], generator=generator, output_type="latent", **kwargs).images


@pytest.fixture(scope="module")
def folder(tiny_unet, tiny_classifier, tmp_path_factory):
    pipe = ClassifierGuidedPipeline(
        tiny_unet(), ADMScheduler(), tiny_classifier(num_labels=5), sampling_defaults={"respacing": "3"}
    )
    path = tmp_path_factory.mktemp("loading")
    pipe.save_pretrained(path / "full")
    pipe.to(torch.float16)
    pipe.save_pretrained(path / "half", variant="fp16")
    return path


@pytest.fixture(scope="module")
def expected(folder):
    images = sample(ClassifierGuidedPipeline.from_pretrained(folder / "full"))
    assert images.dtype == torch.float32
    return images


def test_half_precision_variant(folder, expected):
    names = {path.name for path in (folder / "half").rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    pipe = ClassifierGuidedPipeline.from_pretrained(folder / "half", variant="fp16", torch_dtype=torch.float16)
    full = ClassifierGuidedPipeline.from_pretrained(folder / "full")
    for component in ("unet", "classifier"):
        for half, weight in zip(
            getattr(pipe, component).parameters(), getattr(full, component).parameters(), strict=True
        ):
            assert half.dtype == torch.float16
            assert torch.equal(half, weight.half())
    images = sample(pipe)
    assert images.dtype == torch.float32
    assert 0 < (images - expected).abs().mean() < 0.02


def test_half_precision_from_full_weights(folder):
    pipe = ClassifierGuidedPipeline.from_pretrained(folder / "full", torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.classifier.dtype == torch.bfloat16
    assert sample(pipe).isfinite().all()


def test_half_precision_upscaling(tiny_unet, tmp_path, randn):
    pipe = ClassifierGuidedUpscalePipeline(
        tiny_unet(low_res_channels=3), ADMScheduler(), sampling_defaults={"respacing": "3"}
    )
    small = randn(2, 3, 8, 8).clamp(-1, 1)
    expected = sample(pipe, image=small)
    pipe.save_pretrained(tmp_path)
    half = ClassifierGuidedUpscalePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.unet.dtype == torch.float16
    assert 0 < (sample(half, image=small) - expected).abs().mean() < 0.02


def test_device_maps(folder, expected, tmp_path):
    for device_map in ("balanced", "cpu"):
        pipe = ClassifierGuidedPipeline.from_pretrained(folder / "full", device_map=device_map)
        assert torch.equal(sample(pipe), expected)
    limits = {"device_map": "auto", "max_memory": {"cpu": "300KB"}, "offload_folder": str(tmp_path)}
    unet = ADMUNet2DModel.from_pretrained(folder / "full" / "unet", **limits)
    classifier = ADMForImageClassification.from_pretrained(folder / "full" / "classifier", **limits)
    assert "disk" in unet.hf_device_map.values()
    assert "disk" in classifier.hf_device_map.values()
    pipe = ClassifierGuidedPipeline.from_pretrained(folder / "full", unet=unet, classifier=classifier)
    assert (sample(pipe) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(CPU, offload_device=CPU, offload_type="leaf_level"),
    ],
)
def test_offloading(folder, expected, offload):
    pipe = ClassifierGuidedPipeline.from_pretrained(folder / "full")
    offload(pipe)
    assert all(
        hasattr(pipe.unet, "_hf_hook") or hasattr(layer, "_diffusers_hook")
        for layer in pipe.unet.down_blocks[0].resnets[0].children()
        if list(layer.parameters())
    )
    assert (sample(pipe) - expected).abs().max() < 1e-5
    assert (sample(pipe) - expected).abs().max() < 1e-5  # the hooks are in place again
