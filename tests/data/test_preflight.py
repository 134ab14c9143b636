"""The preflight finds what was put wrong on purpose."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from hf_guided.data import DataArguments, check_images, load_labelled_images


def test_report_of_a_mixed_folder(pets, arguments, noise_image):
    noise_image(0, 8, 8, mode="L").save(pets / "cat" / "0.png")
    noise_image(0, 40, 10, mode="RGBA").save(pets / "cat" / "1.png")
    (pets / "dog" / "3.png").write_bytes(b"broken")
    (pets / "dog" / "4.png").unlink()
    train, _ = load_labelled_images(arguments(pets, held_out_fraction=0), seed=0)
    report = check_images(train)
    assert (report.num_images, report.num_checked) == (19, 19)
    assert report.class_counts == {"cat": 10, "dog": 9}
    assert report.sizes == Counter({(20, 24): 16, (8, 8): 1, (40, 10): 1})
    assert report.modes == Counter({"RGB": 16, "L": 1, "RGBA": 1})
    assert [name.split(" (")[0] for name in report.bad_files] == [str(pets / "dog" / "3.png")]
    assert report.num_upscaled == 2
    assert report.small_classes == ["dog"]
    text = str(report)
    for part in (
        "19 images, 19 checked, 1 bad",
        "classes: 2, with 9 to 10 images each",
        "8x8 to 20x24, most often 20x24, resized to 16x16",
        "RGB (16)",
        "warning: 2 are smaller than 16x16",
        "warning: fewer than 10 images in 1 of the classes: dog",
        "dog/3.png",
    ):
        assert part in text


def test_too_many_bad_files_are_an_error_that_names_them(pets, arguments, noise_image):
    for i in range(5):
        (pets / "dog" / f"{i}.png").write_bytes(b"broken")
    train, _ = load_labelled_images(arguments(pets, held_out_fraction=0), seed=0)
    message = r"5 of 20 checked images .* more than 10%; .*dog/0\.png \(.*dog/1\.png .*dog/2\.png .* and 2 more\.$"
    with pytest.raises(ValueError, match=message):
        check_images(train)
    for i in range(3):
        noise_image(i).save(pets / "dog" / f"{i}.png")
    assert len(check_images(train).bad_files) == 2  # 10 % exactly


def test_values_that_cannot_be_scaled_are_bad(pets, arguments):
    Image.fromarray(np.full((20, 20), 255, dtype=np.float32)).save(pets / "dog" / "float.tiff")
    train, _ = load_labelled_images(arguments(pets, held_out_fraction=0), seed=0)
    (bad_file,) = check_images(train).bad_files
    assert bad_file == f"{pets}/dog/float.tiff (mode F with values from 255.0 to 255.0, where 0 to 1 is meant)"


def test_large_sets_are_sampled_and_clean_ones_have_no_warnings():
    train, held_out = load_labelled_images(DataArguments(), seed=0)
    assert check_images(train).num_checked == 1500
    report = check_images(train, whole_up_to=1400)
    assert report.num_checked == 1000
    assert report.num_images == 1500
    assert report.sizes == Counter({(8, 8): 1000})
    assert sum(report.class_counts.values()) == 1500
    assert "warning" not in str(report)
    assert check_images(held_out).class_counts["0"] > 25


def test_without_labels_there_are_no_classes(pets, arguments):
    (pets / "dog" / "extra").mkdir()
    for file in pets.glob("*/*.png"):
        file.rename(pets / f"{file.parent.name}{file.name}")
    train, _ = load_labelled_images(arguments(pets), seed=0, require_labels=False)
    report = check_images(train)
    assert report.class_counts == {}
    assert "classes" not in str(report)
