"""What a denoising loop costs, and whether all that it computes is finite."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..messages import first_few

_UNET = "unet"
# Outputs and gradients between two checks that they are finite; each check waits for an accelerator
_CHECK_EVERY = 32


class NotFiniteError(RuntimeError):
    """A model's output or a gradient holds NaN or infinity."""


@dataclass
class SamplingCost:
    """Forward passes and seconds that a call of a pipeline took.

    Attributes:
        calls (`dict[str, int]`): Forward passes by component: `"unet"`, `"classifier"`, `"guide_unet"` …; a doubled
            batch counts as one.
        seconds (`dict[str, float]`): Their time by component, backward passes included.
        skipped_gradients (`int`): Number of gradients, one per image, skipped because they were not finite.
    """

    calls: dict[str, int] = field(default_factory=lambda: {"unet": 0, "classifier": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"unet": 0.0, "classifier": 0.0})
    skipped_gradients: int = 0


class Monitor:
    """Counts and times the models of one denoising loop, and refuses outputs and gradients that are not finite.

    Args:
        skip_gradients (`bool`): Count gradients that are not finite instead of refusing them.
        timed (`bool`): Measure seconds, which synchronises with the GPU.
    """

    def __init__(self, skip_gradients: bool = False, timed: bool = False):
        self.skip_gradients, self.timed = skip_gradients, timed
        self.cost = SamplingCost()
        self.pending: list[tuple[torch.Tensor, str, float, int]] = []  # flags of images not finite, of what, where

    def zero_nonfinite(self, gradient: torch.Tensor, name: str, timestep: float, step: int) -> torch.Tensor:
        """The gradient, zero for images where it is not finite; on an accelerator these are reported with a delay."""
        is_broken = broken_images(gradient)
        self.record(is_broken, name, timestep, step)
        return gradient.masked_fill(is_broken.view(-1, 1, 1, 1), 0.0)

    def record(self, is_broken: torch.Tensor, name: str, timestep: float, step: int) -> None:
        """Records which images' gradient or output is not finite, until the next check."""
        self.pending.append((is_broken, name, timestep, step))
        if is_broken.device.type == "cpu" or len(self.pending) >= _CHECK_EVERY:
            self.check()

    def check(self) -> None:
        """Checks that outputs and gradients since the last check were finite; called at the end of the loop too.

        Raises:
            [`NotFiniteError`]: If one was not, unless it is a gradient and these are skipped and counted.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        for flags, (_, name, timestep, step) in zip(
            torch.stack([flags for flags, *_ in pending]).tolist(), pending, strict=True
        ):
            broken = [str(image) for image, is_broken in enumerate(flags) if is_broken]
            images = f"image{'s' * (len(broken) > 1)} {first_few(broken, 5)}"
            where = f"at step {step} (timestep {timestep:g}) for {images} of the batch"
            if broken and name == _UNET:  # clipping would turn it into a valid image
                guides = "guide_unet" in self.cost.calls
                raise NotFiniteError(
                    f"The output of the UNet{' or of guide_unet' * guides} is not finite {where}: its weights have "
                    f"infinite values or NaN, or it overflowed. Load it in float32 or bfloat16; if that does not help, "
                    f"its training diverged or its file is damaged."
                )
            if broken and not self.skip_gradients:
                raise NotFiniteError(
                    f"The gradient of {name} is not finite {where}. Take a smaller scale, load the model that guides "
                    f"in float32 or bfloat16, or leave such gradients out: nonfinite_gradient='skip'."
                )
            self.cost.skipped_gradients += len(broken)

    @contextmanager
    def measured(self, component: str, calls: int = 1) -> Iterator[None]:
        """Counts calls of a component, and measures their time if `timed`."""
        self.cost.calls[component] = self.cost.calls.get(component, 0) + calls
        started = self.now()
        yield
        self.cost.seconds[component] = self.cost.seconds.get(component, 0.0) + self.now() - started

    def now(self) -> float:
        """Seconds, after synchronising with the device; 0 unless `timed`."""
        if not self.timed:
            return 0.0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def broken_images(images: torch.Tensor) -> torch.Tensor:
    """Which images of a batch have NaN or infinite values, booleans of shape `(batch,)`."""
    # A sum is finite if all of its terms are, and takes a hundredth of the time of an elementwise check.
    return ~images.flatten(1).sum(dim=1, dtype=torch.promote_types(images.dtype, torch.float32)).isfinite()
