"""The built-in photographs: many crops of two images, none of them half held out."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from hf_guided.data import DataArguments, load_labelled_images


@pytest.fixture
def ramps(monkeypatch):
    """Two photographs whose pixels tell where they are: red the column, green the row, blue which photograph."""
    photographs = []
    for label in range(2):
        rows, columns = np.mgrid[:200, :250]
        photographs.append(np.stack([columns, rows, np.full_like(rows, label)], axis=-1).astype(np.uint8))
    bunch = load_sample_images()
    bunch.images = photographs
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: bunch)


def columns_and_rows(images) -> list[tuple[set[int], set[int], set[int]]]:
    crops = [np.asarray(images.open(index)) for index in range(len(images))]
    return [(set(crop[..., 0].flat), set(crop[..., 1].flat), set(crop[..., 2].flat)) for crop in crops]


def test_crops_of_32_pixels_of_two_photographs():
    train, held_out = load_labelled_images(DataArguments(dataset_name="photographs"), seed=0)
    assert train.id2label == held_out.id2label == {0: "china", 1: "flower"}
    assert len(train) > 4 * len(held_out) > 4000
    assert np.bincount(train.labels).tolist() == [len(train) / 2] * 2
    for images in (train, held_out):
        crop = images[0]["pixel_values"]
        assert crop.shape == (3, 32, 32)
        assert crop.dtype == torch.float32
    photographs = load_sample_images().images
    top_left = torch.from_numpy(photographs[1][:32, :32].transpose(2, 0, 1) / np.float32(127.5) - 1)
    first_flower = int(np.argmax(train.labels == 1))
    assert torch.allclose(train[first_flower]["pixel_values"], top_left, atol=1e-6)


def test_no_held_out_pixel_is_trained_on(ramps):
    train, held_out = load_labelled_images(DataArguments(dataset_name="photographs"), seed=0)
    trained_on, kept_out = columns_and_rows(train), columns_and_rows(held_out)
    for images, crops in ((train, trained_on), (held_out, kept_out)):
        for label, (_, _, photograph) in zip(images.labels.tolist(), crops, strict=True):
            assert photograph == {label}
    columns = set().union(*(crop[0] for crop in kept_out))
    assert columns <= set(range(100, 150))  # the middle fifth of 250
    assert max(columns) - min(columns) > 40
    assert not columns & set().union(*(crop[0] for crop in trained_on))
    for crops in (trained_on, kept_out):  # every crop is 32 pixels side by side, from top to bottom of the photograph
        for crop in crops:
            assert all(len(side) == max(side) - min(side) + 1 == 32 for side in crop[:2])
        assert max(max(crop[1]) for crop in crops) >= 192

    places, held_out_places = ({min(crop[0]) for crop in crops} for crops in (trained_on, kept_out))
    assert all(second - first == 8 for first, second in pairwise(sorted(held_out_places)))
    assert min(places) == 0
    assert max(places) > 210


def test_share_size_and_augmentation_are_flags():
    def load(seed: int = 0, **flags):
        return load_labelled_images(DataArguments(dataset_name="photographs", **flags), seed=seed)

    train, held_out = load(held_out_fraction=0)
    assert held_out is None
    assert len(train) > len(load()[0])
    assert load(resolution=[16, 24], image_channels=1)[1][0]["pixel_values"].shape == (1, 16, 24)

    train, held_out = load(random_flip=True, random_crop=True)
    same = load(random_flip=True, random_crop=True)[0]
    other = load(random_flip=True, random_crop=True, seed=1)[0]
    assert torch.equal(train[700, 2]["pixel_values"], same[700, 2]["pixel_values"])
    assert not torch.equal(train[700, 2]["pixel_values"], other[700, 2]["pixel_values"])
    assert torch.equal(held_out[5, 0]["pixel_values"], held_out[5, 1]["pixel_values"])

    with pytest.raises(ValueError, match=r"--resolution 257 257 is too large .* 427 x 256 .*held_out_fraction leaves"):
        load(resolution=[257])
    with pytest.raises(ValueError, match=r"fit into 427 x 128 pixels .* of each, the held-out columns"):
        load(resolution=[200])
    with pytest.raises(ValueError, match="The photographs have no split 'test'; use --held_out_fraction"):
        load(validation_split="test")
