"""How long a training takes is said before it starts."""

import time
from itertools import islice

import pytest
import torch
from launching import TINY_MODEL

from hf_guided.data import load_labelled_images
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.timing import in_words, parse_duration, said, seconds_per_step
from hf_guided.training.train_diffusion import DiffusionArguments, DiffusionTask


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (90, "90 seconds"),
        (140, "2 minutes"),
        (5400, "1.5 hours"),
        (8e5, "9 days"),
    ],
)
def test_durations_are_rounded_to_what_people_say(seconds, words):
    assert in_words(seconds) == words


def test_the_sentence_has_the_sum_and_each_stage():
    sentence = said({"judge": 60.0, "diffusion": 540.0})
    assert sentence == "This takes about 10 minutes on this machine: judge 60 seconds, diffusion 9 minutes."


def test_a_long_time_comes_with_a_way_to_less():
    assert "--budget 1h" in said({"diffusion": 86400.0})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5 h", 5400), ("2d", 172800), (" 8h ", 28800)]
)
def test_times_are_read(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-5m", "1e3s", "nanm", "400d", "5min", "5m 3s", "steps"])
def test_other_times_are_refused_with_the_form(text):
    with pytest.raises(ValueError, match="give 90s, 30m, 8h or 2d"):
        parse_duration(text)


def test_a_few_images_tell_the_time_of_a_step():
    """Within a factor of 2.5 of what real steps take, optimizer included; and the model is left as it was."""
    data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, [*TINY_MODEL, "--train_batch_size", "16"])
    images = load_labelled_images(data_args, seed=0)
    task = DiffusionTask(stages["diffusion"], images)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    told = seconds_per_step(task, torch.device("cpu"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())

    optimizer = torch.optim.AdamW(task.model.parameters(), fused=True)
    batch = torch.utils.data.default_collate(list(islice(images[0], 16)))
    took = []
    for _ in range(7):
        started = time.perf_counter()
        task.losses(task.model, batch, torch.zeros(16, dtype=torch.long))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - started)
    assert sorted(took)[3] / 2.5 < told < 2.5 * sorted(took)[3]
