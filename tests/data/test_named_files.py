"""Which files the rows of a dataset may name, and which formats and sizes of images are opened."""

import io
import json
import os
import shutil
import struct
import zlib

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from hf_guided.data import DataArguments, load_labelled_images
from hf_guided.data.images import open_image
from hf_guided.data.preflight import check_images
from hf_guided.evaluation.features.image_sets import open_images
from hf_guided.models.images import BAD_IMAGE_ERRORS, IMAGE_FORMATS


@pytest.fixture
def secret(tmp_path, noise_image):
    """An image that no data should reach."""
    path = tmp_path / "elsewhere" / "secret.png"
    path.parent.mkdir()
    noise_image(99).save(path)
    return path


@pytest.fixture
def data(tmp_path, noise_image):
    """A folder of eleven images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(11):
        noise_image(i).save(folder / f"{i}.png")
    return folder


SPELLINGS = {
    "absolute": lambda secret, data: str(secret),
    "parent folders": lambda secret, data: f"{data}/../elsewhere/secret.png",
    "parent folder last": lambda secret, data: f"{data}/..",
    "relative": lambda secret, data: os.path.relpath(secret),
    "a link": lambda secret, data: str(link(data / "link.png", secret)),
    "a linked folder": lambda secret, data: str(link(data / "linked", secret.parent) / secret.name),
    "a folder of a similar name": lambda secret, data: str(shutil.copytree(secret.parent, f"{data}2")) + "/secret.png",
    "file:": lambda secret, data: f"file://{secret}",
    "https:": lambda secret, data: "https://localhost:1/secret.png",
    "an archive": lambda secret, data: f"zip://secret.png::{data}/archive.zip",
    "a null byte": lambda secret, data: f"{data}/0.png\0{secret}",
}


def link(path, target):
    path.symlink_to(target)
    return path


def write(kind: str, folder, paths: list[str]) -> dict:
    """Data that name files, and the arguments that load them."""
    labels = ["ab"[i % 2] for i in range(len(paths))]
    if kind == "parquet":
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
        rows = [{"bytes": None, "path": path} for path in paths]
        table = pyarrow.table({"image": rows, "label": labels}, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / "rows.parquet")
        return {"dataset_name": str(folder / "rows.parquet")}
    if kind == "parquet of texts":
        datasets.Dataset.from_dict({"image": paths, "label": labels}).to_parquet(folder / "rows.parquet")
        return {"dataset_name": str(folder / "rows.parquet")}
    table = folder / "table"
    table.mkdir()
    rows = [{"image": path, "label": label} for path, label in zip(paths, labels, strict=True)]
    if kind == "json":
        (table / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (table / "train.csv").write_text("image,label\n" + "".join(f"{row['image']},{row['label']}\n" for row in rows))
    (folder / "table").rename(folder.parent / "table")
    return {"dataset_name": str(folder.parent / "table")}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rows_of_parquet_name_no_files_elsewhere(spelling, secret, data, tmp_path):
    path = SPELLINGS[spelling](secret, data)
    arguments = write("parquet", data, [*(str(data / f"{i}.png") for i in range(11)), path])
    arguments |= {"cache_dir": str(tmp_path / "cache"), "resolution": [8]}
    with pytest.raises(ValueError, match=r"Row 11 of split 'train' of .*rows.parquet' names .* below .*data"):
        load_labelled_images(DataArguments(**arguments), seed=0)


@pytest.mark.parametrize("kind", ["parquet of texts", "json", "csv"])
def test_neither_do_other_files_of_data(kind, secret, data, tmp_path):
    arguments = write(kind, data, [str(secret)] * 4)
    arguments |= {"cache_dir": str(tmp_path / "cache"), "resolution": [8]}
    with pytest.raises(ValueError, match=r"Row 0 of split 'train' of .* names"):
        load_labelled_images(DataArguments(**arguments), seed=0)


@pytest.mark.parametrize("name", ["../elsewhere/secret.png", "{secret}", "link.png", "file://{secret}"])
def test_neither_does_metadata_of_a_folder(name, secret, data, tmp_path, arguments):
    link(data / "link.png", secret)
    names = [*(f"{i}.png" for i in range(11)), name.format(secret=secret)]
    lines = [json.dumps({"file_name": name, "label": "ab"[i % 2]}) for i, name in enumerate(names)]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="which is not the name of a file below its folder"):
        load_labelled_images(arguments(data), seed=0)


def test_evaluation_reads_no_files_elsewhere_either(secret, data):
    spec = write("parquet", data, [str(secret)] * 4)["dataset_name"]
    with pytest.raises(ValueError, match=r"Row 0 of split 'train' of .* names"):
        open_images(spec)


def test_files_below_the_data_are_read(data, tmp_path, monkeypatch):
    arguments = {"cache_dir": str(tmp_path / "cache"), "resolution": [20, 24], "held_out_fraction": 0.0}
    monkeypatch.chdir(data)
    (data / "inner.png").symlink_to("0.png")
    paths = [str(data / "1.png"), "2.png", f"{data}/../data/3.png", "inner.png"]
    train, _ = load_labelled_images(DataArguments(**write("parquet", data, paths), **arguments), seed=0)
    for row, name in enumerate(["1.png", "2.png", "3.png", "0.png"]):
        expected = np.asarray(Image.open(data / name)).transpose(2, 0, 1) / np.float32(127.5) - 1
        assert np.array_equal(train[row]["pixel_values"].numpy(), expected)
    assert not train.bad_files


def test_links_in_a_users_folder_are_followed(pets, noise_image, tmp_path, arguments):
    """Its images were found, not named by data."""
    noise_image(7).save(tmp_path / "pool.png")
    link(pets / "cat" / "linked.png", tmp_path / "pool.png")
    train, held_out = load_labelled_images(arguments(pets), seed=0)
    assert len(train) + len(held_out) == 21
    assert check_images(train).bad_files == []


def test_what_is_no_regular_file_is_substituted_and_named(data, tmp_path):
    os.mkfifo(data / "pipe.png")
    (data / "folder.png").mkdir()
    paths = [*(str(data / f"{i}.png") for i in range(11)), str(data / "pipe.png"), str(data / "folder.png")]
    arguments = write("parquet", data, paths) | {"cache_dir": str(tmp_path / "cache"), "resolution": [8]}
    train, _ = load_labelled_images(DataArguments(**arguments, held_out_fraction=0.0), seed=0)
    for row in (11, 12):
        with pytest.raises(ValueError, match="is not a regular file"):
            train.open(row)
        assert train[row]["pixel_values"].shape == (3, 8, 8)
    assert train.bad_files == paths[11:]
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file"):
        check_images(train)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 16
%%EndComments
16 16 scale 16 16 8 [16 0 0 -16 0 16] {currentfile 16 string readhexstring pop} false 3 colorimage
%%EOF
"""


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg", "a"])
def test_postscript_is_not_opened_whatever_it_is_called(name, tmp_path, monkeypatch):
    """Pillow would start Ghostscript, which here would say so."""
    started = tmp_path / "started"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / name).write_bytes(EPS)
    for record in ({"path": str(tmp_path / name), "bytes": None}, {"path": None, "bytes": EPS}):
        with pytest.raises(BAD_IMAGE_ERRORS):
            open_image(record)
    assert not started.exists()


def test_every_listed_format_is_one_of_pillows():
    Image.init()
    assert set(IMAGE_FORMATS) <= set(Image.OPEN)
    assert not {"EPS", "IPTC", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"} & set(IMAGE_FORMATS)


def png(width: int, height: int) -> bytes:
    """A black PNG of 1 bit a pixel, small however large it claims to be."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    packed = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(18_000, 10_000), (20_000, 20_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_size(width, height):
    with pytest.raises(Image.DecompressionBombError, match="pixels"):
        open_image({"path": None, "bytes": png(width, height)})


def test_the_first_frame_of_many_is_taken(noise_image):
    frames = [noise_image(i) for i in range(40)]
    for file_format in ("GIF", "TIFF", "PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(
            file,
            file_format,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if file_format == "WEBP" else {}),
        )
        with Image.open(io.BytesIO(file.getvalue())) as first:
            expected = np.asarray(first.convert("RGB"))
        found = open_image({"path": None, "bytes": file.getvalue()})
        assert np.array_equal(np.asarray(found.convert("RGB")), expected)


def test_one_long_image_among_others_is_trained_on(tmp_path, noise_image, arguments):
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            noise_image(i).save(tmp_path / "photos" / label / f"{i}.png")
    (tmp_path / "photos" / "a" / "long.png").write_bytes(png(1_000_000, 1))
    (tmp_path / "photos" / "b" / "high.png").write_bytes(png(1, 1_000_000))
    train, _ = load_labelled_images(
        arguments(tmp_path / "photos", resolution=[64], random_crop=True, held_out_fraction=0.0), seed=0
    )
    assert all(train[i, epoch]["pixel_values"].shape == (3, 64, 64) for i in range(14) for epoch in range(2))
    assert not train.bad_files
    assert len(open_images(str(tmp_path / "photos"), size=(64, 64))[6]) == 3
