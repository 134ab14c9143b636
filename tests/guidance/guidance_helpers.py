"""The kinds of guidance as the tests use them, and how they sample and count."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_guided import ClassifierGuidedPipeline
from hf_guided.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    CLIPGuidance,
    DenoisedClassifierGuidance,
    Guidance,
    LossGuidance,
)

NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "daisy", 3: "agama", 4: "pug, pug-dog"}
REVERSED = {0: "pug", 1: "Agama", 2: "daisy", 3: "crane", 4: "tench"}


def darkness(images: torch.Tensor) -> torch.Tensor:
    """A loss of each image: its distance from white."""
    return ((images - 1) ** 2).sum((1, 2, 3))


# Each kind by the component whose calls it costs, and with a scale at which it is seen.
GRADIENTS: dict[str, tuple[str, Callable[..., Guidance], float]] = {
    "classifier": ("classifier", ClassifierGuidance, 20.0),
    "denoised": ("clean_classifier", DenoisedClassifierGuidance, 20.0),
    "denoised through the UNet": ("clean_classifier", partial(DenoisedClassifierGuidance, through_unet=True), 20.0),
    "clip": ("clip_model", partial(CLIPGuidance, "a pug", num_cutouts=2), 5.0),
    "clip through the UNet": ("clip_model", partial(CLIPGuidance, "a pug", num_cutouts=2, through_unet=True), 5.0),
    "loss": ("loss", partial(LossGuidance, darkness), 0.1),
    "loss stopped": ("loss", partial(LossGuidance, darkness, through_unet=False), 0.1),
}
COMPARISONS: dict[str, tuple[str, Callable[..., Guidance], float]] = {
    "classifier-free": ("unet", ClassifierFreeGuidance, 3.0),
    "auto": ("guide_unet", AutoGuidance, 3.0),
}
KINDS = {**GRADIENTS, **COMPARISONS}


def make(name: str, **arguments: Any) -> Guidance:
    """A kind by its name here, at the scale at which it is seen."""
    _, kind, scale = KINDS[name]
    return kind(**{"scale": scale, **arguments})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe: ClassifierGuidedPipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    return pipe(*args, **{"generator": seeded(), "output_type": "latent", **kwargs}).images


def steps_of(pipe: ClassifierGuidedPipeline, *args: Any, **kwargs: Any) -> list[dict[str, torch.Tensor | None]]:
    """What the callback sees at each step: model_output and gradient."""
    seen: list[dict[str, torch.Tensor | None]] = []
    names = ["model_output", "gradient"]
    watch = lambda pipe, i, t, tensors: seen.append(tensors) or {}  # noqa: E731
    sample(pipe, *args, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names, **kwargs)
    return seen


@contextmanager
def batches_seen(pipe: ClassifierGuidedPipeline) -> Iterator[dict[str, list[int]]]:
    """The batch size of each forward pass of each real model, by component."""
    seen: dict[str, list[int]] = {}
    with ExitStack() as stack:
        for name in ("unet", "classifier", "clean_classifier", "guide_unet", "clip_model"):
            module = getattr(pipe, name)
            if module is None:
                continue
            seen[name] = []
            module = module.vision_model if name == "clip_model" else module
            hook = partial(_note, seen[name])
            stack.enter_context(_removing(module.register_forward_hook(hook, with_kwargs=True)))
        yield seen


def _note(sizes: list[int], module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
    sizes.append(len(args[0] if args else kwargs["pixel_values"]))


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
