from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_guided.cli import main


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
