"""Every Gaussian against its closed form, computed here from the betas alone, in float64."""

import numpy as np
import pytest
import torch

from hf_guided import ADMScheduler
from hf_guided.schedulers.diffusers_compat import correct_prediction
from hf_guided.schedulers.gaussian_diffusion import original_of
from hf_guided.schedulers.schedules import make_betas

T = 50
SCHEDULES = ("linear", "squaredcos_cap_v2")


@pytest.fixture(scope="module")
def x(randn):
    return randn(2, 3, 4, 4).double().clamp(-1, 1), randn(2, 3, 4, 4, seed=1).double()


def closed_form(schedule, respacing=None):
    """Timesteps, alpha_bar, alpha_bar of the timestep before, and beta, of the timesteps of the schedule."""
    scheduler = ADMScheduler(T, schedule)
    scheduler.set_timesteps(respacing=respacing)
    timesteps = scheduler.timesteps.tolist()[::-1]
    alpha_bar = np.cumprod(1 - make_betas(schedule, T))[timesteps]
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return timesteps, alpha_bar, before, 1 - alpha_bar / before


def scheduler_of(schedule, variance_type, respacing=None, **kwargs):
    scheduler = ADMScheduler(T, schedule, variance_type=variance_type, **kwargs)
    scheduler.set_timesteps(respacing=respacing)
    return scheduler


@pytest.mark.parametrize("respacing", [None, "7", "ddim10", "5,2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior(schedule, respacing, x):
    clean, noise = x
    diffusion = scheduler_of(schedule, "fixed_small", respacing).diffusion
    for i, (t, a, b, beta) in enumerate(zip(*closed_form(schedule, respacing), strict=True)):
        sample = a**0.5 * clean + (1 - a) ** 0.5 * noise
        assert torch.allclose(diffusion.add_noise(clean, noise, t), sample, atol=1e-12)
        posterior = diffusion.posterior(clean, t, sample)
        # Bayes: the product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}), in precisions
        if i == 0:
            assert torch.allclose(posterior.mean, clean, atol=1e-9)
            assert posterior.variance.item() == 0
        else:
            precision = 1 / (1 - b) + (1 - beta) / beta
            mean = (b**0.5 * clean / (1 - b) + (1 - beta) ** 0.5 * sample / beta) / precision
            assert posterior.variance.item() == pytest.approx(1 / precision, rel=1e-9)
            assert posterior.log_variance.item() == pytest.approx(-np.log(precision), rel=1e-9)
            assert torch.allclose(posterior.mean, mean, atol=1e-9)


@pytest.mark.parametrize("respacing", [None, "7"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance_types(schedule, respacing, x, randn):
    _, sample = x
    half = randn(2, 3, 4, 4, seed=2).double()
    timesteps, a, b, beta = closed_form(schedule, respacing)
    small = beta * (1 - b) / (1 - a)
    small[0] = small[1]  # the published code's clipping
    for i, t in enumerate(timesteps):
        learned = scheduler_of(schedule, "learned_range", respacing).diffusion.predict(
            torch.cat([sample, half], dim=1), t, sample
        )
        fraction = (half + 1) / 2
        log_variance = fraction * np.log(beta[i]) + (1 - fraction) * np.log(small[i])
        assert torch.allclose(learned.log_variance, log_variance, atol=1e-9)
        assert torch.allclose(learned.variance, log_variance.exp(), atol=1e-12)

        fixed = scheduler_of(schedule, "fixed_large", respacing).diffusion.predict(sample, t, sample)
        assert fixed.variance.item() == pytest.approx(beta[i] if i else small[0], rel=1e-9)
        assert fixed.log_variance.item() == pytest.approx(np.log(beta[i] if i else small[0]), rel=1e-9)

        fixed = scheduler_of(schedule, "fixed_small", respacing).diffusion.predict(sample, t, sample)
        assert fixed.variance.item() == pytest.approx(small[i] if i else 0, rel=1e-9)
        assert fixed.log_variance.item() == pytest.approx(np.log(small[i]), rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prediction_types_name_the_same_clean_image(schedule, x):
    clean, noise = x
    for t, a, _, _ in zip(*closed_form(schedule), strict=True):
        sample = a**0.5 * clean + (1 - a) ** 0.5 * noise
        outputs = {"epsilon": noise, "sample": clean, "v_prediction": a**0.5 * noise - (1 - a) ** 0.5 * clean}
        for prediction_type, output in outputs.items():
            diffusion = scheduler_of(schedule, "fixed_small", prediction_type=prediction_type).diffusion
            assert torch.allclose(diffusion.original_of(output, t, sample, prediction_type), clean, atol=1e-6)
            assert torch.allclose(diffusion.epsilon_of(clean, t, sample), noise, atol=1e-6)


def test_guidance_and_the_scheduler_predict_the_same_clean_image(x):
    output, sample = x
    scheduler = scheduler_of("linear", "fixed_small")
    for t in (0, 20, 49):
        alpha_bar = scheduler.alphas_cumprod[t].item()
        for prediction_type in ("epsilon", "sample", "v_prediction"):
            of_scheduler = scheduler.diffusion.original_of(output, t, sample, prediction_type)
            of_guidance = original_of(output, sample, alpha_bar, prediction_type)
            torch.testing.assert_close(of_guidance, of_scheduler, rtol=1e-4, atol=1e-4)  # of alpha_bar in float32
            unguided = correct_prediction(output, sample, None, alpha_bar, prediction_type, clip_sample=False)
            torch.testing.assert_close(unguided, output)


def test_clipping(x):
    _, sample = x
    for t in (0, 49):
        diffusion = scheduler_of("linear", "fixed_small").diffusion
        free = diffusion.predict(sample, t, 9 * sample).pred_original_sample
        assert free.abs().max() > 1
        clipped = diffusion.predict(sample, t, 9 * sample, clip_sample=True)
        assert torch.equal(clipped.pred_original_sample, free.clamp(-1, 1))
        assert torch.equal(clipped.mean, diffusion.posterior(free.clamp(-1, 1), t, 9 * sample).mean)


def test_a_schedule_of_a_single_timestep(x):
    """Nothing to take the clipped variance from but beta itself."""
    _, sample = x
    scheduler = scheduler_of("linear", "fixed_large")
    scheduler.set_timesteps(timesteps=[30])
    assert scheduler.diffusion.predict(sample, 30, sample).log_variance.isfinite().all()


@pytest.mark.parametrize(("variance_type", "channels"), [("learned_range", 3), ("fixed_small", 6), ("fixed_large", 4)])
def test_channels_that_do_not_fit(x, variance_type, channels):
    _, sample = x
    diffusion = scheduler_of("linear", variance_type).diffusion
    with pytest.raises(ValueError, match=f"output has {channels} channels where variance_type='{variance_type}'"):
        diffusion.predict(torch.zeros(2, channels, 4, 4), 3, sample)
