"""What a model predicts, for the schedulers of diffusers, which know `alphas_cumprod` alone."""

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin


def alpha_bar_at(scheduler: SchedulerMixin, timestep: float) -> float:
    """`alphas_cumprod` at a timestep; between two, by interpolation of the logarithm of the signal-to-noise ratio."""
    below = min(int(timestep), len(scheduler.alphas_cumprod) - 2)
    log_snr = torch.logit(scheduler.alphas_cumprod[below : below + 2].cpu().double())
    return torch.lerp(log_snr[0], log_snr[1], timestep - below).sigmoid().item()


def original_of(prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: float, prediction_type: str) -> torch.Tensor:
    """The clean image that a prediction stands for (arXiv 2006.11239, equation 15; arXiv 2202.00512, appendix D)."""
    signal, noise_scale = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction_type == "epsilon":
        return (sample - noise_scale * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * sample - noise_scale * prediction
    return prediction


def correct_prediction(
    prediction: torch.Tensor,
    sample: torch.Tensor,
    gradient: torch.Tensor | None,
    alpha_bar: float,
    prediction_type: str,
    clip_sample: bool,
) -> torch.Tensor:
    """Algorithm 2 in whatever a model predicts: epsilon - sqrt(1 - alpha_bar) * gradient, its clean image clipped.

    Solvers that clip nothing explode where hardly any signal is left (cosine schedule, last timesteps); and DDIM of
    diffusers clips the clean image but goes on with a noise that no longer belongs to it.
    """
    signal, noise_scale = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    original = original_of(prediction, sample, alpha_bar, prediction_type)
    if gradient is not None:
        original = original + noise_scale**2 / signal * gradient
    if clip_sample:
        original = original.clamp(-1, 1)
    if prediction_type == "sample":
        return original
    epsilon = (sample - signal * original) / noise_scale
    return epsilon if prediction_type == "epsilon" else signal * epsilon - noise_scale * original
