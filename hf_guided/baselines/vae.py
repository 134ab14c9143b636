"""A class-conditional variational autoencoder (arXiv 1312.6114), built from convolutional blocks of diffusers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from diffusers.utils import BaseOutput
from torch import nn

from ..loading import WholeModelMixin
from ..losses import discretized_gaussian_log_likelihood, mean_over_pixels
from ..registration import register_with_diffusers
from ..settings import check_settings
from .sizes import bottom_size

_FIRST_LOG_VARIANCE = -3.0  # initial learned decoder variance: a standard deviation of 0.22, for images in [-1, 1]


@dataclass
class VAEOutput(BaseOutput):
    """Output of a forward pass.

    Args:
        sample (`torch.Tensor` of shape `(batch, image_channels, height, width)`): The decoder's mean at latents drawn
            from the posterior.
        posterior (`DiagonalGaussianDistribution`): q(z|x) of the latents, `(batch, latent_dim, 1, 1)`.
    """

    sample: torch.Tensor
    posterior: DiagonalGaussianDistribution


@register_with_diffusers
class ClassConditionalVAE(WholeModelMixin, ConfigMixin):
    r"""Encodes images as Gaussians over latents and decodes latents as Gaussians over images, given the class.

    The prior of the latents is the standard normal distribution for every class.

    Args:
        sample_size (`int` or a pair, defaults to 32): Height and width in pixels.
        image_channels (`int`, defaults to 3): Channels of the images.
        num_class_embeds (`int`, defaults to 10): Number of classes.
        latent_dim (`int`, defaults to 128): Length of the latent vector.
        model_channels (`int`, defaults to 64): Base width.
        channel_mult (`Sequence[int]`, defaults to `(1, 2, 4)`): Width of each level, as a multiple of the base; each
            level has half the side length of the one before.
        num_res_blocks (`int`, defaults to 2): Residual blocks per level.
        decoder_variance (`float`, *optional*): Fixed variance of the decoder's Gaussian, for images in [-1, 1].
            Default: one variance for all pixels is learned (sigma-VAE, arXiv 2006.13202).

    Raises:
        `ValueError`: If the size cannot be halved that often.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        image_channels: int = 3,
        num_class_embeds: int = 10,
        latent_dim: int = 128,
        model_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
        decoder_variance: float | None = None,
    ):
        super().__init__()
        check_settings(type(self), self.config)
        widths = tuple(round(model_channels * multiple) for multiple in channel_mult)
        self.bottom_shape = (widths[-1], *bottom_size(sample_size, len(widths)))
        options = {"block_out_channels": widths, "norm_num_groups": math.gcd(32, *widths)}
        self.class_embedding = nn.Embedding(num_class_embeds, model_channels)
        self.encoder = Encoder(
            image_channels + model_channels,  # the class embedding as extra channels
            widths[-1],
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            layers_per_block=num_res_blocks,
            double_z=False,
            **options,
        )
        self.to_posterior = nn.Linear(math.prod(self.bottom_shape), 2 * latent_dim)
        self.from_latents = nn.Linear(latent_dim, math.prod(self.bottom_shape))
        self.decoder = Decoder(
            widths[-1] + model_channels,
            image_channels,
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=num_res_blocks,
            **options,
        )
        log_variance = _FIRST_LOG_VARIANCE if decoder_variance is None else math.log(decoder_variance)
        self.decoder_log_variance = nn.Parameter(torch.tensor(log_variance), requires_grad=decoder_variance is None)

    def encode(self, sample: torch.Tensor, class_labels: torch.Tensor) -> DiagonalGaussianDistribution:
        """The posterior q(z|x) of the latents, of images in [-1, 1] and class ids `(batch,)`."""
        features = self.encoder(self._with_class(sample, class_labels))
        return DiagonalGaussianDistribution(self.to_posterior(features.flatten(1))[:, :, None, None])

    def decode(self, latents: torch.Tensor, class_labels: torch.Tensor) -> DecoderOutput:
        """The mean of the images in [-1, 1], given latents `(batch, latent_dim)` and class ids `(batch,)`."""
        features = self.from_latents(latents).unflatten(1, self.bottom_shape)
        return DecoderOutput(sample=self.decoder(self._with_class(features, class_labels)))

    def forward(
        self,
        sample: torch.Tensor,
        class_labels: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> VAEOutput | tuple:
        """The decoder's mean at latents drawn from the posterior, and the posterior; arguments as of [`encode`]."""
        posterior = self.encode(sample, class_labels)
        latents = posterior.sample(generator)[:, :, 0, 0]
        decoded = self.decode(latents, class_labels).sample
        return VAEOutput(sample=decoded, posterior=posterior) if return_dict else (decoded, posterior)

    def bound(self, images: torch.Tensor, output: VAEOutput) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Distortion and rate of 8-bit images, in bits per dimension: the negative ELBO (arXiv 1312.6114, equation 3).

        Distortion is `-log p(x|z)`, with one sample from the posterior, and rate `KL(q(z|x) || p(z))`, each of shape
        `(batch,)`; `output` is that of [`forward`] for these images in [-1, 1].
        """
        log_scale = (0.5 * self.decoder_log_variance.float()).expand_as(images)
        likelihood = discretized_gaussian_log_likelihood(images.float(), output.sample.float(), log_scale)
        dimensions = images[0].numel()
        return -mean_over_pixels(likelihood) / math.log(2), output.posterior.kl() / (dimensions * math.log(2))

    def _with_class(self, features: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        planes = self.class_embedding(class_labels)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return torch.cat([features, planes.to(features.dtype)], dim=1)
