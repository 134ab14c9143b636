"""The 15 checkpoints that OpenAI published with "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233)."""

import difflib
from dataclasses import dataclass

_DIFFUSION = (
    "--diffusion_steps 1000 --learn_sigma True --resblock_updown True --use_scale_shift_norm True "
    "--attention_resolutions 32,16,8 --timestep_respacing 250"
)
_256 = (
    f"{_DIFFUSION} --image_size 256 --noise_schedule linear --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2"
)
# LSUN's best samples used more than 250 steps.
_LSUN = f"{_256} --class_cond False --timestep_respacing 1000"
_CLASSIFIER = (
    "--diffusion_steps 1000 --classifier_attention_resolutions 32,16,8 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True --classifier_use_scale_shift_norm True"
)


@dataclass(frozen=True)
class Published:
    """A published checkpoint."""

    flags: str  # of the published scripts, with the steps and the scale of its best samples
    data: str = "ImageNet"  # for training
    classifier: str | None = None  # name of the one that can guide it, of the same size and schedule
    float32_only: bool = False  # published samples were drawn in float32 only


PUBLISHED = {
    "64x64_diffusion": Published(
        f"{_DIFFUSION} --image_size 64 --class_cond True --noise_schedule cosine --num_channels 192 "
        "--num_head_channels 64 --num_res_blocks 3 --dropout 0.1 --use_new_attention_order True "
        "--classifier_scale 1.0",
        classifier="64x64_classifier",
    ),
    "128x128_diffusion": Published(
        f"{_DIFFUSION} --image_size 128 --class_cond True --noise_schedule linear --num_channels 256 --num_heads 4 "
        f"--num_res_blocks 2 --classifier_scale 0.5",
        classifier="128x128_classifier",
    ),
    "256x256_diffusion": Published(f"{_256} --class_cond True --classifier_scale 1.0", classifier="256x256_classifier"),
    "256x256_diffusion_uncond": Published(
        f"{_256} --class_cond False --classifier_scale 10.0", classifier="256x256_classifier"
    ),
    "512x512_diffusion": Published(
        f"{_256} --image_size 512 --class_cond True --classifier_scale 4.0",
        classifier="512x512_classifier",
        float32_only=True,
    ),
    "64_256_upsampler": Published(
        f"{_DIFFUSION} --large_size 256 --small_size 64 --class_cond True --noise_schedule linear --num_channels 192 "
        f"--num_heads 4 --num_res_blocks 2",
        classifier="256x256_classifier",
    ),
    "128_512_upsampler": Published(
        f"{_DIFFUSION} --large_size 512 --small_size 128 --class_cond True --noise_schedule linear --num_channels 192 "
        f"--num_head_channels 64 --num_res_blocks 2 --attention_resolutions 32,16",
        classifier="512x512_classifier",
    ),
    "lsun_bedroom": Published(f"{_LSUN} --dropout 0.1", data="LSUN bedroom", classifier="256x256_classifier"),
    "lsun_cat": Published(f"{_LSUN} --dropout 0.1", data="LSUN cat", classifier="256x256_classifier"),
    "lsun_horse": Published(f"{_LSUN} --dropout 0.1", data="LSUN horse", classifier="256x256_classifier"),
    "lsun_horse_nodropout": Published(f"{_LSUN} --dropout 0.0", data="LSUN horse", classifier="256x256_classifier"),
    "64x64_classifier": Published(f"{_CLASSIFIER} --image_size 64 --classifier_depth 4 --noise_schedule cosine"),
    "128x128_classifier": Published(f"{_CLASSIFIER} --image_size 128 --classifier_depth 2 --noise_schedule linear"),
    "256x256_classifier": Published(f"{_CLASSIFIER} --image_size 256 --classifier_depth 2 --noise_schedule linear"),
    "512x512_classifier": Published(f"{_CLASSIFIER} --image_size 512 --classifier_depth 2 --noise_schedule linear"),
}


def find_published(name: str) -> Published:
    """The published checkpoint of a name; raises for another name and lists all names."""
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{name!r} is not a published checkpoint; {hint}They are {', '.join(PUBLISHED)}. Describe your own "
            f"checkpoint with --flags instead of a name."
        )
    return PUBLISHED[name]


def kind_of(name: str) -> str:
    """The kind of a published name: `"unet"`, `"upsampler"` or `"classifier"`."""
    return name.rpartition("_")[2] if name.endswith(("_classifier", "_upsampler")) else "unet"
