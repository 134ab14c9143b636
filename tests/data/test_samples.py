"""Files of samples, as the published scripts write them."""

import numpy as np
import pytest

from hf_guided.data.samples import read_samples, write_samples

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@pytest.mark.parametrize("labels", [None, np.array([7, 3])])
def test_round_trip(tmp_path, labels):
    path = tmp_path / "samples.npz"
    write_samples(path, IMAGES, labels)
    images, read = read_samples(path)
    assert np.array_equal(images, IMAGES)
    assert (read is None) if labels is None else np.array_equal(read, labels)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(path) as file:
        assert sorted(file) == ["arr_0", "arr_1"][: 1 + (labels is not None)]


def test_other_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "samples.npz"
    write_samples(path, IMAGES)
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
    write_samples(path, IMAGES / 255)
    with pytest.raises(ValueError, match="float64 of shape"):
        read_samples(path)
    write_samples(path, IMAGES, np.array([1]))
    with pytest.raises(ValueError, match="labels of 2 images"):
        read_samples(path)
    write_samples(path, IMAGES[:0])
    with pytest.raises(ValueError, match="holds no images"):
        read_samples(path)
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "nowhere.npz")
