"""The samplers of ADM (arXiv 2105.05233): DDPM with Algorithm 1's guidance, DDIM with Algorithm 2's.

Both are first-order cases of DPM-Solver++ (arXiv 2211.01095); its second order needs far fewer steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..loading import SavedConfigMixin
from ..registration import register_with_diffusers
from ..settings import check_settings, whole_number
from .gaussian_diffusion import PREDICTION_TYPES, GaussianDiffusion, Timestep, compute_dtype, upcast
from .schedules import SCHEDULES, check_timesteps, make_betas, space_timesteps

# Default number of second-order steps. On digits 10 are as good as 250 published ones
# (tests/benchmarks/guidance_solvers.py); arXiv 2211.01095 takes 15 to 20 on ImageNet, which was not measured here.
FEW_STEPS = 20

CHOICES = {
    "variance_type": ("learned_range", "fixed_small", "fixed_large"),
    "prediction_type": PREDICTION_TYPES,
    "algorithm_type": ("ddpm", "ddim"),
    "solver_order": (1, 2),
}
SAMPLER = ("algorithm_type", "variance_type", "solver_order")


@dataclass
class ADMSchedulerOutput(BaseOutput):
    """Images of shape `(batch, channels, height, width)` in the dtype of the sample given."""

    prev_sample: torch.Tensor  # one step less noisy
    pred_original_sample: torch.Tensor  # the predicted clean image; with DDIM, as guided


@register_with_diffusers
class ADMScheduler(SavedConfigMixin, SchedulerMixin, ConfigMixin):
    r"""The forward process and its samplers. It has no hidden state: `step` may be called at any timestep at any time.

    Its config carries its betas (`trained_betas`), so that `DDIMScheduler.from_config(scheduler.config)` and the like
    use the same schedule. A config whose betas contradict `beta_schedule` is refused.

    Args:
        num_train_timesteps (`int`, defaults to 1000): Number of timesteps of training.
        beta_schedule (`str`, defaults to `"linear"`): `"linear"` (scaled with `1000 / num_train_timesteps`) or
            `"squaredcos_cap_v2"`, the cosine schedule.
        trained_betas (`Sequence[float]`, *optional*): Betas of another schedule, one per timestep; their number
            replaces `num_train_timesteps` where that is left at its default.
        variance_type (`str`, defaults to `"learned_range"`): `"learned_range"` (Improved DDPM, equation 15),
            `"fixed_small"` (the posterior's) or `"fixed_large"` (beta).
        prediction_type (`str`, defaults to `"epsilon"`): `"epsilon"`, `"sample"` or `"v_prediction"`.
        algorithm_type (`str`, defaults to `"ddpm"`): `"ddpm"` (Algorithm 1) or `"ddim"` (Algorithm 2).
        solver_order (`int`, defaults to 1): The sampler for `set_timesteps(num_inference_steps)`: with 1 the published
            ones, with 2 SDE-DPM-Solver++(2M) for `"ddpm"` and DPM-Solver++(2M) for `"ddim"`, for few steps.
            `respacing` and `timesteps` use the published samplers in either case.
        clip_sample (`bool`, defaults to `True`): Clip predicted clean images to [-1, 1].
        rescale_timesteps (`bool`, defaults to `False`): The model was trained on timesteps scaled to [0, 1000), see
            [`model_timesteps`].

    Raises:
        `ValueError`: For an unknown choice, or `trained_betas` that contradict the other arguments.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    takes_gradient = True  # schedulers of diffusers get a corrected prediction instead

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "learned_range",
        prediction_type: str = "epsilon",
        algorithm_type: str = "ddpm",
        clip_sample: bool = True,
        rescale_timesteps: bool = False,
        solver_order: int = 1,
    ):
        if trained_betas is not None and hasattr(trained_betas, "tolist"):  # an array or a tensor
            trained_betas = trained_betas.tolist()
            self.register_to_config(trained_betas=trained_betas)
        check_settings(type(self), self.config)
        for name, choices in CHOICES.items():
            if (given := self.config[name]) not in choices:
                raise ValueError(f"{name}={given!r} is not one of {', '.join(map(repr, choices))}.")
        if trained_betas is not None and num_train_timesteps == 1000:  # the default
            num_train_timesteps = len(trained_betas)
        betas = check_betas(trained_betas, beta_schedule, num_train_timesteps)
        # These names mean something else in schedulers of diffusers, which keep their own defaults and carry ours only
        # for the conversion back.
        private = [*SAMPLER, *["rescale_timesteps"] * (not rescale_timesteps)]
        sampler = {name: self.config[name] for name in SAMPLER}
        schedule = {"num_train_timesteps": num_train_timesteps, "trained_betas": betas.tolist()}
        self.register_to_config(**schedule, _adm_sampler=sampler, _use_default_values=private)

        alphas_cumprod = np.cumprod(1 - betas)
        self.betas = torch.from_numpy(betas).float()
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod).float()
        self.init_noise_sigma = 1.0
        self.training_diffusion = self.diffusion_on(range(num_train_timesteps))
        self.set_timesteps()

    def diffusion_on(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The Gaussian diffusion on some of the training timesteps, ascending; the scheduler is not changed."""
        alphas_cumprod = np.cumprod(1 - np.asarray(self.config.trained_betas))
        return GaussianDiffusion(alphas_cumprod, timesteps, self.config.prediction_type, self.config.variance_type)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        respacing: str | None = None,
        timesteps: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Sets the timesteps of sampling; all of them, if nothing is given.

        Args:
            num_inference_steps (`int`, *optional*): Number of steps, evenly spaced. With `solver_order` 1 it is the
                same as `respacing` of that number; with 2 the last one is an interval before timestep 0, as in
                diffusers.
            respacing (`str`, *optional*): OpenAI's notation: `"250"`, `"ddim25"`, `"90,60,60,20,20"`.
            timesteps (`Sequence[int]`, *optional*): The timesteps themselves, descending.
            device (`torch.device`, *optional*): Where `scheduler.timesteps` goes.

        Raises:
            `ValueError`: If more than one is given, or one that the schedule cannot satisfy.
        """
        if sum(given is not None for given in (num_inference_steps, respacing, timesteps)) > 1:
            raise ValueError("Give only one of num_inference_steps, respacing and timesteps.")
        total = self.config.num_train_timesteps
        self.is_second_order = num_inference_steps is not None and self.config.solver_order == 2
        if timesteps is not None:
            descending = check_timesteps(timesteps, total)
        elif num_inference_steps is None:
            kept = list(range(total)) if respacing in (None, "") else space_timesteps(total, respacing)
            descending = kept[::-1]
        else:
            steps = whole_number("num_inference_steps", num_inference_steps)
            if not self.is_second_order:
                descending = space_timesteps(total, str(steps))[::-1]
            elif 1 <= steps < total:
                descending = np.linspace(0, total - 1, steps + 1).round()[:0:-1].astype(int).tolist()
            else:
                raise ValueError(
                    f"num_inference_steps={steps} does not lie between 1 and {total - 1}, the most that solver_order=2 "
                    f"allows with {total} timesteps; respacing='{total}' uses all of them."
                )
        self.num_inference_steps = len(descending)
        self.timesteps = torch.tensor(descending, device=device)
        self.diffusion = self.training_diffusion if len(descending) == total else self.diffusion_on(descending[::-1])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Timestep,
        sample: torch.Tensor,
        *,
        gradient: torch.Tensor | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        previous: tuple[Timestep, torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> ADMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        r"""The sample at the next timestep of `scheduler.timesteps`, from `sample` at `timestep`.

        Args:
            model_output (`torch.Tensor` of shape `(batch, C or 2C, height, width)`): The UNet's output.
            timestep (`torch.Tensor` of shape `()` or `(batch,)`, or `int`): One of `scheduler.timesteps`.
            sample (`torch.Tensor` of shape `(batch, C, height, width)`): The noisy images.
            gradient (`torch.Tensor` like `sample`, *optional*): The scaled gradient of log p(y | x_t). DDPM moves
                the mean by variance * gradient (Algorithm 1), DDIM and the second order move epsilon by
                -sqrt(1 - alpha_bar) * gradient (Algorithm 2); DDIM clips x_0 before that, as published, the second
                order after.
            eta (`float`, defaults to 0.0): DDIM's share of noise, from 0 to 1 (DDPM's; arXiv 2010.02502, eq. 16).
            generator (`torch.Generator` or a list, *optional*): Draws the noise; a list has one per image.
            variance_noise (`torch.Tensor` like `sample`, *optional*): The noise itself.
            previous (a timestep and a `torch.Tensor` like `sample`, *optional*): The preceding (noisier) timestep
                and its `pred_original_sample`; without it a second-order step is one of first order.
            return_dict (`bool`, defaults to `True`): Return an output object instead of a tuple.

        Returns:
            [`ADMSchedulerOutput`]: `.prev_sample` and `.pred_original_sample`.

        Raises:
            `ValueError`: For a timestep that is not in `scheduler.timesteps`, channels that do not fit `variance_type`,
                or an `eta` outside [0, 1] or with DDPM.
        """
        algorithm, is_second_order = self.config.algorithm_type, self.is_second_order
        if not 0 <= eta <= 1 or (eta and algorithm != "ddim"):
            raise ValueError(
                f"eta={eta} with algorithm_type={algorithm!r}: eta lies between 0 and 1 and belongs to 'ddim'."
            )
        if eta or algorithm == "ddpm":
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, compute_dtype(sample))
            (is_noisy,) = self.diffusion.at(timestep, sample, "is_noisy")
            noise = is_noisy * upcast(variance_noise).to(sample.device)

        clip_first = self.config.clip_sample and not is_second_order
        predicted = self.diffusion.predict(model_output, timestep, sample, clip_first)
        original = predicted.pred_original_sample
        if algorithm == "ddpm" and not is_second_order:
            mean = predicted.mean
            if gradient is not None:
                mean = mean + predicted.variance * upcast(gradient)
            prev_sample = mean + (0.5 * predicted.log_variance).exp() * noise
        else:
            alpha_bar, alpha_bar_prev = self.diffusion.at(timestep, sample, "alpha_bar", "alpha_bar_prev")
            epsilon = self.diffusion.epsilon_of(original, timestep, sample)
            if gradient is not None:
                epsilon = epsilon - (1 - alpha_bar).sqrt() * upcast(gradient)
                original = self.diffusion.original_of(epsilon, timestep, sample)
            target = original
            if is_second_order:
                eta = 1.0 if algorithm == "ddpm" else eta  # 1 equals DDPM with the posterior's variance
                original = original.clamp(-1, 1) if self.config.clip_sample else original
                target = self.extrapolate(original, timestep, previous)
                epsilon = self.diffusion.epsilon_of(target, timestep, sample)
            # arXiv 2010.02502, equations 12 and 16; by rounding the direction's square may be below 0
            sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
            direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt()
            prev_sample = alpha_bar_prev.sqrt() * target + direction * epsilon
            prev_sample = prev_sample + sigma * noise if eta else prev_sample

        prev_sample, original = prev_sample.to(sample.dtype), original.to(sample.dtype)
        if not return_dict:
            return prev_sample, original
        return ADMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=original)

    def extrapolate(
        self, original: torch.Tensor, timestep: Timestep, previous: tuple[Timestep, torch.Tensor] | None
    ) -> torch.Tensor:
        """The clean image extrapolated by half a step from the preceding one (arXiv 2211.01095, Algorithm 2)."""
        if previous is None:
            return original
        here, ahead = self.diffusion.at(timestep, original, "half_log_snr", "half_log_snr_prev")
        (before,) = self.diffusion.at(previous[0], original, "half_log_snr")
        return original + (ahead - here) / (2 * (here - before)) * (original - upcast(previous[1]))

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Samples of q(x_t | x_0) at training timesteps of shape `(batch,)` (DDPM, eq. 4)."""
        return self.training_diffusion.add_noise(original_samples, noise, timesteps).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of v-prediction, sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (arXiv 2202.00512)."""
        signal, noise_scale = self.training_diffusion.at(
            timesteps, sample, "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"
        )
        velocity = signal * upcast(noise) - noise_scale * upcast(sample)
        return velocity.to(sample.dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep | None = None) -> torch.Tensor:
        """Returns `sample`: this scheduler's samples need no scaling."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def register_to_config(self, **settings: Any) -> None:
        """Records settings in the config in sorted order: diffusers' configs differ if their order does."""
        super().register_to_config(**settings)
        self._internal_dict = FrozenDict(sorted(self.config.items()))

    def to_json_string(self) -> str:
        """The saved config as JSON; diffusers adds its version."""
        text = super().to_json_string()
        self.register_to_config()
        return text

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        complete = {name: value for name, value in config_dict.items() if name != "_use_default_values"}
        carried = complete.pop("_adm_sampler", {})
        if "beta_start" in complete:  # a config of diffusers
            theirs = {name: complete.pop(name) for name in SAMPLER if name in complete}
            if "variance_type" in theirs:
                known = theirs["variance_type"] in CHOICES["variance_type"]
                complete["variance_type"] = theirs["variance_type"] if known else "fixed_small"
            complete.update(carried)
            # diffusers defines a linear schedule by its end points, which do not scale with its length as ours do.
            if complete["beta_schedule"] == "linear" and complete["trained_betas"] is None:
                ends = complete["beta_start"], complete["beta_end"]
                complete["trained_betas"] = np.linspace(*ends, complete["num_train_timesteps"]).tolist()
        return super().extract_init_dict(complete, **kwargs)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls, *super()._get_compatibles()]


def check_betas(trained_betas: Sequence[float] | None, beta_schedule: str, num_train_timesteps: int) -> np.ndarray:
    """The betas of the config, float64 of shape `(num_train_timesteps,)`."""
    given = trained_betas is not None
    betas = np.asarray(trained_betas, float) if given else make_betas(beta_schedule, num_train_timesteps)
    if betas.shape != (num_train_timesteps,) or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"trained_betas must be {num_train_timesteps} numbers between 0 and 1, one per timestep; got {betas.size}. "
            f"To choose another num_train_timesteps, give trained_betas=None with it."
        )
    for name in SCHEDULES.keys() - {beta_schedule}:
        if given and num_train_timesteps > 20 and np.array_equal(betas, make_betas(name, num_train_timesteps)):
            raise ValueError(
                f"trained_betas are those of beta_schedule={name!r}, and beta_schedule={beta_schedule!r} was given; to "
                f"change the schedule, give trained_betas=None with it."
            )
    return betas


def model_timesteps(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """Timesteps as a model takes them: scaled to [0, 1000) if it was trained that way (`rescale_timesteps`).

    The scheduler is an [`ADMScheduler`], or one of diffusers made from its config.
    """
    if scheduler.config.get("rescale_timesteps", False):
        return timesteps * (1000.0 / scheduler.config.num_train_timesteps)
    return timesteps
