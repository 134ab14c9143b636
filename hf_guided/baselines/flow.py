"""A class-conditional multi-scale Glow (arXiv 1807.03039), of the blocks of normflows."""

import math
import warnings
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin

from ..registration import register_with_diffusers
from .sizes import bottom_size

_LEVELS = 256  # of an 8-bit value
_ALPHA = 0.05  # keeps the logit of 0 and 1 finite (RealNVP, arXiv 1605.08803, section 4.1)


@register_with_diffusers
class ClassConditionalGlow(ModelMixin, ConfigMixin):
    r"""An invertible map between images and latents, whose Gaussian has a mean and a variance for each class.

    Args:
        sample_size (`int` or a pair, defaults to 32): Height and width in pixels.
        image_channels (`int`, defaults to 3): Channels of the images.
        num_class_embeds (`int`, defaults to 10): Number of classes.
        num_levels (`int`, defaults to 3): Levels, each of half the side length; half of the channels leave at each.
        num_blocks (`int`, defaults to 8): Steps of flow per level: activation norm, 1x1 convolution, affine coupling.
        hidden_channels (`int`, defaults to 128): Width of the couplings' networks.

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
    ):
        super().__init__()
        nf = _import_normflows()
        height, width = bottom_size(sample_size, num_levels + 1)
        bases, flows, merges = [], [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of `Tensor.lu`, which its 1x1 convolutions call
            for level in range(num_levels):  # from the lowest up
                channels = image_channels * 2 ** (num_levels + 1 - level)
                blocks = [nf.flows.GlowBlock(channels, hidden_channels) for _ in range(num_blocks)]
                flows.append([*blocks, nf.flows.Squeeze()])
                shape = (channels if level == 0 else channels // 2, height * 2**level, width * 2**level)
                if level > 0:
                    merges.append(nf.flows.Merge())
                bases.append(nf.distributions.ClassCondDiagGaussian(shape, num_class_embeds))
        self.flow = nf.MultiscaleFlow(bases, flows, merges, transform=nf.transforms.Logit(_ALPHA))
        for norm in self._activation_norms():
            del norm.data_dep_init_done  # a buffer, which the meta device could not be asked for
            norm.data_dep_init_done = torch.tensor(1.0)

    @torch.no_grad()
    def initialize(self, sample: torch.Tensor) -> None:
        """Lets activation norm begin with unit variance on these images (Glow, section 3.1).

        Args:
            sample (`torch.Tensor` of shape `(batch, image_channels, height, width)`): Images in [-1, 1].
        """
        for norm in self._activation_norms():
            norm.data_dep_init_done = torch.tensor(0.0)
        self.flow.inverse_and_log_det(dequantize(sample))

    def forward(
        self, sample: torch.Tensor, class_labels: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""Bits per dimension, exact of the dequantised images (arXiv 1511.01844, section 3.1).

        In the mean over the noise it is an upper bound of the 8-bit images' own.

        Args:
            sample (`torch.Tensor` of shape `(batch, image_channels, height, width)`): Images in [-1, 1].
            class_labels (`torch.Tensor` of shape `(batch,)`): Class ids.
            noise (`torch.Tensor` of `sample`'s shape, *optional*): Of the dequantisation, in [0, 1); by default drawn.

        Returns:
            `torch.Tensor` of shape `(batch,)`
        """
        log_likelihood = self.flow.log_prob(dequantize(sample, noise), class_labels)
        return math.log2(_LEVELS) - log_likelihood / (sample[0].numel() * math.log(2))

    def encode(self, values: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents of dequantised images, standard normal for the images of the model.

        Args:
            values (`torch.Tensor` of shape `(batch, image_channels, height, width)`): In (0, 1), of [`dequantize`].
            class_labels (`torch.Tensor` of shape `(batch,)`): Class ids.

        Returns:
            Latents of shape `(batch, image_channels * height * width)`, and the logarithm of the map's Jacobian
            determinant, of shape `(batch,)`.
        """
        parts, log_det = self.flow.inverse_and_log_det(values)
        latents = []
        for base, part in zip(self.flow.q0, parts, strict=True):
            mean, log_scale = (moment[..., class_labels].movedim(-1, 0) for moment in (base.loc, base.log_scale))
            latents.append(((part - mean) * torch.exp(-log_scale)).flatten(1))
            log_det = log_det - log_scale.flatten(1).sum(dim=1)
        return torch.cat(latents, dim=1), log_det

    def decode(self, latents: torch.Tensor, class_labels: torch.Tensor) -> DecoderOutput:
        """Images of latents: what [`encode`] undoes.

        Args:
            latents (`torch.Tensor` of shape `(batch, image_channels * height * width)`): Standard normal.
            class_labels (`torch.Tensor` of shape `(batch,)`): Class ids.

        Returns:
            `DecoderOutput`: `.sample` of shape `(batch, image_channels, height, width)` in [-1, 1], so that cutting off
            to 8 bits gives the level that was dequantised.
        """
        parts = []
        sizes = [math.prod(base.shape) for base in self.flow.q0]
        for base, part in zip(self.flow.q0, latents.split(sizes, dim=1), strict=True):
            mean, log_scale = (moment[..., class_labels].movedim(-1, 0) for moment in (base.loc, base.log_scale))
            parts.append(mean + torch.exp(log_scale) * part.unflatten(1, base.shape))
        values, _ = self.flow.forward_and_log_det(parts)
        return DecoderOutput(sample=values * (_LEVELS / 127.5) - 1)

    def _activation_norms(self) -> list[Any]:
        nf = _import_normflows()
        return [module for module in self.flow.modules() if isinstance(module, nf.flows.ActNorm)]


def dequantize(sample: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """8-bit images as continuous values in (0, 1): uniform over the width of a level (arXiv 1511.01844, section 3.1).

    Args:
        sample (`torch.Tensor`): Images in [-1, 1].
        noise (`torch.Tensor` of the same shape, *optional*): In [0, 1); drawn from the global generator, by default.
    """
    noise = torch.rand_like(sample) if noise is None else noise
    return ((sample + 1) * 127.5 + noise) / _LEVELS


def _import_normflows() -> Any:
    try:
        import normflows
    except ImportError as error:
        raise ImportError("The flow is made of blocks of normflows: pip install 'hf-guided[train]'.") from error
    return normflows
