"""Feature extractors: the published Inception network, and any vision model or classifier of transformers."""

import importlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from ...files import is_hub_id
from ...loading import check_cover, naming_damage, weights_digest
from ...messages import first_line
from ...models.classifier_adm import ADMForImageClassification, image_size
from ...models.image_processing_adm import ADMImageProcessor
from ...models.modes import evaluating

_NAMELESS = ("model", "pipeline")  # folder names that do not describe the model in them


@dataclass(frozen=True)
class FeatureBatch:
    """The outputs of an extractor for a batch of images, float32 of shape `(n, columns)`."""

    features: np.ndarray  # for distances between sets
    probabilities: np.ndarray | None = None  # of classes, from classifiers: for the Inception Score and accuracy
    spatial: np.ndarray | None = None  # from Inception: for sFID


class FeatureExtractor(Protocol):
    """A callable that gives the features of `torch.uint8` images `(n, channels, height, width)`, channels 1 or 3, on
    the CPU, in one forward pass. Any class with these members can be used.

    Attributes:
        name (`str`): Part of the name of every metric: `"inception"`, `"dinov2-base"`, `"judge"`.
        fingerprint (`str`): Hex digest of weights and preprocessing; features are cached under it.
        id2label (`dict[int, str]`, *optional*): Names of the classes of `probabilities`, if they have any.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def id2label(self) -> dict[int, str] | None: ...

    def __call__(self, images: torch.Tensor) -> FeatureBatch: ...


class ModelFeatures:
    """Features of any vision model or image classifier of transformers, computed on the model's device.

    An image classifier's features are its last hidden state, maps `(n, dim, h, w)` or tokens `(n, k, dim)`, averaged
    over positions. Another model's are its `pooler_output` (after the projection, in text-image models), or the mean
    of its last hidden state if it has none.

    `Dinov2Model` pools the class token after the last normalisation, and gets whole images, resized without keeping
    their shape, where its processor would crop them: both as in FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675, and the
    code published with it, whose default is `facebook/dinov2-large`).

    Called with RGB images, a model of 1 channel gets their luminance as PIL computes it; called with gray ones, a model
    of 3 channels gets them repeated. `probabilities` are the softmax of a classifier's logits.

    Args:
        model (`PreTrainedModel`): The model, in any floating-point type. Its mode is not changed.
        name (`str`): The name of its features in metrics.
        processor (`BaseImageProcessor`, *optional*): Turns images into `pixel_values`. Only
            [`ADMForImageClassification`] needs none: its [`ADMImageProcessor`] follows from its config.

    Raises:
        `ValueError`: If the model takes no images, or images of neither 1 nor 3 channels, or has no processor.
    """

    def __init__(self, model: PreTrainedModel, name: str, processor: Any | None = None):
        self.model, self.name, kind = model, name, type(model).__name__
        config = getattr(model.config, "vision_config", model.config)
        self.channels = getattr(config, "num_channels", getattr(config, "in_channels", 3))
        self.is_classifier = "ForImageClassification" in kind
        if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
            raise ValueError(f"{kind} takes {model.main_input_name}, not images; features come from a vision model.")
        if self.channels not in (1, 3):
            raise ValueError(f"{kind} takes images of {self.channels} channels; features come from models of 1 or 3.")
        if processor is None and isinstance(model, ADMForImageClassification):
            height, width = image_size(model.config)
            processor = ADMImageProcessor(size={"height": height, "width": width}, num_channels=self.channels)
        if processor is None:
            raise ValueError(f"{kind} needs its image processor, which turns images into pixel_values.")
        if kind == "Dinov2Model" and getattr(processor, "do_center_crop", False):
            settings = processor.to_dict()
            processor = type(processor).from_dict(settings | {"size": settings["crop_size"], "do_center_crop": False})
        self.processor = processor

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of a classifier's classes; `None` for other models, and for `LABEL_0`, `LABEL_1` and so on."""
        names = self.model.config.id2label
        is_named = self.is_classifier and any(label != f"LABEL_{i}" for i, label in names.items())
        return dict(names) if is_named else None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the model's class and weights and the processor's settings."""
        return weights_digest(self.model, json.dumps(self.processor.to_dict(), sort_keys=True, default=str))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> FeatureBatch:
        arrays = match_channels(images, self.channels).movedim(1, -1).numpy()
        pictures = [Image.fromarray(array.squeeze(-1) if self.channels == 1 else array) for array in arrays]
        pixel_values = self.processor(pictures, return_tensors="pt").pixel_values
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        with evaluating(self.model):
            if self.is_classifier:
                output = self.model(pixel_values, output_hidden_states=True)
                probabilities = output.logits.float().softmax(dim=-1)
                return FeatureBatch(_numpy(_mean(output.hidden_states[-1])), _numpy(probabilities))
            output = getattr(self.model, "get_image_features", self.model)(pixel_values)
            pooled = getattr(output, "pooler_output", None)
            return FeatureBatch(_numpy(_mean(output.last_hidden_state) if pooled is None else pooled.flatten(1)))


class InceptionFeatures:
    """The features of the published evaluator of ADM (arXiv 2105.05233): Inception-v3 of 2015 as torch-fidelity has it.

    `features` are `pool_3` (2048); `probabilities` the softmax of its 1008 outputs without the bias, which have no
    class names; `spatial` the first 7 channels of `mixed_6/conv`, 17x17 positions in rows, channels innermost (2023).

    Args:
        weights (`str` or `os.PathLike`, *optional*): A file of its weights. By default torch-fidelity's loader takes
            them from torch.hub's checkpoints, after downloading them there once (91 MiB).
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the features are computed.

    Raises:
        `ImportError`: If torch-fidelity is not installed. torchvision need not be.
        `OSError`: If the weights cannot be found or downloaded.
    """

    name = "inception"
    id2label = None

    def __init__(self, weights: Any | None = None, device: torch.device | str = "cpu"):
        module = _torch_fidelity_inception()

        def load_weights(url: str, progress: bool) -> dict[str, torch.Tensor]:
            if weights is not None:
                return torch.load(weights, map_location="cpu", weights_only=True)
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", progress=progress, weights_only=True)

        module.load_state_dict_from_url = load_weights  # type: ignore[attr-defined]  # in our private copy of the module
        try:
            self.model = module.FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"]).to(device)
        except OSError as error:
            if weights is not None:
                raise
            raise OSError(
                f"Inception's weights could not be downloaded ({error}); download {module.URL_INCEPTION_V3} by hand "
                f"and put it into {torch.hub.get_dir()}/checkpoints."
            ) from error
        self.device = torch.device(device)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the weights."""
        return weights_digest(self.model)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> FeatureBatch:
        maps: list[torch.Tensor] = []
        hook = self.model.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: maps.append(output))
        try:
            pooled, logits = self.model(match_channels(images, 3).to(self.device))
        finally:
            hook.remove()
        spatial = maps[0][:, :7].permute(0, 2, 3, 1).flatten(1)
        return FeatureBatch(_numpy(pooled), _numpy(logits.softmax(dim=-1)), _numpy(spatial))


def load_features(spec: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The feature extractor of a name, folder or Hub id.

    Args:
        spec (`str`): `"inception"`, the published evaluator's features; or the folder or Hub id of any vision model or
            image classifier of transformers with its image processor, loaded in float32. Its name is the last part of
            the path or id that is not generic (`judge` for `outputs/judge/model`, `dinov2-base` for
            `facebook/dinov2-base`), or NAME in `"NAME=outputs/judge/model"`. Images are resized by PIL.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the features are computed.

    Raises:
        `ValueError`: If there is no such model, it takes no images, some of its weights are missing, or the folder is a
            pipeline's: the classifier that guides must not evaluate.
    """
    if spec == InceptionFeatures.name:
        return InceptionFeatures(device=device)
    match = None if Path(spec).exists() else re.fullmatch(r"([\w.-]+)=(.+)", spec)
    name, path = match.groups() if match else ("", spec)
    folder = Path(path).expanduser()
    if not folder.is_dir() and not is_hub_id(path):
        raise ValueError(f"There is no folder {path}.")
    if (folder / "model_index.json").exists():
        raise ValueError(
            f"{path} is a pipeline, and the classifier that guides it must not evaluate it; give a classifier that was "
            f"trained separately, or a vision model."
        )
    parts = folder.absolute().parts if folder.exists() else folder.parts
    name = name or next((part for part in reversed(parts) if part not in _NAMELESS), path)
    if name == InceptionFeatures.name:
        raise ValueError(f"The name {name} is reserved for the published features; name this model: NAME={path}.")

    source = str(folder) if folder.exists() else path
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with naming_damage(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            is_classifier = any("ForImageClassification" in kind for kind in config.architectures or [])
            auto_class = AutoModelForImageClassification if is_classifier else AutoModel
            processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
            model, info = auto_class.from_pretrained(
                source, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # config, processor and damaged weights each raise their own errors
        message = f"No vision model or image classifier could be loaded from {path}: {first_line(error)}"
        raise ValueError(message) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        model.pooler = None  # many ViTs are published with an untrained pooler, which is not used
    else:
        check_cover(path, missing)
    return ModelFeatures(model.to(device), name, processor)


def match_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images `(n, 1 or 3, height, width)`, uint8, with the given channels, 1 or 3: gray from RGB as PIL's
    `convert("L")`, or RGB from gray by repeating."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        given = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"The images must be a torch.uint8 tensor of shape (n, 1 or 3, height, width), got {given}.")
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    red, green, blue = images.to(torch.int32).unsqueeze(2).unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8)  # ITU-R 601 in 65536ths


def _mean(hidden_state: torch.Tensor) -> torch.Tensor:
    """Means over the positions of maps `(n, dim, h, w)` or tokens `(n, k, dim)`, in float32."""
    return hidden_state.float().mean(dim=(2, 3) if hidden_state.ndim == 4 else 1)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _torch_fidelity_inception() -> ModuleType:
    """A private copy of torch-fidelity's module of Inception, imported under an empty package, since the package's own
    `__init__` imports torchvision, which the module does not need."""
    found = importlib.util.find_spec("torch_fidelity")
    if found is None or found.submodule_search_locations is None:
        raise ImportError(
            "Inception features need torch-fidelity: pip install 'hf-guided[eval]', or, without torchvision, "
            "pip install --no-deps torch-fidelity."
        )

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]
        return {name: sys.modules.pop(name) for name in names}

    imported_before = take_out()
    package = ModuleType("torch_fidelity")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    finally:
        take_out()
        sys.modules.update(imported_before)
