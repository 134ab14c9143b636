"""The architecture of a published checkpoint, inferred from the names and shapes of its state dict.

They do not determine the number of attention heads, the order of the rows of its projections, the image size or the
noise schedule.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, Sequence[int]]
_POSITIONS = "out.2.positional_embedding"


@dataclass(frozen=True)
class Architecture:
    """The architecture that the tensors of a checkpoint determine."""

    kind: str  # "unet", "upsampler" or "classifier"
    config: dict[str, Any]  # arguments of the published constructor; `image_size` only for pooling by attention

    @property
    def image_channels(self) -> int:
        return self.config["in_channels"]

    @property
    def learns_sigma(self) -> bool:
        return self.kind != "classifier" and self.config["out_channels"] == 2 * self.config["in_channels"]

    @property
    def num_classes(self) -> int | None:
        return self.config["out_channels"] if self.kind == "classifier" else self.config["num_classes"]

    @property
    def attended_widths(self) -> set[int]:
        """Channels that attention layers split into heads."""
        widths = [int(mult * self.config["model_channels"]) for mult in self.config["channel_mult"]]
        return {widths[-1], *(widths[factor.bit_length() - 1] for factor in self.config["attention_resolutions"])}


def infer_architecture(
    shapes: Shapes, image_size: int | None = None, classifier_depth: int | None = None
) -> Architecture:
    """The architecture of a model, from the names and shapes of its tensors.

    `image_size` and `classifier_depth` are values of the flags, for classifiers whose tensors fit several numbers of
    residual blocks. Not all tensors are checked; [`check_tensors`] does that.

    Raises:
        `ValueError`: If the tensors are not those of a model of guided-diffusion or improved-diffusion, or if they fit
            several of them.
    """
    numbers = {int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name))}
    model_channels = _size(shapes, "time_embed.0.weight", 1)
    in_channels = _size(shapes, "input_blocks.0.0.weight", 1)
    total = max(numbers) + 1
    if total > 2 * len(numbers):
        raise ValueError("The numbers of the input_blocks have gaps that no published model has.")

    is_unet = any(name.startswith("output_blocks.") for name in shapes)
    gaps = set(range(total)) - numbers  # layers without weights: pooling instead of a convolution
    halving = gaps | {i for i in numbers if f"input_blocks.{i}.0.op.weight" in shapes}
    resblock_updown = False
    if halving:
        num_res_blocks = min(halving) - 1
    elif is_unet:
        # A residual block that halves the image has no mark, but one that doubles it is a level's second or third.
        mark = r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight$"
        ups = [int(match[1]) for name in shapes if (match := re.match(mark, name))]
        resblock_updown = bool(ups)
        num_res_blocks = min(ups) if ups else total - 1
    else:
        num_res_blocks = _encoder_depth(shapes, total, image_size, classifier_depth)
        resblock_updown = num_res_blocks < total - 1
    if num_res_blocks < 1 or total % (num_res_blocks + 1):
        raise ValueError(f"{total} input_blocks are not levels of {num_res_blocks} residual blocks each.")

    firsts = range(1, total, num_res_blocks + 1)  # block of each level
    widths = [_size(shapes, f"input_blocks.{first}.0.out_layers.3.weight", 0) for first in firsts]
    attends = [f"input_blocks.{first}.1.qkv.weight" in shapes for first in firsts]
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "model_channels": model_channels,
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": [2**level for level, attended in enumerate(attends) if attended],
        "channel_mult": tuple(_multiple(width, model_channels) for width in widths),
        "conv_resample": not gaps,
        "resblock_updown": resblock_updown,
        "use_scale_shift_norm": _size(shapes, "input_blocks.1.0.emb_layers.1.weight", 0) == 2 * widths[0],
    }
    if not is_unet:
        return Architecture("classifier", {**config, **_head(shapes, len(widths))})

    out_channels = _size(shapes, "out.2.weight", 0)
    # Images are grey or coloured; with a learned variance the output has twice their channels.
    image_channels = {1: 1, 2: 1, 3: 3, 6: 3}.get(out_channels, in_channels)
    if not {in_channels, out_channels} <= {image_channels, 2 * image_channels}:
        raise ValueError(f"No published model takes {in_channels} channels and returns {out_channels}.")
    config |= {
        "in_channels": image_channels,
        "out_channels": out_channels,
        "num_classes": _size(shapes, "label_emb.weight", 0) if "label_emb.weight" in shapes else None,
    }
    return Architecture("unet" if in_channels == image_channels else "upsampler", config)


def _encoder_depth(shapes: Shapes, total: int, image_size: int | None, wanted: int | None) -> int:
    """Residual blocks per level of a classifier whose halving blocks look like the others.

    A block that halves keeps the width and has no attention; within a level the width changes at most once, in front,
    and attention is everywhere or nowhere. Few numbers of blocks fit that, mostly one.
    """
    attends = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in range(total)]
    widens = [f"input_blocks.{i}.0.skip_connection.weight" in shapes for i in range(total)]
    tokens = _size(shapes, _POSITIONS, 1) - 1 if _POSITIONS in shapes else None
    fitting = []
    for depth in range(1, total):
        firsts = range(1, total, depth + 1)
        lowest_side = None if image_size is None else image_size / 2 ** (len(firsts) - 1)
        if (
            total % (depth + 1) == 0
            and not any(widens[i] for i in range(total) if i not in firsts)
            and not any(attends[i] for i in range(0, total, depth + 1))
            and all(len(set(attends[first : first + depth])) == 1 for first in firsts)
            and (lowest_side is None or (lowest_side.is_integer() and tokens in (None, lowest_side**2)))
        ):
            fitting.append(depth)
    if not fitting:
        size = "" if image_size is None else f" of an image_size of {image_size}"
        raise ValueError(f"The {total} input_blocks do not match a published classifier{size}.")
    if wanted in fitting:
        return wanted
    if len(fitting) > 1:
        several = " or ".join(map(str, fitting))
        raise ValueError(f"The classifier's tensors fit {several} residual blocks per level; give --classifier_depth.")
    return fitting[0]


def _head(shapes: Shapes, num_levels: int) -> dict[str, Any]:
    """The classifier's pool and classes, and its image size if the tensors determine it."""
    if _POSITIONS in shapes:
        tokens = _size(shapes, _POSITIONS, 1) - 1
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise ValueError(f"{_POSITIONS} has {tokens} pixels, not a square number as in published classifiers.")
        num_classes = _size(shapes, "out.2.c_proj.weight", 0)
        return {"pool": "attention", "out_channels": num_classes, "image_size": side * 2 ** (num_levels - 1)}
    if len(shapes.get("out.0.weight", ())) == 1:
        return {"pool": "adaptive", "out_channels": _size(shapes, "out.3.weight", 0)}
    if "out.3.weight" in shapes:
        return {"pool": "spatial_v2", "out_channels": _size(shapes, "out.3.weight", 0)}
    return {"pool": "spatial", "out_channels": _size(shapes, "out.2.weight", 0)}


def _size(shapes: Shapes, name: str, dimension: int) -> int:
    """One dimension of a tensor that the model must have."""
    shape = shapes.get(name)
    if shape is None or len(shape) <= dimension or shape[dimension] < 1:
        found = "has no tensor" if shape is None else f"has a tensor of shape {tuple(shape)} named"
        raise ValueError(f"It {found} {name}: these are not the weights of a model of the published code.")
    return shape[dimension]


def _multiple(width: int, base: int) -> int | float:
    """The entry of channel_mult that gives a width; the published code truncates the product."""
    multiple = width / base
    if int(multiple * base) != width:
        multiple = math.nextafter(multiple, math.inf)
    return int(multiple) if multiple == int(multiple) else multiple
