"""Inpainting by resampling: RePaint (arXiv 2201.09865)."""

from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..settings import whole_number

MOST_STEPS = 1_000_000  # in one denoising loop


def jump_positions(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """Indices of the denoising steps in the order in which RePaint takes them (section 4.2 and appendix B).

    Args:
        num_steps (`int`): Steps from noise to image, numbered from 0.
        jump_length (`int`): Steps that a jump goes back, the length of a section, counted from the image.
        jump_n_sample (`int`): How often each section is denoised; 1 is sampling without jumps.

    Raises:
        `ValueError`: If either is less than 1, or there are more steps than `MOST_STEPS`.
    """
    jump_length = whole_number("jump_length", jump_length)
    jump_n_sample = whole_number("jump_n_sample", jump_n_sample)
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(f"jump_length={jump_length} and jump_n_sample={jump_n_sample} must be 1 or more.")
    if jump_n_sample * num_steps > MOST_STEPS:
        raise ValueError(f"jump_n_sample={jump_n_sample} makes over {MOST_STEPS:,} of {num_steps} steps; give less.")
    jumps_left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    positions: list[int] = []
    left = num_steps - 1  # steps that remain after the current one
    while left >= 0:
        positions.append(num_steps - 1 - left)
        left -= 1
        if jumps_left.get(left, 0):
            jumps_left[left] -= 1
            left += jump_length
    return positions


@dataclass(frozen=True)
class RePaint:
    """Puts the known pixels, noised to each timestep, into the sample (Algorithm 1); jumps back by adding noise."""

    scheduler: SchedulerMixin  # an [`ADMScheduler`], which takes the steps
    original: torch.Tensor  # images in [-1, 1], of shape `(batch, channels, height, width)`
    mask: torch.Tensor  # bool, of shape `(1 or batch, 1, height, width)`: True where pixels are inpainted

    def __call__(
        self, sample: torch.Tensor, timestep: int, next_timestep: int | None, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """The sample with its known pixels replaced, noised to the next timestep.

        Args:
            sample (`torch.Tensor` like `original`): The sample after the step at `timestep`.
            timestep (`int`): Timestep of that step.
            next_timestep (`int`, *optional*): Timestep of the next step; not below `timestep` for a jump back.
                `None` at the end, where the known pixels become the original's exactly.
            generators (`list[torch.Generator]`): Draw the noise, one per image.
        """
        if next_timestep is None:
            return torch.where(self.mask, sample, self.original)

        def noised(image: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
            noise = randn_tensor(image.shape, generators, image.device, image.dtype)
            return alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise

        (alpha_bar,) = self.scheduler.diffusion.at(timestep, sample, "alpha_bar_prev")
        sample = torch.where(self.mask, sample, noised(self.original, alpha_bar))  # equation 8
        if next_timestep >= timestep:
            (alpha_bar_next,) = self.scheduler.diffusion.at(next_timestep, sample, "alpha_bar")
            sample = noised(sample, alpha_bar_next / alpha_bar)
        return sample
