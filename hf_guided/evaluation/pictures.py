"""Pictures of a report: samples beside the names of their classes, and the trade-off that the guidance scale buys."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER = "#1f2328", "white"
_MAX_NAME_LENGTH = 28  # characters; ImageNet names several synonyms


def labelled_grid(
    images: Sequence[Image.Image],
    row_names: Sequence[str],
    *,
    title: str | None = None,
    cell_size: int | None = None,
) -> Image.Image:
    """A grid of images with one row per class, the name of the class at its left.

    Args:
        images (`Sequence[PIL.Image.Image]`): Equally many images per row, all of the first row first: what a pipeline
            returns for `class_labels=row_names` with `num_images_per_label`.
        row_names (`Sequence[str]`): The class of each row.
        title (`str`, *optional*): A line above the grid.
        cell_size (`int`, *optional*): Pixels of the longer side of an image in the grid. The default is the smallest
            whole multiple of the images' own size that has at least 56, so that pixels stay sharp squares.

    Returns:
        `PIL.Image.Image`: The grid, RGB on white.
    """
    if len(row_names) == 0 or len(images) == 0 or len(images) % len(row_names) != 0:
        raise ValueError(f"Needs equally many images for each row, got {len(images)} for {len(row_names)} rows.")
    columns = len(images) // len(row_names)

    longer_side = max(images[0].size)
    if cell_size is None:
        cell_size = longer_side * -(-56 // longer_side)
    width, height = (max(1, round(side * cell_size / longer_side)) for side in images[0].size)
    resampling = Image.Resampling.NEAREST if cell_size >= longer_side else Image.Resampling.LANCZOS

    font_size = min(22, max(14, height // 4))
    font, title_font = ImageFont.load_default(font_size), ImageFont.load_default(font_size + 2)
    names = [name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 3] + "..." for name in row_names]
    gap, margin = max(2, cell_size // 16), 16
    left = margin + round(max(font.getlength(name) for name in names)) + 12
    top = margin if title is None else margin + 2 * font_size
    title_width = 0 if title is None else round(title_font.getlength(title))

    grid_width, grid_height = columns * (width + gap) - gap, len(names) * (height + gap) - gap
    size = (max(left + grid_width, margin + title_width) + margin, top + grid_height + margin)
    grid = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(grid)
    if title is not None:
        draw.text((margin, margin), title, fill=_INK, font=title_font, anchor="lt")
    for row, name in enumerate(names):
        y = top + row * (height + gap)
        draw.text((left - 12, y + height / 2), name, fill=_INK, font=font, anchor="rm")
        for column in range(columns):
            image = images[row * columns + column].convert("RGB").resize((width, height), resampling)
            grid.paste(image, (left + column * (width + gap), y))
    return grid


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG under a temporary name and renames it, so that no reader ever sees half a picture."""
    temporary = Path(f"{path}.tmp")
    image.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)


def trade_off_curve(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws how precision, recall and FID move with the guidance scale (figure 4 of arXiv 2105.05233) into a PNG.

    Args:
        rows (`Sequence[Mapping]`): Rows of a report, each with `guidance_scale`, `condition_unet` (whether the UNet
            was told the class), `precision`, `recall` and `fid`.
        path (`str` or `os.PathLike`): Where the PNG goes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The curves are drawn with matplotlib: pip install 'hf-guided[train]'.") from error

    rows = sorted(rows, key=lambda row: row["guidance_scale"])
    # Without pyplot: no global state, no display, nothing to close.
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    quality, distance = figure.subplots(1, 2)
    panels = ((quality, "precision", "#0969da"), (quality, "recall", "#bc4c00"), (distance, "fid", "#1a7f37"))
    for conditional, line, marker, fill, suffix in (
        (False, "-", "o", None, "unconditional UNet"),
        (True, "--", "D", "white", "class-conditional UNet"),
    ):
        series = [row for row in rows if row["condition_unet"] == conditional]
        for axes, metric, color in panels:
            if series:
                axes.plot(
                    [row["guidance_scale"] for row in series],
                    [row[metric] for row in series],
                    linestyle=line,
                    marker=marker,
                    color=color,
                    markerfacecolor=fill or color,
                    label=f"{'FID' if metric == 'fid' else metric}, {suffix}",
                )

    scales = sorted({row["guidance_scale"] for row in rows})
    for axes, title in ((quality, "Precision and recall"), (distance, "FID (lower is better)")):
        axes.set_title(title, loc="left", color=_INK)
        axes.set_xscale("symlog", linthresh=1)  # scales run 0, 1, 3, 10
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()
        axes.set_xlabel("guidance scale")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    quality.set_ylim(0, 1.03)
    distance.set_ylim(bottom=0)

    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
