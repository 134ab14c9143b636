"""Bits per dimension: the published code's numbers, and what the call leaves alone."""

import copy
import math

import numpy as np
import pytest
import torch

from hf_guided import ADMScheduler
from hf_guided.evaluation import bits_per_dim
from hf_guided.schedulers.schedules import make_betas

PARTS = ("total_bpd", "prior_bpd", "vb", "mse", "xstart_mse")


def test_agrees_with_the_published_code(reference, error, sampler_unet):
    given = reference("likelihood_cosine_25").tensors
    scheduler = ADMScheduler(beta_schedule="squaredcos_cap_v2")
    bits = bits_per_dim(sampler_unet, scheduler, given["x_start"], given["y"], respacing="25", noise=given["noise"])
    for part in PARTS:
        assert error(getattr(bits, part), given[part]) < 2e-5, part
    assert bits.vb.shape == bits.mse.shape == bits.xstart_mse.shape == (2, 25)
    torch.testing.assert_close(bits.total_bpd, bits.vb.sum(dim=1) + bits.prior_bpd)


@pytest.fixture(scope="module")
def images(randn):
    return randn(2, 3, 16, 16).clamp(-1, 1)


LABELS = torch.tensor([3, 1])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_prior(tiny_unet, images, schedule):
    """Of a signal so faint that float32 would round it away."""
    bits = bits_per_dim(tiny_unet(), ADMScheduler(beta_schedule=schedule), images, LABELS, "2")
    alpha_bar = np.cumprod(1 - make_betas(schedule, 1000))[-1]
    kl = 0.5 * (alpha_bar * images.double().square().mean(dim=(1, 2, 3)) - alpha_bar - np.log1p(-alpha_bar))
    torch.testing.assert_close(bits.prior_bpd.double(), kl / math.log(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_scheduler_and_model_as_they_were(tiny_unet, images, training):
    unet = tiny_unet(dropout=0.5).train(training)
    scheduler = ADMScheduler()
    scheduler.set_timesteps(7)
    before, diffusion = copy.deepcopy(vars(scheduler)), scheduler.diffusion
    noise = torch.zeros(5, *images.shape)
    first, second = (bits_per_dim(unet, scheduler, images, LABELS, "5", noise) for _ in range(2))
    assert torch.equal(first.total_bpd, second.total_bpd)  # without dropout, then
    assert unet.training == training
    assert scheduler.diffusion is diffusion
    assert vars(scheduler).keys() == before.keys()
    for name, value in vars(scheduler).items():
        if torch.is_tensor(value):
            assert torch.equal(value, before[name])
        elif name not in ("diffusion", "training_diffusion"):
            assert value == before[name]
    assert not first.total_bpd.requires_grad


def test_the_model_is_set_back_if_the_call_fails(tiny_unet, images):
    unet = tiny_unet().train()
    with pytest.raises(ValueError, match="class_labels must be given"):
        bits_per_dim(unet, ADMScheduler(), images, None, "2")
    assert unet.training


def test_all_timesteps_by_default(tiny_unet, images):
    bits = bits_per_dim(tiny_unet(), ADMScheduler(22), images, LABELS)
    assert bits.vb.shape == (2, 22)
    assert bits.total_bpd.isfinite().all()


def test_noise_is_checked(tiny_unet, images):
    with pytest.raises(ValueError, match=r"noise has shape \(4, 2, 3, 16, 16\); 5 timesteps of images .*need \(5, 2"):
        bits_per_dim(tiny_unet(), ADMScheduler(), images, LABELS, "5", torch.zeros(4, *images.shape))


def test_noise_is_drawn_again(tiny_unet, images):
    torch.manual_seed(0)
    first, second = (bits_per_dim(tiny_unet(), ADMScheduler(), images, LABELS, "3") for _ in range(2))
    assert not torch.equal(first.vb, second.vb)
    assert torch.equal(first.prior_bpd, second.prior_bpd)


def test_clipping_follows_the_scheduler(tiny_unet, images):
    noise = torch.ones(5, *images.shape)
    clipped, free = (
        bits_per_dim(tiny_unet(), ADMScheduler(clip_sample=clip), images, LABELS, "5", noise) for clip in (True, False)
    )
    assert clipped.xstart_mse.max() <= 4
    assert free.xstart_mse.max() > 4


class Perfect(torch.nn.Module):
    """Knows the noise: at every timestep its own."""

    dtype = torch.float32

    def __init__(self, noise):
        super().__init__()
        self.noise, self.timesteps = noise, []

    def forward(self, sample, timestep):
        noise = self.noise[len(self.timesteps)]
        self.timesteps.append(timestep)
        return type("Output", (), {"sample": torch.cat([noise, -torch.ones_like(noise)], dim=1)})


def test_a_perfect_model_pays_for_rounding_only(images, randn):
    """The KL terms vanish; what is left is the last pixel value's own width and the prior."""
    noise = randn(20, *images.shape)
    images = ((images + 1) * 127.5).round() / 127.5 - 1
    unet = Perfect(noise)
    scheduler = ADMScheduler(rescale_timesteps=True)
    bits = bits_per_dim(unet, scheduler, images, respacing="20", noise=noise)
    assert bits.vb[:, :-1].abs().max() < 1e-3
    assert bits.vb[:, -1].min() > 0
    assert bits.mse.max() < 1e-4
    assert bits.xstart_mse.max() < 1e-6
    assert 0 < bits.prior_bpd.max() < 1e-3
    assert [timestep[0].item() for timestep in unet.timesteps] == [round(i * 999 / 19) for i in range(19, -1, -1)]


def test_timesteps_are_told_as_the_model_was_trained(images, randn):
    noise = randn(4, *images.shape)
    unet = Perfect(noise)
    bits_per_dim(unet, ADMScheduler(100, rescale_timesteps=True), images, respacing="4", noise=noise)
    assert [timestep.tolist() for timestep in unet.timesteps] == [[990.0] * 2, [660.0] * 2, [330.0] * 2, [0.0] * 2]


def test_half_precision_models(tiny_unet, images, error):
    noise = torch.zeros(5, *images.shape)
    exact = bits_per_dim(tiny_unet(), ADMScheduler(), images, LABELS, "5", noise)
    half = bits_per_dim(tiny_unet().to(torch.bfloat16), ADMScheduler(), images.to(torch.bfloat16), LABELS, "5", noise)
    assert half.total_bpd.dtype == torch.float32
    assert error(half.total_bpd, exact.total_bpd) < 0.1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("channel", [0, 4], ids=["noise", "variance"])
def test_an_output_that_clipping_would_hide_is_an_error(tiny_unet, images, channel, value):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.bias[channel] = value
    with pytest.raises(RuntimeError, match=r"UNet is not finite at step 0 \(timestep 999\) for images 0, 1"):
        bits_per_dim(unet, ADMScheduler(), images, LABELS, "5")


def test_an_output_that_is_not_finite_once_is_named(tiny_unet, images):
    unet, calls = tiny_unet(), []

    def break_one(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output.sample[1, 0, 0, 0] = math.inf
        return output

    unet.register_forward_hook(break_one)
    with pytest.raises(RuntimeError, match=r"not finite at step 2 \(timestep 500\) for image 1"):
        bits_per_dim(unet, ADMScheduler(), images, LABELS, "5")
