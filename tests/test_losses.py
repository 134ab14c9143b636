"""The losses: the published code's numbers, what each trains, and how they relate."""

import math

import pytest
import torch

from hf_guided import ADMScheduler
from hf_guided.losses import LOSS_TYPES, diffusion_loss, discretized_gaussian_log_likelihood, normal_kl
from hf_guided.schedulers.schedules import make_betas

OUR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
TIMESTEPS = torch.tensor([0, 1, 400, 999])


@pytest.fixture
def batch(randn):
    """Clean images, noise, and a model's output that is near the noise."""
    clean, noise = randn(4, 3, 4, 4).clamp(-1, 1), randn(4, 3, 4, 4, seed=1)
    return clean, noise, torch.cat([noise + 0.1 * randn(4, 3, 4, 4, seed=2), randn(4, 3, 4, 4, seed=3)], dim=1)


@pytest.mark.parametrize("name", ["hybrid_linear", "hybrid_cosine", "vlb_cosine"])
def test_agrees_with_the_published_code(reference, error, sampler_unet, name):
    stored = reference(f"loss_{name}")
    given = stored.tensors
    scheduler = ADMScheduler(beta_schedule=OUR_NAME[stored.config["beta_schedule"]])
    noisy = scheduler.add_noise(given["x_start"], given["noise"], given["timesteps"])
    assert error(noisy, given["x_t"]) < 1e-6
    with torch.no_grad():
        output = sampler_unet(given["x_t"], given["timesteps"], given["y"]).sample
    loss = diffusion_loss(
        scheduler, output, given["x_start"], given["noise"], given["timesteps"], loss_type=name.split("_")[0]
    )
    for part in {"loss", "mse", "vb"} & given.keys():
        assert error(getattr(loss, part), given[part]) < 2e-5, part
    assert given.keys() >= ({"loss", "mse", "vb"} if name.startswith("hybrid") else {"loss"})


@pytest.mark.parametrize("total", [1000, 100])
def test_how_the_losses_relate(batch, total):
    clean, noise, output = batch
    scheduler = ADMScheduler(total)
    timesteps = torch.tensor([0, 1, 40, 99])
    simple, hybrid, vlb = (diffusion_loss(scheduler, output, clean, noise, timesteps, kind) for kind in LOSS_TYPES)
    mse = (output[:, :3] - noise).square().mean(dim=(1, 2, 3))
    for loss in (simple, hybrid, vlb):
        assert loss.loss.shape == loss.mse.shape == loss.vb.shape == (4,)
        torch.testing.assert_close(loss.mse, mse)
    assert torch.equal(simple.loss, simple.mse)
    assert torch.equal(simple.vb, vlb.vb)
    torch.testing.assert_close(hybrid.vb, vlb.vb * total / 1000)
    torch.testing.assert_close(hybrid.loss, hybrid.mse + hybrid.vb)
    torch.testing.assert_close(vlb.loss, vlb.vb * total)
    assert (vlb.vb > 0).all()


@pytest.mark.parametrize("loss_type", ["simple", "hybrid"])
def test_min_snr_weights_the_error_of_the_clean_image_whatever_is_predicted(batch, loss_type):
    """The weighted loss of each prediction type is min(SNR, gamma) times the error of the same clean image."""
    clean, noise, _ = batch
    guess = 0.5 * clean + 0.1 * noise
    variance = torch.zeros_like(clean)
    alphas_cumprod = torch.from_numpy(1 - make_betas("linear", 1000)).cumprod(0)[TIMESTEPS]
    weighted = {}
    for prediction_type in ("sample", "epsilon", "v_prediction"):
        scheduler = ADMScheduler(prediction_type=prediction_type)
        alpha = alphas_cumprod.view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        epsilon = (x_t - alpha.sqrt() * guess) / (1 - alpha).sqrt()
        velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * guess
        prediction = {"sample": guess, "epsilon": epsilon, "v_prediction": velocity}[prediction_type]
        output = torch.cat([prediction, variance], dim=1)
        found = diffusion_loss(scheduler, output, clean, noise, TIMESTEPS, loss_type, snr_gamma=5.0)
        weighted[prediction_type] = found.loss - (found.vb if loss_type == "hybrid" else 0)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    assert snr[0] > 5 > snr[2]
    expected = snr.clamp(max=5) * (guess - clean).double().square().mean(dim=(1, 2, 3))
    for found in weighted.values():
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_min_snr_has_nothing_to_weight_in_the_bound(batch):
    clean, noise, output = batch
    with pytest.raises(ValueError, match="leave one of them out"):
        diffusion_loss(ADMScheduler(), output, clean, noise, TIMESTEPS, "vlb", snr_gamma=5.0)


def gradients(batch, loss_type):
    """Of the loss, with respect to the prediction's and the variance's half of the output."""
    clean, noise, output = batch
    output = output.clone().requires_grad_()
    diffusion_loss(ADMScheduler(), output, clean, noise, TIMESTEPS, loss_type).loss.sum().backward()
    return output.grad.chunk(2, dim=1)


def test_what_each_loss_trains(batch):
    clean, noise, output = batch
    mse_gradient = 2 * (output[:, :3] - noise) / clean[0].numel()
    prediction, variance = gradients(batch, "simple")
    torch.testing.assert_close(prediction, mse_gradient)
    assert not variance.any()

    prediction, variance = gradients(batch, "hybrid")
    torch.testing.assert_close(prediction, mse_gradient)  # of the bound nothing reaches it
    assert (variance.flatten(1).abs().amax(dim=1) > 0).all()

    vlb_prediction, vlb_variance = gradients(batch, "vlb")
    assert not torch.allclose(vlb_prediction, mse_gradient)
    torch.testing.assert_close(vlb_variance, 1000 * variance)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_fixed_variances(batch, variance_type):
    clean, noise, output = batch
    scheduler = ADMScheduler(variance_type=variance_type)
    for kind in ("simple", "vlb"):
        loss = diffusion_loss(scheduler, output[:, :3], clean, noise, TIMESTEPS, kind)
        assert loss.loss.isfinite().all()
    with pytest.raises(ValueError, match=f"'hybrid' trains a learned variance, and variance_type='{variance_type}'"):
        diffusion_loss(scheduler, output[:, :3], clean, noise, TIMESTEPS, "hybrid")
    with pytest.raises(ValueError, match="output has 6 channels"):
        diffusion_loss(scheduler, output, clean, noise, TIMESTEPS, "simple")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_prediction(batch, prediction_type):
    """No error is left, and of the bound only what the variance is wrong by."""
    clean, noise, output = batch
    scheduler = ADMScheduler(prediction_type=prediction_type)
    target = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, TIMESTEPS)}
    small_variance = -torch.ones_like(clean)
    perfect = torch.cat([target[prediction_type], small_variance], dim=1)
    loss = diffusion_loss(scheduler, perfect, clean, noise, TIMESTEPS, "vlb")
    assert not loss.mse.any()
    assert loss.vb[1:].abs().max() < 1e-3
    wrong = torch.cat([target[prediction_type] + 0.5, output[:, 3:]], dim=1)
    loss = diffusion_loss(scheduler, wrong, clean, noise, TIMESTEPS, "vlb")
    torch.testing.assert_close(loss.mse, torch.full((4,), 0.25))
    assert (loss.vb > 1e-7).all()


def test_respacing_and_clipping_do_not_matter(batch):
    clean, noise, output = batch
    expected = diffusion_loss(ADMScheduler(), 9 * output, clean, noise, TIMESTEPS, "vlb")
    scheduler = ADMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    loss = diffusion_loss(scheduler, 9 * output, clean, noise, TIMESTEPS, "vlb")
    assert torch.equal(loss.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(batch, dtype):
    clean, noise, output = (tensor.to(dtype) for tensor in batch)
    loss = diffusion_loss(ADMScheduler(), output, clean, noise, TIMESTEPS)
    exact = diffusion_loss(ADMScheduler(), output.float(), clean.float(), noise.float(), TIMESTEPS)
    assert loss.loss.dtype == torch.float32
    assert torch.equal(loss.loss, exact.loss)


def test_images_are_scored_one_by_one(batch):
    clean, noise, output = batch
    together = diffusion_loss(ADMScheduler(), output, clean, noise, TIMESTEPS)
    for i in range(4):
        rows = slice(i, i + 1)
        alone = diffusion_loss(ADMScheduler(), output[rows], clean[rows], noise[rows], TIMESTEPS[rows])
        torch.testing.assert_close(alone.loss, together.loss[rows])


def test_unknown_losses(batch):
    clean, noise, output = batch
    with pytest.raises(ValueError, match="loss_type='kl' is not one of 'simple', 'hybrid', 'vlb'"):
        diffusion_loss(ADMScheduler(), output, clean, noise, TIMESTEPS, "kl")


def test_normal_kl():
    means, scales = torch.tensor([[0.0, 1.0], [0.5, -2.0]]).double(), torch.tensor([[1.0, 0.3], [2.0, 5.0]]).double()
    kl = normal_kl(means[0], 2 * scales[0].log(), means[1], 2 * scales[1].log())
    p, q = (torch.distributions.Normal(mean, scale) for mean, scale in zip(means, scales, strict=True))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(p, q))


@pytest.mark.parametrize("scale", [0.003, 0.1, 1.0])
def test_discretized_likelihood_is_a_distribution(scale):
    """The 256 values of a pixel share a probability of 1, as the normal distribution would share it out."""
    values = (torch.arange(256).double() / 127.5) - 1
    mean = torch.tensor(0.123).double()
    log_likelihood = discretized_gaussian_log_likelihood(values, mean, torch.tensor(scale).double().log())
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)
    normal = torch.distributions.Normal(mean, torch.tensor(scale).double())
    exact = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    exact[0], exact[-1] = normal.cdf(values[0] + 1 / 255), 1 - normal.cdf(values[-1] - 1 / 255)
    torch.testing.assert_close(log_likelihood.exp(), exact, atol=2e-3, rtol=0)
    assert log_likelihood.min() >= math.log(1e-12)
