"""The training objectives: the simple loss, the variational lower bound (VLB), and their hybrid.

DDPM (arXiv 2006.11239), equations 5, 13 and 14; Improved DDPM (arXiv 2102.09672), equation 16, which ADM trains with.
"""

import math
from dataclasses import dataclass

import torch

from .schedulers.gaussian_diffusion import Gaussian, GaussianDiffusion, upcast
from .schedulers.scheduling_adm import ADMScheduler

LOSS_TYPES = ("simple", "hybrid", "vlb")


@dataclass
class DiffusionLoss:
    """Losses of a batch, each of shape `(batch,)`.

    Attributes:
        loss (`torch.Tensor`): The value to minimise.
        mse (`torch.Tensor`): Mean squared error of the model's prediction.
        vb (`torch.Tensor`): Term of the variational bound at the timestep, in bits per dimension; times T / 1000 with
            the hybrid loss, as published.
    """

    loss: torch.Tensor
    mse: torch.Tensor
    vb: torch.Tensor


def diffusion_loss(
    scheduler: ADMScheduler,
    model_output: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    loss_type: str = "simple",
    snr_gamma: float | None = None,
) -> DiffusionLoss:
    """The loss of each image at its timestep of the training schedule. Never clips.

    Args:
        scheduler ([`ADMScheduler`]): Its training schedule, prediction type and variance type; respacing is ignored.
        model_output (`torch.Tensor` of shape `(batch, C or 2C, height, width)`): The UNet's output for
            `scheduler.add_noise(clean, noise, timesteps)`.
        clean (`torch.Tensor` of shape `(batch, C, height, width)`): Images in [-1, 1].
        noise (`torch.Tensor` of the same shape): The noise that was added.
        timesteps (`torch.Tensor` of shape `(batch,)`): Training timesteps.
        loss_type (`str`, defaults to `"simple"`): `"simple"`: mse (DDPM, eq. 14). `"hybrid"`: mse + vb, where vb
            trains the variance only (Improved DDPM, eq. 16 and section 3.1). `"vlb"`: T * vb, in bits per dimension.
        snr_gamma (`float`, *optional*): Weights the mse of each timestep by [`min_snr_weights`]. Default: all alike.

    Raises:
        `ValueError`: For another loss type, channels that do not fit the scheduler's variance type, a hybrid loss
            without a learned variance, or `snr_gamma` with `"vlb"`, which has weights of its own.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is not one of {', '.join(map(repr, LOSS_TYPES))}.")
    diffusion = scheduler.training_diffusion
    if loss_type == "hybrid" and diffusion.variance_type != "learned_range":
        raise ValueError(
            f"loss_type='hybrid' trains a learned variance, and variance_type={diffusion.variance_type!r} has none; "
            f"use loss_type='simple', or a scheduler with variance_type='learned_range'."
        )
    if snr_gamma is not None and loss_type == "vlb":
        raise ValueError("snr_gamma weights the mse, and loss_type='vlb' has none; leave one of them out.")
    model_output, clean, noise = upcast(model_output), upcast(clean), upcast(noise)
    sample = diffusion.add_noise(clean, noise, timesteps)
    prediction, variance_output = diffusion.split(model_output, clean.shape[1])
    if diffusion.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps)
    else:
        target = noise if diffusion.prediction_type == "epsilon" else clean
    mse = mean_over_pixels((target - prediction) ** 2)

    if loss_type != "vlb" and variance_output is not None:
        model_output = torch.cat([prediction.detach(), variance_output], dim=1)
    with torch.set_grad_enabled(torch.is_grad_enabled() and loss_type != "simple"):
        predicted = diffusion.predict(model_output, timesteps, sample)
        vb = variational_bound_term(diffusion, predicted, clean, sample, timesteps)

    total = len(diffusion.timesteps)
    if loss_type == "hybrid":
        vb = vb * (total / 1000)  # without the factor vb would dominate the mse at other numbers of timesteps
    weighted = mse
    if snr_gamma is not None:
        (half_log_snr,) = diffusion.at(timesteps, mse, "half_log_snr")
        weighted = mse * min_snr_weights((2 * half_log_snr).exp(), snr_gamma, diffusion.prediction_type)
    loss = {"simple": weighted, "hybrid": weighted + vb, "vlb": vb * total}[loss_type]
    return DiffusionLoss(loss, mse, vb)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR-gamma weights of the mse of a prediction (arXiv 2303.09556, section 3.4), of the shape of `snr`.

    min(SNR, gamma) for the clean image, with SNR = alphas_cumprod / (1 - alphas_cumprod); for `"epsilon"` divided by
    SNR and for `"v_prediction"` by SNR + 1, since their errors are larger by that.
    """
    larger = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[prediction_type]
    return snr.clamp(max=gamma) / larger


def variational_bound_term(
    diffusion: GaussianDiffusion,
    predicted: Gaussian,
    clean: torch.Tensor,
    sample: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """One term of the bound on the negative log-likelihood, in bits per dimension, of shape `(batch,)`.

    DDPM, equation 5: the KL divergence between the posterior and the model at a timestep, and at the first timestep the
    model's negative log-likelihood of the 8-bit image.
    """
    posterior = diffusion.posterior(clean, timesteps, sample)
    kl = normal_kl(posterior.mean, posterior.log_variance, predicted.mean, predicted.log_variance)
    nll = -discretized_gaussian_log_likelihood(clean, predicted.mean, 0.5 * predicted.log_variance)
    first = (timesteps == diffusion.timesteps[0]).to(clean.device)
    return torch.where(first, mean_over_pixels(nll), mean_over_pixels(kl)) / math.log(2)


def normal_kl(
    mean_1: torch.Tensor, log_variance_1: torch.Tensor, mean_2: torch.Tensor, log_variance_2: torch.Tensor
) -> torch.Tensor:
    """KL divergence between two Gaussians, in nats, elementwise."""
    ratio = torch.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 + ratio + distance - 1)


def discretized_gaussian_log_likelihood(
    images: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """Log-probability, in nats, of 8-bit images in [-1, 1] (DDPM, equation 13), elementwise.

    The normal distribution's integral is the tanh approximation of the published code; both ends are open.
    """
    inverse_scale = torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (images - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (images - mean - 1 / 255))
    probability = torch.where(images < -0.999, upper, torch.where(images > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def mean_over_pixels(x: torch.Tensor) -> torch.Tensor:
    """The mean of each image's values, `(batch,)`."""
    return x.flatten(1).mean(1)
