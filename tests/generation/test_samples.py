"""Files of samples, as the published scripts write them, and as load_dataset reads them."""

import json
import zipfile

import numpy as np
import pytest
from datasets import ClassLabel, load_dataset
from PIL import Image

from hf_guided.data.npz import map_array, read_samples
from hf_guided.generation.samples import read_record, write_samples

IMAGES = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
GREY = IMAGES[..., :1]
LABELS = np.array([2, 0, 2, 1, 3])
NAMES = {0: "crane", 1: "cat, true cat", 2: "crane", 3: "Kätzchen"}


@pytest.mark.parametrize("labels", [None, LABELS])
def test_the_published_layout(tmp_path, labels):
    path = tmp_path / "samples.npz"
    write_samples(path, [IMAGES[:2], IMAGES[2:]], IMAGES.shape, labels, record={"seed": 3})
    images, read = read_samples(path)
    assert np.array_equal(images, IMAGES)
    assert (read is None) if labels is None else np.array_equal(read, labels)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(path) as file:
        assert sorted(file) == ["arr_0", "arr_1"][: 1 + (labels is not None)]
        assert labels is None or file["arr_1"].dtype == np.int64
    np.savez(tmp_path / "published.npz", IMAGES, *([] if labels is None else [labels]))
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "published.npz") as published:
        assert {name: ours.read(name) for name in ours.namelist()} == {
            name: published.read(name) for name in published.namelist()
        }
        assert {entry.compress_type for entry in ours.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("images", [IMAGES, GREY])
def test_a_folder_of_pngs(tmp_path, images):
    folder = tmp_path / "samples"
    write_samples(folder, [images[:2], images[2:]], images.shape, LABELS, id2label=NAMES, record={"seed": 3})
    names = ["crane (2)", "crane (0)", "crane (2)", "cat, true cat", "Kätzchen"]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"file_name": f"00000{i}.png", "label": names[i], "class_id": int(LABELS[i])} for i in range(len(images))
    ]
    dataset = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["label"][:] == names
    assert dataset["class_id"][:] == LABELS.tolist()
    for row, image in zip(dataset, images, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.squeeze())


@pytest.mark.parametrize("images", [IMAGES, GREY])
def test_parquet(tmp_path, images):
    path = tmp_path / "samples.parquet"
    many = np.concatenate([images] * 50)  # more than a group of rows
    labels = np.tile(LABELS, 50)
    write_samples(path, np.array_split(many, 3), many.shape, labels, id2label=NAMES, record={"seed": 3})
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.features["label"] == ClassLabel(names=["crane (0)", "cat, true cat", "crane (2)", "Kätzchen"])
    assert dataset["label"][:] == labels.tolist()
    for row, image in zip(dataset, many, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.squeeze())


@pytest.mark.parametrize("name", ["samples.npz", "samples.parquet", "samples"])
def test_a_record_goes_with_it_and_equal_samples_are_equal_files(tmp_path, name):
    record = {"model": "Kätzchen", "seed": 3, "guidance_scale": 1.5}
    paths = [tmp_path / str(i) / name for i in range(3)]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        assert read_record(path) is None
        write_samples(path, np.array_split(IMAGES, i + 1), IMAGES.shape, record=record)
        assert read_record(path) == record
    contents = [
        {file.name: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())} for path in paths
    ]
    assert contents[0] == contents[1] == contents[2]
    write_samples(tmp_path / name, [IMAGES], IMAGES.shape)
    assert read_record(tmp_path / name) is None


def test_what_has_no_record(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "picture.png")
    np.savez(tmp_path / "others.npz", IMAGES)
    np.savez(tmp_path / "named.npz", images=IMAGES)
    for name in ("broken.npz", "broken.parquet", "broken.png", "text"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "folder").mkdir()
    for path in tmp_path.iterdir():
        assert read_record(path) is None, path


@pytest.mark.parametrize("name", ["samples.npz", "samples.parquet", "samples"])
def test_nothing_is_left_of_a_file_that_failed(tmp_path, name):
    def batches():
        yield IMAGES[:2]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_samples(tmp_path / name, batches(), IMAGES.shape)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "samples.npz"
    write_samples(path, [IMAGES], IMAGES.shape)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"samples\.npz is damaged"):
        read_samples(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is damaged or no"):
        read_samples(path)
    with open(path, "wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(ValueError, match="is damaged or no"):
        read_samples(path)
    np.savez(path, np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="is damaged or no"):
        read_samples(path)
    np.savez(path, images=IMAGES)
    with pytest.raises(ValueError, match="no arr_0"):
        read_samples(path)
    np.savez(path, IMAGES / 255)
    with pytest.raises(ValueError, match="float64 of shape"):
        read_samples(path)
    np.savez(path, IMAGES, np.array([1]))
    with pytest.raises(ValueError, match="each of the 5 images"):
        read_samples(path)
    np.savez(path, IMAGES[:0])
    with pytest.raises(ValueError, match="holds no images"):
        read_samples(path)
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "nowhere.npz")


def test_uncompressed_samples_are_mapped_and_not_read(tmp_path):
    """50,000 images of 256x256 are 9.8 GB: each process would read them all."""
    for version, name in (((1, 0), "one"), ((2, 0), "two")):
        images = np.asfortranarray(IMAGES) if name == "two" else IMAGES
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, images, version=version)
        mapped = map_array(str(path), "arr_0")
        assert isinstance(mapped, np.memmap)
        np.testing.assert_array_equal(mapped, images)
