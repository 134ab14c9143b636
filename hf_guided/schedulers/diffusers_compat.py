"""Guided predictions for the schedulers of diffusers, and checks that a scheduler fits this diffusion process."""

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .gaussian_diffusion import original_coefficients, original_of
from .schedules import space_timesteps

logger = logging.get_logger(__name__)

# The schedulers of diffusers that sample this process, with no randomness but the generator's. Others have
# `alphas_cumprod` too, but invert the process, need more than a prediction, or shift the schedule.
SOLVERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "UniPCMultistepScheduler"),
    *("LCMScheduler", "TCDScheduler"),
)
# The prediction types that some of these support; all others take "epsilon", "v_prediction" and "sample". (PNDM
# averages predictions over timesteps, and treats an average of v as the v of one timestep.)
KNOWN_PREDICTIONS = {
    "EulerAncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "KDPM2AncestralDiscreteScheduler": ("epsilon", "v_prediction"),
    "KDPM2DiscreteScheduler": ("epsilon", "v_prediction"),
    "PNDMScheduler": ("epsilon",),
}
# Largest factor by which a step of Heun or KDPM2 may amplify a change of the predicted clean image. On digits the FID
# is 1 to 28 at factors up to 18 and falls with the number of steps; from 30 on it is 39 to 330.
MAX_GROWTH = 20
# Options with which a solver of diffusers chooses its own timesteps.
SPACINGS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")


def check_solver(scheduler: SchedulerMixin, shifted: bool) -> None:
    """Refuses a scheduler of diffusers or a third party that would misinterpret the prediction, by a `ValueError`.

    `shifted` says whether gradients will correct the prediction.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    lacks = "" if hasattr(scheduler, "alphas_cumprod") else ": it has no alphas_cumprod"
    if lacks or (type(scheduler).__module__.startswith("diffusers.") and name not in SOLVERS):
        raise ValueError(
            f"{name} is not a scheduler of this diffusion process{lacks}. Take one such as DDIMScheduler or "
            f"DPMSolverMultistepScheduler, made from the config of an ADMScheduler."
        )
    if config.get("use_flow_sigmas", False) or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} with use_flow_sigmas=True or timestep_type='continuous' follows another process than this UNet's; "
            f"leave both out."
        )
    known = KNOWN_PREDICTIONS.get(name, ("epsilon", "v_prediction", "sample"))
    if prediction_type not in known:
        raise ValueError(
            f"{name} has prediction_type={prediction_type!r}, but supports only {', '.join(map(repr, known))} "
            f"here; take another scheduler, such as DPMSolverMultistepScheduler."
        )
    reads_it = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    if reads_it and str(config.get("variance_type")).startswith("learned"):
        raise ValueError(
            f"{name} has variance_type={config.variance_type!r}: no scheduler of diffusers reads a learned variance "
            f"correctly. Make it with from_config(…, variance_type='fixed_small'), or take an ADMScheduler."
        )
    if scheduler.alphas_cumprod[-1] == 0 and (shifted or prediction_type == "epsilon"):
        raise ValueError(
            f"The last timestep of {name} is pure noise (rescale_betas_zero_snr=True): there epsilon does not "
            f"determine the image and no gradient can shift it; leave rescale_betas_zero_snr out."
        )


def check_solver_timesteps(scheduler: SchedulerMixin, num_steps: int) -> None:
    """Refuses timesteps of a solver of diffusers, set for `num_steps`, outside the schedule or of one noise level."""
    name, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
    first, last = scheduler.timesteps.max().item(), scheduler.timesteps.min().item()
    if first >= total or last < 0:
        given = {option: scheduler.config.get(option) for option in ("timestep_spacing", "steps_offset")}
        options = [f"{option}={value!r}" for option, value in given.items() if value is not None]
        raise ValueError(
            f"{name} makes timesteps from {first:g} to {last:g} of num_inference_steps={num_steps}, and the schedule "
            f"has 0 to {total - 1}; give fewer steps, or change its {' or '.join(options) or 'settings'}."
        )
    sigmas = getattr(scheduler, "sigmas", None)
    levels = scheduler.timesteps if sigmas is None else sigmas[:-1]  # the last is the image's
    if (distinct := len(levels.unique())) < num_steps:  # solvers of higher order divide by the step between two
        raise ValueError(
            f"{name} makes only {distinct} different noise levels of num_inference_steps={num_steps}, of "
            f"{total} timesteps; give fewer steps, or another timestep_spacing."
        )


def warn_of_overshoot(scheduler: SchedulerMixin) -> None:
    """Warns of timesteps too far apart for a solver that evaluates the model at both ends of a step (Heun, KDPM2).

    From sigma to sigma', such a step extrapolates by about sigma / sigma' times the change of the predicted clean
    image, which is up to 1, or sigma if that is less. A cosine schedule starts at sigma = 20,291; the next of 20 steps
    is 12.
    """
    if not hasattr(scheduler, "state_in_first_order"):
        return
    sigmas = scheduler.sigmas.unique(sorted=True)[1:].flip(0)  # without the 0 at the end
    growth = sigmas[:-1] / sigmas[1:] * sigmas[:-1].clamp(max=1)
    if len(growth) and growth.max() > MAX_GROWTH:
        widest = growth.argmax().item()
        logger.warning(
            f"{type(scheduler).__name__} goes from sigma={sigmas[widest]:.4g} to {sigmas[widest + 1]:.4g} in one step "
            f"and will overshoot: take more steps, timestep_spacing='leading', or a DPMSolverMultistepScheduler."
        )


def alpha_bar_at(scheduler: SchedulerMixin, timestep: float) -> float:
    """`alpha_bar` of the model's input at the current timestep, as the scheduler uses it.

    For schedulers with sigmas it is 1 / (1 + sigma^2) of their current step. Their timesteps are interpolated, and with
    Karras' sigmas some round them to integers, off by up to 7 in the logarithm of the signal-to-noise ratio.
    """
    if getattr(scheduler, "sigmas", None) is None:
        return scheduler.alphas_cumprod[int(timestep)].item()
    if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:  # KDPM2, between two sigmas
        return scheduler.scale_model_input(torch.ones(()), timestep).item() ** 2
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    return 1 / (1 + scheduler.sigmas[index or 0].item() ** 2)


def correct_prediction(
    prediction: torch.Tensor,
    sample: torch.Tensor,
    gradient: torch.Tensor | None,
    alpha_bar: float,
    prediction_type: str,
    clip_sample: bool,
) -> torch.Tensor:
    """The guided prediction of any type: epsilon - sqrt(1 - alpha_bar) * gradient (Algorithm 2), with x_0 clipped.

    Solvers that do not clip diverge where hardly any signal is left (cosine schedule, last timesteps). DDIM of
    diffusers clips x_0, but continues with an epsilon that no longer matches it.
    """
    original = original_of(prediction, sample, alpha_bar, prediction_type)
    if gradient is not None:
        original = original + (1 - alpha_bar) / alpha_bar**0.5 * gradient
    if clip_sample:
        original = original.clamp(-1, 1)
    sample_coef, coef = map(float, original_coefficients(alpha_bar, prediction_type))
    return (sample_coef * sample - original) / coef


def set_solver_timesteps(
    scheduler: SchedulerMixin, given: dict[str, Any], device: torch.device, is_default: bool
) -> None:
    """Sets the timesteps of a scheduler of diffusers; those that it cannot take are a `ValueError`.

    `given` has one of `num_inference_steps`, `respacing` and `timesteps`, or nothing, which is 50 steps. If that
    `is_default`, a scheduler that chooses its own timesteps takes as many of them.
    """
    name, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
    given = dict(given)
    if "respacing" in given:
        given["timesteps"] = space_timesteps(total, given.pop("respacing"))[::-1]
    spaced = any(scheduler.config.get(f"use_{how}", False) for how in SPACINGS)
    if "timesteps" in given and (spaced or "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters):
        if not is_default:
            raise ValueError(f"{name} chooses its own timesteps; give num_inference_steps alone.")
        given = {"num_inference_steps": len(given["timesteps"])}
    ((argument, value),) = (given or {"num_inference_steps": min(50, total)}).items()
    try:
        scheduler.set_timesteps(**{argument: value}, device=device)
    except ValueError as error:
        raise ValueError(f"{name} cannot take {argument}={value}; give another number of steps ({error})") from error
    check_solver_timesteps(scheduler, len(value) if argument == "timesteps" else value)
    if hasattr(scheduler, "set_begin_index"):  # it would search for timesteps, which may repeat
        scheduler.set_begin_index(0)
    warn_of_overshoot(scheduler)


def solver_step(
    scheduler: SchedulerMixin,
    model_output: torch.Tensor,
    timestep: torch.Tensor,
    timestep_value: float,
    sample: torch.Tensor,
    model_input: torch.Tensor,
    gradient: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """The next sample of a scheduler of diffusers; a gradient shifts epsilon (arXiv 2105.05233, Algorithm 2).

    Args:
        model_output (`torch.Tensor`): The UNet's; a learned variance is not used.
        timestep (`torch.Tensor`): The current timestep; `timestep_value`: the same on the host.
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): x_t; `model_input`: the same, scaled for
            the UNet.
        gradient (`torch.Tensor` like `sample`, *optional*): The scaled gradient of log p.
        options: `eta`, `generator` or `variance_noise`, passed on if the scheduler takes them; another
            `variance_noise` is a `ValueError`.
    """
    prediction, config = model_output[:, : sample.shape[1]], scheduler.config
    clip_sample = config.get("clip_sample", False)
    if gradient is not None or clip_sample:
        alpha_bar = alpha_bar_at(scheduler, timestep_value)
        prediction = correct_prediction(
            prediction, model_input, gradient, alpha_bar, config.prediction_type, clip_sample
        )
    accepted = inspect.signature(scheduler.step).parameters
    if "variance_noise" in options and "variance_noise" not in accepted:
        raise ValueError(f"{type(scheduler).__name__} does not support variance_noise; leave it out.")
    options = {name: value for name, value in options.items() if name in accepted}
    return scheduler.step(prediction, timestep, sample, **options).prev_sample
