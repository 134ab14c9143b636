"""Export of a saved model to `.pt` files that the published code loads: `hf-guided convert --to openai`."""

import os
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

from ..files import check_parent, is_hub_id, replacing
from ..loading import naming_damage, read_config
from ..messages import first_line
from ..models.classifier_adm import ADMForImageClassification
from ..models.layers import level_attention, level_widths
from ..models.unet_adm import ADMUNet2DModel
from ..schedulers.schedules import make_betas
from ..schedulers.scheduling_adm import ADMScheduler
from .convert import IMAGENET_CLASSES, RECORD_FILE, Log
from .files import same_content
from .flags import SCHEDULES, parse_flags, scripts_channel_mult, spell_flags
from .openai import to_openai_state_dict

PARTS = {"unet": ADMUNet2DModel, "classifier": ADMForImageClassification, "scheduler": ADMScheduler}
_TAKEN = "{} exists already; choose another file, or remove it."


def export_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    classifier: str | os.PathLike | None = None,
    token: str | None = None,
    log: Log = print,
) -> None:
    """Writes a model as a state dict that the published code loads, and reports the flags for it.

    A converted checkpoint is restored exactly, in the published file's order of attention rows.

    Args:
        source (`str` or `os.PathLike`): The folder of a pipeline, a UNet or a classifier, or its name on the Hub.
        output (`str` or `os.PathLike`): The `.pt` file to write, in an existing folder: the UNet, or a classifier
            saved alone. One that the same call has written is kept.
        classifier (`str` or `os.PathLike`, *optional*): Another `.pt` file, for the pipeline's classifier.
        token (`str`, *optional*): For private repositories on the Hub; by default the saved login.
        log (`Callable`, defaults to `print`): Called with the flags, and further settings of the published scripts.

    Raises:
        `ValueError`: If there is no such model, or the published code cannot express it. Nothing is written then.
    """
    if classifier is not None and os.path.realpath(output) == os.path.realpath(classifier):
        raise ValueError(f"--output and --classifier both name {output}; choose a file for each.")
    for path, flag in ((output, "--output"), (classifier, "--classifier")):
        if path is not None:
            check_parent(path, flag)
            if os.path.lexists(path) and not _is_export(path):
                raise ValueError(_TAKEN.format(path))
    folder = _find(source, token)
    record = read_config(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else {}
    parts = _load_parts(folder)
    models = [part for part in ("unet", "classifier") if part in parts]
    if classifier is not None and len(models) < 2:
        what = "has no classifier" if "unet" in parts else "is a classifier itself"
        raise ValueError(f"{source} {what}; leave out --classifier.")

    exports = []
    for part, path in zip(models, (output, classifier), strict=False):
        if path is None:
            continue
        notes: list[str] = []
        flags = (_unet_flags if part == "unet" else _classifier_flags)(parts, notes)
        new_order = parse_flags(record.get(part, {}).get("flags", "")).get("use_new_attention_order", False)
        if new_order and part == "unet" and "large_size" not in flags:
            flags["use_new_attention_order"] = True
        elif new_order:
            notes.append("No published flag sets its attention order; set use_new_attention_order=True in the scripts.")
        kind = "MODEL" if part == "unet" else "CLASSIFIER"
        report = [f"Wrote {path}, which the published code loads with", f'  {kind}_FLAGS="{spell_flags(flags)}"']
        report += [f"  Note: {note}" for note in notes]
        exports.append((Path(path), to_openai_state_dict(parts[part], new_order), report))
    with ExitStack() as stack:  # at its end either all files are written, or a rerun can continue
        for path, state_dict, _ in exports:
            temporary = stack.enter_context(replacing(path))
            _save(state_dict, temporary)
            if path.exists() and not same_content(temporary, path):
                raise ValueError(_TAKEN.format(path))
    for *_, report in exports:
        for line in report:
            log(line)
    if len(models) > len(exports):
        log(f"The classifier of {source} was not exported; rerun with --classifier classifier.pt for both files.")


def _is_export(path: str | os.PathLike) -> bool:
    """Whether a file may be an earlier export, an archive of torch."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def _find(source: str | os.PathLike, token: str | None) -> Path:
    """A local folder, or the downloaded folder of a model on the Hub."""
    if Path(source).exists():
        return Path(source)
    if not is_hub_id(str(source)):
        raise ValueError(f"There is no folder {source}.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"], token=token))
    except (HTTPError, OSError) as error:
        why = f"could not be downloaded from the Hub: {first_line(error)}"
        if isinstance(error, RepositoryNotFoundError):
            why = "was not found on the Hub with this token: check the name, or log in with `hf auth login`."
        raise ValueError(f"There is no folder {source}, and {source} {why}") from error


def _load_parts(folder: Path) -> dict[str, Any]:
    """This library's models and scheduler in a folder of a pipeline or a model, and the index of a pipeline."""
    try:
        with naming_damage(folder):
            if (folder / "model_index.json").is_file():
                index = read_config(folder / "model_index.json")
                kinds = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
                if kinds.get("unet") != "ADMUNet2DModel":
                    raise ValueError(f"The UNet of {folder} is a {kinds.get('unet')}; give one with an ADMUNet2DModel.")
                saved = {name: kind for name, kind in PARTS.items() if kinds.get(name) == kind.__name__}
                return {"index": index, **{name: kind.from_pretrained(folder / name) for name, kind in saved.items()}}
            config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
            if config.get("_class_name") == "ADMUNet2DModel":
                return {"unet": ADMUNet2DModel.from_pretrained(folder)}
            if config.get("model_type") == "adm-classifier":
                return {"classifier": ADMForImageClassification.from_pretrained(folder)}
            raise ValueError(f"{folder} is not a pipeline, UNet or classifier of this library.")
    except OSError as error:
        raise ValueError(f"The models of {folder} cannot be loaded: {first_line(error)}") from error


def _unet_flags(parts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The published scripts' flags for a UNet and its scheduler; settings without a flag are added to the notes."""
    config = parts["unet"].config
    upsampler = config.low_res_channels is not None
    if config.low_res_channels not in (None, config.in_channels):
        raise ValueError(
            f"The published upsampler takes two images with the same number of channels; this one takes "
            f"{config.in_channels} and {config.low_res_channels}."
        )
    flags = _shared_flags(config, "upsampler" if upsampler else "unet", notes)
    if upsampler:
        flags["large_size"] = flags.pop("image_size")
        small = parts.get("index", {}).get("low_res_size")
        flags |= {} if small is None else {"small_size": small}
        if "channel_mult" in flags:
            notes.append("The published scripts for upsampling have no --channel_mult; call SuperResModel directly.")
    flags |= {
        "class_cond": config.num_class_embeds is not None,
        "learn_sigma": config.out_channels == 2 * config.in_channels,
        "dropout": config.dropout,
    }
    heads = {"num_heads": config.num_heads, "num_heads_upsample": config.num_heads_upsample}
    if config.num_heads is None:
        heads = {"num_head_channels": config.attention_head_dim or 64}
    flags |= {name: value for name, value in heads.items() if value is not None}
    if not config.resblock_updown:  # a default, and a flag that improved-diffusion lacks
        del flags["resblock_updown"]
        known = scripts_channel_mult("unet", 32) if flags.get("image_size") == 32 else None
        if config.num_heads is not None and flags.get("channel_mult", ()) == known:
            del flags["channel_mult"]  # improved-diffusion's own widths for images of 32 pixels
    rows = None if config.num_class_embeds is None else config.num_class_embeds + config.null_class_label
    if rows not in (None, IMAGENET_CLASSES):
        notes.append(f"The published scripts have 1000 classes; set NUM_CLASSES = {rows} in their script_util.py.")
    if config.null_class_label:
        notes.append(f"Class {config.num_class_embeds} is the null label, which the published scripts do not support.")

    scheduler = parts.get("scheduler")
    if scheduler is None:
        notes.append("The model was saved without an ADMScheduler: add its --diffusion_steps and --noise_schedule.")
        return flags
    flags |= _schedule_flags(scheduler.config, notes)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "sample":
        flags["predict_xstart"] = True
    elif prediction_type != "epsilon":
        notes.append(f"It predicts {prediction_type}, which the published scripts do not support.")
    if scheduler.config.variance_type == "fixed_small":
        flags["sigma_small"] = True
        notes.append("Only improved-diffusion has the flag --sigma_small.")
    return flags


def _classifier_flags(parts: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The same for a classifier."""
    config = parts["classifier"].config
    shared = _shared_flags(config, "classifier", notes)
    head_widths = {config.attention_head_dim or 64}
    if config.num_heads is not None:
        widths = level_widths(config.model_channels, config.channel_mult)
        attends = level_attention(config.sample_size, len(widths), config.attention_resolutions)
        attended = {*compress(widths, attends), widths[-1]}
        head_widths = {width // config.num_heads for width in attended}
        if config.pool == "attention" and len(head_widths) > 1:
            raise ValueError(
                f"The published classifier uses attention pooling with heads of one width; this one has "
                f"{config.num_heads} heads over {' and '.join(map(str, sorted(attended)))} channels."
            )
    if head_widths != {64}:
        given = f"num_heads={config.num_heads}" if len(head_widths) > 1 else f"num_head_channels={min(head_widths)}"
        notes.append(
            f"The published classifiers have heads of 64 channels; set {given} in the scripts' script_util.py."
        )
    if config.num_labels != IMAGENET_CLASSES:
        notes.append(
            f"The published scripts have 1000 classes; set out_channels={config.num_labels} in their script_util.py."
        )
    spelling = {"num_channels": "classifier_width", "num_res_blocks": "classifier_depth", "image_size": "image_size"}
    flags = {spelling.get(name, f"classifier_{name}"): value for name, value in shared.items()}
    if flags.pop("classifier_channel_mult", None):
        mult = tuple(config.channel_mult)
        notes.append(f"The published scripts do not support these widths; set channel_mult={mult} in them.")
    return {**flags, "classifier_pool": config.pool, **_schedule_flags(config, notes)}


def _schedule_flags(config: Any, notes: list[str]) -> dict[str, Any]:
    """The flags of a noise schedule."""
    steps, betas = config.num_train_timesteps, config.trained_betas
    flags: dict[str, Any] = {"diffusion_steps": steps}
    name = next((theirs for theirs, ours in SCHEDULES.items() if ours == config.beta_schedule), None)
    if name and (betas is None or abs(make_betas(config.beta_schedule, steps) - betas).max() < 1e-6):
        flags["noise_schedule"] = name
    else:
        notes.append("Its noise schedule has no name in the published scripts.")
    if config.rescale_timesteps or steps != 1000:  # the defaults of the two published codes differ
        flags["rescale_timesteps"] = config.rescale_timesteps
    return flags


def _shared_flags(config: Any, kind: str, notes: list[str]) -> dict[str, Any]:
    """The flags that UNets and classifiers share, under the UNet's names."""
    size = config.sample_size
    if not isinstance(size, int):
        if size[0] != size[1]:
            if getattr(config, "pool", None) == "attention":
                raise ValueError(f"The published code has attention pooling for square images only, not {list(size)}.")
            notes.append(f"The published scripts sample square images; this model's are {size[0]}x{size[1]}.")
        size = size[0]
    widths = tuple(config.channel_mult)
    attends = level_attention(size, len(widths), config.attention_resolutions)
    sides = [size >> level for level, attended in enumerate(attends) if attended]
    flags = {
        "image_size": size,
        "num_channels": config.model_channels,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": sides or [2 * size],  # a resolution that no level has
        "resblock_updown": config.resblock_updown,
        "use_scale_shift_norm": config.use_scale_shift_norm,
    }
    if scripts_channel_mult(kind, size) != widths or size == 32:
        flags["channel_mult"] = widths
        if any(mult != int(mult) for mult in widths):
            notes.append("The published --channel_mult takes only whole numbers; call the published class directly.")
    if not config.conv_resample and not config.resblock_updown and len(widths) > 1:
        notes.append("The published scripts have no flag for conv_resample=False; call the published class directly.")
    if config.in_channels != 3:
        notes.append(f"The published scripts have images of 3 channels; set in_channels={config.in_channels} in them.")
    return flags


def _save(state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch would write its name into the archive
        torch.save(dict(state_dict), file)
