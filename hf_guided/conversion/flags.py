"""The flags of the published scripts (`$MODEL_FLAGS` and the like), which give what the tensors do not determine.

A flag that contradicts the tensors is an error; so is a missing one that the tensors cannot replace. The defaults of
the published scripts are not used for it, since those of guided-diffusion and improved-diffusion differ.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from ..schedulers.schedules import make_betas
from .architecture import Architecture

Flags = Mapping[str, Any]


def _boolean(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise ValueError


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _multiples(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


# The kind of value that each parser takes, for errors.
_WANTED: dict[Callable[[str], Any], str] = {
    _boolean: "True or False",
    _integers: "whole numbers separated by commas",
    _multiples: "numbers separated by commas",
    int: "a whole number",
    float: "a number",
}

_FLAGS: dict[str, Callable[[str], Any]] = {
    # the model
    "image_size": int,
    "large_size": int,
    "small_size": int,
    "num_channels": int,
    "num_res_blocks": int,
    "num_heads": int,
    "num_heads_upsample": int,
    "num_head_channels": int,
    "attention_resolutions": _integers,
    "channel_mult": _multiples,
    "dropout": float,
    "class_cond": _boolean,
    "learn_sigma": _boolean,
    "use_scale_shift_norm": _boolean,
    "resblock_updown": _boolean,
    "use_new_attention_order": _boolean,
    # the classifier; the last two are ours, since the published code only has heads of 64 channels
    "classifier_width": int,
    "classifier_depth": int,
    "classifier_attention_resolutions": _integers,
    "classifier_use_scale_shift_norm": _boolean,
    "classifier_resblock_updown": _boolean,
    "classifier_pool": str,
    "classifier_num_heads": int,
    "classifier_num_head_channels": int,
    # the diffusion
    "diffusion_steps": int,
    "noise_schedule": str,
    "predict_xstart": _boolean,
    "rescale_timesteps": _boolean,
    "sigma_small": _boolean,
    # sampling
    "timestep_respacing": str,
    "use_ddim": _boolean,
    "clip_denoised": _boolean,
    "classifier_scale": float,
}

# Flags of training, computation and files, which a converted model does not need.
_IGNORED = {
    "anneal_lr",
    "base_samples",
    "batch_size",
    "classifier_path",
    "classifier_use_fp16",
    "data_dir",
    "ema_rate",
    "eval_interval",
    "fp16_scale_growth",
    "iterations",
    "log_interval",
    "lr",
    "lr_anneal_steps",
    "microbatch",
    "model_path",
    "noised",
    "num_samples",
    "rescale_learned_sigmas",
    "resume_checkpoint",
    "save_interval",
    "schedule_sampler",
    "use_checkpoint",
    "use_fp16",
    "use_kl",
    "val_data_dir",
    "weight_decay",
}

# Flags of guided-diffusion's scripts only; so are all flags of a classifier.
_GUIDED_ONLY = {"num_head_channels", "channel_mult", "resblock_updown", "use_new_attention_order"}

# The scripts' widths by image size. improved-diffusion adds 32.
_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
_UPSAMPLER_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    64: (1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (1, 1, 2, 2, 4, 4),
}

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def scripts_channel_mult(kind: str, image_size: int) -> tuple[float, ...] | None:
    """The widths that the published scripts give a model of this size, if they support it."""
    if kind == "classifier" and image_size == 32:
        return None
    return (_UPSAMPLER_CHANNEL_MULT if kind == "upsampler" else _CHANNEL_MULT).get(image_size)


def parse_flags(text: str) -> dict[str, Any]:
    """The values of flags, written as for the published scripts.

    Args:
        text (`str`): `--name value` or `--name=value`, in any order; the later of two wins. A whole command line or
            the README's lines `MODEL_FLAGS="…"` can be given, too.

    Returns:
        `dict[str, Any]`: The values by name, without flags that a converted model does not need (of training,
        computation and files).

    Raises:
        `ValueError`: For a flag that neither guided-diffusion nor improved-diffusion has, one without a value, or with
            a value of another kind.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ValueError(f"The flags cannot be read, {error}: {text}") from None
    expanded: list[str] = []
    for word in words:
        assignment = re.match(r"[A-Z_]+=(.*)$", word, re.DOTALL)
        expanded += shlex.split(assignment[1]) if assignment else [word]
    for word in expanded:
        if word.startswith("$"):
            raise ValueError(
                f"{word} in the flags was not expanded; put double quotes around the flags for the shell to expand it."
            )
    # the command in front, such as `mpiexec -n 8 python scripts/image_train.py`
    start = next((i for i, word in enumerate(expanded) if word.startswith("--")), len(expanded))
    if start and not expanded[start - 1].endswith(".py"):
        raise ValueError(f"Flags look like --name value; {expanded[0]!r} is not a flag.")

    flags: dict[str, Any] = {}
    remaining = iter(expanded[start:])
    for word in remaining:
        if not word.startswith("--"):
            raise ValueError(f"Flags look like --name value; {word!r} follows no name.")
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in _FLAGS and name not in _IGNORED:
            raise ValueError(f"--{name} is not a flag of guided-diffusion or improved-diffusion.")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ValueError(f"--{name} has no value.")
        if name in _IGNORED:
            continue
        flags.pop(name, None)
        if value:  # the scripts write an empty value for "not given"
            try:
                flags[name] = _FLAGS[name](value)
            except ValueError:
                raise ValueError(f"--{name} takes {_WANTED[_FLAGS[name]]}; {value!r} was given.") from None
    return flags


def spell_flags(flags: Flags) -> str:
    """Flags as text for the published scripts; the inverse of [`parse_flags`]."""
    return " ".join(f"--{name} {_spell(value)}" for name, value in flags.items())


def is_guided_diffusion(flags: Flags, architecture: Architecture) -> bool:
    """Whether flags or tensors have something that only guided-diffusion has."""
    return (
        architecture.kind == "classifier"
        or architecture.config["resblock_updown"]
        or flags.get("large_size", flags.get("image_size")) in (128, 512)
        or any(name in _GUIDED_ONLY or name.startswith("classifier_") for name in flags)
    )


def is_improved_diffusion(flags: Flags, architecture: Architecture) -> bool:
    """Whether improved-diffusion is assumed: its scripts make such a model, and nothing contradicts it."""
    size = flags.get("large_size", 256) if architecture.kind == "upsampler" else flags.get("image_size")
    return _scripts_make(architecture, size) and not is_guided_diffusion(flags, architecture)


def _scripts_make(architecture: Architecture, image_size: int | None) -> bool:
    """Whether the published scripts make models of this size with the tensors' widths and layers."""
    inferred = architecture.config
    return (
        image_size is not None
        and scripts_channel_mult(architecture.kind, image_size) == inferred["channel_mult"]
        and inferred["conv_resample"]
        and inferred["in_channels"] == 3
    )


def add_improved_defaults(flags: Flags, architecture: Architecture) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags with improved-diffusion's defaults for those that its README omits, and these defaults alone."""
    assumed: dict[str, Any] = {}
    if "num_heads" not in flags:
        assumed["num_heads"] = 4
    if architecture.kind == "upsampler":
        assumed |= {name: size for name, size in (("large_size", 256), ("small_size", 64)) if name not in flags}
    if "rescale_timesteps" not in flags and flags.get("diffusion_steps", 1000) != 1000:
        assumed["rescale_timesteps"] = True
    return {**flags, **assumed}, assumed


def unet_config(flags: Flags, architecture: Architecture) -> dict[str, Any]:
    """The published constructor's arguments of a UNet or upsampler.

    Raises:
        `ValueError`: If a flag is missing or contradicts the tensors, naming it.
    """
    upsampler = architecture.kind == "upsampler"
    size_flag = "large_size" if upsampler else "image_size"
    size = _required(flags, size_flag, "64" if not upsampler else "256")
    if not upsampler and "large_size" in flags:
        raise ValueError(
            f"--large_size {flags['large_size']} is a flag of upsamplers, but the tensors take no low-resolution image."
        )
    if upsampler:
        small_size = _required(flags, "small_size", "64")
        if not 0 < small_size < size:
            raise ValueError(f"--small_size {small_size} is not below --large_size {size}.")
        if flags.get("image_size", size) != size:
            raise ValueError(f"--image_size {flags['image_size']} and --large_size {size} contradict each other.")
    _agree(flags, "class_cond", architecture.num_classes is not None)
    _agree(flags, "learn_sigma", architecture.learns_sigma)
    config = _common_config(flags, architecture, size_flag, prefix="")
    heads = _heads(flags, architecture, ("num_heads", "num_head_channels"))
    if heads is None:
        raise ValueError(
            "--num_heads or --num_head_channels is missing, and the tensors do not determine the number of "
            "attention heads;  the published scripts' default is --num_heads 4."
        )
    upsample = flags.get("num_heads_upsample", -1)
    if upsample != -1 and "num_heads" in heads:
        _divides("num_heads_upsample", upsample, architecture.attended_widths)
        heads["num_heads_upsample"] = upsample
    return {
        **config,
        **heads,
        "dropout": flags.get("dropout", 0.0),
        "use_new_attention_order": flags.get("use_new_attention_order", False),
    }


def classifier_config(flags: Flags, architecture: Architecture, alone: bool = False) -> dict[str, Any]:
    """The published constructor's arguments of a classifier, with the noise schedule that it was trained on.

    Args:
        flags (`Mapping[str, Any]`): From [`parse_flags`].
        architecture ([`Architecture`]): The architecture that the tensors determine.
        alone (`bool`, defaults to `False`): Whether it is converted without a UNet, so that `--num_channels`,
            `--use_new_attention_order` and the like are the classifier's, unless the flags describe both.

    Raises:
        `ValueError`: If a flag is missing or contradicts the tensors, naming it.
    """
    if "image_size" not in flags and "large_size" in flags:  # it guides an upsampler
        flags = {**flags, "image_size": flags["large_size"]}
    if "image_size" not in flags and "image_size" in architecture.config:
        flags = {**flags, "image_size": architecture.config["image_size"]}
    _required(flags, "image_size", "64")
    described = any(name.startswith("classifier_") and name != "classifier_scale" for name in flags)
    own = alone and not (described and any(name in flags for name in ("num_channels", "num_res_blocks", "class_cond")))
    _agree(flags, "classifier_pool", architecture.config["pool"])
    config = _common_config(flags, architecture, "image_size", prefix="" if own and not described else "classifier_")
    heads = _heads(flags, architecture, ("classifier_num_heads", "classifier_num_head_channels"))
    published = _scripts_make(architecture, flags["image_size"])
    published = published and not any(width % 64 for width in architecture.attended_widths)
    if heads is None and (
        own or not published
    ):  # in the scripts this flag sets the heads of a classifier of another size
        heads = _heads(flags, architecture, ("num_heads", "num_head_channels"))
    if heads is None and not published:
        raise ValueError(
            "--classifier_num_heads or --classifier_num_head_channels is missing, and the tensors do not determine "
            "the number of attention heads; the published scripts' heads of 64 channels only apply to the sizes and "
            "widths of their own classifiers, and this one has others."
        )
    heads = heads or {"num_head_channels": 64}
    schedule = scheduler_arguments(flags, learns_sigma=False)
    trained_on = {name: schedule[name] for name in ("num_train_timesteps", "beta_schedule", "rescale_timesteps")}
    new_order = own and flags.get("use_new_attention_order", False)
    return {**config, **heads, **trained_on, "use_new_attention_order": new_order}


def scheduler_arguments(flags: Flags, learns_sigma: bool) -> dict[str, Any]:
    """The arguments of the [`ADMScheduler`] that flags describe.

    Raises:
        `ValueError`: If the noise schedule or the number of its steps is missing or unknown.
    """
    schedule = _required(flags, "noise_schedule", "linear")
    steps = _required(flags, "diffusion_steps", "1000")
    if schedule not in SCHEDULES:
        raise ValueError(f"--noise_schedule {schedule} is neither linear nor cosine.")
    if steps < 1:
        raise ValueError(f"--diffusion_steps {steps} is not a positive number.")
    try:
        make_betas(SCHEDULES[schedule], steps)
    except ValueError:
        raise ValueError(
            f"--diffusion_steps {steps} is too few for --noise_schedule {schedule}, whose betas would reach 1; models "
            f"of so few steps were trained with --noise_schedule cosine."
        ) from None
    fixed = "fixed_small" if flags.get("sigma_small", False) else "fixed_large"
    return {
        "num_train_timesteps": steps,
        "beta_schedule": SCHEDULES[schedule],
        "variance_type": "learned_range" if learns_sigma else fixed,
        "prediction_type": "sample" if flags.get("predict_xstart", False) else "epsilon",
        "algorithm_type": "ddim" if flags.get("use_ddim", False) else "ddpm",
        "clip_sample": flags.get("clip_denoised", True),
        "rescale_timesteps": flags.get("rescale_timesteps", False),
    }


def _common_config(flags: Flags, architecture: Architecture, size_flag: str, prefix: str) -> dict[str, Any]:
    """The arguments that UNets and classifiers share, after checking their flags against the tensors."""
    inferred, size = architecture.config, flags[size_flag]
    width, depth = (f"{prefix}width", f"{prefix}depth") if prefix else ("num_channels", "num_res_blocks")
    _agree(flags, width, inferred["model_channels"])
    _agree(flags, depth, inferred["num_res_blocks"])
    _agree(flags, f"{prefix}use_scale_shift_norm", inferred["use_scale_shift_norm"])
    several = len(inferred["channel_mult"]) > 1  # with one level nothing is resampled
    if several:
        _agree(flags, f"{prefix}resblock_updown", inferred["resblock_updown"])
    if "image_size" in inferred:
        _agree(flags, size_flag, inferred["image_size"])
    lowest = 2 ** (len(inferred["channel_mult"]) - 1)
    if size < 1 or size % lowest:
        raise ValueError(
            f"--{size_flag} {size} cannot be halved {len(inferred['channel_mult']) - 1} times, as the tensors' levels "
            f"require."
        )

    scripts = scripts_channel_mult(architecture.kind, size)
    if prefix == "" and "channel_mult" in flags:
        _agree(flags, "channel_mult", inferred["channel_mult"])
    elif scripts is not None and scripts != inferred["channel_mult"]:
        given, found = _spell(scripts), _spell(inferred["channel_mult"])
        fix = "" if prefix else f", or add --channel_mult {found}"
        raise ValueError(
            f"--{size_flag} {size} means widths of {given} times the base in the published scripts, but the tensors "
            f"have {found}: give the size that the model was trained for{fix}."
        )

    resolutions = flags.get(f"{prefix}attention_resolutions")
    if resolutions is not None:
        levels = {2**level for level in range(len(inferred["channel_mult"]))}
        factors = sorted(levels & {size // side for side in resolutions if side > 0})
        if factors != inferred["attention_resolutions"]:
            found = _spell([size // factor for factor in inferred["attention_resolutions"]]) or "none"
            raise ValueError(
                f"--{prefix}attention_resolutions {_spell(resolutions)} contradicts the checkpoint: with --{size_flag} "
                f"{size} its tensors have attention at {found}."
            )
    return {**inferred, "image_size": size}


def _heads(flags: Flags, architecture: Architecture, names: tuple[str, str]) -> dict[str, Any] | None:
    """The attention heads; their width takes precedence over their number, as in the published code."""
    number, width = names
    if flags.get(width, -1) != -1:
        for channels in architecture.attended_widths:
            if flags[width] < 1 or channels % flags[width]:
                raise ValueError(f"--{width} {flags[width]} does not divide the tensors' {channels} channels.")
        return {"num_head_channels": flags[width]}
    if number in flags:
        _divides(number, flags[number], architecture.attended_widths)
        return {"num_heads": flags[number]}
    return None


def _divides(name: str, heads: int, widths: set[int]) -> None:
    for channels in widths:
        if heads < 1 or channels % heads:
            raise ValueError(f"--{name} {heads} does not divide the tensors' {channels} channels.")


def _required(flags: Flags, name: str, default: str) -> Any:
    if name not in flags:
        raise ValueError(
            f"--{name} is missing, and the tensors do not determine it; add the value from training (the published "
            f"scripts' default is --{name} {default})."
        )
    return flags[name]


def _agree(flags: Flags, name: str, inferred: Any) -> None:
    """Raises for a flag that contradicts the tensors."""
    if name in flags and flags[name] != inferred:
        raise ValueError(
            f"--{name} {_spell(flags[name])} contradicts the checkpoint, whose tensors say {_spell(inferred)}."
        )


def _spell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(f"{number:g}" for number in value)
    return str(value)
