"""Folders as people have them: every image is used, or named before training with the reason why not."""

import json
import os
import pickle
import time
import unicodedata
from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_guided.data import DataArguments, check_images, load_labelled_images
from hf_guided.data.folders import read_split, scan_folder
from hf_guided.messages import printable


def write(folder, *names, size=4, format="PNG"):
    """Writes an image of one colour, its own, under each name, which may hold folders."""
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(os.fsencode(name).ljust(3)[-3:])
        Image.new("RGB", (size, size), colour).save(path, format=format)
    return folder


def load(folder, require_labels=True, **flags):
    """All images of a folder: names of the files, classes, and what the preflight prints."""
    arguments = DataArguments(train_data_dir=str(folder), resolution=[4], held_out_fraction=0.0, **flags)
    images, held_out = load_labelled_images(arguments, seed=0, require_labels=require_labels)
    return images if held_out is None else (images, held_out)


def contents(images, folder):
    """The files by class, relative to the folder; all below "" without labels."""
    found = {name: [] for name in images.id2label.values()} or {"": []}
    for index in range(len(images)):
        path = os.path.relpath(images.images[int(images.rows[index])]["image"]["path"], folder)
        found[images.id2label[int(images.labels[index])] if images.id2label else ""].append(path)
    return found


def classes(folder, **flags):
    images = load(folder, **flags)
    assert check_images(images).bad_files == []
    return {name: len(files) for name, files in contents(images, folder).items()}


@pytest.fixture
def photos(tmp_path):
    return tmp_path / "photos"


# Names say nothing but the class


@pytest.mark.parametrize(
    "odd",
    [
        [f"{i}.png" for i in range(20)] + ["train_1.png", "train 2.png"],
        ["test.png", "val.png", "dev-3.png", "eval.png"],
        ["train/1.png", "test/1.png", "validation/2.png"],
        ["[1].png", "*.png", "?.png", "{a}.png", "a\nb.png", "**.png", "~.png", " .png", "a.png "],
        ["data-00000-of-00001.png", "data/train-00000-of-00001.png", "config.json.png"],
        ["__x.png", "__pycache__/1.png", "__/2.png", "%20.png", "a::b.png", "zip:x.png"],
        ["1.PNG", "2.JPeG", "3.Bmp", "4.WEBP"],
    ],
)
def test_every_file_of_a_class_is_used_whatever_it_is_called(photos, odd):
    write(photos, "cat/a.png", "dog/a.png", *(f"{name}/{file}" for name in ("cat", "dog") for file in odd))
    assert classes(photos) == {"cat": len(odd) + 1, "dog": len(odd) + 1}
    assert classes(photos, require_labels=False) == {"cat": len(odd) + 1, "dog": len(odd) + 1}


@pytest.mark.parametrize(
    "names",
    [
        ("bus", "car", "train"),
        ("test", "test tube"),
        ("train", "test", "val"),
        ("evaluation", "training set", "x"),
        ("__other", "__pycache__", "cat"),
        ("a", "b[1]", "c*", "d?", "{e}"),
        ("a\nb", "c"),
        ("data", "train-00000-of-00001"),
        ("Cat", "cat"),
        ("été", "hiver"),
        ("config.json", "README.md"),
        ("cat.png", "dog.jpg"),
    ],
)
def test_classes_may_be_called_anything(photos, names):
    write(photos, *(f"{name}/{i}.png" for name in names for i in range(3)))
    assert classes(photos) == {printable(name): 3 for name in names}


def test_folders_of_images_that_are_called_as_splits_are_told_to_be_classes(photos):
    write(photos, "train/1.png", "test/1.png")
    assert load(photos).notes == ["the folders test, train are read as classes, since they hold images and no folders"]


def test_stray_files_do_no_harm(photos):
    write(photos, "cat/1.png", "dog/1.png")
    for name in ("task.toml", "cat/instruction.md", "dog/run.eval", "dataset_info.json", "train.csv", "metadata.csv"):
        (photos / name).write_text("a,b\n1,2\n")
    images = load(photos)
    assert contents(images, photos) == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}
    assert "skipped: files that are not images in a supported format (6; .csv 2, .md 1, .json 1): " in "".join(
        images.notes
    )


@pytest.mark.parametrize(
    "name", ["a[1]", "a*b", "{x}", "train", "test", "__data", ".hidden", "a b", "a::b", "x.parquet"]
)
def test_the_folder_itself_may_be_called_anything(tmp_path, name):
    write(tmp_path / name, "cat/1.png", "dog/1.png")
    assert classes(tmp_path / name) == {"cat": 1, "dog": 1}


# What else a file system holds


def test_links_are_read_and_loops_end(tmp_path, photos):
    write(photos, "cat/1.png", "cat/2.png", "dog/1.png")
    write(tmp_path / "elsewhere", "1.png", "2.png", "3.png")
    (photos / "cow").symlink_to(tmp_path / "elsewhere")
    (photos / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "dog" / "linked.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (photos / "cat" / "up").symlink_to("..")
    (photos / "cat" / "root").symlink_to("/")
    (photos / "cat" / "self").symlink_to("self")
    (photos / "dog" / "here").symlink_to(".")
    (photos / "dog" / "gone.png").symlink_to("nowhere")
    images = load(photos)
    assert {name: len(files) for name, files in contents(images, photos).items()} == {"cat": 2, "cow": 3, "dog": 5}
    text = str(check_images(images))
    assert "skipped: links to folders that were already read (3): cat/root, cat/up, dog/here" in text
    assert "skipped: broken links (2): cat/self, dog/gone.png" in text


def test_a_folder_is_read_under_its_own_name(photos):
    write(photos, "cat/b/1.png", "dog/1.png")
    (photos / "cat" / "a").symlink_to("b")
    (photos / "cat" / "c").symlink_to("b")
    (photos / "kitten").symlink_to("cat")
    images = load(photos)
    assert contents(images, photos) == {"cat": ["cat/b/1.png"], "dog": ["dog/1.png"], "kitten": ["kitten/b/1.png"]}
    assert images.notes == ["skipped: links to folders that were already read (4): cat/a, cat/c, kitten/a and 1 more"]


def test_folders_that_link_to_each_other_are_read_once(photos):
    names = [f"n{i}" for i in range(12)]
    write(photos, *(f"cat/{name}/1.png" for name in names), "dog/1.png")
    for name in names:
        for other in set(names) - {name}:
            (photos / "cat" / name / other).symlink_to(f"../{other}")
    assert classes(photos) == {"cat": 12, "dog": 1}


def test_pipes_are_named_and_not_waited_for(photos):
    write(photos, "cat/1.png", "dog/1.png")
    os.mkfifo(photos / "cat" / "2.png")
    os.mkfifo(photos / "cat" / "pipe")
    assert load(photos).notes == ["skipped: pipes, sockets or devices (2): cat/2.png, cat/pipe"]


def test_what_is_hidden_is_named(photos):
    write(photos, "cat/1.png", "dog/1.png", "cat/@eaDir/1.png", "__MACOSX/cat/1.png", ".trash/1.png", "dog/.2.png")
    for junk in ("._1.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (photos / "dog" / junk).write_text("junk")
    images = load(photos)
    assert contents(images, photos) == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}
    assert images.notes == [
        "skipped: hidden or system folders (3): .trash, __MACOSX, cat/@eaDir",
        "skipped: hidden images (1): dog/.2.png",
    ]


def test_images_are_known_by_their_content(photos):
    write(photos, "cat/1", "cat/2.2023", "cat/3.unknown", "cat/really a png.heic", "dog/1.png")
    write(photos, "dog/2", format="JPEG")
    write(photos, "dog/3.tif", format="TIFF")
    write(photos, "dog/raw.nef", format="TIFF")  # raw photographs are TIFF files of a thumbnail
    write(photos, "dog/page.eps", format="EPS")
    (photos / "dog" / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (photos / "dog" / "notes").write_text("BMW P1 Python GIF")
    (photos / "dog" / "empty").write_bytes(b"")
    images = load(photos)
    assert contents(images, photos) == {
        "cat": ["cat/1", "cat/2.2023", "cat/3.unknown", "cat/really a png.heic"],
        "dog": ["dog/1.png", "dog/2", "dog/3.tif"],
    }
    assert check_images(images).bad_files == []
    (note,) = images.notes
    assert note.startswith("skipped: files that are not images in a supported format (5; no extension 2, .")


def test_a_class_of_another_format_is_named(photos):
    write(photos, "cat/1.png", "dog/1.png")
    (photos / "cow" / "more").mkdir(parents=True)
    (photos / "emu").mkdir()
    for i in range(4):
        (photos / "cow" / f"{i}.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    text = str(check_images(load(photos)))
    assert (
        "skipped: files that are not images in a supported format (4; .heic 4): cow/0.heic, cow/1.heic, cow/2.heic "
        "and 1 more" in text
    )
    assert "skipped: folders without images (2): cow, emu" in text
    for file in photos.glob("dog/*"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"single class 'cat'.*skipped: .* \(4; \.heic 4\).*images \(3\): cow, dog, emu"
    ):
        load(photos)


@pytest.mark.skipif(not Image.registered_extensions().get(".avif"), reason="Pillow is built without AVIF")
def test_avif_is_read(photos):
    write(photos, "cat/1.avif", "cat/2", format="AVIF")
    write(photos, "dog/1.png")
    assert classes(photos) == {"cat": 2, "dog": 1}


def test_archives_are_named(photos):
    photos.mkdir()
    for name in ("cat.zip", "dog.zip"):
        (photos / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"no image was found; skipped: .*\(2; \.zip 2\): cat\.zip, dog\.zip"):
        load(photos)


def test_names_that_are_not_utf_8(photos):
    byte = os.fsdecode(b"\xe9")
    write(photos, f"caf{byte}/1.png", f"caf{byte}/{byte}.png", f"dog/{byte}\n.png")
    (photos / f"dog/{byte}.png").write_bytes(b"broken")
    (photos / f"dog/{byte}.heic").write_bytes(b"broken")
    write(photos, *(f"dog/{i}.png" for i in range(10)))
    images = load(photos)
    report = check_images(images)
    assert list(report.class_counts.items()) == [("caf\\xe9", 2), ("dog", 12)]
    assert report.bad_files[0].startswith(f"{photos}/dog/\\xe9.png (")
    assert json.loads(json.dumps(str(report))).encode().decode() == str(report)  # can be written anywhere
    assert ": dog/\\xe9.heic" in str(report)
    root = photos.rename(photos.parent / f"photos{byte}")
    images = load(root)
    assert len(images) == 14
    assert images.name.endswith("/photos\\xe9")


def test_unreadable_folders_are_named(tmp_path, photos, monkeypatch):
    write(photos, "cat/1.png", "dog/1.png", "dog/private/1.png", "emu/1.png")
    os.chmod(photos / "dog" / "private", 0)
    os.chmod(photos / "emu", 0)
    os.mkfifo(tmp_path / "answer")
    monkeypatch.chdir(photos)  # the folders above are for pytest's user alone
    Image.init()
    if (child := os.fork()) == 0:
        answer = os.open(tmp_path / "answer", os.O_WRONLY)
        if os.getuid() == 0:  # may read all
            os.setuid(65534)
        part = read_split(scan_folder("."), "train")
        os.write(answer, json.dumps([part.names, *part.images.notes]).encode())
        os._exit(0)
    names, note = json.loads((tmp_path / "answer").read_text())
    os.waitpid(child, 0)
    assert names == ["cat", "dog"]
    assert note == "skipped: folders that cannot be read (2): dog/private (Permission denied), emu (Permission denied)"


# The level that names the class


def test_the_folder_at_the_top_names_the_class(photos):
    write(photos, *(f"{name}/{year}/{i}.png" for name in ("cat", "dog") for year in (2023, 2024) for i in range(3)))
    assert classes(photos) == {"cat": 6, "dog": 6}
    write(photos, "cat/1.png", "dog/a/b/c/1.png", "emu/2023/train/1.png")
    assert classes(photos) == {"cat": 7, "dog": 7, "emu": 1}


def test_a_stray_image_is_named(photos):
    write(photos, "cat/1.png", "dog/1.png", "sheet.png")
    with pytest.raises(
        ValueError, match=r"images beside its class folders \(1: sheet\.png\); move them into the folder"
    ):
        load(photos)
    images = load(photos, require_labels=False)
    assert contents(images, photos) == {"": ["cat/1.png", "dog/1.png", "sheet.png"]}
    assert images.notes[0].startswith("without labels: ")


def test_one_folder_in_another(photos):
    write(photos, "images/cat/1.png", "images/dog/1.png")
    with pytest.raises(
        ValueError, match=r"single class 'images', .* or give '.*/photos/images' if its folders are the cl"
    ):
        load(photos)
    assert load(photos, require_labels=False).labels is None
    assert classes(photos / "images") == {"cat": 1, "dog": 1}


def test_decomposed_accents_make_no_second_class(photos):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(photos, f"{decomposed}/1.png", "dog/1.png")
    assert classes(photos) == {composed: 1, "dog": 1}
    write(photos, f"{composed}/2.png")
    assert classes(photos) == {composed: 2, "dog": 1}


# Splits


@pytest.mark.parametrize(
    ("folders", "split"),
    [
        (("train", "test"), "test"),
        (("train", "val"), "val"),
        (("train", "val"), "validation"),
        (("Training", "Dev"), "dev"),
        (("train", "validation", "test"), "validation"),
        (("train", "held_out"), "held_out"),
    ],
)
def test_splits_are_folders_at_the_top(photos, folders, split):
    write(photos, *(f"{folder}/{name}/{i}.png" for folder in folders for name in ("cat", "dog") for i in range(2)))
    write(photos, f"{folders[0]}/cow/1.png")  # in training alone
    train, held_out = load(photos, validation_split=split)
    assert contents(train, photos / folders[0]) == {
        "cat": ["cat/0.png", "cat/1.png"],
        "cow": ["cow/1.png"],
        "dog": ["dog/0.png", "dog/1.png"],
    }
    files = contents(held_out, photos / folders[1])
    assert files == {"cat": ["cat/0.png", "cat/1.png"], "cow": [], "dog": ["dog/0.png", "dog/1.png"]}
    others = ", ".join(sorted(folders[1:]))
    assert train.notes[0] == f"split 'train' is the folder {folders[0]}; other splits: {others}"
    with pytest.raises(ValueError, match=r"Cannot load split 'holiday' .*: its splits are train, "):
        load(photos, train_split="holiday")


def test_a_split_may_be_sliced(photos):
    write(photos, *(f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ab" for i in range(4)))
    assert classes(photos, train_split="train[2:6]") == {"a": 2, "b": 2}
    assert classes(photos, train_split="train[:75%]+validation") == {"a": 8, "b": 6}


def test_a_class_that_the_training_split_lacks_is_named(photos):
    write(photos, "train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/cow/1.png")
    with pytest.raises(ValueError, match="class folders that the training split lacks: cow; add them there, or remove"):
        load(photos, validation_split="val")


def test_what_is_in_no_split_is_named(photos):
    write(photos, "train/cat/1.png", "train/dog/1.png", "sheet.png", "test/cat/1.png")
    (photos / "test" / "x.heic").write_bytes(b"")
    (photos / "train" / "emu").mkdir()
    train = load(photos)
    assert train.notes == [
        "split 'train' is the folder train; other splits: test",
        "skipped: folders without images (1): train/emu",
        "skipped: images outside the splits (1): sheet.png",
    ]
    write(photos, "train/stray.png")
    with pytest.raises(ValueError, match=r"beside its class folders \(1: train/stray\.png\)"):
        load(photos)


def test_where_it_is_unclear_what_the_folders_are(photos):
    write(photos, "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "spare/1.png")
    with pytest.raises(ValueError, match=r"splits or classes: test, train would be .* and spare would not; move these"):
        load(photos)
    write(photos.parent / "imagenet", "train/cat/1.png", "train/dog/1.png", "val/1.png")
    with pytest.raises(ValueError, match=r"train would be splits.* and val would not; .* such as '.*/imagenet/train'"):
        load(photos.parent / "imagenet")
    vehicles = write(photos.parent / "vehicles", "bus/2023/1.png", "car/1.png", "train/2023/1.png")
    assert classes(vehicles) == {"bus": 1, "car": 1, "train": 1}
    assert load(vehicles).notes == ["'train' is read as a class, like bus, car beside it"]


def test_splits_are_asked_for_by_name(photos):
    write(photos, "cat/1.png", "dog/1.png")
    with pytest.raises(ValueError, match=r"Cannot load split 'test' of '.*': its folders are classes, not splits"):
        load(photos, validation_split="test")
    with pytest.raises(ValueError, match=r"classes, not splits; give '.*photos/dog' itself"):
        load(photos, validation_split="dog")
    with pytest.raises(ValueError, match=r"Cannot load split 'train\[:0\]' of .*no image was found"):
        load(photos, train_split="train[:0]")


# Metadata


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_metadata_list_the_images(tmp_path, suffix):
    folder = tmp_path / "test [1]"
    write(folder, "train_1.png", "test 2.png", "sub/train.png", "3.png")
    rows = [
        {"file_name": "test 2.png", "label": "dog"},
        {"file_name": "sub/train.png", "label": "cat"},
        {"file_name": "train_1.png", "label": "dog"},
    ]
    if suffix == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        (folder / "metadata.csv").write_text("\n".join(["file_name,label", *(",".join(row.values()) for row in rows)]))
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
    images = load(folder)
    assert contents(images, folder) == {"cat": ["sub/train.png"], "dog": ["test 2.png", "train_1.png"]}
    assert images.labels.tolist() == [1, 0, 1]
    assert images.notes == ["skipped: images that no metadata file lists (1): 3.png"]


def test_metadata_in_each_class_or_split(photos):
    for folder in ("train", "val"):
        write(photos / folder, "1.png", "2.png")
        lines = [json.dumps({"file_name": f"{i}.png", "label": name}) for i, name in ((1, "cat"), (2, "dog"))]
        (photos / folder / "metadata.jsonl").write_text("\n".join(lines))
    train, held_out = load(photos, validation_split="val")
    assert contents(train, photos) == {"cat": ["train/1.png"], "dog": ["train/2.png"]}
    assert contents(held_out, photos) == {"cat": ["val/1.png"], "dog": ["val/2.png"]}
    for old, new in (("train", "a"), ("val", "b")):
        (photos / old).rename(photos / new)
    assert contents(load(photos), photos) == {"cat": ["a/1.png", "b/1.png"], "dog": ["a/2.png", "b/2.png"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "../1.png"}', r"lists the image '\.\./1\.png', which is not the name of a file below its"),
        ('{"file_name": "/etc/passwd"}', "lists the image '/etc/passwd'"),
        ('{"file_name": "a/../../1.png"}', "lists the image"),
        ('{"file_name": "1.png"}\n{"file_name": null}', "lists the image None"),
        ('{"file_name": "1.png"', r"Cannot read '.*metadata\.jsonl' \(.*\); repair or remove it"),
        ('["file_name"]\n3', r"Cannot read '.*metadata\.jsonl'"),
        ('{"a_file_name": "1.png", "b_file_name": "1.png"}', "Several columns .* set --image_column to one of: a, b"),
    ],
)
def test_metadata_that_cannot_be_used(photos, line, message):
    write(photos, "1.png")
    (photos / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        load(photos, require_labels=False)


# As before, for ordinary folders


def test_order_and_classes_are_those_of_datasets(tmp_path, photos):
    """The rows and labels of trained models and of runs to resume."""
    names = ["a", "a-b", "a b", "B", "a.c", "10", "2", "é", "Z_", "abc"]
    files = ["10.png", "2.png", "1_.png", "1.png", "1-.png", "Z.jpg", "a.jpeg", "ä.png", "x y.png", "n01_12.JPEG"]
    write(photos, *(f"{name}/{file}" for name in names for file in files))
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(photos), split="train", cache_dir=str(tmp_path / "cache")
    )
    images = load(photos)
    assert list(images.id2label.values()) == theirs.features["label"].names
    assert images.labels.tolist() == theirs["label"]
    rows = theirs.cast_column("image", datasets.Image(decode=False))
    assert [images.images[i]["image"]["path"] for i in range(100)] == [row["image"]["path"] for row in rows]


def test_a_folder_as_dataset_name(tmp_path, photos):
    write(photos, "cat/train_1.png", "cat/2.png", "dog/test.png")
    arguments = DataArguments(dataset_name=str(photos), resolution=[4], held_out_fraction=0.0)
    assert contents(load_labelled_images(arguments, seed=0)[0], photos) == contents(load(photos), photos)
    # a clone of a dataset of the Hub, with a picture for its card
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("RGB", (4, 4))] * 2, "label": [0, 1]}
    hub = write(tmp_path / "hub", "preview.png")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(hub / "train.parquet")
    arguments = DataArguments(
        dataset_name=str(hub), resolution=[4], held_out_fraction=0.0, cache_dir=str(tmp_path / "cache")
    )
    assert load_labelled_images(arguments, seed=0)[0].id2label == {0: "a", 1: "b"}


def test_the_preflight_prints_the_classes(photos):
    write(photos, *(f"c{i:02}/1.png" for i in range(20)))
    assert ", with 1 to 1 images each: c00, c01, " in str(check_images(load(photos)))
    assert ", c18, c19\n" in str(check_images(load(photos)))
    write(photos, *(f"d{i:02}/1.png" for i in range(30)))
    assert ", c18, c19 and 30 more\n" in str(check_images(load(photos)))


def test_a_large_folder_takes_little_time_and_memory(photos):
    for folder in range(10):
        (photos / f"c{folder}").mkdir(parents=True)
        for i in range(200):
            (photos / f"c{folder}" / f"{i}.jpg").touch()
    started = time.process_time()
    images = load(photos)
    assert len(images) == 2_000
    assert time.process_time() - started < 1  # of a processor's time: 0.02 to 0.06
    assert len(pickle.dumps(images.images)) < 2_000 * 24  # what a loader's worker is sent
