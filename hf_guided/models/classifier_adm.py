"""The noisy-image classifier of ADM, arXiv 2105.05233, section 4: the UNet's encoder with a pooling head."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..loading import check_cover, check_finite_vectors, read_config, read_shapes
from ..registration import register_with_diffusers
from ..settings import check_names, check_settings
from .image_classification_adm import ADMImageClassificationPipeline
from .image_processing_adm import ADMImageProcessor
from .layers import ADMAttentionPool, check_sides, expand_timestep, level_widths, make_encoder
from .ops import NORM_GROUPS, Conv2d, GroupNormSiLU, ZeroLinear

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


@strict
class ADMClassifierConfig(PreTrainedConfig):
    r"""Configuration of [`ADMForImageClassification`].

    Args:
        pool (`str`, defaults to `"attention"`): The head: `"adaptive"` (mean, linear), `"attention"` (attention from
            the mean, section 4.3), `"spatial"` or `"spatial_v2"` (the means of every layer, two linear layers).
        beta_schedule, num_train_timesteps, trained_betas, rescale_timesteps: The noise schedule that the classifier
            was trained on, spelled as in [`ADMScheduler`].
        sample_size, in_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, num_heads,
            attention_head_dim, dropout, conv_resample, resblock_updown, use_scale_shift_norm: As of
            [`ADMUNet2DModel`]; `sample_size` as `[height, width]` for a pair.
    """

    model_type = "adm-classifier"

    sample_size: int | list[int] | tuple[int, ...] = 64
    in_channels: int = 3
    model_channels: int = 128
    channel_mult: list[int | float] | tuple[int | float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 2
    attention_resolutions: list[int] | tuple[int, ...] = (32, 16, 8)
    num_heads: int | None = None
    attention_head_dim: int | None = None
    dropout: float | int = 0.0
    conv_resample: bool = True
    resblock_updown: bool = True
    use_scale_shift_norm: bool = True
    pool: str = "attention"
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000
    trained_betas: list[float] | None = None
    rescale_timesteps: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.pool not in POOLS:
            raise ValueError(f"pool={self.pool!r} is not one of {', '.join(POOLS)}.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a dict of settings; a wrong setting raises `ValueError`."""
        check_settings(cls, config_dict)
        if (id2label := config_dict.get("id2label")) is not None:
            check_names(id2label, None, whole=True)
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:  # several lines
            raise ValueError(f"The config of {cls.__name__}: {' '.join(str(error).split())}.") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The settings in a saved config; a damaged file raises `ValueError`."""
        path = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "", "config.json")
        if path.is_file():
            read_config(path)
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)


class TransformersAttnProcessor:
    """Attention by the backends of transformers, chosen with `set_attn_implementation`."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    def __call__(self, attn: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        attended, _ = interface(
            attn,
            *(x.transpose(1, 2) for x in (query, key, value)),
            attention_mask=None,
            scaling=query.shape[-1] ** -0.5,
            is_causal=False,
        )
        return attended


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a fused kernel; arguments are `(batch, heads, tokens, head_dim)`, the softmax is in float32."""
    weights = torch.softmax((query * scaling) @ key.transpose(-2, -1), dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class PooledHead(nn.Module):
    """Logits from the last feature map: by average pooling (`"adaptive"`) or attention pooling (`"attention"`)."""

    def __init__(self, config: ADMClassifierConfig, channels: int, num_tokens: int, processor: Callable):
        super().__init__()
        self.norm = GroupNormSiLU(channels)
        self.classifier: nn.Module
        if config.pool == "attention":
            self.classifier = ADMAttentionPool(
                num_tokens, channels, config.num_labels, config.num_heads, config.attention_head_dim, processor
            )
        else:
            self.classifier = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), ZeroLinear(channels, config.num_labels)
            )

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.classifier(self.norm(feature_maps[-1]))


class SpatialHead(nn.Module):
    """Logits from the spatial means of every layer's feature map (`"spatial"`, `"spatial_v2"`)."""

    def __init__(self, config: ADMClassifierConfig, channels: int, hidden_size: int = 2048):
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden_size)
        self.norm: nn.Module = nn.Identity()
        self.activation: nn.Module = nn.ReLU()
        if config.pool == "spatial_v2":
            self.norm = nn.GroupNorm(NORM_GROUPS, hidden_size)
            self.activation = nn.SiLU()
        self.linear_2 = nn.Linear(hidden_size, config.num_labels)

    def forward(self, feature_maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
        means = torch.cat([feature_map.mean(dim=(2, 3)) for feature_map in feature_maps], dim=1)
        return self.linear_2(self.activation(self.norm(self.linear_1(means))))


@register_with_diffusers
class ADMForImageClassification(PreTrainedModel):
    r"""Classifies images at every level of noise: `p(y | x_t, t)`, whose gradient guides sampling (Algorithm 1).

    Without a timestep the image is taken to be clean (timestep 0). Therefore `AutoModelForImageClassification`
    and `pipeline("image-classification")` accept it. Its image processor is saved with it.
    """

    config: ADMClassifierConfig
    config_class = ADMClassifierConfig
    base_model_prefix = "classifier"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ADMResnetBlock", "ADMAttention", "ADMAttentionPool"]
    _repeated_blocks = ["ADMDownBlock", "ADMMidBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ADMClassifierConfig):
        super().__init__(config)
        widths = level_widths(config.model_channels, config.channel_mult)
        processor = TransformersAttnProcessor(config)

        self.time_proj = Timesteps(config.model_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(config.model_channels, 4 * config.model_channels)
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks, self.mid_block, skip_channels = make_encoder(config, processor)

        self.head: nn.Module
        if config.pool in ("adaptive", "attention"):
            height, width = (side >> (len(widths) - 1) for side in image_size(config))
            self.head = PooledHead(config, widths[-1], height * width, processor)
        else:
            self.head = SpatialHead(config, sum(skip_channels) + widths[-1])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        getattr(module, "reset_parameters", lambda: None)()

    def forward(
        self,
        pixel_values: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images in [-1, 1], noised to
                `timestep`.
            timestep (`torch.Tensor` of shape `()` or `(batch,)`, or a number, *optional*): Timesteps; fractions are
                allowed. `None` means clean images, timestep 0.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): Class ids, for `.loss`: the mean cross entropy in
                nats.
            output_hidden_states (`bool`, *optional*): Also return the feature maps of every layer, `(batch, channels,
                h, w)`, the middle block's last. Default: as in the config.
            return_dict (`bool`, *optional*): Return an output object instead of a tuple. Default: as in the config.

        Returns:
            [`~transformers.modeling_outputs.ImageClassifierOutput`]: `.logits` of shape `(batch, num_labels)`.

        Raises:
            `ValueError`: If height or width cannot be halved evenly, or do not fit the attention pool.
        """
        height, width = pixel_values.shape[-2:]
        check_sides(height, width, num_levels=len(self.down_blocks))
        if self.config.pool == "attention" and (height, width) != (expected := image_size(self.config)):
            raise ValueError(
                f"Images of {height}x{width} were given; pool='attention' has an embedding per pixel and takes exactly "
                f"{expected[0]}x{expected[1]}. Resize the images, or use a classifier with another pool."
            )

        timestep = expand_timestep(0 if timestep is None else timestep, pixel_values)
        temb = F.silu(self.time_embedding(self.time_proj(timestep).to(pixel_values.dtype)))
        hidden_states = self.conv_in(pixel_values)
        feature_maps: tuple[torch.Tensor, ...] = (hidden_states,)
        for down_block in self.down_blocks:
            hidden_states, block_maps = down_block(hidden_states, temb)
            feature_maps += block_maps
        feature_maps += (self.mid_block(hidden_states, temb),)
        logits = self.head(feature_maps)

        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=feature_maps if output_hidden_states else None
        )
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel, state_dict: Any, checkpoint_files: list[str] | None, load_config: Any, *args: Any
    ) -> Any:
        """Refuses incomplete weights; transformers would initialise the missing ones at random."""
        if state_dict is None:
            for file in checkpoint_files or []:
                read_shapes(file)
        loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)
        info = loaded[0]
        mismatched = () if load_config.ignore_mismatched_sizes else info.mismatched_keys
        check_cover(load_config.pretrained_model_name_or_path, info.missing_keys, info.unexpected_keys, mismatched)
        check_finite_vectors(load_config.pretrained_model_name_or_path, model)
        return loaded

    @wraps(PreTrainedModel.save_pretrained, assigned=())  # pipelines look for "variant" among the arguments
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves config, safetensors and image processor; arguments as for any model of transformers."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self._save_image_processor(save_directory)

    def _save_image_processor(self, folder: Any) -> None:
        size = dict(zip(("height", "width"), image_size(self.config), strict=True))
        ADMImageProcessor(size=size, num_channels=self.config.in_channels).save_pretrained(folder)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the image processor first: `save_pretrained(push_to_hub=True)` pushes before it returns."""
        self._save_image_processor(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def image_size(config: ADMClassifierConfig) -> tuple[int, int]:
    """Height and width in pixels that the classifier is made for."""
    size = config.sample_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


AutoConfig.register(ADMClassifierConfig.model_type, ADMClassifierConfig, exist_ok=True)
AutoModelForImageClassification.register(ADMClassifierConfig, ADMForImageClassification, exist_ok=True)
AutoImageProcessor.register(ADMClassifierConfig, image_processor_classes={"pil": ADMImageProcessor}, exist_ok=True)
ADMImageClassificationPipeline.register()
