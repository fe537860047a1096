"""Image files, and grids of images: the grid of a prompt, the contact sheet of an evaluation."""
from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import math
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from utils.files import PathLike, atomic_write

FORMATS = ("jpg", "png")
GRID_LIMIT = 64
"""Largest number of images in a grid: more would be too large to view."""
SIDE = 128
"""Least width of images on a sheet: smaller ones are enlarged by a whole factor."""

_WIDTH = 1680  # a sheet's, at most
_GAP, _MARGIN = 6, 12
_HEADING, _LABEL = 18, 13  # font sizes; lines are 3 pixels higher
_HEADING_LINES, _LABEL_LINES = 4, 2
_LEGEND = "From left to right: real image, reconstruction, generated from the caption"
_FRAMES = " (green frame: found by retrieval, red: not found)"
_WHITE = (255, 255, 255)
_INK = (32, 32, 32)
_GOOD, _BAD = (46, 139, 87), (200, 60, 50)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def picture_bytes(
    picture: Image.Image, form: str, quality: int | None = None, about: Mapping[str, str] | None = None
) -> bytes:
    """A picture as the bytes of a file: form "png", "jpeg" (full colour resolution) or "webp".

    quality: of jpeg (None: 95) and webp (None: without loss). about: keywords and texts, which PNG files hold.
    """
    settings: dict[str, Any] = {"quality": quality}
    if form == "png":
        settings = {"pnginfo": PngImagePlugin.PngInfo()}
        for keyword, text in (about or {}).items():
            settings["pnginfo"].add_itxt(keyword, text)
    elif form == "jpeg":
        settings = {"quality": 95 if quality is None else quality, "subsampling": 0}
        picture = picture.convert("RGB")
    elif quality is None:
        settings = {"lossless": True}
    buffer = io.BytesIO()
    picture.save(buffer, format=form.upper(), **settings)
    return buffer.getvalue()


def save_picture(picture: Image.Image, path: PathLike) -> None:
    """Write a PIL image atomically as .jpg or .png, by the suffix."""
    content = picture_bytes(picture, "jpeg" if str(path).endswith(".jpg") else "png")
    with atomic_write(path, "wb") as file:
        file.write(content)


class Cell(NamedTuple):
    """Images (3, S, S) uint8 side by side, a label below them, and the colour of a frame around the last one."""

    images: Sequence[Tensor]
    label: str = ""
    frame: tuple[int, int, int] | None = None


def labelled_grid(
    sections: Sequence[tuple[str, Sequence[Cell]]], legend: str = "", columns: int = 0, side: int = 0
) -> Image.Image:
    """Arrange cells in rows on white, each section below its heading, with a legend at the top.

    Every cell has as many images as the first, all of one size. columns: cells in a row; 0: as many as fit. side:
    displayed image size in pixels; 0: the images' own, enlarged by a whole factor to SIDE or, in one or two columns,
    more.
    """
    first = sections[0][1][0]
    most = max(len(cells) for _, cells in sections)
    count, own = len(first.images), first.images[0].shape[-1]
    if not side:
        side = own if own >= SIDE else own * -(-max(SIDE, 3 * SIDE // (count * (columns or most))) // own)
    width = count * (side + _GAP) - _GAP
    columns = columns or max(1, min(most, _WIDTH // (width + _MARGIN)))
    across = columns * (width + _MARGIN) - _MARGIN
    labels = [_wrapped(cell.label, width, _LABEL, _LABEL_LINES) for _, cells in sections for cell in cells]
    row_height = side + _GAP + max(map(len, labels)) * (_LABEL + 3) + (_GAP if any(labels) else 0)
    headings = [_wrapped(heading, across, _HEADING, _HEADING_LINES) for heading, _ in sections]
    legends = _wrapped(legend, across, _LABEL, _HEADING_LINES)
    heights = [
        len(lines) * (_HEADING + 3) + (_GAP if lines else 0) + math.ceil(len(cells) / columns) * row_height
        for lines, (_, cells) in zip(headings, sections)
    ]
    top = _MARGIN + len(legends) * (_LABEL + 3)
    height = top + sum(heights) + _MARGIN * (len(sections) - 1) + _MARGIN - _GAP
    sheet = Image.new("RGB", (across + 2 * _MARGIN, height), _WHITE)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_MARGIN, _MARGIN - _GAP), legends, _LABEL)
    remaining = iter(labels)
    for (_, cells), lines, height in zip(sections, headings, heights):
        _write(pen, (_MARGIN, top), lines, _HEADING)
        begin = top + len(lines) * (_HEADING + 3) + (_GAP if lines else 0)
        for index, (cell, label) in enumerate(zip(cells, remaining)):
            row, column = divmod(index, columns)
            left, upper = _MARGIN + column * (width + _MARGIN), begin + row * row_height
            for number, picture in enumerate(map(to_pil, cell.images)):
                if side != own:
                    resample = Image.Resampling.NEAREST if side % own == 0 else Image.Resampling.LANCZOS
                    picture = picture.resize((side, side), resample)
                sheet.paste(picture, (left + number * (side + _GAP), upper))
            if cell.frame:
                x = left + width - side
                pen.rectangle((x - 2, upper - 2, x + side + 1, upper + side + 1), outline=cell.frame, width=2)
            _write(pen, (left, upper + side + _GAP // 2), label, _LABEL)
        top += height + _MARGIN
    return sheet


def make_grid(images: Sequence[Tensor], caption: str = "") -> Image.Image:
    """Arrange the first GRID_LIMIT images (3, S, S) uint8 in an about square grid below their caption.

    If there are several, each has its number below it.
    """
    images = list(images)[:GRID_LIMIT]
    cells = [Cell([image], str(index) if len(images) > 1 else "") for index, image in enumerate(images)]
    return labelled_grid([(caption, cells)], columns=math.ceil(math.sqrt(len(images))))


class Sample(NamedTuple):
    """One cell of a contact sheet. Images are (3, S, S) uint8."""

    caption: str
    real: Tensor
    reconstruction: Tensor
    generated: Tensor
    found: bool | None = None
    """Whether retrieval found the caption's own image; None: no retrieval."""


def make_sheet(groups: Sequence[tuple[str, Sequence[Sample]]]) -> Image.Image:
    """A contact sheet: for each group a heading, then its samples: real, reconstruction, generated, caption below.

    A frame around the generated image shows whether it was found: green yes, red no.
    """
    frames = {True: _GOOD, False: _BAD, None: None}
    sections = [
        (heading, [Cell(sample[1:4], sample.caption, frames[sample.found]) for sample in samples])
        for heading, samples in groups
    ]
    framed = any(cell.frame for _, cells in sections for cell in cells)
    large = groups[0][1][0].real.shape[-1] > SIDE
    return labelled_grid(sections, _LEGEND + (_FRAMES if framed else ""), side=SIDE if large else 0)


def _write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], size: int) -> None:
    left, top = corner
    for number, line in enumerate(lines):
        pen.text((left, top + number * (size + 3)), line, fill=_INK, font=_font(size))


def _wrapped(text: str, width: int, size: int, most: int) -> list[str]:
    """Wrap a text into at most `most` lines of `width` pixels, with an ellipsis if it does not fit."""
    text, font = _drawable(" ".join(text[: 200 * most].split())), _font(size)
    lines: list[str] = []
    while text and len(lines) < most:
        end = len(text)
        while end > 1 and font.getlength(text[:end]) > width:
            end -= 1
        if end < len(text) and text.rfind(" ", 1, end + 1) > 0:
            end = text.rfind(" ", 1, end + 1)
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    if text:
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines


def _drawable(text: str) -> str:
    """The text with an ellipsis for each run of characters that the font lacks, without emoji joiners."""
    if text.isascii() and text.isprintable():  # all are in the font; importing Matplotlib takes as long as an image
        return text
    known = _characters()
    parts = []
    visible = text.translate({0x200D: None, 0xFE0F: None})
    for is_known, run in itertools.groupby(visible, key=lambda character: ord(character) in known):
        parts.append("".join(run) if is_known else "…")
    return "".join(parts)


@functools.lru_cache(maxsize=None)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


@functools.lru_cache(maxsize=None)
def _characters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def _font_file() -> str:
    """DejaVu Sans, which comes with Matplotlib: Pillow's own font has only Latin-1."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    return str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
