"""`accelerate launch --dynamo_backend inductor` trains the same model. (By that backend itself it takes minutes:
`speed_training.py --compile` does so.)"""

import shutil
from pathlib import Path

import torch
from launching import TINY_RUN
from safetensors.torch import load_file

from hf_guided.training.arguments import parse_arguments
from hf_guided.training.train_diffusion import DiffusionArguments, train_diffusion

FLAGS = [
    *TINY_RUN,
    *("--max_train_steps", "4", "--checkpointing_steps", "2", "--validation_steps", "2"),
    *("--resolution", "8", "--held_out_fraction", "0.4"),
]


def train(folder: Path, photos: Path) -> dict[str, torch.Tensor]:
    argv = [*FLAGS, "--train_data_dir", str(photos), "--output_dir", str(folder)]
    data_args, stages = parse_arguments({"diffusion": DiffusionArguments}, argv)
    return load_file(train_diffusion(data_args, stages["diffusion"]) / "unet" / "diffusion_pytorch_model.safetensors")


def test_compiled_training(photos, tmp_path, monkeypatch):
    """From a checkpoint that was trained without the compiler, to the same weights."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    expected = train(tmp_path / "plain", photos)
    checkpoint = Path("diffusion") / "checkpoint-2"
    shutil.copytree(tmp_path / "plain" / checkpoint, tmp_path / "compiled" / checkpoint)
    torch.compiler.reset()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with torch.compiler.set_stance("default", force_backend=backend):
        actual = train(tmp_path / "compiled", photos)
    assert len(compiled) == 1  # the model while it is trained, whole, and neither what validates nor what samples
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
