"""State dicts of the published guided-diffusion code to this library's models, and back.

The published code numbers its layers in the order in which they run; ours are named as in diffusers. Its attention
projects query, key and value in one product whose rows are ordered `(3, heads, width)` or, in the older layout,
`(heads, 3, width)`. They are split into three products here, so that the models have only one layout.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.classifier_adm import ADMClassifierConfig, ADMForImageClassification
from ..models.layers import ADMAttention, ADMAttentionPool, ADMResnetBlock, Downsample2D
from ..models.unet_adm import ADMUNet2DModel

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

REQUIRED_ARGUMENTS = (
    "image_size",
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "attention_resolutions",
)

# The published constructors' arguments by this library's names. Those with None do not affect the model, or are
# translated separately.
CONSTRUCTOR_ARGUMENTS = {
    "image_size": "sample_size",
    "in_channels": "in_channels",
    "model_channels": "model_channels",
    "out_channels": "out_channels",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": None,
    "dropout": "dropout",
    "channel_mult": "channel_mult",
    "conv_resample": "conv_resample",
    "dims": None,
    "num_classes": "num_class_embeds",
    "use_checkpoint": None,
    "use_fp16": None,
    "num_heads": None,
    "num_head_channels": None,
    "num_heads_upsample": None,
    "use_scale_shift_norm": "use_scale_shift_norm",
    "resblock_updown": "resblock_updown",
    "use_new_attention_order": None,
    "pool": "pool",
}


def convert_openai_unet(
    state_dict: dict[str, torch.Tensor], config: dict[str, Any], super_resolution: bool = False
) -> ADMUNet2DModel:
    """The UNet of a state dict of the published code.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The published names and tensors; floating-point, any precision.
        config (`dict`): The arguments of the published constructor (`UNetModel`, or `SuperResModel`), where
            `attention_resolutions` are downsampling factors.
        super_resolution (`bool`, defaults to `False`): Whether the model is an upsampler, which also takes a
            low-resolution image of `in_channels` channels.

    Returns:
        [`ADMUNet2DModel`]: In float32 and in evaluation mode.

    Raises:
        `ValueError`: If names or shapes do not fit the config, naming the first of them, or if the config has an
            argument that the published constructor lacks.
    """
    return _load(make_unet(config, super_resolution), state_dict, config.get("use_new_attention_order", False))


def convert_openai_classifier(state_dict: dict[str, torch.Tensor], config: dict[str, Any]) -> ADMForImageClassification:
    """The noisy-image classifier of a state dict of the published code.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The published names and tensors; floating-point, any precision.
        config (`dict`): The arguments of the published constructor, `EncoderUNetModel`; `out_channels` is the number
            of classes. Arguments of [`ADMClassifierConfig`] that the published one lacks, such as `beta_schedule` or
            `id2label`, are allowed, too.

    Returns:
        [`ADMForImageClassification`]: In float32 and in evaluation mode.

    Raises:
        `ValueError`: As [`convert_openai_unet`].
    """
    return _load(make_classifier(config), state_dict, config.get("use_new_attention_order", False))


def to_openai_state_dict(
    model: ADMUNet2DModel | ADMForImageClassification, new_attention_order: bool = False
) -> dict[str, torch.Tensor]:
    """The state dict of a model for the published code; the inverse of the two functions above.

    Args:
        model ([`ADMUNet2DModel`] or [`ADMForImageClassification`]): Converted or trained here.
        new_attention_order (`bool`, defaults to `False`): Order the rows of query, key and value as the published
            models with `use_new_attention_order=True` do. Either order can be written for any model; the
            published constructor must get the same value.

    Returns:
        `dict[str, torch.Tensor]`: The published names and tensors in float32, in the published order. Tensors whose
        order does not change share the model's memory.

    Raises:
        `ValueError`: If query, key and value are fused; unfuse them first.
    """
    tensors: dict[str, torch.Tensor] = {}
    for _, theirs, module in published_names(model):
        if isinstance(module, ADMAttention | ADMAttentionPool):
            pooling = isinstance(module, ADMAttentionPool)
            if getattr(module, "fused_projections", False):
                raise ValueError("The attention layers are fused; call unfuse_qkv_projections() on the model first.")
            for kind, query in module.to_q.named_parameters():
                parts = [query, module.to_k.get_parameter(kind), module.to_v.get_parameter(kind)]
                rows = _join_qkv([part.detach() for part in parts], module.heads, new_attention_order or pooling)
                tensors[f"{theirs}.{qkv_name(module)}.{kind}"] = rows
            if isinstance(module, ADMAttentionPool):
                tensors[f"{theirs}.positional_embedding"] = module.position_embedding.detach().T.contiguous()
        else:
            for kind, parameter in module.named_parameters(recurse=False):
                tensors[f"{theirs}.{kind}"] = parameter.detach()
    shapes = published_shapes(model)
    return {name: tensors[name].to(torch.float32).reshape(shape) for name, shape in shapes.items()}


def make_unet(config: dict[str, Any], super_resolution: bool = False) -> ADMUNet2DModel:
    """The UNet of a published config, on the meta device: names and shapes, no weights."""
    arguments = _our_arguments(config, foreign="pool")
    if super_resolution:
        arguments["low_res_channels"] = arguments["in_channels"]
    heads_upsample = config.get("num_heads_upsample", -1)
    if heads_upsample != -1 and arguments["num_heads"] is not None:
        arguments["num_heads_upsample"] = heads_upsample
    with torch.device("meta"):
        return ADMUNet2DModel(**arguments).eval()


def make_classifier(config: dict[str, Any]) -> ADMForImageClassification:
    """The classifier of a published config, on the meta device: names and shapes, no weights."""
    own = {
        name: config[name] for name in ADMClassifierConfig().to_dict().keys() - CONSTRUCTOR_ARGUMENTS if name in config
    }
    published = {name: value for name, value in config.items() if name not in own}
    arguments = _our_arguments(published, foreign="num_classes")
    num_labels = arguments.pop("out_channels")
    with torch.device("meta"):
        return ADMForImageClassification(
            ADMClassifierConfig(**{"num_labels": num_labels, "pool": "adaptive", **arguments, **own})
        ).eval()


def _our_arguments(config: dict[str, Any], foreign: str) -> dict[str, Any]:
    """A published constructor's arguments and defaults in this library's spelling; `foreign` only the other one has."""
    for name in REQUIRED_ARGUMENTS:
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
            raise ValueError(
                f"The checkpoint has no tensor {name}, which the config requires; the checkpoint belongs to another "
                f"config."
            )
        given = tuple(state_dict[name].shape)
        if _without_trailing_ones(given) != _without_trailing_ones(shape):
            raise ValueError(
                f"The tensor {name} has shape {given} where the config expects {shape}; the checkpoint belongs to "
                f"another config."
            )
    unknown = state_dict.keys() - expected.keys()
    if unknown:
        raise ValueError(
            f"The checkpoint holds {len(unknown)} tensors that are not in the config, such as {min(unknown)}; the "
            f"checkpoint belongs to another config."
        )


def converted_tensors(
    model: Any, state_dict: Mapping[str, torch.Tensor], new_order: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields our names and the published tensors of a state dict that passed [`check_tensors`].

    One by one, and as views if the order does not change, so that a file larger than the memory can be converted.
    """
    for ours, theirs, module in published_names(model):
        if isinstance(module, ADMAttention | ADMAttentionPool):
            pooling = isinstance(module, ADMAttentionPool)
            for kind, parameter in module.to_q.named_parameters():
                rows = state_dict[f"{theirs}.{qkv_name(module)}.{kind}"]
                rows = rows.reshape(3 * len(parameter), *parameter.shape[1:])
                for part, tensor in zip("qkv", _split_qkv(rows, module.heads, new_order or pooling), strict=True):
                    yield f"{ours}.to_{part}.{kind}", tensor
            if isinstance(module, ADMAttentionPool):
                yield f"{ours}.position_embedding", state_dict[f"{theirs}.positional_embedding"].T
        else:
            for kind, parameter in module.named_parameters(recurse=False):
                yield f"{ours}.{kind}", state_dict[f"{theirs}.{kind}"].reshape(parameter.shape)


def published_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Published name -> shape for every tensor of one of our models, in the published order.

    Our linear layers are 1x1 convolutions there.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs, module in published_names(model):
        if isinstance(module, ADMAttention | ADMAttentionPool):
            channels = module.to_q.in_features
            if isinstance(module, ADMAttentionPool):
                shapes[f"{theirs}.positional_embedding"] = tuple(module.position_embedding.T.shape)
            shapes[f"{theirs}.{qkv_name(module)}.weight"] = (3 * channels, channels, 1)
            shapes[f"{theirs}.{qkv_name(module)}.bias"] = (3 * channels,)
        else:
            for kind, parameter in module.named_parameters(recurse=False):
                ones = 0
                if kind == "weight" and theirs.endswith(("proj_out", "c_proj")):
                    ones = 1
                elif kind == "weight" and ours == "head.classifier.2":  # behind the adaptive pool
                    ones = 2
                shapes[f"{theirs}.{kind}"] = (*parameter.shape, *[1] * ones)
    return shapes


def qkv_name(module: ADMAttention | ADMAttentionPool) -> str:
    """The published name of the joint projection of query, key and value."""
    return "qkv_proj" if isinstance(module, ADMAttentionPool) else "qkv"


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution's shape as a linear layer's."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _join_qkv(parts: Sequence[torch.Tensor], heads: int, new_order: bool) -> torch.Tensor:
    """The rows of query, key and value in either published layout; the inverse of [`_split_qkv`]."""
    if new_order:
        return torch.cat(list(parts))
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _split_qkv(rows: torch.Tensor, heads: int, new_order: bool) -> tuple[torch.Tensor, ...]:
    """The rows of query, key and value, ordered by head, from either published layout."""
    if new_order:
        return rows.chunk(3)
    return tuple(part.flatten(0, 1) for part in rows.unflatten(0, (heads, 3, -1)).unbind(1))


def published_names(model: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields `(our name, published name, module)` for every module with tensors of its own, in the published order.

    An attention layer is yielded for its query, key and value, which are one tensor in the published code; its other
    tensors follow under their own names.
    """
    yield from _names_in(model, "time_embedding.linear_1", "time_embed.0")
    yield from _names_in(model, "time_embedding.linear_2", "time_embed.2")
    if getattr(model, "class_embedding", None) is not None:
        yield from _names_in(model, "class_embedding", "label_emb")
    yield from _names_in(model, "conv_in", "input_blocks.0.0")

    index = 1
    for level, block in enumerate(model.down_blocks):
        for i in range(len(block.resnets)):
            yield from _names_in(model, f"down_blocks.{level}.resnets.{i}", f"input_blocks.{index}.0")
            if block.attentions:
                yield from _names_in(model, f"down_blocks.{level}.attentions.{i}", f"input_blocks.{index}.1")
            index += 1
        if block.resamplers:
            yield from _names_in(model, f"down_blocks.{level}.resamplers.0", f"input_blocks.{index}.0")
            index += 1

    yield from _names_in(model, "mid_block.resnets.0", "middle_block.0")
    yield from _names_in(model, "mid_block.attentions.0", "middle_block.1")
    yield from _names_in(model, "mid_block.resnets.1", "middle_block.2")

    if isinstance(model, ADMUNet2DModel):
        index = 0
        for level, block in enumerate(model.up_blocks):
            for i in range(len(block.resnets)):
                yield from _names_in(model, f"up_blocks.{level}.resnets.{i}", f"output_blocks.{index}.0")
                if block.attentions:
                    yield from _names_in(model, f"up_blocks.{level}.attentions.{i}", f"output_blocks.{index}.1")
                index += 1
            if block.resamplers:  # the last layer of the level's last block
                position = 2 if block.attentions else 1
                yield from _names_in(model, f"up_blocks.{level}.resamplers.0", f"output_blocks.{index - 1}.{position}")
        yield from _names_in(model, "conv_norm_out", "out.0")
        yield from _names_in(model, "conv_out", "out.2")
    else:
        for ours, theirs in {
            "adaptive": {"head.norm": "out.0", "head.classifier.2": "out.3"},
            "attention": {"head.norm": "out.0", "head.classifier": "out.2"},
            "spatial": {"head.linear_1": "out.0", "head.linear_2": "out.2"},
            "spatial_v2": {"head.linear_1": "out.0", "head.norm": "out.1", "head.linear_2": "out.3"},
        }[model.config.pool].items():
            yield from _names_in(model, ours, theirs)


def _names_in(model: nn.Module, ours: str, theirs: str) -> Iterator[tuple[str, str, nn.Module]]:
    """The modules with tensors inside one layer."""
    module = model.get_submodule(ours)
    if isinstance(module, ADMResnetBlock):
        for our_part, their_part in RESNET_NAMES.items():
            yield f"{ours}.{our_part}", f"{theirs}.{their_part}", module.get_submodule(our_part)
    elif isinstance(module, ADMAttention):
        yield f"{ours}.group_norm", f"{theirs}.norm", module.group_norm
        yield ours, theirs, module
        yield f"{ours}.to_out", f"{theirs}.proj_out", module.to_out
    elif isinstance(module, ADMAttentionPool):
        yield ours, theirs, module
        yield f"{ours}.to_out", f"{theirs}.c_proj", module.to_out
    elif hasattr(module, "conv"):
        yield (
            f"{ours}.conv",
            f"{theirs}.{'op' if isinstance(module, Downsample2D) else 'conv'}",
            module.get_submodule("conv"),
        )
    else:
        yield ours, theirs, module
