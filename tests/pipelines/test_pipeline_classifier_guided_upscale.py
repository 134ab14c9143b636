"""The cascade's second stage: what the UNet is shown, the forms that small images come in, and the chain."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMScheduler, ClassifierGuidedPipeline, ClassifierGuidedUpscalePipeline
from hf_guided.conversion import convert_openai_unet

NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "daisy", 3: "crane", 4: "pug, pug-dog"}


def make_pipeline(unet, **kwargs):
    components = {
        "scheduler": ADMScheduler(),
        "id2label": NAMES,
        "sampling_defaults": {"respacing": "4"},
        "low_res_size": 8,
        **kwargs,
    }
    pipe = ClassifierGuidedUpscalePipeline(unet, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_unet):
    return make_pipeline(tiny_unet(low_res_channels=3))


@pytest.fixture(scope="module")
def small(randn):
    return (randn(2, 3, 8, 8) / 2).clamp(-1, 1)


def upscale(pipe, image, *args, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(image, *args, **{"output_type": "latent", "generator": generator, **kwargs}).images


def test_the_walk_is_the_published_models(reference, error):
    """With one step from the last timestep, the predicted clean image is the reference output's."""
    stored = reference("superres")
    unet = convert_openai_unet(stored.weights, stored.config, super_resolution=True)
    scheduler = ADMScheduler(clip_sample=False)
    pipe = make_pipeline(unet, scheduler=scheduler)
    seen = []
    for i in range(len(stored.tensors["x"])):
        t = int(stored.tensors["timesteps"][i])
        output = pipe(
            stored.tensors["low_res"][i : i + 1],
            stored.tensors["y"][i : i + 1],
            timesteps=[t],
            latents=stored.tensors["x"][i : i + 1],
            callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["model_output"]) or {},
            callback_on_step_end_tensor_inputs=["model_output"],
            output_type="latent",
        ).images
        alpha_bar = scheduler.alphas_cumprod[t].double()
        epsilon = stored.tensors["output"][i, :3].double()
        expected = (stored.tensors["x"][i].double() - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        assert error(output[0], expected) < 2e-5
    assert error(torch.cat(seen), stored.tensors["output"]) < 2e-5


def test_every_form_of_small_images_gives_the_same(pipe, small):
    eight_bit = ((small + 1) * 127.5).round().to(torch.uint8)
    arrays = eight_bit.permute(0, 2, 3, 1).numpy()
    expected = upscale(pipe, eight_bit, ["daisy", 0])
    forms = {
        "8-bit array, as in a published npz": arrays,
        "pil": [Image.fromarray(array) for array in arrays],
        "list of arrays": list(arrays),
        "floats in [0, 1], channels last": arrays / np.float32(255),
        "pt": eight_bit / 255,
        "list of tensors": list(eight_bit / 255),
        "latent": eight_bit / 127.5 - 1,
    }
    for name, form in forms.items():
        assert (upscale(pipe, form, ["daisy", 0]) - expected).abs().max() < 1e-5, name
    assert (upscale(pipe, arrays[:, ::-1], ["daisy", 0]) - expected).abs().max() > 1e-3


def test_published_files_of_samples(pipe, small, tmp_path):
    arrays = ((small + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "64_samples.npz", arrays, np.array([2, 0]))
    expected = upscale(pipe, arrays, [2, 0])
    assert torch.equal(upscale(pipe, tmp_path / "64_samples.npz"), expected)
    assert torch.equal(upscale(pipe, str(tmp_path / "64_samples.npz"), ["daisy", 0]), expected)
    assert (upscale(pipe, tmp_path / "64_samples.npz", 1) - expected).abs().max() > 1e-3


def test_a_list_is_read_like_a_batch(pipe, small):
    """Dark and bright images have one range together, however they are given."""
    pair = torch.stack([small[0].abs(), -small[1].abs()])
    assert torch.equal(upscale(pipe, list(pair), 1), upscale(pipe, pair, 1))


def test_images_and_labels_come_together(pipe, small):
    expected = upscale(pipe, small, [1, 2])
    assert expected.shape == (2, 3, 16, 16)
    generators = [torch.Generator().manual_seed(s) for s in (5, 6, 7, 8)]
    each_twice = upscale(pipe, small, [1, 2], num_images_per_label=2, generator=generators)
    for i in range(4):
        alone = torch.Generator().manual_seed(5 + i)
        one = upscale(pipe, small[i // 2], [1, 2][i // 2], generator=[alone])
        assert (each_twice[i] - one[0]).abs().max() < 1e-4
    one_label = upscale(pipe, small, 2)
    assert torch.equal(one_label, upscale(pipe, small, [2, 2]))
    one_image = upscale(pipe, small[:1], [1, 2])
    assert torch.equal(one_image, upscale(pipe, small[[0, 0]], [1, 2]))
    assert (one_image - expected).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"do not match \(3, 2 were given\)"):
        upscale(pipe, small, [0, 1, 2])


def test_the_chain_stays_in_tensors(tiny_unet, pipe):
    base = ClassifierGuidedPipeline(tiny_unet(sample_size=8), ADMScheduler(), sampling_defaults={"respacing": "3"})
    base.set_progress_bar_config(disable=True)
    small = base([1, 4], output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert upscale(pipe, small, [1, 4]).shape == (2, 3, 16, 16)
    samples = base([1, 4], output_type="latent", generator=torch.Generator().manual_seed(0)).images
    assert (upscale(pipe, small, [1, 4]) - upscale(pipe, samples, [1, 4])).abs().max() < 5e-5
    images = pipe(small, [1, 4]).images
    assert [image.size for image in images] == [(16, 16)] * 2


def test_an_unconditional_grey_upsampler(tiny_unet, randn):
    unet = tiny_unet(in_channels=1, out_channels=1, low_res_channels=1, num_class_embeds=None)
    pipe = make_pipeline(unet, scheduler=ADMScheduler(variance_type="fixed_small"), id2label=None, low_res_size=None)
    small = randn(1, 1, 4, 4).clamp(-1, 1)
    assert upscale(pipe, small, num_images_per_label=3).shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match="no classes"):
        upscale(pipe, small, 1)


def test_a_classifier_steers_the_large_images(tiny_unet, tiny_classifier, small):
    classifier = tiny_classifier(num_labels=5, id2label=NAMES)
    pipe = make_pipeline(tiny_unet(low_res_channels=3), classifier=classifier)
    unguided = upscale(pipe, small, [1, 2], guidance_scale=0.0)
    guided = upscale(pipe, small, [1, 2], guidance_scale=50.0)

    def confidence(images):
        with torch.no_grad():
            return classifier(images, 0).logits.log_softmax(dim=1)[[0, 1], [1, 2]].mean()

    assert confidence(guided) > confidence(unguided)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers_of_diffusers(name, tiny_unet, small):
    pipe = make_pipeline(tiny_unet(low_res_channels=3))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = upscale(pipe, small, [1, 2], num_inference_steps=4)
    assert images.isfinite().all()
    assert images.abs().max() < 3


def test_saved_and_loaded(pipe, small, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ClassifierGuidedUpscalePipeline"
    assert not any(isinstance(value, list) and len(value) != 2 for value in index.values())
    loaded = ClassifierGuidedUpscalePipeline.from_pretrained(tmp_path)
    assert loaded.config.low_res_size == 8
    assert loaded.id2label == NAMES
    assert (upscale(loaded, small, "daisy") - upscale(pipe, small, 2)).abs().max() < 5e-5


def test_what_cannot_be_upsampled_is_refused(pipe, tiny_unet, small):
    for image, message in [
        (small[:, :, :4], r"The images are 8x4 \(width x height\), and this UNet makes 16x16 of 8x8"),
        (small[:, :, :, :4], "4x8"),
        (small[:, :2], r"shape \(2, 2, 8, 8\) were given where 3 channels"),
        (small[:0], r"shape \(0, 3, 8, 8\)"),
        (small.abs() - 0.01, "values from -0.00"),
        ([small[0], (small[1] * 255).to(torch.uint8)], "one size and type"),
        (small * 100, "values from"),
        (torch.full_like(small, torch.nan), "values from"),
        (5, "got int"),
        ([], "have none"),
        ([small[0], small[0, :, :4]], "one size and type; these have 4x8 torch.float32, 8x8"),
    ]:
        with pytest.raises(ValueError, match=message):
            upscale(pipe, image, 1)
    with pytest.raises(ValueError, match="is not an upsampler"):
        make_pipeline(tiny_unet())
    with pytest.raises(ValueError, match="ClassifierGuidedUpscalePipeline"):
        ClassifierGuidedPipeline(tiny_unet(low_res_channels=3), ADMScheduler())([1])
    with pytest.raises(ValueError, match="class_labels must be given"):
        upscale(pipe, small)


def test_what_callbacks_of_diffusers_ask_for(pipe, small):
    seen = []
    upscale(pipe, small, 1, callback_on_step_end=lambda pipeline, *_: seen.append(pipeline.guidance_scale))
    assert seen == [None] * pipe.num_timesteps
