"""A folder of colour pictures by class: crops of photographs that scikit-learn and scikit-image ship.

    python tests/benchmarks/colour_set.py photos

Each photograph is a class. Its middle columns are held out (`val`), the rest is trained on (`train`).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SHIPPED = ("chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg")
SIDE = 32  # pixels of a crop
HEIGHT = 200  # pixels that a photograph is scaled to
STRIDE = 8
HELD_OUT = 0.2  # of the columns


def photographs() -> dict[str, Image.Image]:
    """The photographs by the names of their classes."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    folder = Path(skimage.data.__file__).parent
    found = {Path(name).stem.split("_")[0]: Image.open(folder / name).convert("RGB") for name in SHIPPED}
    return {**found, **{name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}}


def make(folder: str | Path) -> Path:
    """Writes `train/<class>/` and `val/<class>/`; returns the folder."""
    folder = Path(folder)
    for name, picture in photographs().items():
        width = max(2 * SIDE, round(picture.width * HEIGHT / picture.height))
        pixels = np.asarray(picture.resize((width, HEIGHT), Image.Resampling.LANCZOS))
        held = max(SIDE, round(HELD_OUT * width))
        first = (width - held) // 2
        for split, start, end in (("train", 0, first), ("train", first + held, width), ("val", first, first + held)):
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            for top in range(0, HEIGHT - SIDE + 1, STRIDE):
                for left in range(start, end - SIDE + 1, STRIDE):
                    crop = pixels[top : top + SIDE, left : left + SIDE]
                    Image.fromarray(crop).save(target / f"{top}-{left}.png")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    print(make(parser.parse_args().folder))
