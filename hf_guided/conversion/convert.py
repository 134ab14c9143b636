"""Conversion of published checkpoints to folders that `from_pretrained` loads: `hf-guided convert`."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..files import check_place, recover_folder, replacing_folder
from ..guidance import ClassifierGuidance
from ..hub import write_model_card
from ..hub.markdown import code_span
from ..labels import composed
from ..models.unet_adm import ADMUNet2DModel
from ..pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline
from ..pipelines.pipeline_classifier_guided_upscale import ClassifierGuidedUpscalePipeline
from ..schedulers.scheduling_adm import FEW_STEPS, ADMScheduler
from .architecture import Architecture, infer_architecture
from .files import in_new_folders, one_by_one, read_checkpoint, same_content, write_safetensors
from .flags import (
    classifier_config,
    improved_defaults,
    is_guided_diffusion,
    is_improved_diffusion,
    parse_flags,
    scheduler_arguments,
    spell_flags,
    unet_config,
)
from .openai import check_tensors, converted_tensors, make_classifier, make_unet
from .published import Published, find_published, kind_of

PIPELINES = {"unet": ClassifierGuidedPipeline, "upsampler": ClassifierGuidedUpscalePipeline}
RECORD_FILE = "openai_flags.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IMAGENET_CLASSES = 1000
Log = Callable[[str], Any]
_ARTICLES = {"unet": "a UNet", "upsampler": "an upsampler", "classifier": "a classifier"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint file, and the model that it describes once its flags are validated."""

    path: Path
    name: str | None  # of the published checkpoint
    flags: Mapping[str, Any]  # as given, then with defaults
    state_dict: Mapping[str, torch.Tensor]  # read from disk on use
    mapped: bool  # into memory
    architecture: Architecture  # which the tensors determine
    model: Any = None  # [`ADMUNet2DModel`] or [`ADMForImageClassification`] on the meta device: no weights
    new_order: bool = False  # of the rows of query, key and value
    scheduler: ADMScheduler | None = None  # of a UNet or an upsampler

    def save(self, folder: Path, dtype: str) -> None:
        """Writes the config and, tensor by tensor, the weights."""
        if isinstance(self.model, ADMUNet2DModel):
            self.model.save_config(folder)
            file = folder / "diffusion_pytorch_model.safetensors"
        else:
            # Its config always says float32, so that it loads in the same dtype as the UNet does.
            shown = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()  # of no weights
            self.model.save_pretrained(folder, state_dict={})
            if shown:
                logging.enable_progress_bar()
            file = folder / "model.safetensors"
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        tensors = converted_tensors(self.model, self.state_dict, self.new_order)
        with _naming(self.path):
            write_safetensors(file, shapes, one_by_one(tensors, self.state_dict, self.mapped), DTYPES[dtype])
        if dtype != "fp32":  # also under its variant's name, for `variant=`
            variant = file.with_suffix(f".{dtype}.safetensors")
            try:
                os.link(file, variant)
            except OSError:  # a file system without links
                shutil.copyfile(file, variant)

    def record(self) -> dict[str, Any]:
        """What an export needs besides the weights, without local paths."""
        return {
            "checkpoint": self.name,
            "flags": spell_flags({**self.flags, "use_new_attention_order": self.new_order}),
        }


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

    The architecture is inferred from the tensors; the name or the flags give the rest. Weights are memory-mapped and
    written one by one, so that memory use does not depend on the model's size.

    Args:
        checkpoint (`str` or `os.PathLike`): The `.pt` file of a UNet, an upsampler or a classifier.
        output (`str` or `os.PathLike`): The folder of the result: a [`ClassifierGuidedPipeline`], a
            [`ClassifierGuidedUpscalePipeline`], or an [`ADMForImageClassification`]. It is written completely or not
            at all; one that the same call has made is kept.
        name (`str`, *optional*): The published checkpoint's name, such as `"256x256_diffusion"`.
        flags (`str`, *optional*): Instead, the flags that the checkpoint was trained with, see [`parse_flags`].
        classifier (`str` or `os.PathLike`, *optional*): The `.pt` file of the classifier that guides.
        labels (`str` or `os.PathLike`, *optional*): A text file with a class name per line. Default: ImageNet's names
            for 1,000 classes, else numbers.
        dtype (`str`, defaults to `"fp32"`): `"fp32"`, `"fp16"` or `"bf16"`: the type of the saved weights.
        repo_id (`str`, *optional*): The folder's id on the Hub, for the card.
        log (`Callable`, defaults to `print`): Called with a line on each step.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: For a file that cannot be read or is not the named checkpoint, missing flags, flags that
            contradict the tensors, or a folder that holds something else. Nothing is written then.
    """
    start = time.perf_counter()
    output = Path(output)
    taken = f"{output} exists already and is not empty; choose another --output, or remove it."
    check_place(output.absolute().parent, f"--output {output}: its folder")
    recover_folder(output)
    exists = os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir()))
    if exists and not ((output / RECORD_FILE).is_file() and Path(checkpoint).is_file()):
        raise ValueError(taken)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if (name is None) == (flags is None):
        count = "both were given" if name else "neither was given"
        raise ValueError(f'Give a published name, or --flags "$MODEL_FLAGS $DIFFUSION_FLAGS"; {count}.')
    published = None if name is None else find_published(name)
    if published is not None and classifier is not None and published.classifier is None:
        raise ValueError(f"{name} has no published classifier for guidance; leave out --classifier.")

    parts, id2label = _open_parts(checkpoint, classifier, name, parse_flags(flags or ""), labels, log)
    if published is not None and published.float32_only and dtype != "fp32":
        log(f"{name}: its published samples were computed in float32; in {dtype} they may differ or fail.")

    record = json.dumps({part: source.record() for part, source in parts.items()}, indent=2) + "\n"
    if exists and (output / RECORD_FILE).read_bytes() != record.encode():
        raise ValueError(taken)

    log(f"Writing {output}")
    with in_new_folders(output), replacing_folder(output) as folder:
        if "unet" not in parts:
            parts["classifier"].save(folder, dtype)
        else:
            _save_pipeline(parts, id2label, folder, dtype)
        (folder / RECORD_FILE).write_text(record)
        _write_card(folder, list(parts.values()), published, id2label, dtype, output.name, repo_id)
        if exists and not same_content(folder, output):
            raise ValueError(taken)
    seconds = time.perf_counter() - start
    log(f"{output} already exists, made by the same command" if exists else f"Wrote {output} in {seconds:.1f} s")
    return output


def _open_parts(
    checkpoint: str | os.PathLike,
    classifier: str | os.PathLike | None,
    name: str | None,
    flags: Mapping[str, Any],
    labels: str | os.PathLike | None,
    log: Log,
) -> tuple[dict[str, Checkpoint], dict[int, str] | None]:
    """The checkpoints by component, described and matched with each other, and the names of their classes."""
    main = _open(checkpoint, name, flags, log)
    alone = main.architecture.kind == "classifier"
    if alone and classifier is not None:
        raise ValueError(f"{checkpoint} is a classifier itself; give it as --classifier, the UNet as --checkpoint.")
    guide = main if alone else None
    parts = {} if alone else {"unet": _describe_unet(main, classifier is not None, log)}
    if classifier is not None:
        guide = _open(classifier, None if name is None else find_published(name).classifier, flags, log)
        _check_pair(main, guide)
    id2label = _read_labels(labels, (guide or main).architecture.num_classes, name, log)
    if guide is not None:
        parts["classifier"] = _describe_classifier(guide, id2label, alone, log)
    return parts, id2label


@contextmanager
def _naming(path: str | os.PathLike, name: str | None = None) -> Iterator[None]:
    """Prefixes an error with the file that it is about, and the published checkpoint that this should be."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}{'' if name is None else f' is not {name}'}: {error}") from None


def _open(path: str | os.PathLike, name: str | None, flags: Mapping[str, Any], log: Log) -> Checkpoint:
    """The checkpoint in a file, with the flags given or those of its name; raises if it does not match the name."""
    flags = flags if name is None else parse_flags(find_published(name).flags)
    state_dict, mapped = read_checkpoint(path)
    with _naming(path, name):
        shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
        depth = flags.get("classifier_depth", flags.get("num_res_blocks"))
        architecture = infer_architecture(shapes, flags.get("image_size", flags.get("large_size")), depth)
        if name is not None:
            if architecture.kind != (kind := kind_of(name)):
                raise ValueError(f"{name} is {_ARTICLES[kind]}, the tensors those of {_ARTICLES[architecture.kind]}.")
            if architecture.image_channels != 3:
                raise ValueError(f"Its images have 3 channels, but the tensors have {architecture.image_channels}.")
            if architecture.num_classes not in (None, IMAGENET_CLASSES):
                raise ValueError(f"It has 1000 classes or none, but the tensors have {architecture.num_classes}.")
    parameters = sum(tensor.numel() for tensor in state_dict.values())
    log(f"{path}: {_ARTICLES[architecture.kind]} of {parameters / 1e6:,.1f} million parameters")
    return Checkpoint(Path(path), name, flags, state_dict, mapped, architecture)


def _describe_unet(checkpoint: Checkpoint, guided: bool, log: Log) -> Checkpoint:
    """The checkpoint with the model that its flags and tensors describe, and the scheduler."""
    flags, architecture = checkpoint.flags, checkpoint.architecture
    with _naming(checkpoint.path, checkpoint.name):
        improved = checkpoint.name is None and not guided and is_improved_diffusion(flags, architecture)
        if improved and (assumed := improved_defaults(flags, architecture)):
            flags = {**flags, **assumed}
            other = " (guided-diffusion's: --rescale_timesteps False)" if "rescale_timesteps" in assumed else ""
            log(
                f"Nothing here is specific to guided-diffusion, so that improved-diffusion's defaults are used: "
                f"{spell_flags(assumed)}. If the model was trained with other values, add them{other}."
            )
        config = unet_config(flags, architecture)
        scheduler = ADMScheduler(**scheduler_arguments(flags, architecture.learns_sigma), solver_order=2)
        if flags["diffusion_steps"] != 1000 and "rescale_timesteps" not in flags:
            if not guided and not is_guided_diffusion(flags, architecture):
                raise ValueError(
                    "--rescale_timesteps is missing; add it, for guided-diffusion's default is False and "
                    "improved-diffusion's True, and either may have trained the model."
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
    new_order = config["use_new_attention_order"]
    return replace(checkpoint, flags=flags, model=model, new_order=new_order, scheduler=scheduler)


def _describe_classifier(checkpoint: Checkpoint, id2label: dict[int, str] | None, alone: bool, log: Log) -> Checkpoint:
    """The checkpoint with the classifier that its flags and tensors describe."""
    with _naming(checkpoint.path, checkpoint.name):
        try:
            config = classifier_config(checkpoint.flags, checkpoint.architecture, alone)
        except ValueError as error:
            described = checkpoint.name or any(name.startswith("classifier_") for name in checkpoint.flags)
            fix = " Its tensors are a classifier's: give it as --classifier with its UNet, or add $CLASSIFIER_FLAGS."
            raise ValueError(f"{error}{'' if described else fix}") from None
        heads = "num_heads" if "num_heads" in config else "num_head_channels"
        is_given = alone or f"classifier_{heads}" in checkpoint.flags
        if not is_given and (heads, config[heads]) != ("num_head_channels", 64):
            log(
                f"No published script makes a classifier of this size: the UNet's --{heads} {config[heads]} is "
                f"assumed; if it was trained with another value, add --classifier_{heads}."
            )
        names = id2label or {}
        model = make_classifier({**config, "id2label": names, "label2id": {name: id for id, name in names.items()}})
        check_tensors(model, checkpoint.state_dict)
    return replace(checkpoint, model=model, new_order=config["use_new_attention_order"])


def _check_pair(unet: Checkpoint, classifier: Checkpoint) -> None:
    """Raises for what is no classifier, or one of other images or classes than the UNet's."""
    ours, theirs = unet.architecture, classifier.architecture
    if theirs.kind != "classifier":
        raise ValueError(f"{classifier.path} is {_ARTICLES[theirs.kind]}; give a classifier as --classifier.")
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
        names = Path(__file__).with_name("imagenet_labels.txt").read_text(encoding="utf-8").splitlines()
        if name is None:
            log("The 1,000 classes get ImageNet's names; --labels names.txt gives them others.")
    else:
        names = [str(label) for label in range(num_classes)]
    return dict(enumerate(names))


def _save_pipeline(parts: Mapping[str, Checkpoint], id2label: dict[int, str] | None, folder: Path, dtype: str) -> None:
    """Saves the pipeline as `save_pretrained` does, with the weights converted from the checkpoints one by one."""
    unet, classifier = parts["unet"], parts.get("classifier")
    defaults = {"num_inference_steps": max(1, min(FEW_STEPS, unet.flags["diffusion_steps"] - 1))}
    if unet.name is None and "timestep_respacing" in unet.flags:  # the user's, not of a published name
        defaults = {"respacing": unet.flags["timestep_respacing"]}
    if classifier is not None and "classifier_scale" in unet.flags:
        defaults["guidance_scale"] = unet.flags["classifier_scale"]
    kind = unet.architecture.kind
    pipeline = PIPELINES[kind](
        unet=unet.model,
        scheduler=unet.scheduler,
        classifier=None if classifier is None else classifier.model,
        id2label=id2label,
        sampling_defaults=defaults,
        **({"low_res_size": unet.flags["small_size"]} if kind == "upsampler" else {}),
    )
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for part, source in parts.items():
        source.save(folder / part, dtype)


def _write_card(
    folder: Path,
    sources: Sequence[Checkpoint],
    published: Published | None,
    id2label: dict[int, str] | None,
    dtype: str,
    title: str,
    repo_id: str | None,
) -> None:
    """Writes the model card: source, flags and usage."""
    main, guided = sources[0], len(sources) > 1
    kind, size = main.architecture.kind, main.model.config.sample_size
    article = "An unconditional" if main.architecture.num_classes is None else "A class-conditional"
    summary = {
        "unet": f"{article} diffusion model",
        "upsampler": f"{article} upsampler from {main.flags.get('small_size')} to {size} pixels",
        "classifier": f"A classifier of noisy {size}x{size} images",
    }[kind]
    origin = "converted with `hf-guided`\nfrom the format of OpenAI's guided-diffusion"
    if published is not None:
        names = " and ".join(code_span(str(source.name)) for source in sources)
        link = "[guided-diffusion](https://github.com/openai/guided-diffusion)"
        origin = f"converted with `hf-guided`\nfrom OpenAI's {names} of {link}, trained on {published.data}"
    write_model_card(
        folder,
        title=title,
        dataset="" if published is None else published.data,
        class_names=list((id2label or {}).values()),
        training={"flags": spell_flags(main.flags)},
        dataset_id="ILSVRC/imagenet-1k" if published is not None and published.data == "ImageNet" else None,
        repo_id=repo_id,
        license=None if published is None else "mit",
        model_class="ADMForImageClassification" if kind == "classifier" else PIPELINES[kind].__name__,
        summary=f"{summary}{' with classifier guidance' if guided else ''}",
        origin=origin,
        guided=guided,
        dtype=None if dtype == "fp32" else str(DTYPES[dtype]).removeprefix("torch."),
    )
