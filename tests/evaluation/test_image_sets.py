"""Sets of images from files, folders and datasets: which images, of which size, and the notes about them."""

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from hf_guided.data import DataArguments, load_labelled_images
from hf_guided.evaluation.features.image_sets import ArrayImages, SampledImages, open_images
from hf_guided.models.images import resize_and_crop


def pixels(n, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def write_folder(folder, images, names=("cat", "dog")):
    """A folder of PNGs, in the subfolders of classes in turn."""
    for i, image in enumerate(images):
        place = folder / names[i % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(place / f"{i:03}.png")
    return str(folder)


def read(images):
    return torch.stack([images[i] for i in range(len(images))]).permute(0, 2, 3, 1).numpy()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples(tmp_path, save):
    images, labels = pixels(5, 4, 6), np.array([3, 0, 0, 2, 1])
    save(tmp_path / "samples.npz", images, labels)
    opened = open_images(str(tmp_path / "samples.npz"))
    assert opened.size == (4, 6)
    assert opened.channels == 3
    assert opened.labels.tolist() == labels.tolist()
    assert opened.notes == []
    np.testing.assert_array_equal(read(opened), images)
    assert np.asarray(opened.picture(2)).tolist() == images[2].tolist()


def test_published_statistics_come_with_their_images(tmp_path):
    rng = np.random.default_rng(0)
    features, spatial = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
    path = tmp_path / "reference.npz"
    np.savez(
        path, pixels(4), mu=features.mean(0), sigma=np.cov(features.T), mu_s=spatial.mean(0), sigma_s=np.cov(spatial.T)
    )
    statistics = open_images(str(path)).statistics
    np.testing.assert_array_equal(statistics["features"].mean, features.mean(0))
    np.testing.assert_array_equal(statistics["spatial"].covariance, np.cov(spatial.T))
    np.savez(path, pixels(4))
    assert open_images(str(path)).statistics is None


def test_folders_have_their_own_size_and_class_names(tmp_path):
    images = pixels(6)
    opened = open_images(write_folder(tmp_path / "photos", images))
    assert opened.size == (8, 8)
    assert opened.id2label == {0: "cat", 1: "dog"}
    assert opened.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(read(opened), images[[0, 2, 4, 1, 3, 5]])


def test_images_are_brought_to_a_size_as_in_training(tmp_path):
    images = pixels(4, 20, 16)
    folder, npz = write_folder(tmp_path / "photos", images), tmp_path / "samples.npz"
    np.savez(npz, images[[0, 2, 1, 3]])
    expected = [np.asarray(resize_and_crop(Image.fromarray(image), (8, 8))) for image in images[[0, 2, 1, 3]]]
    for spec in (folder, str(npz)):
        opened = open_images(spec, size=(8, 8))
        np.testing.assert_array_equal(read(opened), expected)
        assert opened.notes == [
            f"{spec} has images of 20x16 pixels; they are resized to 8x8 as in training, shrunk and cropped at the "
            f"centre."
        ]
        assert "upscales small ones" in open_images(spec, size=(32, 8)).notes[0]


def test_images_of_several_sizes_need_one(tmp_path):
    folder = write_folder(tmp_path / "photos", [pixels(1, 8, 8)[0], pixels(1, 9, 8)[0]])
    with pytest.raises(ValueError, match=r"differ in size: \S*000.png has 8x8 pixels and \S*001.png 9x8"):
        open_images(folder)
    assert "8x8 to 9x8" in open_images(folder, size=(4, 4)).notes[0]


def test_images_are_gray_if_all_are(tmp_path):
    gray = pixels(4, channels=1)
    folder = tmp_path / "photos"
    opened = open_images(write_folder(folder, gray))
    assert opened.channels == 1
    np.testing.assert_array_equal(read(opened), gray[[0, 2, 1, 3]])
    Image.fromarray(pixels(1)[0]).save(folder / "dog" / "colour.png")
    assert open_images(str(folder)).channels == 3


@pytest.mark.parametrize("ending", ["jpg", "tiff", "png", "webp"])
def test_an_image_that_lies_on_its_side_has_the_size_that_is_seen(ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.fromarray(pixels(1, 8, 12)[0]).save(tmp_path / "photos" / "cat" / f"a.{ending}", exif=exif)
    opened = open_images(str(tmp_path / "photos"))
    assert opened.size == (12, 8)
    assert opened[0].shape == (3, 12, 8)


def test_parts_of_folders_and_datasets():
    whole, train, held_out = (open_images(f"digits{part}") for part in ("", ":train", ":held_out"))
    assert (len(whole), len(train), len(held_out)) == (1797, 1500, 297)
    assert whole.size == (8, 8)
    assert whole.channels == 1
    trained_on, left = load_labelled_images(DataArguments(dataset_name="digits"), seed=5)
    for opened, images in ((train, trained_on), (held_out, left)):
        expected = torch.stack([images[i]["pixel_values"] for i in range(20)])
        got = torch.stack([opened[i] for i in range(20)])
        assert (got / 127.5 - 1 - expected).abs().max() < 1 / 255 + 1e-6
        assert opened.labels.tolist() == images.labels.tolist()
    with pytest.raises(ValueError, match="test"):
        open_images("digits:test")


def test_photographs_are_cropped_at_the_size_asked_for():
    opened = open_images("photographs:held_out", size=(16, 24))
    assert opened.size == (16, 24)
    assert opened.notes == []
    assert opened.channels == 3


def test_parquet_files(tmp_path):
    import datasets

    def encoded(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        return {"bytes": file.getvalue(), "path": None}

    images = pixels(4)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [encoded(image) for image in images], "label": [1, 0, 1, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "samples.parquet")
    opened = open_images(str(tmp_path / "samples.parquet"))
    np.testing.assert_array_equal(read(opened), images)
    assert opened.labels.tolist() == [1, 0, 1, 1]
    assert opened.id2label == {0: "cat", 1: "dog"}


def test_digest_follows_the_content_and_nothing_else(tmp_path):
    images = pixels(6)
    folder = write_folder(tmp_path / "photos", images)
    digests = {open_images(folder).digest()}
    write_folder(tmp_path / "elsewhere", images)
    os.utime(tmp_path / "photos" / "cat" / "000.png", (1, 1))
    assert digests == {open_images(folder).digest(), open_images(str(tmp_path / "elsewhere")).digest()}
    other = images[0].copy()
    other[0, 0, 0] ^= 1
    Image.fromarray(other).save(tmp_path / "photos" / "cat" / "000.png")
    digests.add(open_images(folder).digest())
    digests.add(open_images(folder, size=(4, 4)).digest())
    (tmp_path / "photos" / "cat" / "000.png").unlink()
    digests.add(open_images(folder).digest())
    assert len(digests) == 4

    arrays = [ArrayImages(images), ArrayImages(images.copy(), name="another"), ArrayImages(images[:5])]
    same, equal, shorter = (array.digest() for array in arrays)
    assert same == equal != shorter


def test_sampled_images_are_those_of_the_pipeline(tiny_unet):
    from hf_guided import ADMScheduler, ClassifierGuidedPipeline
    from hf_guided.generation.sampling import to_8_bit

    pipe = ClassifierGuidedPipeline(tiny_unet(), ADMScheduler(), sampling_defaults={"respacing": "2"})
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(7) % 5
    samples = SampledImages(pipe, labels, seed=3)
    assert len(samples) == 7
    assert samples.size == (16, 16)
    batches = list(samples.batches([[0, 1, 2], [6]]))
    expected = pipe(labels, generator=torch.Generator().manual_seed(3), output_type="latent").images
    assert [len(batch) for batch in batches] == [3, 1]
    difference = torch.cat(batches).int() - to_8_bit(expected[[0, 1, 2, 6]]).int()
    assert difference.abs().max() <= 1  # of batches of another size
    assert (difference != 0).float().mean() < 0.01


def test_what_is_no_set_of_images(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    np.savez(tmp_path / "empty.npz", labels=np.arange(3))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "labels.npz", pixels(2), np.arange(3))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "a.png").write_bytes(b"no picture")
    for name, message in {
        "notes.txt": "is not a set of images",
        "nowhere.npz": "There is no file",
        "empty.npz": "no arr_0",
        "floats.npz": "float64 of shape",
        "labels.npz": "labels",
        "broken.npz": "is damaged",
        "bad": "None of the 1 files",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_images(str(tmp_path / name))


def test_metadata_of_a_folder_of_samples(tmp_path):
    """As sampling writes it: every image in one folder, the name of its class beside it."""
    images = pixels(3)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:06}.png")
    rows = [{"file_name": f"{i:06}.png", "label": name, "class_id": i} for i, name in enumerate(["dog", "cat", "dog"])]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = open_images(str(tmp_path))
    assert [opened.id2label[label] for label in opened.labels.tolist()] == ["dog", "cat", "dog"]
    np.testing.assert_array_equal(read(opened), images)


@pytest.mark.parametrize(
    "names", [("train_1", "test", "0"), ("bus", "car", "train"), ("__other", "test tube", "val"), ("a[1]", "b*", "c")]
)
def test_every_image_of_a_folder_counts_whatever_it_is_called(tmp_path, names):
    folder = write_folder(tmp_path / "photos [1]", pixels(9), names)
    for name in names:
        for old, new in (("train_1.png", 3), ("val.PNG", 4), ("x", 5)):
            Image.fromarray(pixels(1, seed=new)[0]).save(tmp_path / "photos [1]" / name / old, format="PNG")
    (tmp_path / "photos [1]" / "task.toml").write_text("")
    opened = open_images(folder)
    assert [opened.id2label[label] for label in opened.labels.tolist()] == [n for n in sorted(names) for _ in range(6)]
    assert opened.notes == [
        f"{folder}: skipped: files that are not images in a supported format (1; .toml 1): task.toml."
    ]
    train, held_out = (open_images(f"{folder}:{part}") for part in ("train", "held_out"))
    assert len(train) + len(held_out) == 18


def test_splits_of_a_folder_are_parts(tmp_path):
    for split, count in (("train", 6), ("val", 4), ("test", 2)):
        write_folder(tmp_path / "photos" / split, pixels(count, seed=count))
    folder = str(tmp_path / "photos")
    counts = {part: len(open_images(f"{folder}{part}")) for part in ("", ":val", ":validation", ":test")}
    assert counts == {"": 6, ":val": 4, ":validation": 4, ":test": 2}
    assert len(open_images(f"{folder}:train")) + len(open_images(f"{folder}:held_out")) == 6
    assert open_images(f"{folder}:test").notes == [
        f"{folder}: split 'test' is the folder test; other splits: train, val."
    ]
    with pytest.raises(ValueError, match=r"Cannot load split 'holiday' of .*: its splits are train, validation, test"):
        open_images(f"{folder}:holiday")


def test_a_folder_may_have_its_own_held_out_images(tmp_path):
    for split, count in (("train", 6), ("held_out", 4)):
        write_folder(tmp_path / "photos" / split, pixels(count, seed=count))
    np.testing.assert_array_equal(
        read(open_images(f"{tmp_path / 'photos'}:held_out")), read(open_images(str(tmp_path / "photos" / "held_out")))
    )
    assert len(open_images(f"{tmp_path / 'photos'}")) == 6


def test_images_without_classes(tmp_path):
    images = pixels(4)
    folder = write_folder(tmp_path / "photos", images, names=("",))
    assert open_images(folder).labels is None
    assert open_images(folder).notes == []
    write_folder(tmp_path / "photos", images, names=("cat",))
    np.testing.assert_array_equal(read(open_images(folder)), [*images, *images])
    assert "images beside its class folders (4: " in open_images(folder).notes[0]


def test_names_that_are_not_utf_8(tmp_path):
    folder = write_folder(tmp_path / os.fsdecode(b"photos\xe9"), pixels(4), (os.fsdecode(b"\xe9"), "dog"))
    opened = open_images(folder)
    assert opened.id2label == {0: "\\xe9", 1: "dog"}
    assert len(read(opened)) == 4
    assert opened.digest()
    assert "photos\\xe9 has images of 8x8 pixels" in open_images(folder, size=(4, 4)).notes[0]
    opened.name.encode()
