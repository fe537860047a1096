"""Tensors as picture files, and pictures side by side: the grid of a prompt, the contact sheet of an evaluation."""
from __future__ import annotations

import math
from typing import NamedTuple, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import PathLike, atomic_write

FORMATS = ("jpg", "png")
GRID_LIMIT = 64
"""Images of a grid at most: more would make a picture too large to look at."""

_SHEET_SIDE = 128  # pictures of a contact sheet are at most so wide
_LEGEND = "From left to right: real picture, reconstruction, drawn from the caption"
_FRAMES = " (green frame: found by retrieval, red: not found)"
_WHITE = (255, 255, 255)
_INK = (32, 32, 32)
_GOOD, _BAD = (46, 139, 87), (200, 60, 50)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def save_picture(picture: Image.Image, path: PathLike) -> None:
    """Write a picture atomically as .jpg (quality 95, full colour resolution) or .png, as the name ends."""
    is_jpg = str(path).endswith(".jpg")
    settings = {"format": "JPEG", "quality": 95, "subsampling": 0} if is_jpg else {"format": "PNG"}
    with atomic_write(path, "wb") as file:
        picture.save(file, **settings)


def make_grid(images: Sequence[Tensor]) -> Image.Image:
    """Put pictures (3, S, S) uint8 side by side on white, about as wide as high; the first GRID_LIMIT of them."""
    images = list(images)[:GRID_LIMIT]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[1:]
    margin = max(4, height // 32)
    grid = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + margin) + margin), _WHITE)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(to_pil(image), (margin + column * (width + margin), margin + row * (height + margin)))
    return grid


class Sample(NamedTuple):
    """One cell of a contact sheet. Pictures are (3, S, S) uint8."""

    caption: str
    real: Tensor
    reconstruction: Tensor
    generated: Tensor
    found: bool | None = None
    """Whether the generated picture was told apart (retrieval); None: not asked."""


def make_sheet(groups: Sequence[tuple[str, Sequence[Sample]]]) -> Image.Image:
    """A contact sheet: for each group a heading, then its samples: real, reconstruction, generated, caption below.

    A frame around the generated picture says whether it was found: green yes, red no.
    """
    side = min(max(groups[0][1][0].real.shape[-1], 64), _SHEET_SIDE)
    gap, font_size = 6, 13
    cell_width = max(3 * side + 2 * gap, 200)
    columns = max(1, min(6, 1600 // (cell_width + 3 * gap)))
    font, bold = label_font(font_size), label_font(font_size + 5)
    line = font_size + 3
    cell_height = side + 2 * line + 3 * gap
    heights = [font_size + 5 + 3 * gap + math.ceil(len(samples) / columns) * cell_height for _, samples in groups]
    sheet = Image.new("RGB", (columns * (cell_width + 3 * gap) + 3 * gap, sum(heights) + line + 3 * gap), _WHITE)
    draw = ImageDraw.Draw(sheet)
    framed = any(sample.found is not None for _, samples in groups for sample in samples)
    draw.text((3 * gap, gap), _LEGEND + (_FRAMES if framed else ""), fill=_INK, font=font)
    top = line + 2 * gap
    for (heading, samples), height in zip(groups, heights):
        draw.text((3 * gap, top), heading, fill=_INK, font=bold)
        first = top + font_size + 5 + 2 * gap
        for index, sample in enumerate(samples):
            row, column = divmod(index, columns)
            left, upper = 3 * gap + column * (cell_width + 3 * gap), first + row * cell_height
            _draw_sample(sheet, draw, sample, (left, upper), side, gap)
            for number, text in enumerate(_wrapped(sample.caption, cell_width, font)):
                draw.text((left, upper + side + gap // 2 + number * line), text, fill=_INK, font=font)
        top += height
    return sheet


def _draw_sample(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, sample: Sample, corner: tuple[int, int], side: int, gap: int
) -> None:
    left, upper = corner
    for number, image in enumerate((sample.real, sample.reconstruction, sample.generated)):
        picture = to_pil(image)
        if picture.width != side:
            picture = picture.resize(
                (side, side), Image.Resampling.LANCZOS if picture.width > side else Image.Resampling.NEAREST
            )
        sheet.paste(picture, (left + number * (side + gap), upper))
    x = left + 2 * (side + gap)
    if sample.found is not None:
        draw.rectangle(
            (x - 2, upper - 2, x + side + 1, upper + side + 1), outline=_GOOD if sample.found else _BAD, width=2
        )


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a caption into at most two lines of `width` pixels; what does not fit ends in an ellipsis."""
    text = " ".join(text[:300].split())
    lines: list[str] = []
    for _ in range(2):
        end = len(text)
        while end and font.getlength(text[:end]) > width:
            end -= 1
        if end < len(text):
            end = text.rfind(" ", 1, end + 1) if text.rfind(" ", 1, end + 1) > 0 else end
        lines.append(text[:end])
        text = text[end:].lstrip()
        if not text:
            return lines
    while lines[-1] and font.getlength(lines[-1] + "…") > width:
        lines[-1] = lines[-1][:-1]
    lines[-1] += "…"
    return lines


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with Matplotlib: Pillow's own font has no letters beyond Latin-1."""
    import matplotlib

    return ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", size)
