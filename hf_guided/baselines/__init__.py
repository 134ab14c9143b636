"""Models of the families to compare with diffusion: a VAE, a GAN and a normalizing flow, all class-conditional."""

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
