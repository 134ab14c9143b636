"""Conversion of published checkpoints to folders that `from_pretrained` loads: `hf-guided convert`."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..files import recover_folder, replacing_folder
from ..guidance import ClassifierGuidance
from ..hub import write_model_card
from ..hub.markdown import code_span
from ..labels import composed
from ..models.classifier_adm import ADMForImageClassification
from ..models.unet_adm import ADMUNet2DModel
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline
from ..schedulers.scheduling_adm import FEW_STEPS, ADMScheduler
from .architecture import Architecture, infer_architecture
from .files import in_new_folders, one_by_one, read_checkpoint, same_content, write_safetensors
from .flags import (
    add_improved_defaults,
    classifier_config,
    is_guided_diffusion,
    is_improved_diffusion,
    parse_flags,
    scheduler_arguments,
    spell_flags,
    unet_config,
)
from .openai import check_tensors, converted_tensors, make_classifier, make_unet
from .published import Published, find_published, kind_of

RECORD_FILE = "openai_flags.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGENET_CLASSES = 1000
Log = Callable[[str], Any]
_ARTICLES = {"unet": "a UNet", "upsampler": "an upsampler", "classifier": "a classifier"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint file.

    Attributes:
        path (`Path`): The `.pt` file.
        name (`str`, *optional*): The name of the published checkpoint.
        flags (`Mapping[str, Any]`): Its flags as given.
        state_dict (`Mapping[str, torch.Tensor]`): Its tensors, read from disk on use.
        mapped (`bool`): Whether they are memory-mapped.
        architecture ([`Architecture`]): The architecture that they determine.
    """

    path: Path
    name: str | None
    flags: Mapping[str, Any]
    state_dict: Mapping[str, torch.Tensor]
    mapped: bool
    architecture: Architecture


@dataclass(frozen=True)
class Source:
    """A checkpoint that was validated; nothing is written before all of them are.

    Attributes:
        checkpoint ([`Checkpoint`]): The file.
        flags (`Mapping[str, Any]`): Its flags, with defaults.
        model: This library's model on the meta device, with names and shapes but no weights.
        new_order (`bool`): Whether the rows of query, key and value are in the new attention order.
        scheduler ([`ADMScheduler`], *optional*): The scheduler of a UNet or an upsampler.
    """

    checkpoint: Checkpoint
    flags: Mapping[str, Any]
    model: ADMUNet2DModel | ADMForImageClassification
    new_order: bool
    scheduler: ADMScheduler | None = None

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the config and, tensor by tensor, the weights."""
        if isinstance(self.model, ADMUNet2DModel):
            self.model.save_config(folder)
            file = folder / "diffusion_pytorch_model.safetensors"
        else:
            # Its config always says float32, so that it loads in the same dtype as the UNet does.
            _save_without_weights(self.model, folder)
            file = folder / "model.safetensors"
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        state_dict = self.checkpoint.state_dict
        tensors = converted_tensors(self.model, state_dict, self.new_order)
        with _naming(self.checkpoint.path):
            write_safetensors(file, shapes, one_by_one(tensors, state_dict, self.checkpoint.mapped), dtype)
        if dtype != torch.float32:
            _link(file, file.with_suffix(f".{next(name for name in DTYPES if DTYPES[name] == dtype)}.safetensors"))

    def record(self) -> dict[str, Any]:
        """What an export needs besides the weights, without local paths."""
        flags = {**self.flags, "use_new_attention_order": self.new_order}
        return {"checkpoint": self.checkpoint.name, "flags": spell_flags(flags)}


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
    log: Log = print,
) -> Path:
    """Converts checkpoints of guided-diffusion or improved-diffusion to a pipeline, or a classifier alone.

    The architecture is inferred from the tensors. The name or the flags give the rest, and are checked against the
    tensors. Weights are memory-mapped and written one by one, so that memory use does not depend on the model's size.

    Args:
        checkpoint (`str` or `os.PathLike`): The `.pt` file of a UNet, an upsampler or a classifier.
        output (`str` or `os.PathLike`): The folder to write: a [`ClassifierGuidedPipeline`], a
            [`ClassifierGuidedUpscalePipeline`], or an [`ADMForImageClassification`]. It is written
            completely or not at all; one that the same call has made is kept.
        name (`str`, *optional*): The published checkpoint's name, such as `"256x256_diffusion"`.
        flags (`str`, *optional*): Instead of a name, the flags that the checkpoint was trained with, see
            [`parse_flags`].
        classifier (`str` or `os.PathLike`, *optional*): The `.pt` file of the classifier that guides.
        labels (`str` or `os.PathLike`, *optional*): A text file with a class name per line. By default models of 1,000
            classes get ImageNet's names, and others numbers.
        dtype (`str`, defaults to `"fp32"`): `"fp32"`, `"fp16"` or `"bf16"`: the type of the saved weights.
        repo_id (`str`, *optional*): The folder's id on the Hub, for the card.
        log (`Callable`, defaults to `print`): Called with a line about each step.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: If a file cannot be read or is not the named checkpoint, if flags are missing or contradict the
            tensors, or if the folder holds something else. Nothing is written then.
    """
    start = time.perf_counter()
    output = Path(output)
    home = next(parent for parent in output.absolute().parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK):
        raise ValueError(f"--output {output} cannot be written, because {home} is not writable; choose another folder.")
    recover_folder(output)
    taken = f"{output} exists already and is not empty; choose another --output, or remove it."
    exists = os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir()))
    if exists and not ((output / RECORD_FILE).is_file() and Path(checkpoint).is_file()):
        raise ValueError(taken)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    published: Published | None = None
    if name is not None and flags is None:
        published = find_published(name)
        said = parse_flags(published.flags)
        if classifier is not None and published.classifier is None:
            raise ValueError(f"{name} has no published classifier for guidance; leave out --classifier.")
    elif name is None and flags is not None:
        said = parse_flags(flags)
    else:
        both = "both were given" if name else "neither was given"
        raise ValueError(
            f"A checkpoint is described by the name of a published one, or by --flags with its $MODEL_FLAGS and "
            f"$DIFFUSION_FLAGS; {both}."
        )

    main = _open(checkpoint, name, said, log)
    alone = main.architecture.kind == "classifier"
    if alone and classifier is not None:
        raise ValueError(
            f"{checkpoint} is a classifier itself; give the UNet as --checkpoint and the classifier as --classifier."
        )
    guide = main if alone else None
    sources: dict[str, Source] = {}  # in the order of the pipeline's parts
    if not alone:
        sources["unet"] = _describe_unet(main, classifier is not None, log)
    if classifier is not None:
        guide = _open_classifier(classifier, None if published is None else published.classifier, said, log)
        _check_pair(main, guide)
    num_classes = main.architecture.num_classes
    if num_classes is None and guide is not None:
        num_classes = guide.architecture.num_classes
    id2label = _read_labels(labels, num_classes, name, log)
    if guide is not None:
        sources["classifier"] = _describe_classifier(guide, id2label, alone, log)
    if published is not None and published.float32_only and dtype != "fp32":
        log(f"{name}: its published samples were computed in float32; in {dtype} they may differ or fail.")

    record = json.dumps({part: source.record() for part, source in sources.items()}, indent=2) + "\n"
    if exists and (output / RECORD_FILE).read_bytes() != record.encode():
        raise ValueError(taken)

    log(f"Writing {output}")
    with in_new_folders(output), replacing_folder(output) as folder:
        if alone:
            sources["classifier"].save(folder, DTYPES[dtype])
        else:
            _save_pipeline(sources, id2label, folder, DTYPES[dtype])
        (folder / RECORD_FILE).write_text(record)
        _write_card(folder, list(sources.values()), published, id2label, dtype, output.name, repo_id)
        if exists and not same_content(folder, output):
            raise ValueError(taken)
    if exists:
        log(f"{output} already exists, made by the same command")
        return output
    log(f"Wrote {output} in {time.perf_counter() - start:.1f} s")
    return output


def _link(file: Path, name: Path) -> None:
    """Links a file of half precision under its variant's name, too, for `variant=`."""
    try:
        os.link(file, name)
    except OSError:  # a file system without links
        shutil.copyfile(file, name)


def _save_without_weights(classifier: Any, folder: Path) -> None:
    """Saves config and image processor, without a progress bar for weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    classifier.save_pretrained(folder, state_dict={})
    if shown:
        logging.enable_progress_bar()


@contextmanager
def _naming(path: str | os.PathLike, name: str | None = None) -> Iterator[None]:
    """Prefixes an error with the file that it is about, and the published checkpoint that this should be."""
    try:
        yield
    except ValueError as error:
        about = f"{path}" if name is None else f"{path} is not {name}"
        raise ValueError(f"{about}: {error}") from None


def _open(path: str | os.PathLike, name: str | None, flags: Mapping[str, Any], log: Log) -> Checkpoint:
    """The checkpoint in a file; raises if it does not match the name."""
    state_dict, mapped = read_checkpoint(path)
    with _naming(path, name):
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
        depth = flags.get("classifier_depth", flags.get("num_res_blocks"))
        architecture = infer_architecture(shapes, flags.get("image_size", flags.get("large_size")), depth)
        if name is not None:
            kind = kind_of(name)
            if architecture.kind != kind:
                raise ValueError(
                    f"{name} is {_ARTICLES[kind]}, but the tensors are those of {_ARTICLES[architecture.kind]}."
                )
            if architecture.image_channels != 3:
                raise ValueError(f"Its images have 3 channels, but the tensors have {architecture.image_channels}.")
            if architecture.num_classes not in (None, IMAGENET_CLASSES):
                raise ValueError(f"It has 1000 classes or none, but the tensors have {architecture.num_classes}.")
    parameters = sum(tensor.numel() for tensor in state_dict.values())
    log(f"{path}: {_ARTICLES[architecture.kind]} of {parameters / 1e6:,.1f} million parameters")
    return Checkpoint(Path(path), name, flags, state_dict, mapped, architecture)


def _open_classifier(path: str | os.PathLike, name: str | None, flags: Mapping[str, Any], log: Log) -> Checkpoint:
    """The classifier for guidance: the published one of a name, or the one that the UNet's flags describe."""
    if name is not None:
        flags = parse_flags(find_published(name).flags)
    checkpoint = _open(path, name, flags, log)
    if checkpoint.architecture.kind != "classifier":
        raise ValueError(f"{path} is {_ARTICLES[checkpoint.architecture.kind]}; give a classifier as --classifier.")
    return checkpoint


def _describe_unet(checkpoint: Checkpoint, guided: bool, log: Log) -> Source:
    """The model that the flags and the tensors describe, on the meta device, and its scheduler."""
    flags, architecture = checkpoint.flags, checkpoint.architecture
    with _naming(checkpoint.path, checkpoint.name):
        if checkpoint.name is None and not guided and is_improved_diffusion(flags, architecture):
            flags, assumed = add_improved_defaults(flags, architecture)
            if assumed:
                other = ", guided-diffusion's being --rescale_timesteps False" if "rescale_timesteps" in assumed else ""
                log(
                    f"Nothing here is specific to guided-diffusion, so that improved-diffusion's defaults are used: "
                    f"{spell_flags(assumed)}. If the model was trained with other values, add these flags with "
                    f"them{other}."
                )
        config = unet_config(flags, architecture)
        scheduler = ADMScheduler(**scheduler_arguments(flags, architecture.learns_sigma), solver_order=2)
        if flags["diffusion_steps"] != 1000 and "rescale_timesteps" not in flags:
            if not guided and not is_guided_diffusion(flags, architecture):
                raise ValueError(
                    "--rescale_timesteps is missing, and it is unknown whether guided-diffusion, whose default is "
                    "False, or improved-diffusion, whose default is True, trained the model; add the flag."
                )
            log(
                f"The model gets its {flags['diffusion_steps']} timesteps without rescaling, guided-diffusion's "
                f"default; if it was trained with rescaling, add --rescale_timesteps True."
            )
        if "timestep_respacing" in flags:
            scheduler.set_timesteps(respacing=flags["timestep_respacing"])
        if "classifier_scale" in flags:
            ClassifierGuidance(flags["classifier_scale"])
        model = make_unet(config, architecture.kind == "upsampler")
        check_tensors(model, checkpoint.state_dict)
    return Source(checkpoint, flags, model, config["use_new_attention_order"], scheduler)


def _describe_classifier(checkpoint: Checkpoint, id2label: dict[int, str] | None, alone: bool, log: Log) -> Source:
    """The classifier that the flags and the tensors describe, on the meta device."""
    with _naming(checkpoint.path, checkpoint.name):
        try:
            config = classifier_config(checkpoint.flags, checkpoint.architecture, alone)
        except ValueError as error:
            described = checkpoint.name or any(name.startswith("classifier_") for name in checkpoint.flags)
            fix = "Its tensors are a classifier's: give it as --classifier with its UNet, or add $CLASSIFIER_FLAGS."
            raise ValueError(f"{error} {'' if described else fix}".strip()) from None
        heads = "num_heads" if "num_heads" in config else "num_head_channels"
        is_given = alone or f"classifier_{heads}" in checkpoint.flags
        if not is_given and (heads, config[heads]) != ("num_head_channels", 64):
            log(
                f"No published script makes a classifier of this size: the UNet's --{heads} {config[heads]} is "
                f"assumed; if it was trained with another value, add --classifier_{heads}."
            )
        names = id2label or {}
        labels = {"id2label": names, "label2id": {label: id for id, label in names.items()}}
        model = make_classifier({**config, **labels})
        check_tensors(model, checkpoint.state_dict)
    return Source(checkpoint, checkpoint.flags, model, config["use_new_attention_order"])


def _check_pair(unet: Checkpoint, classifier: Checkpoint) -> None:
    """Raises for a classifier of other images or classes than the UNet's."""
    ours, theirs = unet.architecture, classifier.architecture
    if ours.image_channels != theirs.image_channels:
        raise ValueError(
            f"{classifier.path} takes images of {theirs.image_channels} channels, but {unet.path} of "
            f"{ours.image_channels}."
        )
    if ours.num_classes not in (None, theirs.num_classes):
        raise ValueError(f"{classifier.path} has {theirs.num_classes} classes, but {unet.path} has {ours.num_classes}.")


def _read_labels(
    path: str | os.PathLike | None, num_classes: int | None, name: str | None, log: Log
) -> dict[int, str] | None:
    """Class names by id; `None` for models without classes."""
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise ValueError(f"There is no file {path}.") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a text file in UTF-8; save it in that encoding.") from None
        names = [composed(line) for line in text.splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f"{path} has {len(names)} names, but the model has {num_classes or 'no'} classes.")
    elif num_classes is None:
        return None
    elif num_classes == IMAGENET_CLASSES:
        text = (files("hf_guided.conversion") / "imagenet_labels.txt").read_text(encoding="utf-8")
        names = text.splitlines()
        if name is None:
            log("The 1,000 classes get ImageNet's names; --labels names.txt gives them others.")
    else:
        names = [str(label) for label in range(num_classes)]
    return dict(enumerate(names))


def _save_pipeline(
    sources: Mapping[str, Source], id2label: dict[int, str] | None, folder: Path, dtype: torch.dtype
) -> None:
    """Saves the pipeline as `save_pretrained` does, with the weights converted from the checkpoints one by one."""
    unet, classifier = sources["unet"], sources.get("classifier")
    if (
        unet.checkpoint.name is None and "timestep_respacing" in unet.flags
    ):  # given by the user, not by the table of published flags
        defaults = {"respacing": unet.flags["timestep_respacing"]}
    else:
        defaults = {"num_inference_steps": max(1, min(FEW_STEPS, unet.flags["diffusion_steps"] - 1))}
    if classifier is not None:
        defaults["guidance_scale"] = unet.flags.get("classifier_scale")
    defaults = {name: value for name, value in defaults.items() if value is not None}
    parts: dict[str, Any] = {
        "unet": unet.model,
        "scheduler": unet.scheduler,
        "classifier": None if classifier is None else classifier.model,
        "id2label": id2label,
        "sampling_defaults": defaults or None,
    }
    if unet.architecture.kind == "upsampler":
        pipeline = ClassifierGuidedUpscalePipeline(**parts, low_res_size=unet.flags["small_size"])
    else:
        pipeline = ClassifierGuidedPipeline(**parts)
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for part, source in sources.items():
        source.save(folder / part, dtype)


def _write_card(
    folder: Path,
    sources: Sequence[Source],
    published: Published | None,
    id2label: dict[int, str] | None,
    dtype: str,
    title: str,
    repo_id: str | None,
) -> None:
    """Writes the model card: source, flags and usage."""
    main, guided = sources[0], len(sources) > 1
    kind, size = main.architecture.kind, main.model.config.sample_size
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
        names = " and ".join(code_span(str(source.checkpoint.name)) for source in sources)
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
        dtype=None if dtype == "fp32" else str(DTYPES[dtype]).removeprefix("torch."),
    )
