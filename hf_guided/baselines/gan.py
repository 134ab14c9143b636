"""A small BigGAN (arXiv 1809.11096), the GAN that the ADM paper compares with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from ..loading import WholeModelMixin
from ..registration import register_with_diffusers
from ..settings import check_settings
from .sizes import bottom_size


@register_with_diffusers
class BigGANGenerator(WholeModelMixin, ConfigMixin):
    r"""Images from latents and a class; both condition the batch norm of every residual block.

    Args:
        latent_dim (`int`, defaults to 120): Length of the latent vector.
        sample_size, image_channels, num_class_embeds, model_channels, channel_mult: As of [`ClassConditionalVAE`].

    Raises:
        `ValueError`: If the size cannot be halved that often.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        image_channels: int = 3,
        num_class_embeds: int = 10,
        latent_dim: int = 120,
        model_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
    ):
        super().__init__()
        check_settings(type(self), self.config)
        widths = [round(model_channels * multiple) for multiple in channel_mult]
        self.bottom_shape = (widths[-1], *bottom_size(sample_size, len(widths)))
        self.class_embedding = nn.Embedding(num_class_embeds, latent_dim)
        conditions = 2 * latent_dim  # latents and class, at every block (BigGAN, figure 15)
        self.from_latents = _normalised(nn.Linear(latent_dim, torch.Size(self.bottom_shape).numel()))
        self.up_blocks = nn.ModuleList(
            GeneratorBlock(before, width, conditions, upsample=i > 0)
            for i, (before, width) in enumerate(pairwise([widths[-1], *reversed(widths)]))
        )
        self.norm_out = nn.BatchNorm2d(widths[0])
        self.conv_out = _normalised(nn.Conv2d(widths[0], image_channels, 3, padding=1))

    def forward(
        self, latents: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """The images in [-1, 1] of standard normal latents `(batch, latent_dim)` and class ids `(batch,)`."""
        conditions = torch.cat([latents, self.class_embedding(class_labels)], dim=1)
        hidden = self.from_latents(latents).unflatten(1, self.bottom_shape)
        for block in self.up_blocks:
            hidden = block(hidden, conditions)
        hidden = self.conv_out(F.relu(self.norm_out(hidden)))
        # Infinite values become NaN: tanh would turn them into a valid image.
        sample = torch.tanh(hidden).where(hidden.isfinite(), torch.nan)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @torch.no_grad()
    def set_standing_statistics(self, num_batches: int = 16, batch_size: int = 128, seed: int = 0) -> None:
        """Sets batch norm's statistics to those of this generator's images of all classes, and evaluation mode.

        The running statistics of training are of earlier weights, and a moving average of weights has none (BigGAN,
        appendix B: standing statistics).
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the plain average of all batches
        self.train()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_batches):
            latents = torch.randn(batch_size, self.config.latent_dim, generator=generator)
            labels = torch.randint(self.config.num_class_embeds, (batch_size,), generator=generator)
            self(latents.to(self.device, self.dtype), labels.to(self.device))
        self.eval()


@register_with_diffusers
class BigGANDiscriminator(WholeModelMixin, ConfigMixin):
    r"""Scores how real an image of a class is, a projection discriminator (arXiv 1802.05637).

    Args: as those of [`BigGANGenerator`], without `latent_dim`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        image_channels: int = 3,
        num_class_embeds: int = 10,
        model_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
    ):
        super().__init__()
        check_settings(type(self), self.config)
        bottom_size(sample_size, len(channel_mult))
        widths = [image_channels, *(round(model_channels * multiple) for multiple in channel_mult)]
        self.down_blocks = nn.ModuleList(
            DiscriminatorBlock(widths[level], widths[level + 1], is_first=level == 0, downsample=level > 0)
            for level in range(len(channel_mult))
        )
        self.mid_block = DiscriminatorBlock(widths[-1], widths[-1])
        self.score = _normalised(nn.Linear(widths[-1], 1))
        self.class_embedding = _normalised(nn.Embedding(num_class_embeds, widths[-1]))

    def forward(self, sample: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Scores `(batch,)`, the higher, the more real, of images in [-1, 1] and class ids `(batch,)`."""
        hidden = sample
        for block in self.down_blocks:
            hidden = block(hidden)
        features = F.relu(self.mid_block(hidden)).sum(dim=(2, 3))
        return self.score(features)[:, 0] + (self.class_embedding(class_labels) * features).sum(dim=1)


@dataclass
class AdversarialOutput(BaseOutput):
    """The discriminator's scores, each of shape `(batch,)`.

    Args:
        real, fake (`torch.Tensor`): Scores of real images and of samples, for the discriminator's loss: no gradient
            reaches the generator.
        fake_for_generator (`torch.Tensor`): Scores of the same samples, for the generator's loss: no gradient reaches
            the discriminator.
    """

    real: torch.Tensor
    fake: torch.Tensor
    fake_for_generator: torch.Tensor


class AdversarialPair(nn.Module):
    """Generator and discriminator: one forward pass gives the scores for both losses.

    Args:
        generator ([`BigGANGenerator`]), discriminator ([`BigGANDiscriminator`]): The two.
        translation (`int`, defaults to 0): Real images and samples are randomly shifted by up to this many pixels
            before the discriminator, against overfitting (DiffAugment, arXiv 2006.10738).
    """

    def __init__(self, generator: BigGANGenerator, discriminator: BigGANDiscriminator, translation: int = 0):
        super().__init__()
        self.generator, self.discriminator, self.translation = generator, discriminator, translation

    def forward(self, sample: torch.Tensor, class_labels: torch.Tensor, latents: torch.Tensor) -> AdversarialOutput:
        """The scores of real images in [-1, 1], and of samples of their classes from latents `(batch, latent_dim)`."""
        made = self.generator(latents, class_labels).sample
        both = torch.cat([sample, made.detach()])
        real, fake = self.discriminator(self._shift(both), class_labels.repeat(2)).chunk(2)
        constants = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        fake_for_generator = functional_call(self.discriminator, constants, (self._shift(made), class_labels))
        return AdversarialOutput(real=real, fake=fake, fake_for_generator=fake_for_generator)

    def _shift(self, images: torch.Tensor) -> torch.Tensor:
        """Each image shifted by whole pixels, padded with black."""
        reach = self.translation
        if reach == 0:
            return images
        height, width = images.shape[2:]
        down, right = torch.randint(2 * reach + 1, (2, len(images), 1), device=images.device)
        rows = (torch.arange(height, device=images.device) + down)[:, None, :, None]
        columns = (torch.arange(width, device=images.device) + right)[:, None, None, :]
        padded = F.pad(images, (reach,) * 4, value=-1.0)
        item, channel = (torch.arange(n, device=images.device) for n in images.shape[:2])
        return padded[item[:, None, None, None], channel[None, :, None, None], rows, columns]


def hinge_losses(output: AdversarialOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of discriminator and generator, each of shape `(batch,)` (arXiv 1705.02894; BigGAN, section 3)."""
    return F.relu(1 - output.real) + F.relu(1 + output.fake), -output.fake_for_generator


class GeneratorBlock(nn.Module):
    """(class-conditional norm -> ReLU -> convolution) twice, with a shortcut (BigGAN, figure 15 b)."""

    def __init__(self, in_channels: int, out_channels: int, conditions: int, upsample: bool):
        super().__init__()
        self.upsample = upsample
        self.norm1 = ConditionalBatchNorm2d(in_channels, conditions)
        self.conv1 = _normalised(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.norm2 = ConditionalBatchNorm2d(out_channels, conditions)
        self.conv2 = _normalised(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = _normalised(nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, hidden: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        shortcut, hidden = hidden, F.relu(self.norm1(hidden, conditions))
        if self.upsample:
            shortcut, hidden = (F.interpolate(part, scale_factor=2.0, mode="nearest") for part in (shortcut, hidden))
        hidden = self.conv1(hidden)
        hidden = self.conv2(F.relu(self.norm2(hidden, conditions)))
        return hidden + self.conv_shortcut(shortcut)


class DiscriminatorBlock(nn.Module):
    """(ReLU -> convolution) twice, with a shortcut (BigGAN, figure 15 c); the first has no ReLU on the image."""

    def __init__(self, in_channels: int, out_channels: int, is_first: bool = False, downsample: bool = False):
        super().__init__()
        self.is_first, self.downsample = is_first, downsample
        self.conv1 = _normalised(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.conv2 = _normalised(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        changes = in_channels != out_channels or downsample
        self.conv_shortcut = _normalised(nn.Conv2d(in_channels, out_channels, 1)) if changes else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shortcut = self.conv_shortcut(hidden)
        hidden = self.conv1(hidden if self.is_first else F.relu(hidden))
        hidden = self.conv2(F.relu(hidden))
        if self.downsample:
            shortcut, hidden = F.avg_pool2d(shortcut, 2), F.avg_pool2d(hidden, 2)
        return hidden + shortcut


class ConditionalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose gain and bias are linear in the conditions (arXiv 1610.07629)."""

    def __init__(self, num_channels: int, conditions: int):
        super().__init__(num_channels, affine=False)
        self.gain = _normalised(nn.Linear(conditions, num_channels, bias=False))
        self.bias_of = _normalised(nn.Linear(conditions, num_channels, bias=False))

    def forward(self, hidden: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gain, bias = (layer(conditions)[:, :, None, None] for layer in (self.gain, self.bias_of))
        return super().forward(hidden) * (1 + gain) + bias


def _normalised(layer: Any) -> nn.Module:
    """A layer with spectral normalisation and orthogonal initial weights (arXiv 1802.05957; BigGAN, section 3).

    They are decomposed in float32 for every dtype of the weights.
    """
    layer.weight.data.copy_(nn.init.orthogonal_(torch.empty_like(layer.weight, dtype=torch.float32)))
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)
    return spectral_norm(layer)
