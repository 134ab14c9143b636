"""Saved models and configs: damaged files and weights that do not fit raise errors that name them."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from .messages import first_few, first_line
from .settings import check_names

_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
_MOST_NAMES = 5  # in one message
# Errors that loading raises for damaged files
_DAMAGED = (SafetensorError, UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError)


class WeightsError(ValueError, RuntimeError):
    """Weights do not fit a model; a `ValueError`, and a `RuntimeError` as torch raises."""


class SavedConfigMixin:
    """Mixin for configs of diffusers, before its own classes: refuses damaged files, and saves no local paths."""

    config_name: str

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """The saved config; a damaged file, for a pipeline also of a component, is a `ValueError`."""
        if not isinstance(pretrained_model_name_or_path, Mapping):
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            if (folder / cls.config_name).is_file():
                config = read_config(folder / cls.config_name)
                if config.get("id2label") is not None:
                    check_names(config["id2label"], None)
                for name, entry in config.items():
                    if isinstance(entry, list):  # a component, by library and class
                        check_component(folder / name)
        return super().load_config(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """The saved config as JSON, without the local folder that it was loaded from."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class WholeModelMixin(SavedConfigMixin, ModelMixin):
    """A model of diffusers that refuses incomplete or unexpected weights."""

    @classmethod
    def _load_pretrained_model(
        cls, model: nn.Module, state_dict: Any, files: list[str], source: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.get("hf_quantizer") is None:  # a quantizer has names and shapes of its own
            if state_dict is not None:
                given = _shapes(state_dict)
            else:  # shards: their index may list tensors that they lack
                given = {name: shape for file in files for name, shape in read_shapes(file).items()}
            expected = _shapes(model.state_dict())
            mismatched = [
                (name, given[name], shape)
                for name, shape in expected.items()
                if name in given and given[name] != shape and not kwargs.get("ignore_mismatched_sizes")
            ]
            missing, unexpected = expected.keys() - given.keys(), given.keys() - expected.keys()
            check_cover(source, missing, unexpected, mismatched)
        loaded = super()._load_pretrained_model(model, state_dict, files, source, *args, **kwargs)
        check_finite_vectors(source, model)
        return loaded


def check_cover(
    source: str | os.PathLike | None,
    missing: Collection[str],
    unexpected: Collection[str] = (),
    mismatched: Collection[tuple[str, Collection[int], Collection[int]]] = (),
) -> None:
    """Refuses weights that do not fit a model; missing ones would be initialised at random.

    Args:
        source (`str` or `os.PathLike`, *optional*): Where the weights come from.
        missing, unexpected (`Collection[str]`): Tensors of the model that the weights lack, and vice versa.
        mismatched: Tensors of another shape: name, shape in the weights, shape in the model.

    Raises:
        [`WeightsError`]: Naming them.
    """

    def size(shape: Collection[int]) -> str:
        return "x".join(map(str, shape)) or "a number"

    shapes = [f"{name} ({size(given)} instead of {size(wanted)})" for name, given, wanted in sorted(mismatched)]
    parts = [
        f"{first_few(names, _MOST_NAMES)} {one if len(names) == 1 else several}"
        for names, one, several in (
            (sorted(missing), "is missing", "are missing"),
            (sorted(unexpected), "is not of this model", "are not of this model"),
            (shapes, "has another shape", "have another shape"),
        )
        if names
    ]
    if not parts:
        return
    fix = "Config and weights belong to different models, or the file is incomplete: save or download the model again."
    prefixes = {name.partition(".")[0] for name in unexpected}
    if mismatched and not missing and not unexpected:
        fix = "Config and weights belong to different models; ignore_mismatched_sizes=True reinitialises these tensors."
    elif len(prefixes) == 1 and {name.partition(".")[2] for name in unexpected} == set(missing):
        fix = (
            f"All names begin with '{prefixes.pop()}.', as a wrapper of the model (DistributedDataParallel, "
            f"torch.compile) saves them: save the model inside the wrapper."
        )
    raise WeightsError(f"The weights of {source or 'the state dict'} do not fit the model: {'; '.join(parts)}. {fix}")


def check_finite_vectors(source: str | os.PathLike | None, model: nn.Module) -> None:
    """Refuses, by a [`WeightsError`], biases and scales that are not finite: a ReLU may hide them.

    They are a thousandth of the weights. Others show in the model's output, which is checked wherever it is used.
    """
    broken = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.ndim < 2 and tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all()
    ]
    if broken:
        raise WeightsError(
            f"The weights of {source or 'the state dict'} have infinite values or NaN "
            f"({first_few(broken, _MOST_NAMES)}): their training diverged, or the file is damaged."
        )


def check_loaded(name: str, component: Any) -> None:
    """Refuses, by a [`WeightsError`], a component of another library that was loaded from incomplete weights.

    Our own models refuse them when loaded; others initialise missing weights at random, or leave them empty.
    """
    source = getattr(getattr(component, "config", None), "_name_or_path", None)
    if not isinstance(component, nn.Module) or not source or any(hasattr(m, "_hf_hook") for m in component.modules()):
        return  # made here, or offloaded
    tensors = component.state_dict(keep_vars=True)
    missing = [key for key, tensor in tensors.items() if tensor.is_meta]
    # A component passed by hand may have been trained since it was loaded, for example a new head.
    of_pipeline = Path(source).name == name and (Path(source).parent / "model_index.json").is_file()
    if of_pipeline and getattr(component, "_is_hf_initialized", False):  # as transformers marks what it has loaded
        missing += [key for key, tensor in tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
    check_cover(source, missing)


@contextmanager
def naming_damage(source: str | os.PathLike) -> Iterator[None]:
    """Turns errors of loading a folder's or Hub id's model into a `ValueError` that names the damaged file, if any."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        folder = Path(source)
        try:
            components = folder.glob("*/*") if (folder / "model_index.json").is_file() else ()
            for file in sorted([*folder.glob("*"), *components]):
                check_file(file)
        except ValueError as damage:
            raise damage from error
        if "ignore_mismatched_sizes" in str(error):  # the report of transformers names the tensors
            raise ValueError(
                f"Weights of {source} have other shapes than its config says, see the report above: save or download "
                f"the model again."
            ) from error
        if isinstance(error, _DAMAGED):
            raise ValueError(
                f"{source} cannot be loaded, its files are damaged or those of another model "
                f"({type(error).__name__}: {first_line(error)})."
            ) from error
        raise


def check_component(folder: Path) -> None:
    """Refuses a component of a pipeline with a damaged config, or with weights and no config."""
    for name in _CONFIGS:
        if (folder / name).is_file():
            read_config(folder / name)
    if not (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has weights and no config.json: save or download the model again.")


def check_file(path: Path) -> None:
    """Refuses a damaged file of a model; other kinds of files are ignored."""
    if path.name in ("model_index.json", *_CONFIGS):
        read_config(path)
    elif path.name.endswith(".index.json"):
        shards = read_config(path).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{path} lists no shards of weights: download it again.")
        for name in sorted(set(map(str, shards.values()))):
            if not (path.parent / name).is_file():
                raise ValueError(f"{path.parent / name} is missing, which {path.name} lists: download it again.")
    elif path.suffix == ".safetensors":
        read_shapes(path)
    elif path.suffix == ".bin" and foreign_content(path):
        raise _damaged(path)


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """The settings in a JSON file of a model; a damaged one is a `ValueError` that names it."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not config:
        raise _damaged(path, "it is not a JSON object of settings")
    return config


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file of weights; of `.safetensors`, only the header is read."""
    if Path(path).suffix != ".safetensors":
        return _shapes(torch.load(path, map_location="meta", weights_only=True))
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def foreign_content(path: str | os.PathLike) -> str:
    """What a file is that is not weights: empty, a web page, a Git LFS pointer; `""` if none of these."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS instead of the file (`git lfs pull` fetches it)"
    if start.lstrip()[:1] == b"<":
        return "a web page"
    return ""


def _damaged(path: str | os.PathLike, reason: str = "") -> ValueError:
    return ValueError(f"{path} is {foreign_content(path) or f'damaged ({reason})'}: save or download it again.")


def weights_digest(model: torch.nn.Module, settings: str = "") -> str:
    """Hex SHA-256 of a model's class, of settings, and of the names, types, shapes and bytes of its weights."""
    digest = hashlib.sha256(json.dumps([type(model).__name__, settings]).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
