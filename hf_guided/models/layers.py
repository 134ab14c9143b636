"""The layers that the ADM UNet and the noisy-image classifier are made of.

Section 3 of "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233) with the residual blocks of
"Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672). Hidden states are `(batch, channels, height,
width)`; `temb` is the activated embedding of timestep and class, `(batch, 4 * model_channels)`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .ops import NORM_GROUPS, Conv2d, GroupNormSiLU, UpsampleConv2d, ZeroConv2d, ZeroLinear


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = UpsampleConv2d(channels, channels) if use_conv else nn.UpsamplingNearest2d(scale_factor=2)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class Downsample2D(nn.Module):
    """Halves both sides: a 3x3 convolution of stride two if `use_conv`, else the mean of 2x2 pixels."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class ADMResnetBlock(nn.Module):
    """The residual block of ADM, BigGAN's up- and downsampling included (section 3, tables 1 and 3).

    Args:
        use_scale_shift_norm (`bool`): Adaptive group normalisation, `AdaGN(h, y) = y_s GroupNorm(h) + y_b`
            (section 3.1); otherwise the projected embedding is added to the hidden states.
        resample (`"up"`, `"down"` or `None`): Resample both branches by two before their convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = resample
        self.norm1 = GroupNormSiLU(in_channels)
        if resample == "up":
            self.conv1: nn.Module = UpsampleConv2d(in_channels, out_channels)
        else:
            self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        self.norm2 = GroupNormSiLU(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = ZeroConv2d(out_channels, out_channels, 3, padding=1)
        keeps_width = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if keeps_width else Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.norm1(hidden_states)
        if self.resample == "up":
            residual = F.interpolate(residual, scale_factor=2.0, mode="nearest")  # and `conv1` the other branch
        elif self.resample == "down":
            residual = F.avg_pool2d(residual, 2)
            hidden_states = F.avg_pool2d(hidden_states, 2)
        hidden_states = self.conv1(hidden_states)

        embedding = self.time_emb_proj(temb)
        if self.use_scale_shift_norm:
            hidden_states = self.norm2(hidden_states, *embedding.chunk(2, dim=1))
        else:
            hidden_states = self.norm2(hidden_states + embedding[:, :, None, None])
        hidden_states = self.conv2(self.dropout(hidden_states))
        return self.conv_shortcut(residual) + hidden_states


class ADMAttnProcessor:
    """Attention by the backends of diffusers, chosen with `set_attention_backend`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class ADMAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over pixels with a residual connection (section 3).

    Args:
        num_heads (`int`, *optional*): A fixed number of heads.
        head_dim (`int`, *optional*): A fixed width of a head instead (64, if neither is given).
        processor (`Callable`, *optional*): Maps query, key and value of shape `(batch, tokens, heads, head_dim)` to
            the attended values of the same shape.
    """

    _default_processor_cls = ADMAttnProcessor
    _available_processors = [ADMAttnProcessor]
    to_qkv: nn.Linear  # replaces the three projections after `fuse_projections`

    def __init__(
        self,
        channels: int,
        num_heads: int | None = None,
        head_dim: int | None = None,
        processor: Callable | None = None,
    ):
        super().__init__()
        self.heads = count_heads(channels, num_heads, head_dim)
        self.use_bias = True
        self.group_norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = ZeroLinear(channels, channels)
        self.processor: Callable = processor or self._default_processor_cls()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = self.group_norm(hidden_states).flatten(2).transpose(1, 2).contiguous()  # for faster matrix products
        if self.fused_projections:
            projected = self.to_qkv(tokens).chunk(3, dim=-1)
        else:
            projected = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        attended = self.processor(self, *(x.unflatten(-1, (self.heads, -1)) for x in projected))
        attended = self.to_out(attended.flatten(2))
        return hidden_states + attended.transpose(1, 2).reshape(hidden_states.shape)


class ADMAttentionPool(nn.Module):
    """Pools a feature map by attention from its mean, as CLIP does (section 4.3: the classifier's head).

    `num_tokens` is the number of its pixels; the other arguments are as for [`ADMAttention`].
    """

    def __init__(
        self,
        num_tokens: int,
        channels: int,
        out_features: int,
        num_heads: int | None = None,
        head_dim: int | None = None,
        processor: Callable | None = None,
    ):
        super().__init__()
        self.heads = count_heads(channels, num_heads, head_dim)
        self.position_embedding = nn.Parameter(torch.empty(num_tokens + 1, channels))
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, out_features)
        self.processor = processor or ADMAttnProcessor()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position_embedding, std=self.position_embedding.shape[1] ** -0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.position_embedding
        # Only the mean is a query: the output at the other tokens would not be used.
        projected = self.to_q(tokens[:, :1]), self.to_k(tokens), self.to_v(tokens)
        attended = self.processor(self, *(x.unflatten(-1, (self.heads, -1)) for x in projected))
        return self.to_out(attended.flatten(1))


class ADMBlock(nn.Module):
    """One level of the UNet: residual blocks, each with its attention (or none), then up- or downsampling."""

    _gradient_checkpointing_func: Callable  # set by both libraries' models when they enable gradient checkpointing

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], resampler: nn.Module | None = None
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.resamplers = nn.ModuleList([] if resampler is None else [resampler])
        self.gradient_checkpointing = False

    def call(self, layer: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        """The output of a layer; with gradient checkpointing its activations are recomputed in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *args)
        return layer(*args)


class ADMDownBlock(ADMBlock):
    """A level of the encoder; also returns the skip connections to the decoder."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        skips: tuple[torch.Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            hidden_states = self.call(resnet, hidden_states, temb)
            if self.attentions:
                hidden_states = self.call(self.attentions[i], hidden_states)
            skips += (hidden_states,)
        for resampler in self.resamplers:
            hidden_states = self.call(resampler, hidden_states, temb)
            skips += (hidden_states,)
        return hidden_states, skips


class ADMMidBlock(ADMBlock):
    """The lowest resolution: residual block, attention, residual block."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        hidden_states = self.call(self.resnets[0], hidden_states, temb)
        hidden_states = self.call(self.attentions[0], hidden_states)
        return self.call(self.resnets[1], hidden_states, temb)


class ADMUpBlock(ADMBlock):
    """A level of the decoder; each residual block takes one skip connection, last first. Also returns the rest."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor, skips: tuple) -> tuple[torch.Tensor, tuple]:
        for i, resnet in enumerate(self.resnets):
            skips, skip = skips[:-1], skips[-1]
            hidden_states = self.call(resnet, torch.cat([hidden_states, skip], dim=1), temb)
            if self.attentions:
                hidden_states = self.call(self.attentions[i], hidden_states)
        for resampler in self.resamplers:
            hidden_states = self.call(resampler, hidden_states, temb)
        return hidden_states, skips


def layer_makers(config: Any, processor: Callable | None = None) -> tuple[Callable, Callable, Callable]:
    """What makes residual blocks, attention layers, and (of channels and `"up"` or `"down"`) resamplers of a config."""
    resnet = partial(
        ADMResnetBlock,
        temb_channels=4 * config.model_channels,
        dropout=config.dropout,
        use_scale_shift_norm=config.use_scale_shift_norm,
    )
    attention = partial(
        ADMAttention, num_heads=config.num_heads, head_dim=config.attention_head_dim, processor=processor
    )

    def resampler(channels: int, direction: str) -> nn.Module:
        if config.resblock_updown:
            return resnet(channels, channels, resample=direction)
        return (Upsample2D if direction == "up" else Downsample2D)(channels, use_conv=config.conv_resample)

    return resnet, attention, resampler


def make_encoder(config: Any, processor: Callable | None = None) -> tuple[nn.ModuleList, ADMMidBlock, list[int]]:
    """The encoder of the UNet and the classifier: down blocks, middle block, and channels of all skip connections."""
    resnet, attention, resampler = layer_makers(config, processor)
    widths = level_widths(config.model_channels, config.channel_mult)
    has_attention = level_attention(config.sample_size, len(widths), config.attention_resolutions)
    down_blocks = nn.ModuleList()
    skip_channels = [widths[0]]
    for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
        resnets = [resnet(channels, width) for channels in [before] + [width] * (config.num_res_blocks - 1)]
        attentions = [attention(width) for _ in resnets if has_attention[level]]
        is_last = level == len(widths) - 1
        down_blocks.append(ADMDownBlock(resnets, attentions, None if is_last else resampler(width, "down")))
        skip_channels += [width] * (config.num_res_blocks + (not is_last))
    last = widths[-1]
    return down_blocks, ADMMidBlock([resnet(last, last), resnet(last, last)], [attention(last)]), skip_channels


def level_widths(model_channels: int, channel_mult: Sequence[float]) -> list[int]:
    """Channels of each level; `ValueError` if group normalisation cannot split them."""
    widths = [int(mult * model_channels) for mult in channel_mult]
    for mult, width in zip(channel_mult, widths, strict=True):
        if width == 0 or width % NORM_GROUPS:
            raise ValueError(
                f"model_channels={model_channels} times the entry {mult} of channel_mult gives {width} channels; group "
                f"normalisation needs a multiple of {NORM_GROUPS}: change model_channels."
            )
    return widths


def level_attention(
    sample_size: int | Sequence[int], num_levels: int, attention_resolutions: Sequence[int]
) -> list[bool]:
    """Whether each level has attention: its side length (of the height, for a pair) is among the resolutions."""
    height = sample_size if isinstance(sample_size, int) else sample_size[0]
    return [height % 2**level == 0 and height // 2**level in attention_resolutions for level in range(num_levels)]


def count_heads(channels: int, num_heads: int | None, head_dim: int | None) -> int:
    """Number of attention heads: fixed, or from their width (64 if neither is given; section 3, table 2)."""
    if num_heads is not None and head_dim is not None:
        raise ValueError(f"num_heads={num_heads} and attention_head_dim={head_dim} contradict each other; give one.")
    head_dim = head_dim or 64
    if channels % (num_heads or head_dim):
        heads = f"attention heads of width {head_dim}" if num_heads is None else f"{num_heads} attention heads"
        raise ValueError(f"{channels} channels do not divide into {heads}; change num_heads or attention_head_dim.")
    return num_heads or channels // head_dim


def check_sides(height: int, width: int, num_levels: int) -> None:
    """Refuses images whose height or width cannot be halved at every level."""
    times = num_levels - 1
    if height % 2**times or width % 2**times:
        raise ValueError(
            f"Images of {height}x{width} cannot be halved {times} times; take multiples of {2**times}, or "
            f"fewer levels in channel_mult."
        )


def expand_timestep(timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
    """Timesteps of shape `(batch,)` on the device of `sample`, from a number, a 0-d tensor or one timestep per image.

    One row for all would save next to nothing, and products of a single row depend on the memory layout of weights.
    """
    if not torch.is_tensor(timestep):
        timestep = torch.tensor(timestep, device=sample.device)
    return timestep.to(sample.device).reshape(-1).expand(sample.shape[0])
