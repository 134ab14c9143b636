"""State dicts of the published guided-diffusion code to this library's models, and back.

The published code numbers its layers in the order in which they run; ours are named as in diffusers. Its attention
projects query, key and value in one product whose rows are ordered `(3, heads, width)` or, in the older layout,
`(heads, 3, width)`. They are split into three products here, so that the models have only one layout.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from ..models.classifier_adm import ADMClassifierConfig, ADMForImageClassification
from ..models.layers import ADMAttention, ADMAttentionPool, ADMResnetBlock, Downsample2D, Upsample2D
from ..models.unet_adm import ADMUNet2DModel

# The published constructors' arguments by this library's names. Those with None do not affect the model, or are
# translated separately.
CONSTRUCTOR_ARGUMENTS: dict[str, str | None] = {
    **{name: name for name in ("in_channels", "model_channels", "out_channels", "num_res_blocks", "dropout", "pool")},
    **{name: name for name in ("channel_mult", "conv_resample", "use_scale_shift_norm", "resblock_updown")},
    "image_size": "sample_size",
    "num_classes": "num_class_embeds",
    **dict.fromkeys(("attention_resolutions", "num_heads", "num_head_channels", "num_heads_upsample")),
    **dict.fromkeys(("dims", "use_checkpoint", "use_fp16", "use_new_attention_order")),
}
REQUIRED = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions")

# Parts of our layers, by their published names; "" is the layer's own: of an attention layer query, key and value.
PARTS: dict[type, dict[str, str]] = {
    ADMResnetBlock: {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    ADMAttention: {"group_norm": "norm", "": "qkv", "to_out": "proj_out"},
    ADMAttentionPool: {"": "qkv_proj", "to_out": "c_proj"},
    Downsample2D: {"conv": "op"},
    Upsample2D: {"conv": "conv"},
}
POSITIONS = "positional_embedding"
HEADS = {
    "adaptive": {"head.norm": "out.0", "head.classifier.2": "out.3"},
    "attention": {"head.norm": "out.0", "head.classifier": "out.2"},
    "spatial": {"head.linear_1": "out.0", "head.linear_2": "out.2"},
    "spatial_v2": {"head.linear_1": "out.0", "head.norm": "out.1", "head.linear_2": "out.3"},
}


def convert_openai_unet(
    state_dict: dict[str, torch.Tensor], config: dict[str, Any], super_resolution: bool = False
) -> ADMUNet2DModel:
    """The UNet of a state dict of the published code, in float32 and in evaluation mode.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The published names and tensors; floating-point, any precision.
        config (`dict`): The arguments of the published constructor (`UNetModel`, or `SuperResModel`), where
            `attention_resolutions` are downsampling factors.
        super_resolution (`bool`, defaults to `False`): Whether the model is an upsampler, which also takes a
            low-resolution image of `in_channels` channels.

    Raises:
        `ValueError`: For the first name or shape that does not fit the config, or an argument that the published
            constructor lacks.
    """
    return _load(make_unet(config, super_resolution), state_dict, config.get("use_new_attention_order", False))


def convert_openai_classifier(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> ADMForImageClassification:
    """The noisy-image classifier of a state dict of the published code, as [`convert_openai_unet`].

    `config` has the arguments of the published constructor, `EncoderUNetModel`, where `out_channels` is the number of
    classes, and may have those that only [`ADMClassifierConfig`] has, such as `beta_schedule` or `id2label`.
    """
    return _load(make_classifier(config), state_dict, config.get("use_new_attention_order", False))


def to_openai_state_dict(
    model: ADMUNet2DModel | ADMForImageClassification, new_attention_order: bool = False
) -> dict[str, torch.Tensor]:
    """The state dict of a model for the published code; the inverse of the two functions above.

    Args:
        model ([`ADMUNet2DModel`] or [`ADMForImageClassification`]): Converted or trained here.
        new_attention_order (`bool`, defaults to `False`): Order the rows of query, key and value as the published
            models with `use_new_attention_order=True` do, the value that the published constructor must then get.

    Returns:
        `dict[str, torch.Tensor]`: The published names and tensors in float32, in the published order. Tensors whose
        order does not change share the model's memory.

    Raises:
        `ValueError`: If query, key and value are fused; unfuse them first.
    """
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        raise ValueError("The attention layers are fused; call unfuse_qkv_projections() on the model first.")
    return {tensor.name: tensor.to_published() for tensor in published_tensors(model, new_attention_order)}


def make_unet(config: dict[str, Any], super_resolution: bool = False) -> ADMUNet2DModel:
    """The UNet of a published config, on the meta device: names and shapes, no weights."""
    arguments = _our_arguments(config, foreign="pool")
    if super_resolution:
        arguments["low_res_channels"] = config["in_channels"]
    heads_upsample = config.get("num_heads_upsample", -1)
    if heads_upsample != -1 and arguments["num_heads"] is not None:
        arguments["num_heads_upsample"] = heads_upsample
    with torch.device("meta"):
        return ADMUNet2DModel(**arguments).eval()


def make_classifier(config: dict[str, Any]) -> ADMForImageClassification:
    """The classifier of a published config, on the meta device: names and shapes, no weights."""
    ours = ADMClassifierConfig().to_dict().keys() - CONSTRUCTOR_ARGUMENTS
    own = {name: value for name, value in config.items() if name in ours}
    arguments = _our_arguments({name: config[name] for name in config if name not in ours}, foreign="num_classes")
    settings = {"num_labels": arguments.pop("out_channels"), "pool": "adaptive", **arguments, **own}
    with torch.device("meta"):
        return ADMForImageClassification(ADMClassifierConfig(**settings)).eval()


def _our_arguments(config: dict[str, Any], foreign: str) -> dict[str, Any]:
    """A published constructor's arguments and defaults in this library's spelling; `foreign` only the other one has."""
    for name in REQUIRED:
        if name not in config:
            raise ValueError(f"The published constructor's argument {name!r} is missing from the config.")
    for name in config:
        if name not in CONSTRUCTOR_ARGUMENTS or name == foreign:
            raise ValueError(f"The published constructor has no argument {name!r}, which the config gives.")
    head_dim = config.get("num_head_channels", -1)
    return {
        # the published constructor's defaults, where they differ from ours
        "channel_mult": (1, 2, 4, 8),
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        **{ours: config[name] for name, ours in CONSTRUCTOR_ARGUMENTS.items() if ours and name in config},
        "attention_resolutions": [config["image_size"] // factor for factor in config["attention_resolutions"]],
        "num_heads": config.get("num_heads", 1) if head_dim == -1 else None,
        "attention_head_dim": None if head_dim == -1 else head_dim,
    }


def _load(model: Any, state_dict: dict[str, torch.Tensor], new_order: bool) -> Any:
    """A model that was on the meta device, with copies of the published tensors and no random initialisation."""
    check_tensors(model, state_dict)
    converted = {
        name: tensor.to(torch.float32, copy=True).contiguous()
        for name, tensor in converted_tensors(model, state_dict, new_order)
    }
    model.load_state_dict(converted, assign=True)
    return model


def check_tensors(model: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raises for a state dict whose names or shapes do not match the model, naming the first of them."""
    expected = published_shapes(model)
    for name, shape in expected.items():
        if name not in state_dict:
            raise ValueError(f"The checkpoint has no tensor {name}, so the checkpoint belongs to another config.")
        given = tuple(state_dict[name].shape)
        if any(a != b for a, b in zip_longest(given, shape, fillvalue=1)):  # a 1x1 convolution may be a linear layer
            raise ValueError(f"{name} has shape {given}, not {shape}: the checkpoint belongs to another config.")
    if unknown := state_dict.keys() - expected.keys():
        several = f"{len(unknown)} tensors that are not in the config, such as {min(unknown)}"
        raise ValueError(f"The checkpoint holds {several}: the checkpoint belongs to another config.")


def converted_tensors(
    model: Any, state_dict: Mapping[str, torch.Tensor], new_order: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields our names and the published tensors of a state dict that passed [`check_tensors`].

    One by one, and as views if the order does not change, so that a file larger than the memory can be converted.
    """
    for tensor in published_tensors(model, new_order):
        yield from tensor.to_ours(state_dict[tensor.name])


def published_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Published name -> shape for every tensor of one of our models, in the published order."""
    return {tensor.name: tensor.shape for tensor in published_tensors(model)}


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of the published code, and the parameters that it is here."""

    name: str  # the published one
    shape: tuple[int, ...]  # the published one: our linear layers are 1x1 convolutions there
    parameters: Mapping[str, torch.Tensor]  # ours by name: one, or those of query, key and value
    heads: int = 1  # groups in which rows of query, key and value take turns; 1 is the new attention order

    def to_ours(self, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Our names and tensors, of the published tensor."""
        first = next(iter(self.parameters.values()))
        if len(self.parameters) == 3:
            rows = tensor.reshape(3 * len(first), *first.shape[1:]).unflatten(0, (self.heads, 3, -1))
            return zip(self.parameters, (part.flatten(0, 1) for part in rows.unbind(1)), strict=True)
        tensor = tensor.T if self.name.endswith(POSITIONS) else tensor.reshape(first.shape)
        return zip(self.parameters, [tensor], strict=True)

    def to_published(self) -> torch.Tensor:
        """The published tensor in float32, of our parameters."""
        parts = [parameter.detach() for parameter in self.parameters.values()]
        tensor = parts[0].T.contiguous() if self.name.endswith(POSITIONS) else parts[0]
        if len(parts) == 3:
            tensor = torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 2)
        return tensor.to(torch.float32).reshape(self.shape)


def published_tensors(model: Any, new_order: bool = False) -> Iterator[PublishedTensor]:
    """Every tensor of one of our models as in the published code, in the published order."""
    for layer, their_layer in _layers(model):
        for part, their_part in PARTS.get(type(model.get_submodule(layer)), {"": ""}).items():
            ours, theirs = f"{layer}.{part}".rstrip("."), f"{their_layer}.{their_part}".rstrip(".")
            module: nn.Module = model.get_submodule(ours)
            if isinstance(module, ADMAttention | ADMAttentionPool):
                if isinstance(module, ADMAttentionPool):
                    positions = module.position_embedding
                    parameters = {f"{ours}.position_embedding": positions}
                    yield PublishedTensor(f"{their_layer}.{POSITIONS}", tuple(positions.T.shape), parameters)
                heads = 1 if new_order or isinstance(module, ADMAttentionPool) else module.heads
                for kind in ("weight", "bias"):
                    names = [f"to_{name}.{kind}" for name in "qkv"]
                    parameters = {f"{ours}.{name}": module.get_parameter(name) for name in names}
                    channels = module.to_q.in_features
                    shape = (3 * channels, channels, 1) if kind == "weight" else (3 * channels,)
                    yield PublishedTensor(f"{theirs}.{kind}", shape, parameters, heads)
            else:
                convolves = {"proj_out": 1, "c_proj": 1}.get(their_part, 2 if ours == "head.classifier.2" else 0)
                for kind, parameter in module.named_parameters(recurse=False):
                    shape = (*parameter.shape, *[1] * (convolves if kind == "weight" else 0))
                    yield PublishedTensor(f"{theirs}.{kind}", shape, {f"{ours}.{kind}": parameter})


def _layers(model: Any) -> Iterator[tuple[str, str]]:
    """Our name and the published one of every layer, in the published order."""
    yield from (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"))
    if getattr(model, "class_embedding", None) is not None:
        yield "class_embedding", "label_emb"
    yield "conv_in", "input_blocks.0.0"

    index = 1
    for level, block in enumerate(model.down_blocks):
        yield from _layers_of_level(block, f"down_blocks.{level}", "input_blocks", index)
        index += len(block.resnets)
        if block.resamplers:
            yield f"down_blocks.{level}.resamplers.0", f"input_blocks.{index}.0"
            index += 1

    for i, layer in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{layer}", f"middle_block.{i}"

    if not isinstance(model, ADMUNet2DModel):
        yield from HEADS[model.config.pool].items()
        return
    index = 0
    for level, block in enumerate(model.up_blocks):
        yield from _layers_of_level(block, f"up_blocks.{level}", "output_blocks", index)
        index += len(block.resnets)
        if block.resamplers:  # the last layer of the level's last block
            position = 2 if block.attentions else 1
            yield f"up_blocks.{level}.resamplers.0", f"output_blocks.{index - 1}.{position}"
    yield from (("conv_norm_out", "out.0"), ("conv_out", "out.2"))


def _layers_of_level(block: Any, ours: str, published: str, index: int) -> Iterator[tuple[str, str]]:
    for i in range(len(block.resnets)):
        yield f"{ours}.resnets.{i}", f"{published}.{index + i}.0"
        if block.attentions:
            yield f"{ours}.attentions.{i}", f"{published}.{index + i}.1"
