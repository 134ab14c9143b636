"""Timesteps by chance, and by what they cost."""

import sys

import forked
import torch
from launching import environment

from hf_guided.training.timestep_sampling import LossSecondMomentSampler, TimestepSampler


def test_uniform():
    torch.manual_seed(0)
    timesteps, weights = TimestepSampler(10).sample(20_000)
    assert torch.allclose(timesteps.bincount(minlength=10) / 20_000, torch.full((10,), 0.1), atol=0.01)
    assert torch.allclose(weights, torch.ones(20_000))


def fill(sampler, scale=lambda t: t + 1.0):
    for _ in range(sampler.losses.shape[1]):
        timesteps = torch.arange(sampler.num_train_timesteps)
        sampler.update(timesteps, scale(timesteps.double()))


def test_second_moment_draws_in_proportion_and_stays_unbiased():
    torch.manual_seed(0)
    sampler = LossSecondMomentSampler(4, history=3)
    assert torch.equal(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    fill(sampler)
    expected = 0.999 * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64) / 10 + 0.001 / 4
    assert torch.allclose(sampler.probabilities(), expected)
    timesteps, weights = sampler.sample(100_000)
    assert torch.allclose(timesteps.bincount() / 100_000, expected.float(), atol=0.01)
    # the weighted mean of any loss is the uniform mean
    assert abs((weights * (timesteps + 1.0)).mean() - 2.5) < 0.02


def test_history_forgets_the_oldest():
    sampler = LossSecondMomentSampler(2, history=2)
    for loss in (100.0, 1.0, 3.0):
        sampler.update(torch.tensor([0, 1]), torch.tensor([loss, 2.0]))
    second_moment = torch.tensor([(1 + 9) / 2, 4.0], dtype=torch.float64).sqrt()
    assert torch.allclose(sampler.probabilities(), 0.999 * second_moment / second_moment.sum() + 0.0005)


def test_state_comes_back():
    sampler, other = LossSecondMomentSampler(4, history=3), LossSecondMomentSampler(4, history=3)
    fill(sampler)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.probabilities(), sampler.probabilities())
    other.update(torch.tensor([0]), torch.tensor([50.0]))
    assert not torch.equal(other.probabilities(), sampler.probabilities())


def test_losses_of_all_processes_are_gathered(tmp_path):
    """Two processes that saw different losses end up with the same probabilities."""
    (tmp_path / "gather.py").write_text(
        """
import torch
from accelerate import Accelerator
from hf_guided.training.timestep_sampling import LossSecondMomentSampler
accelerator = Accelerator()
assert accelerator.num_processes == 2
sampler = LossSecondMomentSampler(2, history=1)
mine = accelerator.process_index  # process 0 draws timestep 0, process 1 timestep 1
sampler.update(*accelerator.gather((torch.tensor([mine]), torch.tensor([1.0 + 2 * mine]))))
assert torch.allclose(sampler.probabilities(), 0.999 * torch.tensor([0.25, 0.75]).double() + 0.0005)
accelerator.wait_for_everyone()  # a process that is gone aborts the one that still talks to it
accelerator.end_training()
"""
    )
    result = forked.run([sys.executable, "gather.py"], processes=2, cwd=tmp_path, env=environment())
    assert result.returncode == 0, result.stderr
