"""Other code of such models, for the benchmarks to run beside ours. Nothing of it is part of this project.

The published guided-diffusion is read from a folder (https://github.com/openai/guided-diffusion), diffusers is
installed, denoising-diffusion-pytorch comes with `pip install --no-deps denoising-diffusion-pytorch ema-pytorch
einops`.
"""

import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_guided.conversion import convert_openai_classifier, convert_openai_unet

# The sizes at which the project states its numbers: 32x32 pixels, 8.0 and 3.3 million parameters.
UNET = {
    "image_size": 32,
    "in_channels": 3,
    "model_channels": 64,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": (2, 4),  # rates of downsampling, as the published constructors want them
    "channel_mult": (1, 2, 2),
    "num_classes": 10,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": False,
}
CLASSIFIER = {name: value for name, value in UNET.items() if name != "num_classes"} | {
    "out_channels": 10,
    "pool": "attention",
}


def guided_diffusion(folder: str | Path) -> Any:
    """The package of the published code, from a folder that has `guided_diffusion/` in it.

    Raises:
        `ValueError`: If it is not there.
    """
    if not (Path(folder) / "guided_diffusion" / "unet.py").is_file():
        raise ValueError(
            f"--guided_diffusion {folder}: there is no guided_diffusion/unet.py in it; give a clone of "
            f"https://github.com/openai/guided-diffusion."
        )
    sys.path.insert(0, str(Path(folder).resolve()))
    for name in ("unet", "gaussian_diffusion", "respace", "script_util", "nn", "fp16_util", "resample"):
        importlib.import_module(f"guided_diffusion.{name}")
    return sys.modules["guided_diffusion"]


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every weight noise of unit gain, so that no branch is the zero that it is before training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def published_models(peer: Any, unet: dict[str, Any], classifier: dict[str, Any]) -> dict[str, nn.Module]:
    """The published UNet and classifier of these arguments, and ours of the same weights."""

    def make(kind: type, arguments: dict[str, Any]) -> nn.Module:
        known = inspect.signature(kind).parameters  # the schedule, which `costs.published_configs` tells too, is not
        return randomise(kind(**{name: value for name, value in arguments.items() if name in known})).eval()

    theirs = {
        "unet": make(peer.unet.UNetModel, unet),
        "classifier": make(peer.unet.EncoderUNetModel, classifier),
    }
    return {
        **theirs,
        "our_unet": convert_openai_unet(theirs["unet"].state_dict(), unet).eval(),
        "our_classifier": convert_openai_classifier(theirs["classifier"].state_dict(), classifier).eval(),
    }


def diffusers_unet(unet: dict[str, Any]) -> nn.Module:
    """diffusers' `UNet2DModel` of equal size: the same widths, blocks, attention, conditions."""
    from diffusers import UNet2DModel

    levels = range(len(unet["channel_mult"]))
    attends = [2**level in unet["attention_resolutions"] for level in levels]
    return UNet2DModel(
        sample_size=unet["image_size"],
        in_channels=unet["in_channels"],
        out_channels=unet["out_channels"],
        layers_per_block=unet["num_res_blocks"],
        block_out_channels=[mult * unet["model_channels"] for mult in unet["channel_mult"]],
        down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=unet["num_head_channels"],
        num_class_embeds=unet["num_classes"],
        resnet_time_scale_shift="scale_shift",
    )


def denoising_diffusion_pytorch() -> Any:
    """The package of that name, without torchvision, which only its folder of images would need.

    Raises:
        `ImportError`: If it is not installed.
    """
    for name, parts in {"torchvision": ("transforms", "utils"), "pytorch_fid": ("inception", "fid_score")}.items():
        if importlib.util.find_spec(name) is None:
            package = types.ModuleType(name)
            for part in parts:
                module = types.ModuleType(f"{name}.{part}")
                module.InceptionV3 = module.calculate_frechet_distance = None
                setattr(package, part, module)
                sys.modules[f"{name}.{part}"] = module
            sys.modules[name] = package
    return importlib.import_module("denoising_diffusion_pytorch")
