"""The UNet of ADM, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), section 3."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from ..loading import WholeModelMixin
from ..registration import register_with_diffusers
from ..settings import check_settings
from .layers import ADMUpBlock, check_sides, expand_timestep, layer_makers, level_attention, level_widths, make_encoder
from .ops import Conv2d, GroupNormSiLU, ZeroConv2d


@register_with_diffusers
class ADMUNet2DModel(WholeModelMixin, AttentionMixin, ConfigMixin):
    r"""Predicts the noise (and, with twice the channels, its variance) in a noisy image.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 64): Side length in pixels, or `(height, width)`, that the
            model is trained for. It fixes where attention sits; other sizes that halve evenly can be sampled too.
        in_channels (`int`, defaults to 3): Channels of the noisy image.
        out_channels (`int`, defaults to 6): Channels of the output: `in_channels`, or twice that when the variance is
            learned (Improved DDPM, section 3.1).
        model_channels (`int`, defaults to 128): Base width.
        channel_mult (`tuple[float]`, defaults to `(1, 2, 3, 4)`): Width of each level as a multiple of the base.
        num_res_blocks (`int`, defaults to 3): Residual blocks per level.
        attention_resolutions (`tuple[int]`, defaults to `(32, 16, 8)`): Side lengths in pixels (of the height, for a
            pair) at which attention sits; those that no level reaches are ignored.
        num_heads (`int`, *optional*): A fixed number of attention heads.
        attention_head_dim (`int`, *optional*): A fixed width of a head instead; 64, as in the paper, if neither is
            given.
        num_heads_upsample (`int`, *optional*): Number of heads in the decoder, if it differs from `num_heads`.
        dropout (`float`, defaults to 0.0): Rate of dropout in residual blocks.
        conv_resample (`bool`, defaults to `True`): Resample with learned convolutions, or else nearest-neighbour
            upsampling and average pooling.
        resblock_updown (`bool`, defaults to `True`): Resample with residual blocks (BigGAN) instead of both.
        use_scale_shift_norm (`bool`, defaults to `True`): Adaptive group normalisation instead of addition.
        num_class_embeds (`int`, *optional*): Number of classes; `None` for an unconditional model.
        null_class_label (`bool`, defaults to `False`): One more row in the class embedding, id `num_class_embeds`: the
            null label ("no class"), used where no labels are given.
        low_res_channels (`int`, *optional*): Channels of the low-resolution image that an upsampler is
            conditioned on.

    Raises:
        `ValueError`: For widths that do not divide into 32 groups or into heads, and for contradicting options.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ADMResnetBlock", "ADMAttention"]
    # Regions for `compile_repeated_blocks`: whole levels, since residual blocks differ in shape too often
    _repeated_blocks = ["ADMDownBlock", "ADMMidBlock", "ADMUpBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        out_channels: int = 6,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        num_heads: int | None = None,
        attention_head_dim: int | None = None,
        num_heads_upsample: int | None = None,
        dropout: float = 0.0,
        conv_resample: bool = True,
        resblock_updown: bool = True,
        use_scale_shift_norm: bool = True,
        num_class_embeds: int | None = None,
        null_class_label: bool = False,
        low_res_channels: int | None = None,
    ):
        super().__init__()
        check_settings(type(self), self.config)
        if num_heads_upsample is not None and num_heads is None:
            raise ValueError(f"num_heads_upsample={num_heads_upsample} needs num_heads too, for the encoder.")
        if null_class_label and num_class_embeds is None:
            raise ValueError("null_class_label=True needs num_class_embeds, the number of classes.")

        widths = level_widths(model_channels, channel_mult)
        temb_channels = 4 * model_channels

        # 1. Conditioning: timestep and class
        self.time_proj = Timesteps(model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(model_channels, temb_channels)
        self.class_embedding = (
            None if num_class_embeds is None else nn.Embedding(num_class_embeds + null_class_label, temb_channels)
        )

        # 2. Encoder and middle
        self.conv_in = Conv2d(in_channels + (low_res_channels or 0), widths[0], 3, padding=1)
        self.down_blocks, self.mid_block, skip_channels = make_encoder(self.config)

        # 3. Decoder, its levels from the lowest resolution up
        resnet, attention, resampler = layer_makers(self.config)
        has_attention = level_attention(sample_size, len(widths), attention_resolutions)
        self.up_blocks = nn.ModuleList()
        channels = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(num_res_blocks + 1):
                resnets.append(resnet(channels + skip_channels.pop(), width))
                channels = width
            heads = num_heads_upsample or num_heads
            attentions = [attention(width, num_heads=heads) for _ in resnets if has_attention[level]]
            self.up_blocks.append(ADMUpBlock(resnets, attentions, resampler(width, "up") if level else None))

        # 4. Output
        self.conv_norm_out = GroupNormSiLU(channels)
        self.conv_out = ZeroConv2d(channels, out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        r"""
        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Noisy images; clean ones are in
                [-1, 1].
            timestep (`torch.Tensor` of shape `()` or `(batch,)`, or a number): Timesteps; fractions are allowed.
            class_labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class ids. `None` is the null label, or no
                label for an unconditional model.
            low_res (`torch.Tensor` of shape `(batch, low_res_channels, h, w)`, *optional*): The image to upsample.
            return_dict (`bool`, defaults to `True`): Return an output object instead of a tuple.

        Returns:
            [`~diffusers.models.unets.unet_2d.UNet2DOutput`]: `.sample` of shape `(batch, out_channels, height,
            width)`.

        Raises:
            `ValueError`: If height or width cannot be halved evenly, or labels or `low_res` are missing or unexpected.
        """
        height, width = sample.shape[-2:]
        check_sides(height, width, num_levels=len(self.down_blocks))

        # 1. Timestep and class
        temb = self.time_embedding(self.time_proj(expand_timestep(timestep, sample)).to(sample.dtype))
        if self.class_embedding is not None:
            if class_labels is None and not self.config.null_class_label:
                raise ValueError("This UNet is class-conditional and has no null label: class_labels must be given.")
            if class_labels is None:
                class_labels = torch.full_like(sample[:, 0, 0, 0], self.config.num_class_embeds, dtype=torch.long)
            temb = temb + self.class_embedding(class_labels).to(temb.dtype)
        elif class_labels is not None:
            raise ValueError("This UNet is unconditional (num_class_embeds=None): class_labels must be None.")
        temb = F.silu(temb)

        # 2. The image to upsample (section 5.2: interpolated and concatenated)
        if (low_res is None) != (self.config.low_res_channels is None):
            raise ValueError(
                f"low_res must be given exactly if the UNet is an upsampler; here "
                f"low_res_channels={self.config.low_res_channels} and low_res is {'not ' * (low_res is None)}given."
            )
        if low_res is not None:
            upsampled = F.interpolate(low_res.to(sample.dtype), (height, width), mode="bilinear")
            sample = torch.cat([sample, upsampled], dim=1)

        # 3. Down, middle, up
        hidden_states = self.conv_in(sample)
        skips: tuple[torch.Tensor, ...] = (hidden_states,)
        for down_block in self.down_blocks:
            hidden_states, block_skips = down_block(hidden_states, temb)
            skips += block_skips
        hidden_states = self.mid_block(hidden_states, temb)
        for up_block in self.up_blocks:
            hidden_states, skips = up_block(hidden_states, temb, skips)

        # 4. Output
        output = self.conv_out(self.conv_norm_out(hidden_states))
        return UNet2DOutput(sample=output) if return_dict else (output,)
