"""What guidance shows a classifier against what the image processors of transformers make of the same pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    EfficientNetImageProcessorPil,
    LevitImageProcessorPil,
    MobileViTImageProcessorPil,
    PerceiverImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_guided.guidance.preprocessing import center_crop, preprocessing
from hf_guided.models.image_processing_adm import ADMImageProcessor

STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE_12 = {"height": 12, "width": 12}
PROCESSORS = {
    "vit": ViTImageProcessorPil(size=SQUARE_12, **STATISTICS),
    "vit, not square": ViTImageProcessorPil(size={"height": 10, "width": 17}),
    "vit, bicubic": ViTImageProcessorPil(size=SQUARE_12, resample=3),
    "vit, nearest": ViTImageProcessorPil(size={"height": 8, "width": 16}, resample=0),
    "vit, no resizing": ViTImageProcessorPil(do_resize=False, **STATISTICS),
    "vit, no normalisation": ViTImageProcessorPil(size=SQUARE_12, do_normalize=False),
    "vit, no rescaling": ViTImageProcessorPil(size=SQUARE_12, do_rescale=False, do_normalize=False),
    "vit, another factor": ViTImageProcessorPil(size=SQUARE_12, rescale_factor=1 / 127.5, image_mean=[1.0] * 3),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size=SQUARE_12),
    "clip, cropped": CLIPImageProcessorPil(size={"shortest_edge": 15}, crop_size={"height": 12, "width": 11}),
    "clip, padded": CLIPImageProcessorPil(size={"shortest_edge": 11}, crop_size={"height": 16, "width": 14}),
    "clip, not cropped": CLIPImageProcessorPil(size={"shortest_edge": 13}, do_center_crop=False),
    "convnext below 384": ConvNextImageProcessorPil(size={"shortest_edge": 12}, **STATISTICS),
    "convnext, cut more": ConvNextImageProcessorPil(size={"shortest_edge": 21}, crop_pct=0.7),
    "convnext from 384": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "adm": ADMImageProcessor(size={"height": 8, "width": 8}),
    "adm, larger": ADMImageProcessor(size={"height": 24, "width": 16}),
}


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (9, 14), (31, 20)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_become_what_their_processor_makes_of_them(name, size):
    """Up to the 8 bits in which PIL keeps a picture after each of its two passes: 1.2 of 255 levels a resizing."""
    processor = PROCESSORS[name]
    # in the middle of the range, beyond whose ends a bicubic overshoots, which 8 bits cut off
    pictures = np.random.default_rng(0).integers(64, 192, (2, *size, 3), dtype=np.uint8)
    expected = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
    images = torch.from_numpy(pictures).movedim(-1, 1) / 127.5 - 1
    prepared = preprocessing(processor)(images)
    assert prepared.shape == expected.shape
    level = processor.rescale_factor if processor.do_rescale else 1.0
    deviation = (prepared - expected).abs()
    if processor.do_normalize:
        deviation = deviation * torch.tensor(processor.image_std).expand(3).view(3, 1, 1)
    resized = processor.do_resize and expected.shape[-2:] != size
    resizings = 2 if name == "adm" and size == (31, 20) else 1  # one half first
    assert deviation.max() < (1.2 * resizings if resized and int(processor.resample) else 1e-4) * level


def test_grey_pictures_for_a_classifier_of_grey_images():
    processor = ADMImageProcessor(size=SQUARE_12, num_channels=1)
    pictures = np.random.default_rng(0).integers(64, 192, (2, 9, 14), dtype=np.uint8)
    expected = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values
    prepared = preprocessing(processor)(torch.from_numpy(pictures)[:, None] / 127.5 - 1)
    assert prepared.shape == expected.shape == (2, 1, 12, 12)
    assert (prepared - expected).abs().max() < 2.4 / 255


@pytest.mark.parametrize("size", [(5, 4), (9, 7)])
@pytest.mark.parametrize("name", ["vit", "clip, cropped", "clip, padded", "convnext, cut more", "adm"])
def test_it_is_differentiable(name, size):
    prepare = preprocessing(PROCESSORS[name])
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert prepare(images).dtype == torch.float64
    assert torch.autograd.gradcheck(prepare, images.requires_grad_())


def test_overshooting_images_keep_their_gradient():
    """Clipped to 8 bits like a picture's, pixels near black and white could not be guided."""
    images = torch.where(torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    images.requires_grad_()
    prepared = preprocessing(PROCESSORS["vit, bicubic"])(images)
    assert prepared.abs().max() > 1.05
    weights = torch.randn(prepared.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((prepared * weights).sum(), images)
    assert (gradient != 0).all()


def test_without_a_processor_images_stay_as_they_are():
    images = torch.randn(2, 3, 5, 6)
    assert preprocessing(None)(images) is images


def test_what_is_missing_around_a_crop_is_black():
    images = torch.ones(1, 1, 2, 3)
    assert center_crop(images, 4, 2).tolist() == [[[[0, 0], [1, 1], [1, 1], [0, 0]]]]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (ViTImageProcessorPil(size={"longest_edge": 12}), "cannot be done differentiably here"),
        (ViTImageProcessorPil(size={"shortest_edge": 12, "longest_edge": 24}), "cannot be done differentiably here"),
        (ViTImageProcessorPil(size=SQUARE_12, resample=1), "take 0, 2 or 3"),
        # these do what none of the usual settings says: resize to more, turn the channels round, shift the range
        (LevitImageProcessorPil(), "LevitImageProcessorPil does more"),
        (MobileViTImageProcessorPil(), "MobileViTImageProcessorPil does more"),
        (EfficientNetImageProcessorPil(rescale_offset=True), "EfficientNetImageProcessorPil does more"),
        (PerceiverImageProcessorPil(), "PerceiverImageProcessorPil does more"),
    ],
)
def test_a_processor_that_resizes_in_another_way_is_refused(processor, message):
    with pytest.raises(ValueError, match=message):
        preprocessing(processor)
