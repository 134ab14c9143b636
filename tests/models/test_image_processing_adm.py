"""Pictures of every mode and size come out as the classifier takes them."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided import ADMImageProcessor


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def process(processor, images):
    values = processor(images, return_tensors="pt")["pixel_values"]
    assert values.dtype == torch.float32
    return values


def test_values_map_to_minus_one_and_one(pixels):
    processor = ADMImageProcessor(size={"height": 8, "width": 8})
    pixels[0, :2] = [[0, 0, 0], [255, 255, 255]]
    values = process(processor, Image.fromarray(pixels))
    assert values.shape == (1, 3, 8, 8)
    torch.testing.assert_close(values[0].permute(1, 2, 0), torch.from_numpy(pixels / np.float32(127.5) - 1))
    assert values[0, 0, 0, :2].tolist() == [-1, 1]


def test_resizes_to_height_and_width(pixels):
    values = process(ADMImageProcessor(size={"height": 4, "width": 6}), Image.fromarray(pixels))
    resized = Image.fromarray(pixels).resize((6, 4), Image.Resampling.BICUBIC)
    torch.testing.assert_close(values[0].permute(1, 2, 0), torch.from_numpy(np.float32(resized) / 127.5 - 1))


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_the_classifiers_channels(pixels, mode, num_channels):
    processor = ADMImageProcessor(size={"height": 8, "width": 8}, num_channels=num_channels)
    image = Image.fromarray(pixels).convert(mode)
    values = process(processor, image)
    wanted = np.float32(image.convert("L" if num_channels == 1 else "RGB")).reshape(8, 8, num_channels)
    torch.testing.assert_close(values[0].permute(1, 2, 0), torch.from_numpy(wanted / 127.5 - 1))


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_become_the_classifiers_channels(pixels, channels, num_channels):
    processor = ADMImageProcessor(size={"height": 8, "width": 8}, num_channels=num_channels)
    array = np.concatenate([pixels, pixels[..., :1]], axis=2)[..., :channels]
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    torch.testing.assert_close(process(processor, array), process(processor, image))


def test_other_numbers_of_channels_are_refused(pixels):
    with pytest.raises(ValueError, match="An image of 3 channels cannot be turned into the 5 that the classifier"):
        process(ADMImageProcessor(size={"height": 8, "width": 8}, num_channels=5), pixels)


def test_lists_become_batches(pixels):
    images = [Image.fromarray(pixels), Image.fromarray(pixels[::-1].copy())]
    processor = ADMImageProcessor(size={"height": 8, "width": 8})
    values = process(processor, images)
    assert torch.equal(values[0], values[1].flip(1))
    assert torch.equal(values[:1], process(processor, images[0]))


def test_save_and_load(tmp_path):
    processor = ADMImageProcessor(size={"height": 4, "width": 6}, num_channels=1)
    processor.save_pretrained(tmp_path)
    assert ADMImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
