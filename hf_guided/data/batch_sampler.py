"""Batches of example indices, each a function of the training step alone, so that resuming is exact."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler


@dataclass(eq=False, repr=False)
class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(index, epoch)` keys for micro-steps `start_step`, `start_step + 1`, …

    The examples form one endless stream: epoch after epoch, each in an order drawn from `(seed, epoch)`. Micro-step
    `s` of process `p` takes `batch_size` positions from `(s * num_processes + p) * batch_size` on. There is no other
    state: a sampler started at `s` gives what an uninterrupted run sees at `s`, with any number of loader workers. A
    batch may span epochs. Every example is seen once per epoch.

    Args:
        num_examples (`int`): Length of the dataset.
        batch_size (`int`): Examples per process and micro-step. May exceed `num_examples`.
        seed (`int`): Seed of the shuffling, the same in all processes.
        num_processes, process_index (`int`, default to 1 and 0): Processes that share the stream, and which this is.
        start_step (`int`, defaults to 0): First micro-step, the number of batches already taken. With gradient
            accumulation it is optimizer steps times accumulation steps.
        num_steps (`int`, *optional*): Number of batches to yield. None: without end.

    Raises:
        `ValueError`: if there are no examples, or no such process.
    """

    num_examples: int
    batch_size: int
    seed: int
    num_processes: int = 1
    process_index: int = 0
    start_step: int = 0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.batch_size < 1:
            raise ValueError(
                f"Batches of {self.batch_size} cannot be drawn from {self.num_examples} examples; give 1 or more of "
                f"both."
            )
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index {self.process_index} must be 0 to {self.num_processes - 1}.")

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @lru_cache(maxsize=1)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((self.seed, epoch)).permutation(self.num_examples)

        for step in islice(count(self.start_step), self.num_steps):
            first = (step * self.num_processes + self.process_index) * self.batch_size
            places = (divmod(position, self.num_examples) for position in range(first, first + self.batch_size))
            yield [(int(order(epoch)[place]), epoch) for epoch, place in places]
