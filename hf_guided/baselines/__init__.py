"""Models of the families that diffusion is compared with: a VAE, a GAN and a normalizing flow, each told the class."""

from .flow import ClassConditionalGlow
from .gan import AdversarialPair, BigGANDiscriminator, BigGANGenerator
from .vae import ClassConditionalVAE

__all__ = [
    "AdversarialPair",
    "BigGANDiscriminator",
    "BigGANGenerator",
    "ClassConditionalGlow",
    "ClassConditionalVAE",
]
