"""Pictures of every mode and size come out as the classifier takes them."""

import base64
import json
import os

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import pipeline

from hf_guided import ADMImageProcessor
from hf_guided.data import LabelledImages
from hf_guided.models.images import resize_and_crop, to_pixel_values
from hf_guided.pipelines.inputs import images_to_tensor


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


def picture(kind: str, height: int, width: int) -> tuple[Image.Image, str, dict]:
    """A picture of noise, the format of a file that keeps it, and what the file says beside."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8))
    deep = random.integers(0, 2**16, (height, width))
    exif = Image.Exif()
    match kind:
        case "P, one colour transparent":
            return image.convert("RGB").quantize(16), "PNG", {"transparency": 3}
        case "P, every colour transparent in part":
            return image.convert("RGB").quantize(16), "PNG", {"transparency": bytes(range(0, 256, 16))}
        case "P with alpha":
            return image.quantize(64), "PNG", {}
        case "RGB, one colour transparent":
            return image.convert("RGB"), "PNG", {"transparency": image.getpixel((0, 0))[:3]}
        case "L, one gray transparent":
            return image.convert("L"), "PNG", {"transparency": image.convert("L").getpixel((0, 0))}
        case "1, white transparent":
            return image.convert("1"), "PNG", {"transparency": 1}
        case "I;16" | "I;16, one gray transparent":
            return (
                Image.fromarray(deep.astype(np.uint16)),
                "PNG",
                {"transparency": int(deep[0, 0])} if "," in kind else {},
            )
        case "I":
            return Image.fromarray(deep.astype(np.int32)), "TIFF", {}
        case "I;16B":
            return Image.frombytes("I;16B", (width, height), deep.astype(">u2").tobytes()), "TIFF", {}
        case "F":
            return Image.fromarray((deep / 65535).astype(np.float32)), "TIFF", {}
        case "RGB, GIF" | "RGB, WEBP" | "RGB, JPEG":
            return image.convert("RGB"), kind.rpartition(" ")[2], {}
        case "RGB, EXIF 6" | "RGB, EXIF 5" | "RGB, EXIF 2" | "RGBA, EXIF 8":
            mode, _, orientation = kind.partition(", EXIF ")
            exif[ExifTags.Base.Orientation] = int(orientation)
            return image.convert(mode), "PNG", {"exif": exif}
        case "CMYK":
            return image.convert("RGB").convert(kind), "TIFF", {}
        case _:
            return image.convert(kind), "PNG", {}


KINDS = [
    *("RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "I;16", "I", "I;16B", "F"),
    *("P, one colour transparent", "P, every colour transparent in part", "P with alpha"),
    *("RGB, one colour transparent", "L, one gray transparent", "1, white transparent", "I;16, one gray transparent"),
    *("RGB, GIF", "RGB, WEBP", "RGB, JPEG", "RGB, EXIF 2", "RGB, EXIF 5", "RGB, EXIF 6", "RGBA, EXIF 8"),
]


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_become_what_training_makes_of_them_to_the_bit(kind, num_channels, tiny_classifier, tmp_path):
    """However they are given: as a file, opened by the user, of the dataset, or through transformers' pipeline."""
    classifier = tiny_classifier(in_channels=num_channels, sample_size=[16, 24])
    classifier.save_pretrained(tmp_path / "classifier")
    classify = pipeline("image-classification", model=str(tmp_path / "classifier"))
    for height, width in [(16, 24), (33, 50), (9, 40), (70, 131)]:
        image, file_format, said = picture(kind, height, width)
        path = tmp_path / f"{height}.{file_format.lower()}"
        image.save(path, file_format, **said)
        rows = [{"image": {"bytes": None, "path": str(path)}}]
        data = LabelledImages(rows, np.arange(1), None, {}, "data", (16, 24), num_channels)
        expected = data[0]["pixel_values"]
        assert expected.shape == (num_channels, 16, 24)
        with Image.open(path) as opened:
            for given in (opened, str(path), [str(path)]):
                assert torch.equal(process(classify.image_processor, given)[0], expected)
            for given in (opened, str(path), base64.b64encode(path.read_bytes()).decode()):
                assert torch.equal(classify.preprocess(given)["pixel_values"][0], expected)
            assert torch.equal(images_to_tensor(opened, num_channels)[0], data_at_its_size(rows, num_channels, opened))
    assert len(classify(str(path))) == 3


def data_at_its_size(rows, num_channels, opened):
    height, width = np.asarray(ImageOps.exif_transpose(opened)).shape[:2]
    return LabelledImages(rows, np.arange(1), None, {}, "data", (height, width), num_channels)[0]["pixel_values"]


def test_what_is_transparent_is_white_not_the_colour_beneath(tmp_path):
    hidden = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (process(ADMImageProcessor(size={"height": 16, "width": 16}), hidden) == 1).all()


def test_processors_of_earlier_versions_load(tmp_path):
    """As they were saved, they do what training does."""
    config = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": 0.5,
        "image_processor_type": "ADMImageProcessor",
        "image_std": 0.5,
        "num_channels": 3,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 16, "width": 16},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    expected = to_pixel_values(resize_and_crop(image, (16, 16)), 3)
    assert np.array_equal(process(ADMImageProcessor.from_pretrained(tmp_path), image)[0].numpy(), expected)
    assert ADMImageProcessor.from_pretrained(tmp_path).to_dict() == config


def test_its_settings_are_followed(pixels):
    """What transformers' processors can be asked for: other means, no scaling, no resizing."""
    image = Image.fromarray(pixels)
    processor = ADMImageProcessor(size={"height": 4, "width": 4})
    bare = processor(image, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(bare[0], pixels.transpose(2, 0, 1))
    halves = processor(image, do_resize=False, image_mean=0.0, image_std=2.0, return_tensors="np")["pixel_values"]
    assert np.allclose(halves[0], pixels.transpose(2, 0, 1) / 510)
    with pytest.raises(ValueError, match="a height and a width"):
        processor(image, size={"shortest_edge": 8})


def test_a_picture_of_any_length_takes_little_memory():
    for size in [(1_000_000, 1), (1, 1_000_000)]:
        image = Image.new("RGB", size, "red")
        values = process(ADMImageProcessor(size={"height": 64, "width": 64}), image)
        assert values.shape == (1, 3, 64, 64)


def test_files_that_are_no_pictures_are_named(tmp_path):
    processor = ADMImageProcessor(size={"height": 8, "width": 8})
    with pytest.raises(ValueError, match=r"'missing\.png' is neither a file"):
        processor("missing.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file"):
        processor(str(tmp_path / "pipe.png"))


def test_floats_keep_their_values_and_their_depth():
    values = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    processor = ADMImageProcessor(size={"height": 8, "width": 8}, do_rescale=False)
    assert np.array_equal(processor(values, return_tensors="np")["pixel_values"][0], values * 2 - 1)
    gray = processor(values[:1], return_tensors="np")["pixel_values"][0]
    assert np.array_equal(gray, np.repeat(values[:1] * 2 - 1, 3, axis=0))


def test_integers_of_more_than_8_bits_are_refused_where_they_need_them(pixels):
    processor = ADMImageProcessor(size={"height": 8, "width": 8})
    assert torch.equal(process(processor, pixels.astype(np.int64)), process(processor, pixels))
    with pytest.raises(ValueError, match="values from 0 to 300; give 8-bit"):
        processor(np.full((8, 8, 3), 300) * (pixels > 9))


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
