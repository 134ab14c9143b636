"""What a task declares is in the card of its finished folder."""

from types import SimpleNamespace

import pytest
import torch
from launching import TINY_RUN

from hf_guided.models.modes import evaluating
from hf_guided.training.arguments import parse_arguments
from hf_guided.training.cards import aligned
from hf_guided.training.loop import train_and_save
from hf_guided.training.task import evenly, fitted
from hf_guided.training.train_classifier import ClassifierArguments, ClassifierTask


class ToyTask(ClassifierTask):
    def __init__(self, args, images):
        super().__init__(args, images, name="toy")
        self.title, self.summary = "Toy of", "A toy"

    def facts(self):
        return {"colour": "green"}

    def findings(self):
        return {"finding": "none"}

    def report(self, folder):
        (folder / "note.txt").write_text("finished")
        return {"results": [{"measured": 3}]}


def test_a_task_says_what_its_card_shows(photos, tmp_path):
    argv = [*TINY_RUN, "--train_data_dir", str(photos), "--resolution", "8", "--output_dir", str(tmp_path)]
    data_args, stages = parse_arguments({"classifier": ClassifierArguments}, [*argv, "--max_train_steps", "1"])
    folder = train_and_save(ToyTask, data_args, stages["classifier"])
    assert folder == tmp_path / "toy" / "model"
    assert (folder / "note.txt").read_text() == "finished"
    card = (folder / "README.md").read_text()
    for part in (f"# Toy of {photos.name}", "A toy", "| Colour | green |", "| Finding | none |", "| Measured |"):
        assert part in card, part


def test_a_model_is_put_back_into_its_mode_after_an_error_too():
    for mode in (True, False):
        model = torch.nn.Linear(1, 1).train(mode)
        with pytest.raises(AssertionError), evaluating(model):
            assert model.training
        assert model.training is mode


def test_spread_indices_and_aligned_columns():
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(2, 4) == [0, 1]
    assert aligned([["", "FID"], ["samples", "3.5"]]) == "         FID\nsamples  3.5"


@pytest.mark.parametrize(
    ("resolution", "channel_mult", "attention"),
    [
        ((64, 64), [1, 2, 3, 4], [32, 16, 8]),  # as the flags say
        ((28, 28), [1, 2, 3], [28, 14, 7]),  # 7 is odd
        ((48, 32), [1, 2, 3, 4], [24, 12, 6]),
        ((30, 28), [1, 2], [30, 15]),
        ((8, 8), [1, 2, 3, 4], [32, 16, 8]),
        ((40, 40), [1, 2, 3, 4], [40, 20, 10]),
    ],
)
def test_levels_end_where_sides_are_odd(resolution, channel_mult, attention):
    flags = SimpleNamespace(channel_mult=[1, 2, 3, 4], attention_resolutions=[32, 16, 8])
    assert fitted(flags, resolution) == {"channel_mult": channel_mult, "attention_resolutions": attention}
    assert fitted(SimpleNamespace(num_levels=3), resolution) == {"num_levels": min(3, len(channel_mult) - 1)}
