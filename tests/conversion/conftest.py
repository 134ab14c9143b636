import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import hf_guided.conversion.convert as convert_module
from hf_guided.cli import main

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture
def convert(capsys) -> Callable[..., str]:
    """Runs `hf-guided convert` and returns what it printed."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        main(["convert", *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(convert) -> Callable[..., str]:
    """Runs `hf-guided convert`, which must end in one sentence; returns it."""

    def run(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as caught:
            convert(*arguments)
        message = str(caught.value)
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def checkpoint(reference, tmp_path) -> Callable[..., Path]:
    """Writes a reference model's weights, with or without changes, as the published code would."""

    def write(name: str, **options: Any) -> Path:
        path = tmp_path / f"{name}.pt"
        torch.save(reference(name).weights, path, **options)
        return path

    return write


@pytest.fixture
def published_order() -> Callable[[str], list[str]]:
    """The keys of a reference model's state dict, as the published code gives them."""

    def order(name: str) -> list[str]:
        with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
            return list(json.loads(file.metadata()["weights"])["shapes"])

    return order


@pytest.fixture
def full_size(reference_json, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """A file with a published checkpoint's names and full-size shapes, of zeros that take no space; what is written of
    the weights are their names and shapes."""
    monkeypatch.setattr(
        convert_module,
        "write_safetensors",
        lambda path, shapes, tensors, dtype: path.write_text(
            json.dumps({name: list(tensor.shape) for name, tensor in tensors if shapes[name] == tensor.shape})
        ),
    )

    def write(name: str) -> Path:
        zero = torch.zeros(())
        tensors = reference_json("published_checkpoints")[name]["tensors"]
        path = tmp_path / f"{name}.pt"
        torch.save({key: zero.expand(shape) for key, shape in tensors.items()}, path)
        return path

    return write
