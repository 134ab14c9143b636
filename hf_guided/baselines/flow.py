"""A class-conditional multi-scale Glow (arXiv 1807.03039), built from parts of normflows."""

import math
import warnings
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from ..loading import WholeModelMixin
from ..registration import register_with_diffusers
from ..settings import check_settings
from .sizes import bottom_size

_ALPHA = 0.05  # keeps the logit of 0 and 1 finite (RealNVP, arXiv 1605.08803, section 4.1)


@register_with_diffusers
class ClassConditionalGlow(WholeModelMixin, ConfigMixin):
    r"""An invertible map between images and latents, with class-conditional couplings and Gaussians of the latents.

    Args:
        sample_size, image_channels, num_class_embeds: As of [`ClassConditionalVAE`].
        num_levels (`int`, defaults to 3): Levels, each of half the side length; half of the channels become
            latents at each.
        num_blocks (`int`, defaults to 8): Steps of flow per level.
        hidden_channels (`int`, defaults to 128): Width of the networks in the couplings.
        dequantization_width (`float`, defaults to 1): Width of the dequantisation noise in training, in steps of the
            8-bit scale. For images of fewer than 256 levels take the distance of two levels: densities with gaps
            between them are hard to learn.

    Raises:
        `ValueError`: If the size cannot be halved that often.
        `ImportError`: Without normflows.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        image_channels: int = 3,
        num_class_embeds: int = 10,
        num_levels: int = 3,
        num_blocks: int = 8,
        hidden_channels: int = 128,
        dequantization_width: float = 1.0,
    ):
        super().__init__()
        check_settings(type(self), self.config)
        nf = _import_normflows()
        height, width = bottom_size(sample_size, num_levels + 1)
        self.logit, self.squeeze, self.split = nf.transforms.Logit(_ALPHA), nf.flows.Squeeze(), nf.flows.Split()
        self.class_embedding = nn.Embedding(num_class_embeds, hidden_channels)
        self.levels, self.bases = nn.ModuleList(), nn.ModuleList()
        channels = image_channels
        for level in range(num_levels):  # from the image down
            channels *= 4
            steps = [GlowStep(channels, hidden_channels, hidden_channels) for _ in range(num_blocks)]
            self.levels.append(nn.ModuleList(steps))
            if level < num_levels - 1:
                channels //= 2  # the other half stays in the flow
            factor = 2 ** (num_levels - 1 - level)
            shape = (channels, height * factor, width * factor)
            self.bases.append(nf.distributions.ClassCondDiagGaussian(shape, num_class_embeds))

    def forward(
        self, sample: torch.Tensor, class_labels: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""Bits per dimension of shape `(batch,)`, exact for the dequantised images (arXiv 1511.01844, section 3.1).

        Averaged over noise of one step of the 8-bit scale, it is an upper bound for the 8-bit images. `sample` holds
        images `(batch, image_channels, height, width)` in [-1, 1], `class_labels` ids `(batch,)`; for the noise, of
        `sample`'s shape, see [`dequantize`].
        """
        latents, log_det = self.encode(self.dequantize(sample, noise), class_labels)
        dimensions = sample[0].numel()
        log_likelihood = log_det - 0.5 * (latents**2 + math.log(2 * math.pi)).sum(dim=1)
        return math.log2(255 + self.config.dequantization_width) - log_likelihood / (dimensions * math.log(2))

    def dequantize(self, sample: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """8-bit images in [-1, 1] as continuous values in (0, 1) (arXiv 1511.01844, section 3.1).

        `noise` is in steps of the 8-bit scale, centred: uniform in [-1/2, 1/2) to measure likelihood; by default drawn
        as in training, uniform over the `dequantization_width`.
        """
        width = self.config.dequantization_width
        noise = (torch.rand_like(sample) - 0.5) * width if noise is None else noise
        return ((sample + 1) * 127.5 + width / 2 + noise) / (255 + width)

    def encode(self, values: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `(batch, image_channels * height * width)`, and the logarithmic Jacobian determinant `(batch,)`.

        `values` `(batch, image_channels, height, width)` are from [`dequantize`]; those of the model's own images have
        standard normal latents. `class_labels` `(batch,)` are ids.
        """
        embedding = self.class_embedding(class_labels)
        hidden, log_det = self.logit.inverse(values)
        latents = []
        for level, (steps, base) in enumerate(self._levels()):
            hidden, _ = self.squeeze.inverse(hidden)
            for step in steps:
                hidden, change = step.encode(hidden, embedding)
                log_det = log_det + change
            part = hidden
            if level < len(self.levels) - 1:
                (hidden, part), _ = self.split(hidden)
            mean, log_scale = _moments(base, class_labels)
            latents.append(((part - mean) * torch.exp(-log_scale)).flatten(1))
            log_det = log_det - log_scale.flatten(1).sum(dim=1)
        return torch.cat(latents, dim=1), log_det

    def decode(self, latents: torch.Tensor, class_labels: torch.Tensor) -> DecoderOutput:
        """The inverse of [`encode`]: images `(batch, image_channels, height, width)` in [-1, 1] from its latents.

        They are half a step of the 8-bit scale higher, so that truncation to 8 bits rounds.
        """
        embedding = self.class_embedding(class_labels)
        parts = latents.split([math.prod(base.shape) for _, base in self._levels()], dim=1)
        hidden: Any = None
        for (steps, base), part in reversed(list(zip(self._levels(), parts, strict=True))):
            mean, log_scale = _moments(base, class_labels)
            part = mean + torch.exp(log_scale) * part.unflatten(1, base.shape)
            hidden = part if hidden is None else self.split.inverse([hidden, part])[0]
            for step in reversed(steps):
                hidden = step.decode(hidden, embedding)
            hidden, _ = self.squeeze(hidden)
        values, _ = self.logit(hidden)
        values = values.where(hidden.isfinite(), torch.nan)  # the sigmoid would turn it into a valid image
        width = self.config.dequantization_width
        return DecoderOutput(sample=(values * (255 + width) - width / 2 + 0.5) / 127.5 - 1)

    @torch.no_grad()
    def initialize(self, sample: torch.Tensor, class_labels: torch.Tensor) -> None:
        """Initialises activation norm to zero mean and unit variance on these images (Glow, section 3.1)."""
        for steps, _ in self._levels():
            for step in steps:
                step.norm.data_dep_init_done = torch.tensor(0.0)
        self(sample, class_labels)

    def _levels(self) -> list[tuple[Any, Any]]:
        """The steps and the base of each level, from the image down."""
        return list(zip(self.levels, self.bases, strict=True))


class GlowStep(nn.Module):
    """Activation norm, 1x1 convolution, affine coupling (Glow, table 1); the coupling is class-conditional."""

    def __init__(self, channels: int, hidden_channels: int, class_channels: int):
        super().__init__()
        nf = _import_normflows()
        self.norm = nf.flows.ActNorm((channels, 1, 1))
        del self.norm.data_dep_init_done  # a buffer whose value the meta device does not have
        self.norm.data_dep_init_done = torch.tensor(1.0)
        self.conv = _invertible_convolution(channels)
        widths = (channels // 2 + class_channels, hidden_channels, hidden_channels, channels)
        self.coupling = nf.nets.ConvNet2d(widths, (3, 1, 3), init_zeros=True)

    def encode(self, hidden: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step towards the latents, and the logarithm of its Jacobian determinant, `(batch,)`."""
        hidden, of_norm = self.norm.inverse(hidden)
        hidden, of_conv = self.conv.inverse(hidden)
        kept, changed = hidden.chunk(2, dim=1)
        shift, log_scale = self._affine(kept, embedding)
        hidden = torch.cat([kept, (changed + shift) * torch.exp(log_scale)], dim=1)
        return hidden, log_scale.flatten(1).sum(dim=1) + of_norm + of_conv

    def decode(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Back."""
        kept, changed = hidden.chunk(2, dim=1)
        shift, log_scale = self._affine(kept, embedding)
        hidden = torch.cat([kept, changed * torch.exp(-log_scale) - shift], dim=1)
        return self.norm(self.conv(hidden)[0])[0]

    def _affine(self, kept: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        planes = embedding[:, :, None, None].expand(-1, -1, *kept.shape[2:])
        shift, log_scale = self.coupling(torch.cat([kept, planes], dim=1)).chunk(2, dim=1)
        return shift, 2 * torch.tanh(log_scale / 2)  # bounded, or outlying latents give infinite images


def _invertible_convolution(channels: int) -> Any:
    """A 1x1 convolution initialised as a rotation, decomposed in float32 for every dtype of the weights."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it calls `Tensor.lu`
            return _import_normflows().flows.Invertible1x1Conv(channels, use_lu=True)
    finally:
        torch.set_default_dtype(dtype)


def _moments(base: Any, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and logarithm of the standard deviation of each image's latents, by its class."""
    return base.loc[..., class_labels].movedim(-1, 0), base.log_scale[..., class_labels].movedim(-1, 0)


def _import_normflows() -> Any:
    try:
        import normflows
    except ImportError as error:
        raise ImportError("The flow needs normflows: pip install normflows.") from error
    return normflows
