"""The forward process q, its posterior, and the model p, on all timesteps or on a respaced subset.

Equation numbers are those of DDPM (arXiv 2006.11239) unless another paper is named. Tables are computed in float64 and
used in float32 or better. They are indexed by the timestep of the training schedule; nothing here has a state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Timestep = torch.Tensor | int  # one for all images, or of shape (batch,)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def original_coefficients(alpha_bar: Any, prediction_type: str) -> tuple[Any, Any]:
    """`a` and `b` of x_0 = a x_t - b prediction, at a number or an array of `alpha_bar`.

    Equation 15 for `"epsilon"`; arXiv 2202.00512, appendix D, for `"v_prediction"`.
    """
    if prediction_type == "epsilon":
        return np.sqrt(1 / alpha_bar), np.sqrt(1 / alpha_bar - 1)
    if prediction_type == "v_prediction":
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return 0 * alpha_bar, 0 * alpha_bar - 1


def original_of(prediction: torch.Tensor, sample: torch.Tensor, alpha_bar: float, prediction_type: str) -> torch.Tensor:
    """The clean image x_0 of a sample x_t that a prediction implies."""
    sample_coef, coef = map(float, original_coefficients(alpha_bar, prediction_type))
    return sample_coef * sample - coef * prediction


@dataclass
class Gaussian:
    """A diagonal Gaussian over images; tensors are broadcastable to `(batch, channels, height, width)`."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor  # clipped where the variance is 0, at the first timestep
    pred_original_sample: torch.Tensor  # the (predicted) clean image that it was computed from


class GaussianDiffusion:
    """A Gaussian diffusion on a subset of the timesteps of a training schedule.

    Args:
        alphas_cumprod (`np.ndarray` of shape `(num_train_timesteps,)`): Of the training schedule, float64.
        timesteps (`Sequence[int]`): Timesteps of the subset, ascending. Their betas follow from `alphas_cumprod`
            (Improved DDPM, arXiv 2102.09672, equation 19).
        prediction_type (`str`): What the model predicts: `"epsilon"`, `"sample"` or `"v_prediction"`.
        variance_type (`str`): `"learned_range"` (Improved DDPM, equation 15), `"fixed_small"` or `"fixed_large"`.
    """

    def __init__(self, alphas_cumprod: np.ndarray, timesteps: Sequence[int], prediction_type: str, variance_type: str):
        self.timesteps = list(timesteps)
        self.prediction_type = prediction_type
        self.variance_type = variance_type

        alpha_bar = alphas_cumprod[self.timesteps]
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        self.betas = betas = 1 - alpha_bar / alpha_bar_prev
        posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)  # eq. 7
        # 0 at the first timestep, whose logarithm is therefore taken from the second
        first_variance = posterior_variance[1] if len(betas) > 1 else betas[0]
        half_log_snr = np.log(alpha_bar / (1 - alpha_bar)) / 2  # DPM-Solver's lambda (arXiv 2206.00927)
        tables = {
            "alpha_bar": alpha_bar,
            "alpha_bar_prev": alpha_bar_prev,
            "sqrt_alpha_bar": np.sqrt(alpha_bar),
            "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
            "posterior_original_coef": betas * np.sqrt(alpha_bar_prev) / (1 - alpha_bar),
            "posterior_sample_coef": (1 - alpha_bar_prev) * np.sqrt(1 - betas) / (1 - alpha_bar),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": np.log(np.append(first_variance, posterior_variance[1:])),
            "large_variance": np.append(first_variance, betas[1:]),
            "log_beta": np.log(betas),
            "is_noisy": np.arange(len(betas)) > 0,  # the last step of sampling adds no noise
            "half_log_snr": half_log_snr,
            "half_log_snr_prev": np.append(half_log_snr[0], half_log_snr[:-1]),  # of the last step: no step
        }
        for name in PREDICTION_TYPES:
            tables[f"sample_coef_{name}"], tables[f"coef_{name}"] = original_coefficients(alpha_bar, name)
        # One row per table, one column per training timestep; NaN at timesteps outside the subset.
        self._rows = {name: row for row, name in enumerate(tables)}
        self._tables = torch.full((len(tables), len(alphas_cumprod)), torch.nan, dtype=torch.float64)
        self._tables[:, self.timesteps] = torch.from_numpy(np.stack([np.float64(t) for t in tables.values()]))
        self._on_device: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def at(self, timestep: Timestep, sample: torch.Tensor, *names: str) -> tuple[torch.Tensor, ...]:
        """The named constants at a timestep (a number, or one per image), broadcastable to `sample`."""
        key = (sample.device, compute_dtype(sample))
        if key not in self._on_device:
            self._on_device[key] = self._tables.to(*key)
        timestep = torch.as_tensor(timestep)
        if timestep.device.type == "cpu" and (
            timestep.is_floating_point()
            or not ((timestep >= 0) & (timestep < self._tables.shape[1])).all()
            or self._tables[0, timestep].isnan().any()
        ):
            raise ValueError(
                f"timestep {timestep.flatten().tolist()} is not among the {len(self.timesteps)} timesteps of the "
                f"schedule ({self.timesteps[0]} … {self.timesteps[-1]}); call set_timesteps for others."
            )
        columns = self._on_device[key][:, timestep.to(sample.device).reshape(-1)]
        return tuple(columns[self._rows[name]].view(-1, *[1] * (sample.ndim - 1)) for name in names)

    def add_noise(self, original: torch.Tensor, noise: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """A sample of `q(x_t | x_0)` with given noise (eq. 4)."""
        signal, noise_scale = self.at(timestep, original, "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar")
        return signal * upcast(original) + noise_scale * upcast(noise)

    def original_of(
        self, prediction: torch.Tensor, timestep: Timestep, sample: torch.Tensor, prediction_type: str = "epsilon"
    ) -> torch.Tensor:
        """The clean image x_0 of a sample x_t that a prediction implies."""
        sample_coef, coef = self.at(timestep, sample, f"sample_coef_{prediction_type}", f"coef_{prediction_type}")
        return sample_coef * upcast(sample) - coef * upcast(prediction)

    def epsilon_of(self, original: torch.Tensor, timestep: Timestep, sample: torch.Tensor) -> torch.Tensor:
        """The noise epsilon of a sample x_t with clean image `original`."""
        sample_coef, coef = self.at(timestep, sample, "sample_coef_epsilon", "coef_epsilon")
        return (sample_coef * upcast(sample) - original) / coef

    def posterior(self, original: torch.Tensor, timestep: Timestep, sample: torch.Tensor) -> Gaussian:
        """`q(x_{t-1} | x_t, x_0)` (eq. 6 and 7)."""
        names = ("original_coef", "sample_coef", "variance", "log_variance")
        original_coef, sample_coef, variance, log_variance = self.at(
            timestep, sample, *(f"posterior_{name}" for name in names)
        )
        mean = original_coef * upcast(original) + sample_coef * upcast(sample)
        return Gaussian(mean, variance, log_variance, original)

    def predict(
        self, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, clip_sample: bool = False
    ) -> Gaussian:
        """The model's `p(x_{t-1} | x_t)` (eq. 1), before any guidance; arguments as of [`ADMScheduler.step`].

        `clip_sample` clips the predicted clean image to [-1, 1].
        """
        prediction, variance_output = self.split(model_output, sample.shape[1])
        original = self.original_of(prediction, timestep, sample, self.prediction_type)
        gaussian = self.posterior(original.clamp(-1, 1) if clip_sample else original, timestep, sample)
        if variance_output is not None:  # between the two bounds on a logarithmic scale
            (log_beta,) = self.at(timestep, sample, "log_beta")
            fraction = (upcast(variance_output) + 1) / 2
            gaussian.log_variance = fraction * log_beta + (1 - fraction) * gaussian.log_variance
            gaussian.variance = gaussian.log_variance.exp()
        elif self.variance_type == "fixed_large":
            (gaussian.variance,) = self.at(timestep, sample, "large_variance")
            gaussian.log_variance = gaussian.variance.log()
        return gaussian

    def split(self, model_output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Splits a model's output into its prediction and that of the variance, if it is learned."""
        expected = 2 * channels if self.variance_type == "learned_range" else channels
        if model_output.shape[1] != expected:
            raise ValueError(
                f"The model's output has {model_output.shape[1]} channels where variance_type={self.variance_type!r} "
                f"needs {expected}; give the scheduler the variance_type that the model was trained with."
            )
        if expected == channels:
            return model_output, None
        return model_output.split(channels, dim=1)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for a float64 tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 or better."""
    return tensor.to(compute_dtype(tensor))
