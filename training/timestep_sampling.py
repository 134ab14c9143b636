"""Sampling of the timesteps that a training batch is noised to."""

import math

import torch


class TimestepSampler:
    """Draws timesteps uniformly, with torch's global generator."""

    learns_from_losses = False

    def __init__(self, num_train_timesteps: int):
        self.num_train_timesteps = num_train_timesteps

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps, and importance weights that keep the mean loss unbiased, each of shape `(batch_size,)`."""
        probabilities = self.probabilities()
        timesteps = torch.multinomial(probabilities, batch_size, replacement=True)
        return timesteps, (1 / (self.num_train_timesteps * probabilities[timesteps])).float()

    def probabilities(self) -> torch.Tensor:
        """The probability of each timestep, `(num_train_timesteps,)`, float64."""
        return torch.full((self.num_train_timesteps,), 1 / self.num_train_timesteps, dtype=torch.float64)

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        """Records the losses of all processes at the drawn timesteps."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        pass


class LossSecondMomentSampler(TimestepSampler):
    """Draws a timestep in proportion to the root of its loss's second moment (arXiv 2102.09672, section 3.3).

    Uniform until every timestep has been drawn `history` times, the number of its last losses that are kept. It suits
    the variational bound, whose terms differ by orders of magnitude.
    """

    learns_from_losses = True
    uniform = 0.001  # share of uniform draws, so that every timestep is drawn

    def __init__(self, num_train_timesteps: int, history: int = 10):
        super().__init__(num_train_timesteps)
        self.history = history
        self.losses = torch.zeros(num_train_timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        if self.counts.min() < self.history:
            return super().probabilities()
        weights = self.losses.square().mean(dim=1).sqrt()
        return (1 - self.uniform) * weights / weights.sum() + self.uniform / self.num_train_timesteps

    def update(self, timesteps: torch.Tensor, losses: torch.Tensor) -> None:
        for timestep, loss in zip(timesteps.tolist(), losses.double().tolist(), strict=True):
            if math.isfinite(loss):
                self.losses[timestep, self.counts[timestep] % self.history] = loss
                self.counts[timestep] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])
