"""Fine-tuning: weights of a pretrained model that fit are kept, the others are reinitialised."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from hf_guided import ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline
from hf_guided.labels import composed
from hf_guided.loading import naming_damage
from hf_guided.models.layers import level_attention
from hf_guided.training.arguments import ModelArguments

logger = logging.getLogger(__name__)


class Pretrained:
    """The configs of a pretrained pipeline with an ADM UNet, or of such a UNet alone, in a folder or on the Hub.

    Others, and damaged ones, are a `ValueError`.
    """

    def __init__(self, name: str):
        try:
            index = ClassifierGuidedPipeline.load_config(name)
        except OSError:
            index = {}
        self.name, self.subfolder = name, "unet" if index else None
        try:
            self.config = ADMUNet2DModel.load_config(name, subfolder=self.subfolder)
        except OSError as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"--pretrained_model {name} is neither a pipeline with a UNet nor a UNet ({reason})."
            ) from error
        if (kind := self.config.get("_class_name")) != ADMUNet2DModel.__name__:
            raise ValueError(f"--pretrained_model {name} has a {kind}; only an ADMUNet2DModel is fine-tuned.")
        with naming_damage(name), torch.device("meta"):  # without memory for the weights
            ADMUNet2DModel.from_config(self.config)
            self.scheduler_config = ADMScheduler.load_config(name, subfolder="scheduler") if index else {}
            self.id2label = {int(label): text for label, text in (index.get("id2label") or {}).items()}

    def check(self, wanted: Mapping[str, Any], is_upsampler: bool) -> None:
        """Refuses a model for another task, or trained with other arguments of the scheduler than those wanted."""
        if (self.config.get("low_res_channels") is not None) != is_upsampler:
            here, script = ("an", "train_upscaler.py") if not is_upsampler else ("not an", "train_diffusion.py")
            raise ValueError(f"--pretrained_model {self.name} is {here} upsampler; train it with {script}.")
        known = {**wanted, **self.scheduler_config}
        if mend := [f"--{name} {known[name]}" for name in wanted if known[name] != wanted[name]]:
            raise ValueError(
                f"--pretrained_model {self.name} has another noise schedule or objective than these flags; add "
                f"{' '.join(mend)}."
            )

    def architecture(self, resolution: tuple[int, int]) -> dict[str, Any]:
        """The UNet's arguments that fix its weights; attention stays at the same levels for other image sizes."""
        names = {"num_heads_upsample", *ModelArguments().architecture()}
        config = {name: value for name, value in self.config.items() if name in names}
        levels = range(len(config["channel_mult"]))
        has_attention = level_attention(self.config["sample_size"], len(levels), config["attention_resolutions"])
        config["attention_resolutions"] = [resolution[0] // 2**level for level in levels if has_attention[level]]
        return config

    def unet(self, config: dict[str, Any], id2label: dict[int, str]) -> ADMUNet2DModel:
        """A UNet of another config with all pretrained tensors that fit, those of classes if these have equal names."""
        pretrained = ADMUNet2DModel.from_pretrained(self.name, subfolder=self.subfolder, torch_dtype=torch.float32)
        weights = pretrained.state_dict()
        with torch.device("meta"):  # only reinitialised modules allocate and draw weights
            unet = ADMUNet2DModel(**config)
        reasons = {}
        for name, tensor in unet.state_dict().items():
            if name not in weights:
                reasons[name] = "new"
            elif weights[name].shape != tensor.shape:
                reasons[name] = f"{_shape(tensor)} instead of {_shape(weights[name])}"
            elif name == "class_embedding.weight" and _compared(self.id2label) != _compared(id2label):
                reasons[name] = "other classes"
        for module_name in dict.fromkeys(name.rpartition(".")[0] for name in reasons):  # a fixed order, for the seed
            unet.get_submodule(module_name).to_empty(device="cpu").reset_parameters()
        kept = {name: tensor for name, tensor in weights.items() if name not in reasons}
        unused = unet.load_state_dict(kept, strict=False, assign=True).unexpected_keys
        if os.environ.get("RANK", "0") == "0":
            changes = [f"; reinitialised: {name} ({reason})" for name, reason in reasons.items()]
            changes += [f"; not used: {', '.join(unused)}"] if unused else []
            count = f"{len(kept) - len(unused)} of {len(weights)}"
            logger.info(f"Kept {count} tensors of {self.name}{''.join(changes)}.")
        return unet


def _compared(id2label: Mapping[int, str]) -> dict[int, str]:
    return {label: composed(name) for label, name in id2label.items()}


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))
