"""Starting from an image (SDEdit) and filling holes (RePaint)."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMScheduler, ClassifierGuidedPipeline


@pytest.fixture(scope="module")
def pipe(tiny_unet):
    return make_pipeline(tiny_unet())


def make_pipeline(unet, **kwargs):
    pipe = ClassifierGuidedPipeline(
        unet, **{"scheduler": ADMScheduler(), "sampling_defaults": {"respacing": "10"}, **kwargs}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture():
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def hole():
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 10))
    return mask


def pixels(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def edit(pipe, *args, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(*args, **{"output_type": "latent", "generator": generator, **kwargs}).images


def timesteps_of(pipe, *args, **kwargs):
    timesteps = []
    edit(pipe, *args, callback_on_step_end=lambda pipe, i, t, tensors: timesteps.append(int(t)) or {}, **kwargs)
    return timesteps


def test_strength_is_the_share_of_steps_that_is_left(pipe, picture):
    complete = timesteps_of(pipe, 1)
    for strength, steps in ((1.0, 10), (0.75, 7), (0.8, 8), (0.1, 1)):
        assert timesteps_of(pipe, 1, image=picture, strength=strength) == complete[10 - steps :]
    assert timesteps_of(pipe, 1, image=picture) == complete[2:]


def test_full_strength_forgets_the_image(pipe, picture):
    assert torch.equal(edit(pipe, 1, image=picture, strength=1.0), edit(pipe, 1))


def test_the_image_is_noised_to_the_first_step(pipe, picture, randn):
    noise = randn(1, 3, 16, 16)
    original = pixels(picture)
    result = edit(pipe, 1, image=picture, strength=0.5, latents=noise, seed=3)
    pipe.scheduler.set_timesteps(10)
    first = pipe.scheduler.timesteps[5]
    alpha_bar = pipe.scheduler.alphas_cumprod[first]
    sample = alpha_bar.sqrt() * original + (1 - alpha_bar).sqrt() * noise
    seed = torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3)).item()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[5:]:
            output = pipe.unet(sample, t, torch.tensor([1])).sample
            sample = pipe.scheduler.step(output, t, sample, generator=generator).prev_sample
    assert (result - sample).abs().max() < 1e-4


def test_little_strength_stays_near_the_image(pipe, picture):
    original = pixels(picture)
    distances = [(edit(pipe, 1, image=picture, strength=s) - original).square().mean() for s in (0.1, 0.5, 0.9)]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler",
                                  "HeunDiscreteScheduler", "UniPCMultistepScheduler"])  # fmt: skip
def test_strength_with_schedulers_of_diffusers(name, tiny_unet, picture):
    pipe = make_pipeline(tiny_unet())
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    original = pixels(picture)
    near, far = (edit(pipe, 1, image=picture, strength=s, num_inference_steps=10) for s in (0.1, 0.9))
    assert (near - original).square().mean() < 0.25 * (far - original).square().mean()
    assert far.isfinite().all()
    calls = timesteps_of(pipe, 1, image=picture, strength=0.5, num_inference_steps=10)
    assert len(calls) == (9 if name == "HeunDiscreteScheduler" else 5)


@pytest.mark.parametrize("algorithm_type", ["ddpm", "ddim"])
def test_kept_pixels_are_kept_exactly(tiny_unet, picture, hole, algorithm_type):
    pipe = make_pipeline(tiny_unet(), scheduler=ADMScheduler(algorithm_type=algorithm_type))
    options = {"image": picture, "mask_image": hole, "jump_length": 3, "jump_n_sample": 2}
    filled = edit(pipe, [1, 2], output_type="pil", **options)
    kept = np.asarray(hole) == 0
    for image in filled:
        assert np.array_equal(np.asarray(image)[kept], np.asarray(picture)[kept])
        assert not np.array_equal(np.asarray(image)[~kept], np.asarray(picture)[~kept])
    assert not np.array_equal(np.asarray(filled[0]), np.asarray(filled[1]))
    original = pixels(picture)[0]
    exact = edit(pipe, 1, **options)[0]
    assert (exact - original)[:, torch.from_numpy(kept)].abs().max() < 1e-6


def test_the_filling_sees_what_is_kept(pipe, picture, hole):
    options = {"mask_image": hole, "jump_n_sample": 1}
    other = Image.fromarray(255 - np.asarray(picture))
    inside = np.s_[:, :, 5:9, 5:11]
    difference = edit(pipe, 1, image=picture, **options)[inside] - edit(pipe, 1, image=other, **options)[inside]
    assert difference.abs().max() > 1e-2


def test_a_classifier_steers_the_filling(tiny_unet, tiny_classifier, picture, hole):
    classifier = tiny_classifier(num_labels=5)
    pipe = make_pipeline(tiny_unet(), classifier=classifier)
    options = {"image": picture, "mask_image": hole, "jump_n_sample": 1}
    plain, guided = (edit(pipe, [1, 2], guidance_scale=scale, **options) for scale in (0.0, 100.0))
    kept = torch.from_numpy(np.array(hole)) == 0
    assert torch.equal(guided[..., kept], plain[..., kept])
    with torch.no_grad():
        confidence = [
            classifier(images, 0).logits.log_softmax(dim=1)[[0, 1], [1, 2]].mean() for images in (plain, guided)
        ]
    assert confidence[1] > confidence[0]


def test_jumps_and_their_noise(pipe, picture, hole):
    complete = timesteps_of(pipe, 1)
    options = {"image": picture, "mask_image": hole}
    assert timesteps_of(pipe, 1, jump_n_sample=1, **options) == complete
    twice = timesteps_of(pipe, 1, jump_length=4, jump_n_sample=2, **options)
    assert twice == [complete[i] for i in (0, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9)]
    short = timesteps_of(pipe, 1, jump_n_sample=1, strength=0.5, **options)
    assert short == complete[5:]


def test_an_edited_image_does_not_depend_on_its_batch(pipe, picture, hole):
    options = {"mask_image": hole, "jump_length": 2, "jump_n_sample": 2}
    generators = [torch.Generator().manual_seed(s) for s in (5, 6)]
    both = edit(pipe, [1, 2], image=[picture, picture], generator=generators, **options)
    alone = edit(pipe, 2, image=picture, generator=[torch.Generator().manual_seed(6)], **options)
    assert (both[1] - alone[0]).abs().max() < 1e-4


def test_images_masks_and_labels_come_together(pipe, picture, hole):
    other, wide = Image.fromarray(255 - np.asarray(picture)), hole.resize((16, 16), box=(2, 2, 14, 14))
    options = {"jump_n_sample": 1, "output_type": "pil"}
    several = edit(pipe, [1, 2], 2, image=[picture, other], mask_image=[hole, wide], **options)
    assert len(several) == 4
    for i, image in enumerate(several):
        kept = np.asarray([hole, wide][i // 2]) < 128
        assert np.array_equal(np.asarray(image)[kept], np.asarray([picture, other][i // 2])[kept])
    assert len(edit(pipe, 1, image=picture, mask_image=[hole, wide], **options)) == 2
    assert len(edit(pipe, [1, 2, 3], image=picture, mask_image=torch.from_numpy(np.array(hole)), **options)) == 3


def test_strength_counts_the_steps_that_there_are(tiny_unet, picture):
    pipe = make_pipeline(tiny_unet())
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    assert len(timesteps_of(pipe, 1, image=picture, strength=0.5)) == 5  # of the saved respacing
    pipe.scheduler.set_timesteps(4)
    assert len(timesteps_of(pipe, 1, image=picture, strength=0.5, respacing="10")) == 5
    pipe.scheduler = diffusers.IPNDMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="IPNDMScheduler cannot start from an image"):
        pipe(1, image=picture, num_inference_steps=10)


def test_everything_kept_and_nothing_kept(pipe, picture):
    black, white = (Image.new("1", (16, 16), value) for value in (0, 1))
    kept = edit(pipe, 1, image=picture, mask_image=black, jump_n_sample=1, output_type="pil")[0]
    assert np.array_equal(np.asarray(kept), np.asarray(picture))
    made = edit(pipe, 1, image=picture, mask_image=white, jump_n_sample=1)
    other = edit(pipe, 1, image=Image.new("RGB", (16, 16)), mask_image=white, jump_n_sample=1)
    assert torch.equal(made, other)


def test_what_cannot_be_edited_is_refused(pipe, tiny_unet, picture, hole):
    for arguments, message in [
        ({"strength": 0.5}, "give image="),
        ({"mask_image": hole}, "give image="),
        ({"image": picture, "strength": 0.0}, "strength=0.0 is not allowed; give a share of the steps"),
        ({"image": picture, "strength": 0.05}, "leaves none"),
        ({"image": picture, "strength": 1.5}, "strength=1.5"),
        ({"image": picture.resize((8, 8))}, "8x8 pixels and this UNet makes 16x16"),
        ({"image": picture, "mask_image": hole.resize((8, 8))}, "The mask has 8x8 pixels and the image 16x16"),
        ({"image": [picture] * 3, "mask_image": [hole, hole]}, r"do not match \(1, 3, 2 were given\)"),
        ({"image": picture, "mask_image": hole, "jump_length": 0}, "jump_length=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(1, **arguments)
    solver = make_pipeline(tiny_unet())
    solver.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(solver.scheduler.config)
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler cannot"):
        solver(1, image=picture, mask_image=hole)
