"""Sample grids with one row per class, and PNGs with a record of the settings that produced them."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..files import replacing
from .samples import RECORD_KEY

INK, PAPER = "#1f2328", "white"
_MAX_NAME_LENGTH = 28  # characters; ImageNet names several synonyms


def labelled_grid(
    images: Sequence[Image.Image], row_names: Sequence[str], *, title: str | None = None, cell_size: int | None = None
) -> Image.Image:
    """An image grid, RGB on white, with one row per class, labelled with the class name on the left.

    Args:
        images (`Sequence[PIL.Image.Image]`): Row by row, the same number in each.
        row_names (`Sequence[str]`): The class of each row.
        title (`str`, *optional*): A line above the grid.
        cell_size (`int`, *optional*): Longer side of an image in the grid, in pixels. The default is the smallest
            whole multiple of the images' own size that is at least 56, so that pixels stay sharp squares.
    """
    if len(row_names) == 0 or len(images) == 0 or len(images) % len(row_names) != 0:
        raise ValueError(f"Each row of a grid has equally many images; got {len(images)} for {len(row_names)} rows.")
    columns = len(images) // len(row_names)

    longer_side = max(images[0].size)
    if cell_size is None:
        cell_size = longer_side * -(-56 // longer_side)
    width, height = (max(1, round(side * cell_size / longer_side)) for side in images[0].size)
    resampling = Image.Resampling.NEAREST if cell_size >= longer_side else Image.Resampling.LANCZOS

    font_size = min(22, max(14, height // 4))
    font, title_font = ImageFont.load_default(font_size), ImageFont.load_default(font_size + 2)
    names = [shortened(name) for name in row_names]
    gap, margin = max(2, cell_size // 16), 16
    left = margin + round(max(font.getlength(name) for name in names)) + 12
    top = margin if title is None else margin + 2 * font_size
    title_width = 0 if title is None else round(title_font.getlength(title))

    grid_width, grid_height = columns * (width + gap) - gap, len(names) * (height + gap) - gap
    size = (max(left + grid_width, margin + title_width) + margin, top + grid_height + margin)
    grid = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(grid)
    if title is not None:
        draw.text((margin, margin), title, fill=INK, font=title_font, anchor="lt")
    for row, name in enumerate(names):
        y = top + row * (height + gap)
        draw.text((left - 12, y + height / 2), name, fill=INK, font=font, anchor="rm")
        for column in range(columns):
            image = images[row * columns + column].convert("RGB").resize((width, height), resampling)
            grid.paste(image, (left + column * (width + gap), y))
    return grid


def save_png(image: Image.Image, path: str | os.PathLike, record: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG at once, with a record of the settings that produced it, which [`read_record`] returns."""
    text = PngInfo()
    if record is not None:
        text.add_text(RECORD_KEY, json.dumps(record))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True, pnginfo=text)


def shortened(name: str, length: int = _MAX_NAME_LENGTH) -> str:
    return name if len(name) <= length else name[: length - 3] + "..."
