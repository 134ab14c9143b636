"""Tiny models for every kind of guidance, 3x8x8 images in 5 classes, and pipelines of them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from guidance_helpers import NAMES, REVERSED
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hf_guided import ADMForImageClassification, ADMScheduler, ADMUNet2DModel, ClassifierGuidedPipeline


@pytest.fixture(scope="session")
def make_unet(tiny_unet) -> Callable[..., ADMUNet2DModel]:
    def make(**arguments: Any) -> ADMUNet2DModel:
        defaults = {"sample_size": 8, "attention_resolutions": (4,), "null_class_label": True}
        return tiny_unet(**{**defaults, **arguments})

    return make


@pytest.fixture(scope="session")
def make_classifier(tiny_classifier) -> Callable[..., ADMForImageClassification]:
    def make(**arguments: Any) -> ADMForImageClassification:
        defaults = {"sample_size": 8, "attention_resolutions": [4], "id2label": NAMES, "label2id": {}}
        arguments = {**defaults, **arguments}
        return tiny_classifier(**arguments, num_labels=len(arguments["id2label"]))

    return make


@pytest.fixture(scope="session")
def make_resnet() -> Callable[..., PreTrainedModel]:
    """Makes a classifier of clean images with ReLUs, its classes in the reverse order."""

    def make(**arguments: Any) -> PreTrainedModel:
        torch.manual_seed(2)
        config = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        names = {"id2label": REVERSED, "label2id": {}}
        return ResNetForImageClassification(ResNetConfig(**{**config, **names, **arguments})).eval()

    return make


@pytest.fixture(scope="session")
def clip_model() -> CLIPModel:
    torch.manual_seed(3)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layers, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    vision = {**layers, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    for parameter in model.vision_model.parameters():  # as initialised, it hardly sees the pixels
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def clip_processor(tmp_path_factory) -> CLIPProcessor:
    """A real tokenizer, whose tokens are letters, and a real image processor."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return CLIPProcessor(images, tokenizer)


@pytest.fixture(scope="session")
def components(make_unet, make_classifier, make_resnet, clip_model, clip_processor) -> dict[str, Any]:
    """Everything that any kind needs; the tests leave it as it is."""
    return {
        "unet": make_unet(),
        "scheduler": ADMScheduler(),
        "classifier": make_classifier(),
        "guide_unet": make_unet(channel_mult=(1,), attention_resolutions=()),
        "clean_classifier": make_resnet(),
        "clip_model": clip_model,
        "clip_processor": clip_processor,
    }


@pytest.fixture(scope="session")
def make_pipe(components) -> Callable[..., ClassifierGuidedPipeline]:
    """Makes a pipeline of five steps, 999, 749, 500, 250 and 0, with other components where they are given."""

    def make(**arguments: Any) -> ClassifierGuidedPipeline:
        pipe = ClassifierGuidedPipeline(**{**components, "sampling_defaults": {"respacing": "5"}, **arguments})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def pipe(make_pipe) -> ClassifierGuidedPipeline:
    return make_pipe()
