"""Kinds together: they add up, in any order, and with every other part of a pipeline."""

from itertools import combinations, permutations

import pytest
import torch
from guidance_helpers import COMPARISONS, GRADIENTS, KINDS, batches_seen, darkness, make, sample, seeded, steps_of

from hf_guided import ADMScheduler, ClassifierGuidedUpscalePipeline
from hf_guided.guidance import AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance, LossGuidance

LABELS = [2, 0, 4]


@pytest.fixture(scope="module")
def noisy():
    return torch.randn(3, 3, 8, 8, generator=seeded(5))


def single_step(pipe, noisy, *guidance):
    (seen,) = steps_of(pipe, LABELS, guidance=guidance, timesteps=[500], latents=noisy)
    return seen["model_output"], seen["gradient"]


@pytest.mark.parametrize(("one", "other"), list(combinations(GRADIENTS, 2)))
def test_gradients_add(one, other, pipe, noisy, error):
    _, first = single_step(pipe, noisy, make(one))
    _, second = single_step(pipe, noisy, make(other))
    output, both = single_step(pipe, noisy, make(one), make(other))
    assert error(both, first + second) < 1e-6
    assert torch.equal(output, single_step(pipe, noisy)[0])


def test_comparisons_add_their_differences(pipe, noisy, error):
    """In one call of each UNet; the class guides both UNets' predictions alike."""
    with batches_seen(pipe) as seen:
        output, _ = single_step(pipe, noisy, AutoGuidance(2.5), ClassifierFreeGuidance(3.0))
    assert (seen["unet"], seen["guide_unet"]) == ([6], [3])
    with torch.no_grad():
        cond = pipe.unet(noisy, 500, torch.tensor(LABELS)).sample
        uncond = pipe.unet(noisy, 500).sample
        weak = pipe.guide_unet(noisy, 500, torch.tensor(LABELS)).sample
    expected = (cond + 1.5 * (cond - weak) + 2.0 * (cond - uncond))[:, :3]
    assert error(output[:, :3], expected) < 1e-5
    assert error(output[:, 3:], cond[:, 3:]) < 1e-5


@pytest.mark.parametrize("pair", list(combinations(KINDS, 2)))
def test_the_order_of_two_does_not_matter(pair, pipe):
    kinds = [make(name) for name in pair]
    arguments = {"timesteps": [700, 300]}
    one, other = (sample(pipe, LABELS, guidance=order, **arguments) for order in (kinds, kinds[::-1]))
    assert torch.equal(one, other)
    for kind in kinds:  # and neither of them is lost
        assert not torch.equal(sample(pipe, LABELS, guidance=kind, **arguments), one)


@pytest.mark.parametrize(
    "kinds",
    [
        [make(name) for name in ("classifier-free", "auto", "classifier")],
        [make(name) for name in ("classifier-free", "auto", "denoised through the UNet")],
        [make(name) for name in ("loss", "loss stopped", "clip through the UNet")],
        [ClassifierGuidance(3.0, interval=(400, 999)), ClassifierGuidance({0: 1.0, 999: 2.0}), ClassifierGuidance(0.1)],
        [LossGuidance(darkness, 0.1), LossGuidance(lambda images: -darkness(images), 0.03), make("classifier")],
    ],
    ids=["comparisons and classifier", "comparisons and UNet", "gradients", "one kind", "losses"],
)
def test_the_order_of_three_does_not_matter(kinds, pipe):
    orders = [sample(pipe, LABELS, guidance=order, timesteps=[700, 300]) for order in permutations(kinds)]
    assert all(torch.equal(images, orders[0]) for images in orders)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_a_gradient_goes_through_all_that_is_compared(scale, pipe, noisy, error):
    """Through both halves of the doubled batch and the weaker UNet."""
    guidance = [LossGuidance(darkness, 0.5), ClassifierFreeGuidance(scale), AutoGuidance(scale)]
    output, gradient = single_step(pipe, noisy, *guidance)
    x = noisy.clone().requires_grad_()
    cond = pipe.unet(x, 500, torch.tensor(LABELS)).sample[:, :3]
    uncond = pipe.unet(x, 500).sample[:, :3]
    weak = pipe.guide_unet(x, 500, torch.tensor(LABELS)).sample[:, :3]
    epsilon = cond + (scale - 1) * (cond - weak) + (scale - 1) * (cond - uncond)
    alpha_bar = pipe.scheduler.alphas_cumprod[500]
    original = ((x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()).clamp(-1, 1)
    assert error(output[:, :3], epsilon) < 1e-5
    assert error(gradient, -0.5 * torch.autograd.grad(darkness(original).sum(), x)[0]) < 5e-5
    # in parts, both UNets see no more at once
    with batches_seen(pipe) as seen:
        arguments = {"timesteps": [500], "latents": noisy, "gradient_batch_size": 2}
        (in_parts,) = steps_of(pipe, LABELS, guidance=guidance, **arguments)
    assert (seen["unet"], seen["guide_unet"]) == ([4, 2], [2, 1])
    assert error(in_parts["gradient"], gradient) < 1e-5


def test_an_absent_kind_changes_nothing(pipe):
    alone = sample(pipe, LABELS, guidance=make("classifier"))
    neutral = [make(name, scale=0) for name in GRADIENTS] + [make(name, scale=1) for name in COMPARISONS]
    assert torch.equal(sample(pipe, LABELS, guidance=[*neutral, make("classifier")]), alone)


@pytest.fixture(scope="module")
def upscale(components, make_unet):
    weak = {"channel_mult": (1,), "attention_resolutions": ()}
    parts = {
        **components,
        "unet": make_unet(low_res_channels=3),
        "guide_unet": make_unet(low_res_channels=3, **weak),
        "sampling_defaults": {"respacing": "3"},
    }
    pipe = ClassifierGuidedUpscalePipeline(**parts, low_res_size=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", KINDS)
def test_upscaling_takes_every_kind(name, upscale, randn, error):
    small = (randn(3, 3, 4, 4) / 2).clamp(-1, 1)
    unguided = sample(upscale, small, LABELS, guidance=[])
    guided = sample(upscale, small, LABELS, guidance=make(name))
    assert (guided - unguided).abs().mean() > 0.01
    (whole,), (in_parts,) = (
        steps_of(upscale, small, LABELS, guidance=make(name), timesteps=[500], gradient_batch_size=size)
        for size in (None, 2)
    )
    assert error(in_parts["model_output"], whole["model_output"]) < 1e-5  # each part beside its own small images
    if name in GRADIENTS:
        assert error(in_parts["gradient"], whole["gradient"]) < 1e-5
    neutral = make(name, scale=0 if name in GRADIENTS else 1)
    assert torch.equal(sample(upscale, small, LABELS, guidance=neutral), unguided)


def test_upscaling_returns_its_cost_too(upscale, randn):
    output = upscale(randn(2, 3, 4, 4) / 3, [2, 0], guidance=ClassifierGuidance(2.0), return_cost=True)
    assert output.cost.calls == {"unet": 3, "classifier": 3}


@pytest.mark.parametrize("name", KINDS)
def test_other_predictions_are_guided_alike(name, make_pipe, pipe, noisy, error):
    """A UNet of the clean image or of v instead of the noise: the same clean image, so the same gradient."""

    class Predicting(type(pipe.unet)):
        def forward(self, sample, timestep, *args, **kwargs):
            output = super().forward(sample, timestep, *args, **kwargs)
            epsilon, variance = output.sample.tensor_split([3], dim=1)
            alpha_bar = pipe.scheduler.alphas_cumprod[int(timestep)]
            original = (sample - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
            prediction = original if self.predicts == "sample" else alpha_bar.sqrt() * epsilon
            if self.predicts == "v_prediction":
                prediction = prediction - (1 - alpha_bar).sqrt() * original
            output.sample = torch.cat([prediction, variance], dim=1)
            return output

    output, gradient = single_step(pipe, noisy, make(name))
    alpha_bar = pipe.scheduler.alphas_cumprod[500]
    original = (noisy - (1 - alpha_bar).sqrt() * output[:, :3]) / alpha_bar.sqrt()
    for predicts in ("sample", "v_prediction"):
        unets = {}
        for part in ("unet", "guide_unet"):
            unets[part] = Predicting.from_config(getattr(pipe, part).config).eval()
            unets[part].load_state_dict(getattr(pipe, part).state_dict())
            unets[part].predicts = predicts
        other = make_pipe(**unets, scheduler=ADMScheduler(prediction_type=predicts))
        output, theirs = single_step(other, noisy, make(name))
        prediction = output[:, :3]
        if predicts == "v_prediction":
            prediction = alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction
        assert error(prediction, original) < 1e-5
        if gradient is not None:
            assert error(theirs, gradient) < 1e-4
