"""The package as it is installed: light to import, complete in a wheel, one copy of everything."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import hf_guided

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def fastest(command: list[str], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_the_front_door_opens():
    for name in hf_guided.__all__:
        assert getattr(hf_guided, name) is not None
        assert name in dir(hf_guided)
    with pytest.raises(AttributeError, match="no attribute 'ADMUnet'"):
        hf_guided.ADMUnet  # noqa: B018


def test_importing_is_light(tmp_path):
    modules = json.loads(python("import hf_guided, sys, json; print(json.dumps(sorted(sys.modules)))", tmp_path))
    assert not {"torch", "diffusers", "transformers", "numpy", "PIL"} & set(modules)
    ours = fastest([sys.executable, "-c", "import hf_guided"])
    theirs = fastest([sys.executable, "-c", "import diffusers"], times=1)  # seconds, and ours a fraction of one
    assert ours <= theirs


def test_help_is_quick():
    assert fastest([str(Path(sys.executable).parent / "hf-guided"), "--help"]) < 0.5


def test_nothing_needs_torchvision(tmp_path):
    code = """
import importlib, pkgutil, sys
sys.modules["torchvision"] = None
import hf_guided
for module in pkgutil.walk_packages(hf_guided.__path__, "hf_guided."):
    importlib.import_module(module.name)
"""
    python(code, tmp_path)


def test_one_copy_of_every_class():
    from hf_guided import ClassifierGuidedPipeline

    assert (ROOT / "hf_guided" / "pipelines").is_symlink()
    assert (ROOT / "hf_guided" / "training").is_symlink()
    assert ClassifierGuidedPipeline.__module__ == "hf_guided.pipelines.pipeline_classifier_guided"
    module = importlib.import_module("hf_guided.pipelines.pipeline_classifier_guided")
    assert module.ClassifierGuidedPipeline is ClassifierGuidedPipeline


def test_a_wheel_holds_everything(tmp_path):
    source = tmp_path / "source"  # a copy, so that no earlier build can lend what is missing
    source.mkdir()
    for name in ("hf_guided", "pipelines", "training"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps"]
    build += ["--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hf_guided-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:  # all that installing a wheel of pure Python does
        file.extractall(site)
    assert not list(site.glob("hf_guided/**/*.md"))  # READMEs are for readers of the repository
    code = f"""
import hf_guided, hf_guided.pipelines, hf_guided.training
from hf_guided.training.arguments import RECIPES, read_recipe
for package in (hf_guided, hf_guided.pipelines, hf_guided.training):
    assert package.__path__[0].startswith({str(site)!r}), package.__path__
assert (RECIPES / "imagenet256.yaml").is_file() and read_recipe("digits")["judge"]
assert (RECIPES.parents[1] / "py.typed").is_file()
assert (RECIPES.parents[1] / "conversion" / "imagenet_labels.txt").is_file()
templates = [path.name for path in RECIPES.parents[1].glob("*/templates/*")]
for name in ("model_card", "inspection", "sentences", "comparison.md", "comparison.html"):
    assert name + ".jinja" in templates, templates
for name in hf_guided.__all__:
    getattr(hf_guided, name)

import runpy, sys
sys.argv = ["train", "--help"]
runpy.run_module("hf_guided.training.train", run_name="__main__")
"""
    assert "imagenet256" in python(code, tmp_path, PYTHONPATH=str(site))
