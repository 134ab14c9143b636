"""RePaint's order of steps, and the statistics of what it does to a sample."""

from itertools import pairwise

import pytest
import torch

from hf_guided import ADMScheduler
from hf_guided.schedulers.repaint import RePaint, jump_positions


def test_each_stretch_is_walked_again():
    assert jump_positions(5, jump_length=2, jump_n_sample=2) == [0, 1, 0, 1, 2, 3, 2, 3, 4]
    assert jump_positions(3, jump_length=1, jump_n_sample=3) == [0, 0, 0, 1, 1, 1, 2]
    assert jump_positions(4, jump_length=10, jump_n_sample=10) == [0, 1, 2, 3]
    assert jump_positions(7, jump_length=3, jump_n_sample=1) == list(range(7))


def test_the_papers_setting():
    positions = jump_positions(250, jump_length=10, jump_n_sample=10)
    assert len(positions) == 250 + 24 * 9 * 10
    counts = torch.bincount(torch.tensor(positions)).tolist()
    assert counts == [1] * 9 + [10] * 240 + [1]
    ascents = [later - earlier for earlier, later in pairwise(positions)]
    assert set(ascents) == {1, -9}


@pytest.mark.parametrize(("jump_length", "jump_n_sample"), [(0, 1), (1, 0)])
def test_bad_jumps(jump_length, jump_n_sample):
    with pytest.raises(ValueError, match="must be 1 or more"):
        jump_positions(5, jump_length, jump_n_sample)


def test_noise_of_kept_pixels_and_of_jumps():
    scheduler = ADMScheduler()
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps.tolist()
    original = torch.full((1, 1, 256, 256), 0.5)
    mask = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    mask[..., :128] = True
    repaint = RePaint(scheduler, original, mask)
    sample = torch.full_like(original, -1.0)
    generators = [torch.Generator().manual_seed(0)]

    stepped = repaint(sample, timesteps[4], timesteps[5], generators)
    alpha_bar = scheduler.alphas_cumprod[timesteps[5]]
    assert torch.equal(stepped[..., :128], sample[..., :128])
    kept = stepped[..., 128:]
    assert kept.mean().item() == pytest.approx(0.5 * alpha_bar.sqrt().item(), abs=0.02)
    assert kept.var().item() == pytest.approx(1 - alpha_bar.item(), rel=0.03)

    jumped = repaint(sample, timesteps[4], timesteps[3], generators)  # everywhere at the noise of the earlier step
    alpha_bar_back = scheduler.alphas_cumprod[timesteps[3]]
    assert jumped[..., 128:].mean().item() == pytest.approx(0.5 * alpha_bar_back.sqrt().item(), abs=0.02)
    assert jumped[..., 128:].var().item() == pytest.approx(1 - alpha_bar_back.item(), rel=0.03)
    ratio = (alpha_bar_back / alpha_bar).item()
    assert jumped[..., :128].mean().item() == pytest.approx(-(ratio**0.5), abs=0.02)
    assert jumped[..., :128].var().item() == pytest.approx(1 - ratio, rel=0.03)

    again = repaint(sample, timesteps[4], timesteps[4], generators)  # one step undone
    assert again[..., 128:].mean().item() == pytest.approx(
        0.5 * scheduler.alphas_cumprod[timesteps[4]].sqrt().item(), abs=0.01
    )

    done = repaint(sample, timesteps[-1], None, generators)
    assert torch.equal(done, torch.where(mask, sample, original))
