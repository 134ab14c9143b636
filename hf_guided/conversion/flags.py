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

# What a flag takes, in words for errors, and its parser, which raises `KeyError` or `ValueError`.
_TRUTH = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
Parser = tuple[str, Callable[[str], Any]]
_BOOLEAN: Parser = ("True or False", lambda text: _TRUTH[text.lower()])
_INTEGER: Parser = ("a whole number", int)
_INTEGERS: Parser = ("whole numbers separated by commas", lambda text: tuple(map(int, text.split(","))))
_NUMBER: Parser = ("a number", float)
_NUMBERS: Parser = ("numbers separated by commas", lambda text: tuple(map(float, text.split(","))))
_TEXT: Parser = ("a text", str)
_FLAGS: dict[str, Parser] = {
    # the model
    **dict.fromkeys(("image_size", "large_size", "small_size", "num_channels", "num_res_blocks"), _INTEGER),
    **dict.fromkeys(("num_heads", "num_heads_upsample", "num_head_channels"), _INTEGER),
    **dict.fromkeys(("class_cond", "learn_sigma", "use_scale_shift_norm", "resblock_updown"), _BOOLEAN),
    "use_new_attention_order": _BOOLEAN,
    "attention_resolutions": _INTEGERS,
    "channel_mult": _NUMBERS,
    "dropout": _NUMBER,
    # the classifier; its heads are ours, since the published code only has heads of 64 channels
    **dict.fromkeys(("classifier_width", "classifier_depth"), _INTEGER),
    **dict.fromkeys(("classifier_num_heads", "classifier_num_head_channels"), _INTEGER),
    **dict.fromkeys(("classifier_use_scale_shift_norm", "classifier_resblock_updown"), _BOOLEAN),
    "classifier_attention_resolutions": _INTEGERS,
    "classifier_pool": _TEXT,
    # the diffusion
    "diffusion_steps": _INTEGER,
    "noise_schedule": _TEXT,
    **dict.fromkeys(("predict_xstart", "rescale_timesteps", "sigma_small"), _BOOLEAN),
    # sampling
    "timestep_respacing": _TEXT,
    **dict.fromkeys(("use_ddim", "clip_denoised"), _BOOLEAN),
    "classifier_scale": _NUMBER,
}

# Flags of training, computation and files, which a converted model does not need.
_IGNORED = {
    *("batch_size", "microbatch", "lr", "lr_anneal_steps", "anneal_lr", "weight_decay", "ema_rate", "iterations"),
    *("schedule_sampler", "noised", "use_kl", "rescale_learned_sigmas", "log_interval", "eval_interval"),
    *("use_checkpoint", "use_fp16", "fp16_scale_growth", "classifier_use_fp16", "num_samples", "base_samples"),
    *("data_dir", "val_data_dir", "model_path", "classifier_path", "resume_checkpoint", "save_interval"),
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
_UPSAMPLER_CHANNEL_MULT = {64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (1, 1, 2, 2, 4, 4)}

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def scripts_channel_mult(kind: str, image_size: int) -> tuple[float, ...] | None:
    """The widths that the published scripts give a model of this size, if they support it."""
    if kind == "classifier" and image_size == 32:
        return None
    return (_UPSAMPLER_CHANNEL_MULT if kind == "upsampler" else _CHANNEL_MULT).get(image_size)


def parse_flags(text: str) -> dict[str, Any]:
    """The values by name of flags written as for the published scripts, without those that a model does not need.

    Args:
        text (`str`): `--name value` or `--name=value`, the later of two wins; or a whole command line, or the README's
            lines `MODEL_FLAGS="…"`.

    Raises:
        `ValueError`: For a flag that neither guided-diffusion nor improved-diffusion has, or a missing or wrong value.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ValueError(f"The flags cannot be read, {error}: {text}") from None
    expanded: list[str] = []  # of lines such as MODEL_FLAGS="…"
    for word in words:
        assignment = re.match(r"[A-Z_]+=(.*)$", word, re.DOTALL)
        expanded += shlex.split(assignment[1]) if assignment else [word]
    if variable := next((word for word in expanded if word.startswith("$")), None):
        raise ValueError(f"{variable} in the flags was not expanded; put double quotes around the flags for the shell.")
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
            wanted, parse = _FLAGS[name]
            try:
                flags[name] = parse(value)
            except (KeyError, ValueError):
                raise ValueError(f"--{name} takes {wanted}; {value!r} was given.") from None
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


def improved_defaults(flags: Flags, architecture: Architecture) -> dict[str, Any]:
    """improved-diffusion's defaults for the flags that its README omits, without those given."""
    defaults: dict[str, Any] = {"num_heads": 4}
    if architecture.kind == "upsampler":
        defaults |= {"large_size": 256, "small_size": 64}
    if flags.get("diffusion_steps", 1000) != 1000:
        defaults["rescale_timesteps"] = True
    return {name: value for name, value in defaults.items() if name not in flags}


def unet_config(flags: Flags, architecture: Architecture) -> dict[str, Any]:
    """The published constructor's arguments of a UNet or upsampler; a missing or wrong flag is a `ValueError`."""
    upsampler = architecture.kind == "upsampler"
    size_flag = "large_size" if upsampler else "image_size"
    size = _required(flags, size_flag, "256" if upsampler else "64")
    if upsampler:
        small_size = _required(flags, "small_size", "64")
        if not 0 < small_size < size:
            raise ValueError(f"--small_size {small_size} is not below --large_size {size}.")
        if flags.get("image_size", size) != size:
            raise ValueError(f"--image_size {flags['image_size']} and --large_size {size} contradict each other.")
    elif "large_size" in flags:
        raise ValueError(
            f"--large_size {flags['large_size']} is a flag of upsamplers, and these tensors take no small image; leave "
            f"it out."
        )
    _agree(flags, "class_cond", architecture.num_classes is not None)
    _agree(flags, "learn_sigma", architecture.learns_sigma)
    config = _common_config(flags, architecture, size_flag, prefix="")
    heads = _heads(flags, architecture, prefix="")
    if heads is None:
        raise ValueError(
            "--num_heads or --num_head_channels is missing, and the tensors do not determine the number of attention "
            "heads; the published scripts' default is --num_heads 4."
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
    """The published constructor's arguments of a classifier, with its noise schedule; raises as [`unet_config`].

    Of a classifier converted without a UNet (`alone`), `--num_channels`, `--use_new_attention_order` and the like are
    its own, unless the flags describe both.
    """
    if "large_size" in flags:  # it guides an upsampler
        flags = {"image_size": flags["large_size"], **flags}
    size = _required({**architecture.config, **flags}, "image_size", "64")
    flags = {**flags, "image_size": size}
    described = any(name.startswith("classifier_") and name != "classifier_scale" for name in flags)
    own = alone and not (described and any(name in flags for name in ("num_channels", "num_res_blocks", "class_cond")))
    _agree(flags, "classifier_pool", architecture.config["pool"])
    config = _common_config(flags, architecture, "image_size", prefix="" if own and not described else "classifier_")
    heads = _heads(flags, architecture, prefix="classifier_")
    published = _scripts_make(architecture, size) and not any(width % 64 for width in architecture.attended_widths)
    if heads is None and (own or not published):  # in the scripts this flag sets the heads where the size is another
        heads = _heads(flags, architecture, prefix="")
    if heads is None and not published:
        raise ValueError(
            "--classifier_num_heads or --classifier_num_head_channels is missing, and the tensors do not determine the "
            "number of attention heads; only the published scripts' own classifiers have heads of 64 channels."
        )
    heads = heads or {"num_head_channels": 64}
    schedule = scheduler_arguments(flags, learns_sigma=False)
    trained_on = {name: schedule[name] for name in ("num_train_timesteps", "beta_schedule", "rescale_timesteps")}
    new_order = own and flags.get("use_new_attention_order", False)
    return {**config, **heads, **trained_on, "use_new_attention_order": new_order}


def scheduler_arguments(flags: Flags, learns_sigma: bool) -> dict[str, Any]:
    """The arguments of the [`ADMScheduler`] that flags describe; raises as [`unet_config`]."""
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
            f"--diffusion_steps {steps} is too few for --noise_schedule {schedule}, whose betas would reach 1; such "
            f"models were trained with --noise_schedule cosine."
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
    inferred, size, widths = architecture.config, flags[size_flag], architecture.config["channel_mult"]
    width, depth = (f"{prefix}width", f"{prefix}depth") if prefix else ("num_channels", "num_res_blocks")
    _agree(flags, width, inferred["model_channels"])
    _agree(flags, depth, inferred["num_res_blocks"])
    _agree(flags, f"{prefix}use_scale_shift_norm", inferred["use_scale_shift_norm"])
    if len(widths) > 1:  # with one level nothing is resampled
        _agree(flags, f"{prefix}resblock_updown", inferred["resblock_updown"])
    _agree(flags, size_flag, inferred.get("image_size", size))
    if size < 1 or size % 2 ** (len(widths) - 1):
        raise ValueError(f"--{size_flag} {size} cannot be halved {len(widths) - 1} times, as the tensors require.")

    scripts = scripts_channel_mult(architecture.kind, size)
    if prefix == "" and "channel_mult" in flags:
        _agree(flags, "channel_mult", widths)
    elif scripts is not None and scripts != widths:
        fix = "" if prefix else f", or add --channel_mult {_spell(widths)}"
        raise ValueError(
            f"--{size_flag} {size} means widths of {_spell(scripts)} times the base in the published scripts, but the "
            f"tensors have {_spell(widths)}: give the size that the model was trained for{fix}."
        )

    if (resolutions := flags.get(f"{prefix}attention_resolutions")) is not None:
        levels = {2**level for level in range(len(widths))}
        factors = sorted(levels & {size // side for side in resolutions if side > 0})
        if factors != inferred["attention_resolutions"]:
            found = _spell([size // factor for factor in inferred["attention_resolutions"]]) or "none"
            raise ValueError(
                f"--{prefix}attention_resolutions {_spell(resolutions)} contradicts the checkpoint: with --{size_flag} "
                f"{size} its tensors have attention at {found}."
            )
    return {**inferred, "image_size": size}


def _heads(flags: Flags, architecture: Architecture, prefix: str) -> dict[str, Any] | None:
    """The attention heads; their width takes precedence over their number, as in the published code."""
    for name, unset in (("num_head_channels", -1), ("num_heads", None)):
        value = flags.get(f"{prefix}{name}", unset)
        if value != unset:
            _divides(f"{prefix}{name}", value, architecture.attended_widths)
            return {name: value}
    return None


def _divides(name: str, divisor: int, widths: set[int]) -> None:
    for channels in widths:
        if divisor < 1 or channels % divisor:
            raise ValueError(f"--{name} {divisor} does not divide the tensors' {channels} channels.")


def _required(flags: Flags, name: str, default: str) -> Any:
    if name not in flags:
        raise ValueError(f"--{name} is missing; add the one of training (the scripts' default is --{name} {default}).")
    return flags[name]


def _agree(flags: Flags, name: str, inferred: Any) -> None:
    """Raises for a flag that contradicts the tensors."""
    if name in flags and flags[name] != inferred:
        given, found = _spell(flags[name]), _spell(inferred)
        raise ValueError(f"--{name} {given} contradicts the checkpoint, whose tensors say {found}.")


def _spell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(f"{number:g}" for number in value)
    return str(value)
