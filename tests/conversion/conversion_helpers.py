"""What the tests of the conversion share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_guided.conversion.openai import make_unet, published_shapes

SCHEDULE = "--diffusion_steps 1000 --noise_schedule linear"


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def script_made(image_size: int, upsampler: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small model that improved-diffusion's scripts make: their widths times 32."""
    config = {
        "image_size": image_size,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "channel_mult": {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}[image_size],
        "num_heads": 4,
    }
    return published_shapes(make_unet(config, upsampler))


def write_random_checkpoint(shapes: Mapping[str, Sequence[int]], path: Path) -> int:
    """Writes weights that keep activations of order one, and returns their number."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.empty(tuple(shape)).uniform_(-1, 1, generator=generator)
        if len(shape) > 1:
            weights[name] = weight.mul_((1.5 / weight[0].numel()) ** 0.5)
        else:
            weights[name] = weight.mul_(0.2).add_(name.endswith("weight"))
    torch.save(weights, path)
    return sum(weight.numel() for weight in weights.values())


def needed_flags(config: dict[str, Any], schedule: str = SCHEDULE) -> str:
    """Just those flags of a reference model that its tensors do not determine."""
    if "pool" in config:
        flags = {"image_size": config["image_size"]}
        heads = {f"classifier_{name}": config.get(name, -1) for name in ("num_heads", "num_head_channels")}
    else:
        upsampler = config["image_size"] == 32
        flags = {"large_size": 32, "small_size": 8} if upsampler else {"image_size": config["image_size"]}
        heads = {name: config.get(name, -1) for name in ("num_heads", "num_head_channels", "num_heads_upsample")}
    flags |= {name: value for name, value in heads.items() if value != -1}
    if config.get("use_new_attention_order"):
        flags["use_new_attention_order"] = True
    return f"{spell(flags)} {schedule}"


def all_flags(config: dict[str, Any], schedule: str = SCHEDULE) -> str:
    """Every flag of a reference model that the published scripts have."""
    sides = [config["image_size"] // factor for factor in config["attention_resolutions"]]
    if "pool" in config:
        told = {
            "classifier_width": config["model_channels"],
            "classifier_depth": config["num_res_blocks"],
            "classifier_attention_resolutions": sides,
            "classifier_use_scale_shift_norm": config["use_scale_shift_norm"],
            "classifier_resblock_updown": config["resblock_updown"],
            "classifier_pool": config["pool"],
        }
    else:
        told = {
            "num_channels": config["model_channels"],
            "num_res_blocks": config["num_res_blocks"],
            "attention_resolutions": sides,
            "channel_mult": config["channel_mult"],
            "class_cond": config["num_classes"] is not None,
            "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
            "use_scale_shift_norm": config["use_scale_shift_norm"],
            "resblock_updown": config["resblock_updown"],
        }
    return f"{needed_flags(config, schedule)} {spell(told)}"


def spell(flags: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)

    return " ".join(f"--{name} {text(value)}" for name, value in flags.items())
