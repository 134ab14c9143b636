import sys

import numpy as np
import pytest
from PIL import Image

from hf_guided.evaluation.plots import trade_off_curve
from hf_guided.generation.grids import labelled_grid, save_png


def picture(color, size=(8, 8)):
    """One colour, with one black pixel in the corner."""
    image = Image.new("RGB", size, color)
    image.putpixel((0, 0), (0, 0, 0))
    return image


COLORS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff", "#00ffff"]


def boxes(grid, colors):
    """Bounding box (left, top, right, bottom) of each colour in the grid."""
    pixels = np.asarray(grid)
    found = []
    for color in colors:
        ys, xs = np.nonzero((pixels == np.array(Image.new("RGB", (1, 1), color))).all(axis=2))
        found.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return found


def test_grid_places_and_enlarges_images():
    grid = labelled_grid([picture(color) for color in COLORS], ["cat", "dog"])
    cells = boxes(grid, COLORS)
    assert {(right - left, bottom - top) for left, top, right, bottom in cells} == {(56, 56)}  # 7 times 8
    lefts, tops = [cell[0] for cell in cells], [cell[1] for cell in cells]
    assert lefts[:3] == lefts[3:] == sorted(set(lefts))  # three columns, the first row's images first
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4] == tops[5]
    assert (lefts[1] - lefts[0], tops[3] - tops[0]) == (59, 59)  # a small gap
    # Pixels stay sharp: the corner pixel is a black square of 7x7, and nothing is in between.
    pixels = np.asarray(grid)[tops[0] : tops[0] + 56, lefts[0] : lefts[0] + 56]
    expected = np.full((56, 56, 3), (255, 0, 0))
    expected[:7, :7] = 0
    np.testing.assert_array_equal(pixels, expected)
    assert labelled_grid([picture(COLORS[0], (64, 64))], ["cat"], cell_size=32).width < 100


def test_names_stand_left_of_their_rows():
    pixels = np.asarray(labelled_grid([picture(color) for color in COLORS], ["cat", "", "a much longer name"]))
    names = pixels[:, : boxes(Image.fromarray(pixels), COLORS)[0][0]].min(axis=2) < 128  # dark on white
    rows = [names[16 + 59 * row : 16 + 59 * row + 56] for row in range(3)]
    assert [row.any() for row in rows] == [True, False, True]
    assert rows[2].sum() > 3 * rows[0].sum()
    # Right-aligned, beside the images, vertically centred on them, and not cut at the left.
    assert not names[:, :10].any()
    for row in (rows[0], rows[2]):
        ys, xs = np.nonzero(row)
        assert names.shape[1] - 20 < xs.max() < names.shape[1] - 4
        assert 22 < ys.mean() < 34


def test_title_and_shapes():
    images = [picture("#ff0000", (12, 6)) for _ in range(2)]
    plain, titled = labelled_grid(images, ["cat", "dog"]), labelled_grid(images, ["cat", "dog"], title="Scale 3 " * 9)
    (left, top, right, bottom), (_, titled_top, *_) = boxes(plain, COLORS[:1]) + boxes(titled, COLORS[:1])
    assert (right - left, bottom - top) == (60, 30 + 3 + 30)  # two rows and a gap; the sides keep their proportion
    assert titled_top > top + 14
    title = np.asarray(titled)[:titled_top].min(axis=2) < 128
    assert title.any()
    assert not title[:, -10:].any()  # a title wider than the grid is not cut


def test_grey_images_and_wrong_counts():
    assert labelled_grid([Image.new("L", (8, 8), 90)], ["x"]).mode == "RGB"
    with pytest.raises(ValueError, match="got 3 for 2 rows"):
        labelled_grid([picture("red")] * 3, ["a", "b"])
    with pytest.raises(ValueError, match="got 0 for 2 rows"):
        labelled_grid([], ["a", "b"])


def test_save_png_keeps_the_old_picture_when_it_fails(tmp_path):
    path = tmp_path / "grid.png"
    save_png(picture("red"), path)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    with pytest.raises(OSError, match="cannot write mode F"):
        save_png(Image.new("F", (8, 8)), path)
    with Image.open(path) as image:
        assert (image.format, image.getpixel((5, 5))) == ("PNG", (255, 0, 0))


def row(scale, conditional, precision=0.8, recall=0.9, fid=10.0):
    return {
        "guidance_scale": scale, "condition_unet": conditional,
        "precision/judge": precision, "recall/judge": recall, "fid/judge": fid,
    }  # fmt: skip


def test_trade_off_curve(tmp_path):
    pytest.importorskip("matplotlib")
    had_pyplot = "matplotlib.pyplot" in sys.modules
    alone = [row(scale, False, fid=fid) for scale, fid in ((10, 12.0), (0, 12.0), (1, 20.0), (3, 6.0))]
    drawn = {}
    for name, rows in {
        "alone": alone,
        "shuffled": alone[::-1],
        "both": [*alone, row(0, True, fid=7.0), row(3, True, fid=9.0)],
        "conditional": [row(scale, True) for scale in (0, 1)],
    }.items():
        trade_off_curve(rows, "judge", tmp_path / f"{name}.png")
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
    assert len(list(tmp_path.iterdir())) == 4  # no temporary file is left
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot

    def green(pixels):  # FID's colour
        return (abs(pixels - (0x1A, 0x7F, 0x37)).max(axis=2) < 20).sum()

    np.testing.assert_array_equal(drawn["alone"], drawn["shuffled"])  # a curve, in the order of the scale
    assert green(drawn["both"]) > 1.2 * green(drawn["alone"]) > 0
    assert (drawn["conditional"] != drawn["alone"]).any()
