"""From a published checkpoint to a folder that `from_pretrained` loads: `hf-guided convert`."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..hub import write_model_card
from ..models.unet_adm import ADMUNet2DModel
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline
from ..schedulers.schedules import space_timesteps
from ..schedulers.scheduling_adm import ADMScheduler
from ..training.checkpoints import save_folder
from .files import one_by_one, read_checkpoint, write_safetensors
from .flags import (
    add_improved_defaults,
    classifier_config,
    is_improved_diffusion,
    parse_flags,
    scheduler_arguments,
    spell_flags,
    unet_config,
)
from .inference import Architecture, infer_architecture
from .openai import check_tensors, converted_tensors, make_classifier, make_unet
from .published import Published, find_published, kind_of

RECORD_FILE = "openai_flags.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGENET_CLASSES = 1000
_ARTICLES = {"unet": "a UNet", "upsampler": "an upsampler", "classifier": "a classifier"}


@dataclass
class Source:
    """A checkpoint that was opened and understood: nothing is written before all of them are.

    Attributes:
        path (`Path`): The `.pt` file.
        state_dict (`Mapping[str, torch.Tensor]`): Its tensors, read from disk when they are used.
        mapped (`bool`): Whether they lie in a mapped file.
        architecture ([`Architecture`]): What they tell.
        flags (`Mapping[str, Any]`): What was said of them.
        name (`str`, *optional*): The published checkpoint that it is.
        model: Ours, on the meta device: names and shapes, no weights.
        new_order (`bool`): How the rows of query, key and value lie.
    """

    path: Path
    state_dict: Mapping[str, torch.Tensor]
    mapped: bool
    architecture: Architecture
    flags: Mapping[str, Any]
    name: str | None = None
    model: Any = None
    new_order: bool = False

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the config and, tensor by tensor, the weights."""
        if isinstance(self.model, ADMUNet2DModel):
            self.model.save_config(folder)
            file = folder / "diffusion_pytorch_model.safetensors"
        else:
            _save_without_weights(self.model.to(dtype), folder)
            file = folder / "model.safetensors"
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        tensors = converted_tensors(self.model, self.state_dict, self.new_order)
        with _naming(f"{self.path}"):
            write_safetensors(file, shapes, one_by_one(tensors, self.state_dict, self.mapped), dtype)

    def record(self) -> dict[str, Any]:
        """What the way back needs beside the weights, without anybody's paths."""
        return {"checkpoint": self.name, "flags": spell_flags(self.flags)}


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    name: str | None = None,
    flags: str | None = None,
    classifier: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    dtype: str = "fp32",
    repo_id: str | None = None,
    tell: Callable[[str], Any] = print,
) -> Path:
    """Converts checkpoints of guided-diffusion or improved-diffusion to a pipeline, or a classifier alone.

    What the tensors tell is inferred; the name or the flags say the rest, and are checked against the tensors. Weights
    are mapped and written one by one, so that the memory that this takes does not depend on the model.

    Args:
        checkpoint (`str` or `os.PathLike`): The `.pt` file of a UNet, an upsampler or a classifier.
        output (`str` or `os.PathLike`): The folder to write: a [`ClassifierGuidedPipeline`], a
            [`ClassifierGuidedUpscalePipeline`], or an [`ADMForImageClassification`]. It is whole or not there.
        name (`str`, *optional*): The published checkpoint's name, such as `"256x256_diffusion"`.
        flags (`str`, *optional*): Instead of a name, the flags that the checkpoint was trained with, see
            [`parse_flags`].
        classifier (`str` or `os.PathLike`, *optional*): The `.pt` file of the classifier that guides.
        labels (`str` or `os.PathLike`, *optional*): A text file with a class name per line. By default models of 1,000
            classes have ImageNet's, and others have their numbers.
        dtype (`str`, defaults to `"fp32"`): `"fp32"`, `"fp16"` or `"bf16"`: how weights are saved.
        repo_id (`str`, *optional*): Where the folder will be on the Hub, for the card.
        tell (`Callable`, defaults to `print`): Is told, in a line each, what is done.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: In a sentence, and with nothing written, if a file cannot be read, is not what was named, or if
            flags are missing or contradict the tensors.
    """
    start = time.perf_counter()
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"{output} exists already and is not empty; choose another --output, or remove it.")
    if (name is None) == (flags is None):
        both = "both were given" if name else "neither was given"
        raise ValueError(
            f"A checkpoint is described by the name of a published one, or by --flags with its $MODEL_FLAGS and "
            f"$DIFFUSION_FLAGS; {both}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    published = None if name is None else find_published(name)
    given = parse_flags(flags if published is None else published.flags)  # type: ignore[arg-type]
    if published and classifier and published.classifier is None:
        raise ValueError(f"{name} has no classifier that could guide it; leave --classifier out.")

    main = _open(checkpoint, name, given, tell)
    unet, guide = (None, main) if main.architecture.kind == "classifier" else (main, None)
    if unet is None and classifier:
        raise ValueError(f"{checkpoint} is a classifier itself; give the UNet as --checkpoint beside --classifier.")
    if unet is not None:
        _describe_unet(unet, classifier is not None, tell)
    if classifier:
        guide = _open_classifier(classifier, published, given, tell)
        _check_pair(unet, guide)  # type: ignore[arg-type]
    num_classes = main.architecture.num_classes
    if num_classes is None and guide is not None:
        num_classes = guide.architecture.num_classes
    id2label = _read_labels(labels, num_classes, name, tell)
    if guide is not None:
        _describe_classifier(guide, id2label, alone=unet is None)
    if published and published.float32_only and dtype != "fp32":
        tell(f"{name}: its published samples were drawn in float32; in {dtype} they may differ or fail.")

    def save(folder: str) -> None:
        if unet is None:
            guide.save(Path(folder), DTYPES[dtype])  # type: ignore[union-attr]
        else:
            _save_pipeline(unet, guide, id2label, Path(folder), DTYPES[dtype])
        sources = {"unet": unet, "classifier": guide}
        record = {part: source.record() for part, source in sources.items() if source is not None}
        (Path(folder) / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        _write_card(Path(folder), main, guide, published, id2label, output.name, repo_id)

    tell(f"Writing {output}")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        save_folder(save, output)
    except BaseException:  # an interrupt, too, leaves nothing behind
        shutil.rmtree(output.with_name(f".{output.name}.partial"), ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()
        raise
    tell(f"Wrote {output} in {time.perf_counter() - start:.1f} s")
    return output


def _save_without_weights(classifier: Any, folder: Path) -> None:
    """Config and image processor, without the progress bar for no weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    classifier.save_pretrained(folder, state_dict={})
    if shown:
        logging.enable_progress_bar()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Puts in front of an error which file it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _open(path: str | os.PathLike, name: str | None, flags: Mapping[str, Any], tell: Callable[[str], Any]) -> Source:
    """Opens a file and finds out what it holds; a name that says otherwise is an error."""
    state_dict, mapped = read_checkpoint(path)
    with _naming(f"{path}" if name is None else f"{path} is not {name}"):
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
        depth = flags.get("classifier_depth", flags.get("num_res_blocks"))
        architecture = infer_architecture(shapes, flags.get("image_size", flags.get("large_size")), depth)
        if name is not None:
            kind = kind_of(name)
            if architecture.kind != kind:
                raise ValueError(
                    f"{name} is {_ARTICLES[kind]}, and the tensors are those of {_ARTICLES[architecture.kind]}."
                )
            if architecture.image_channels != 3:
                raise ValueError(f"Its images have 3 channels, and the tensors say {architecture.image_channels}.")
            if architecture.num_classes not in (None, IMAGENET_CLASSES):
                raise ValueError(f"It has 1000 classes or none, and the tensors say {architecture.num_classes}.")
    parameters = sum(tensor.numel() for tensor in state_dict.values())
    tell(f"{path}: {_ARTICLES[architecture.kind]} of {parameters / 1e6:,.1f} million parameters")
    return Source(Path(path), state_dict, mapped, architecture, flags, name)


def _open_classifier(
    path: str | os.PathLike, published: Published | None, flags: Mapping[str, Any], tell: Callable[[str], Any]
) -> Source:
    if published is None:
        source = _open(path, None, flags, tell)
    else:
        name = published.classifier
        source = _open(path, name, parse_flags(find_published(name).flags), tell)  # type: ignore[arg-type]
    if source.architecture.kind != "classifier":
        raise ValueError(f"{path} is {_ARTICLES[source.architecture.kind]}; give a classifier as --classifier.")
    return source


def _describe_unet(source: Source, guided: bool, tell: Callable[[str], Any]) -> None:
    """Makes the model that the flags and the tensors describe, on the meta device."""
    architecture = source.architecture
    if source.name is None and not guided and is_improved_diffusion(source.flags, architecture):
        source.flags, assumed = add_improved_defaults(source.flags, architecture)
        if assumed:
            tell(
                f"Nothing here is guided-diffusion's alone, so improved-diffusion's defaults hold: "
                f"{spell_flags(assumed)}. Where the model was trained otherwise, add those flags with its own values"
                + (", guided-diffusion's being --rescale_timesteps False." if "rescale_timesteps" in assumed else ".")
            )
    elif source.flags.get("diffusion_steps", 1000) != 1000 and "rescale_timesteps" not in source.flags:
        tell(
            f"The model is told its {source.flags['diffusion_steps']} timesteps as they are, guided-diffusion's "
            f"default; if it was trained otherwise, add --rescale_timesteps True."
        )
    with _naming(f"{source.path}" if source.name is None else f"{source.path} is not {source.name}"):
        config = unet_config(source.flags, architecture)
        arguments = scheduler_arguments(source.flags, architecture.learns_sigma)
        if "timestep_respacing" in source.flags:
            space_timesteps(arguments["num_train_timesteps"], source.flags["timestep_respacing"])
        source.model = make_unet(config, architecture.kind == "upsampler")
        check_tensors(source.model, source.state_dict)
    source.new_order = config["use_new_attention_order"]


def _describe_classifier(source: Source, id2label: dict[int, str] | None, alone: bool) -> None:
    """Makes the classifier that the flags and the tensors describe, on the meta device."""
    with _naming(f"{source.path}" if source.name is None else f"{source.path} is not {source.name}"):
        config = classifier_config(source.flags, source.architecture, alone)
        names = id2label or {}
        labels = {"id2label": names, "label2id": {label: id for id, label in names.items()}}
        source.model = make_classifier({**config, **labels})
        check_tensors(source.model, source.state_dict)


def _check_pair(unet: Source, classifier: Source) -> None:
    """Refuses a classifier of other images or classes than the UNet's."""
    ours, theirs = unet.architecture, classifier.architecture
    if ours.image_channels != theirs.image_channels:
        raise ValueError(
            f"{classifier.path} takes images of {theirs.image_channels} channels, and {unet.path} of "
            f"{ours.image_channels}."
        )
    if ours.num_classes not in (None, theirs.num_classes):
        raise ValueError(f"{classifier.path} knows {theirs.num_classes} classes, and {unet.path} {ours.num_classes}.")


def _read_labels(
    path: str | os.PathLike | None, num_classes: int | None, name: str | None, tell: Callable[[str], Any]
) -> dict[int, str] | None:
    """Class names by id; `None` for models without classes."""
    if path is not None:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f"{path} has {len(names)} names, and the model has {num_classes or 'no'} classes.")
    elif num_classes is None:
        return None
    elif num_classes == IMAGENET_CLASSES:
        text = (files("hf_guided.conversion") / "imagenet_labels.txt").read_text(encoding="utf-8")
        names = text.splitlines()
        if name is None:
            tell("The 1,000 classes are named after ImageNet's; --labels names.txt gives them other names.")
    else:
        names = [str(label) for label in range(num_classes)]
    return dict(enumerate(names))


def _save_pipeline(
    unet: Source, classifier: Source | None, id2label: dict[int, str] | None, folder: Path, dtype: torch.dtype
) -> None:
    """What the pipeline's `save_pretrained` writes, with the weights taken from the checkpoints one by one."""
    scheduler = ADMScheduler(**scheduler_arguments(unet.flags, unet.architecture.learns_sigma))
    defaults = {"respacing": unet.flags.get("timestep_respacing")}
    if classifier is not None:
        defaults["guidance_scale"] = unet.flags.get("classifier_scale")
    defaults = {name: value for name, value in defaults.items() if value is not None}
    parts: dict[str, Any] = {
        "unet": unet.model,
        "scheduler": scheduler,
        "classifier": None if classifier is None else classifier.model,
        "id2label": id2label,
        "sampling_defaults": defaults or None,
    }
    if unet.architecture.kind == "upsampler":
        pipeline = ClassifierGuidedUpscalePipeline(**parts, low_res_size=unet.flags["small_size"])
    else:
        pipeline = ClassifierGuidedPipeline(**parts)
    pipeline.save_config(folder)
    scheduler.save_pretrained(folder / "scheduler")
    unet.save(folder / "unet", dtype)
    if classifier is not None:
        classifier.save(folder / "classifier", dtype)


def _write_card(
    folder: Path,
    main: Source,
    classifier: Source | None,
    published: Published | None,
    id2label: dict[int, str] | None,
    title: str,
    repo_id: str | None,
) -> None:
    """The model card: what was converted, from what, and how to use it."""
    kind, guided = main.architecture.kind, classifier is not None and classifier is not main
    size = main.model.config.sample_size
    if kind == "classifier":
        summary, model_class = f"A classifier of noisy {size}x{size} images", "ADMForImageClassification"
    else:
        conditional = "unconditional" if main.architecture.num_classes is None else "class-conditional"
        article = "An" if conditional == "unconditional" else "A"
        if kind == "upsampler":
            summary = f"{article} {conditional} upsampler from {main.flags['small_size']} to {size} pixels"
            model_class = "ClassifierGuidedUpscalePipeline"
        else:
            summary, model_class = f"{article} {conditional} diffusion model", "ClassifierGuidedPipeline"
        summary += " with classifier guidance" if guided else ""
    if published is not None:
        names = " and ".join(f"`{source.name}`" for source in (main, classifier if guided else None) if source)
        link = "[guided-diffusion](https://github.com/openai/guided-diffusion)"
        origin = f"converted with `hf-guided`\nfrom OpenAI's {names} of {link}, trained on {published.data}"
    else:
        origin = "converted with `hf-guided`\nfrom the format of OpenAI's guided-diffusion"
    write_model_card(
        folder,
        title=title,
        dataset="" if published is None else published.data,
        class_names=list((id2label or {}).values()),
        training={"flags": spell_flags(main.flags)},
        dataset_id="ILSVRC/imagenet-1k" if published is not None and published.data == "ImageNet" else None,
        repo_id=repo_id,
        license=None if published is None else "mit",
        model_class=model_class,
        summary=summary,
        origin=origin,
        guided=guided,
    )
