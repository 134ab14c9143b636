"""Features of whole sets: the same however they are computed, each image once, kept by content."""

import contextlib
import os
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from evaluation_helpers import Pixels, pixels

from hf_guided.evaluation.features import feature_sets
from hf_guided.evaluation.features.feature_sets import FeatureSet, collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages
from hf_guided.evaluation.metrics.distances import inception_score


def directly(images, extractor):
    return extractor(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_what_is_collected(batch_size):
    images = pixels(50)
    collected = collect_features(ArrayImages(images), Pixels(spatial=True), batch_size=batch_size)
    expected = directly(images, Pixels(spatial=True))
    assert collected.num_images == collected.statistics.num_samples == 50
    np.testing.assert_allclose(collected.kept, expected.features, rtol=1e-5, atol=1e-6)
    assert collected.kept_indices.tolist() == list(range(50))
    np.testing.assert_allclose(collected.statistics.mean, expected.features.mean(axis=0, dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(
        collected.spatial_statistics.covariance, np.cov(expected.spatial.astype(np.float64).T), rtol=1e-4
    )
    assert collected.predictions.tolist() == expected.probabilities.argmax(axis=1).tolist()
    assert collected.score.score == pytest.approx(inception_score(expected.probabilities), rel=1e-6)


def test_only_so_many_are_kept_evenly_spread(monkeypatch):
    monkeypatch.setattr(feature_sets, "MAX_KEPT", 5)
    collected = collect_features(ArrayImages(pixels(41)), Pixels(), batch_size=8)
    assert collected.kept_indices.tolist() == [0, 10, 20, 30, 40]
    assert collected.statistics.num_samples == 41
    assert len(collected.predictions) == 41


def test_features_that_are_not_finite_are_named():
    class Broken(Pixels):
        def __call__(self, images):
            batch = super().__call__(images)
            batch.features[images.float().mean(dim=(1, 2, 3)) > 254] = np.nan
            return batch

    images = pixels(20)
    images[13] = 255
    with pytest.raises(ValueError, match="pixels features of image 13 of these are not finite"):
        collect_features(ArrayImages(images, name="these"), Broken(), batch_size=4)


def test_features_of_known_content_are_not_computed_again(tmp_path):
    images = pixels(30)
    extractor = Pixels(spatial=True)
    first = collect_features(ArrayImages(images), extractor, cache_dir=tmp_path)
    calls = extractor.calls
    again = collect_features(ArrayImages(images.copy(), name="renamed"), extractor, cache_dir=tmp_path)
    assert extractor.calls == calls
    for name in ("kept", "kept_indices", "predictions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    np.testing.assert_array_equal(again.statistics.covariance, first.statistics.covariance)
    np.testing.assert_array_equal(again.spatial_statistics.mean, first.spatial_statistics.mean)
    assert again.statistics.num_samples == again.num_images == 30

    images[3, 0, 0, 0] ^= 1
    collect_features(ArrayImages(images), extractor, cache_dir=tmp_path)
    assert extractor.calls == calls + 1
    other = Pixels(spatial=True)
    other.fingerprint = "pixels of version 2"
    collect_features(ArrayImages(images), other, cache_dir=tmp_path)
    assert other.calls == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_saved_files_and_published_ones(tmp_path):
    collected = collect_features(ArrayImages(pixels(30)), Pixels())
    collected.save(tmp_path / "saved.npz")
    loaded = FeatureSet.load(tmp_path / "saved.npz")
    assert (loaded.extractor, loaded.fingerprint, loaded.num_images) == ("pixels", "pixels of version 1", 30)
    with np.load(tmp_path / "saved.npz") as file:  # as published files name them
        np.testing.assert_array_equal(file["mu"], collected.statistics.mean)
        np.testing.assert_array_equal(file["sigma"], collected.statistics.covariance)

    rng = np.random.default_rng(0)
    np.savez(tmp_path / "published.npz", mu=rng.standard_normal(3), sigma=np.eye(3))
    published = FeatureSet.load(tmp_path / "published.npz")
    assert (published.extractor, published.num_images, published.kept) == ("inception", None, None)
    np.savez(tmp_path / "other.npz", other=np.eye(3))
    with pytest.raises(ValueError, match="neither images"):
        FeatureSet.load(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="is damaged"):
        FeatureSet.load(tmp_path / "broken.npz")


PROGRAM = """
import sys
from accelerate import PartialState
from evaluation_helpers import Pixels, pixels
from hf_guided.evaluation.features.feature_sets import collect_features
from hf_guided.evaluation.features.image_sets import ArrayImages

state = PartialState(cpu=True)
assert state.num_processes == int(sys.argv[2])
for n in (50, 5):  # the last batch is short; and fewer batches than processes
    collected = collect_features(ArrayImages(pixels(n)), Pixels(spatial=True), batch_size=7, cache_dir=sys.argv[3])
    assert (collected is None) == (not state.is_main_process)
    if collected is not None:
        collected.save(f"{sys.argv[1]}/{n}.npz")
        open(f"{sys.argv[1]}/{n}.txt", "w").write(repr(collected.score.score))
state.destroy_process_group()
"""


def test_two_processes_gather_what_one_has(tmp_path):
    """Each image once, also where the processes' shares are uneven."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        arguments = [str(tmp_path / "program.py"), str(folder), str(processes), str(tmp_path / f"cache-{processes}")]
        result = forked.run([sys.executable, *arguments], processes=processes, env=environment, timeout=120)
        assert result.returncode == 0, result.stderr
    for n in (50, 5):
        one, two = (FeatureSet.load(tmp_path / str(processes) / f"{n}.npz") for processes in (1, 2))
        np.testing.assert_array_equal(one.kept, two.kept)
        np.testing.assert_array_equal(one.kept_indices, two.kept_indices)
        np.testing.assert_array_equal(one.predictions, two.predictions)
        np.testing.assert_allclose(one.statistics.mean, two.statistics.mean, rtol=1e-13)
        np.testing.assert_allclose(one.statistics.covariance, two.statistics.covariance, rtol=1e-12)
        assert one.num_images == two.num_images == two.statistics.num_samples == n
        scores = [float((tmp_path / str(processes) / f"{n}.txt").read_text()) for processes in (1, 2)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-13)


@pytest.mark.parametrize("how", ["empty", "cut off", "flipped", "binary", "other features", "no archive", "folder"])
def test_a_damaged_file_of_the_cache_is_made_again(tmp_path, caplog, how):
    images, extractor = pixels(30), Pixels(spatial=True)
    first = collect_features(ArrayImages(images), extractor, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "other features":
        collect_features(ArrayImages(pixels(20)), extractor).save(path)
    elif how == "no archive":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        place = content.index(first.kept.tobytes())
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        path.write_bytes({"empty": b"", "cut off": content[:middle], "flipped": flipped, "binary": bytes(99)}[how])
    again = collect_features(ArrayImages(images), extractor, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.kept, first.kept)
    assert "are computed again" in caplog.text
    if how != "folder":
        assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog, small_disk):
    images, extractor = ArrayImages(pixels(30)), Pixels()
    (tmp_path / "file").write_text("")
    assert collect_features(images, extractor, cache_dir=tmp_path / "file" / "cache").num_images == 30
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))
    assert collect_features(images, extractor, cache_dir=small_disk).num_images == 30
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert caplog.text.count("are not cached") == 2
    assert "The disk is full" in caplog.text


@pytest.mark.parametrize("content", [b"", bytes(99), b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_damaged_statistics_are_named(tmp_path, content):
    (tmp_path / "statistics.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"statistics\.npz (is damaged|holds neither)"):
        FeatureSet.load(tmp_path / "statistics.npz")


def test_statistics_are_never_unpickled(tmp_path):
    with open(tmp_path / "statistics.npz", "wb") as file:
        np.savez(file, mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"statistics\.npz is damaged"):
        FeatureSet.load(tmp_path / "statistics.npz")
    np.savez(tmp_path / "other.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"other\.npz holds statistics that are damaged \(.*finite"):
        FeatureSet.load(tmp_path / "other.npz")
