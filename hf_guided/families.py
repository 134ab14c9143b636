"""The families of generative models, each declared once; commands, reports, cards and Spaces read it here.

It imports nothing heavy, so that a push reads it without torch. To add a family, declare it here, write its model
`baselines/<name>.py`, its pipeline `pipelines/pipeline_<name>.py`, and its task in `training/train_baseline.py`.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """A family of generative models."""

    title: str  # in tables and plots
    noun: str  # what one of its models is called in a sentence
    pipeline: str  # the class that samples
    models: tuple[str, ...]  # the classes of its models
    component: str  # of the pipeline, which makes the images
    paper: str  # a Markdown link
    tag: str  # on the Hub
    trade_off: str  # the argument of the pipeline's call that trades variety for fidelity
    curve: tuple[float, ...] = ()  # values of it that a comparison draws
    requirements: tuple[str, ...] = ()  # packages that its models need beside this package's own


DIFFUSION = Family(
    title="Diffusion",
    noun="diffusion model",
    pipeline="ClassifierGuidedPipeline",
    models=("ADMUNet2DModel",),
    component="unet",
    paper="ADM,\n[Diffusion Models Beat GANs on Image Synthesis](https://arxiv.org/abs/2105.05233)",
    tag="adm",
    trade_off="guidance_scale",
)

# What diffusion is compared with, by name in commands, recipes and reports.
BASELINES = {
    "vae": Family(
        title="VAE",
        noun="VAE",
        pipeline="VAEPipeline",
        models=("ClassConditionalVAE",),
        component="vae",
        paper="[Auto-Encoding Variational Bayes](https://arxiv.org/abs/1312.6114)",
        tag="vae",
        trade_off="temperature",
    ),
    "gan": Family(
        title="GAN",
        noun="GAN",
        pipeline="GANPipeline",
        models=("BigGANGenerator", "BigGANDiscriminator"),
        component="generator",
        paper="[Large Scale GAN Training](https://arxiv.org/abs/1809.11096)",
        tag="gan",
        trade_off="truncation",
        curve=(0.5, 1.0, 2.0),
    ),
    "flow": Family(
        title="Flow",
        noun="normalizing flow",
        pipeline="FlowPipeline",
        models=("ClassConditionalGlow",),
        component="flow",
        paper="[Glow](https://arxiv.org/abs/1807.03039)",
        tag="normalizing-flow",
        trade_off="temperature",
        requirements=("normflows",),
    ),
}


def family_of(class_name: str) -> Family:
    """The family of a pipeline or model by the name of its class; diffusion, if no other claims it."""
    families = (family for family in BASELINES.values() if class_name in (family.pipeline, *family.models))
    return next(families, DIFFUSION)
