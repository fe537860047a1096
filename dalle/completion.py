"""Image completion: which codes of a given picture are kept, and which ones the model samples.

White (or nonzero, or True) parts of the mask are sampled, black parts are kept. A code covers a square of pixels and is
sampled if any of them is marked, so no marked pixel is kept. A code sees its surroundings only as far as they come
before it in raster order: the model samples from the top left to the bottom right.

Letters: G side of the code grid, N = G * G codes, S image height and width.
"""
from __future__ import annotations

import re
from typing import Any, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dalle.loading import Loaded
from sampling import encode
from utils.errors import UsageError, UserError

Picture = Union[Image.Image, Tensor, np.ndarray]
Box = Tuple[float, float, float, float]


def parse_box(text: str) -> Box | None:
    """Parse "left,top,right,bottom", fractions of the picture's sides; None if the text is something else.

    Raises UsageError for a box of this form that is empty or not within the picture.
    """
    if "," not in text or not re.fullmatch(r"[-0-9.,\s]+", text):
        return None
    parts = text.split(",")
    box = [float(part) for part in parts if re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*", part)]
    if not (len(parts) == len(box) == 4 and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise UsageError(
            f"--mask {text}: a box is left,top,right,bottom with 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
    left, top, right, bottom = box
    return left, top, right, bottom


def open_picture(path: str) -> Image.Image:
    """Read a picture file. Raises Pillow's errors for files that it cannot decode."""
    # The formats that training reads: for others, such as EPS, Pillow starts external programs.
    with Image.open(path, formats=("JPEG", "PNG", "BMP", "GIF", "WEBP")) as picture:
        picture.load()
        return picture.copy()


def square(picture: Image.Image, mode: str, size: int) -> Image.Image:
    """The upright centre square of a picture on white, `size` pixels high and wide, in Pillow's `mode`."""
    picture = ImageOps.exif_transpose(picture)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return ImageOps.fit(picture.convert(mode), (size, size), Image.Resampling.BILINEAR)


def picture_pixels(picture: Picture, size: int) -> Tensor:
    """Convert a picture to uint8 (3, size, size).

    A PIL image is cropped to its centre square and resized; an array (S, S, 3) or tensor (3, S, S), uint8 or floats in
    [0, 1], must have this size. Raises UserError otherwise.
    """
    if isinstance(picture, Image.Image):
        picture = np.array(square(picture, "RGB", size))
    if isinstance(picture, np.ndarray):
        pixels = torch.tensor(picture)
        pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels
    else:
        pixels = picture.cpu()
    if tuple(pixels.shape) != (3, size, size):
        raise UserError(f"image: expected 3 x {size} x {size} pixels, got {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        pixels = (pixels * 255.0 + 0.5).clamp(0, 255)
    return pixels.to(torch.uint8)


def mask_cells(mask: Any, grid: int, size: int) -> Tensor:
    """Which codes a mask marks for sampling: (N,) bool.

    mask: a PIL image (bright parts are sampled), a box of fractions (left, top, right, bottom), or an array or tensor
    of numbers or bools, (G, G), (N,) or (S, S). Raises UserError for another shape, and for a mask that marks nothing.
    """
    if isinstance(mask, tuple) and len(mask) == 4 and all(isinstance(side, (int, float)) for side in mask):
        cells = _box_cells(mask, grid)
    elif isinstance(mask, Image.Image):
        cells = _pixel_cells(torch.as_tensor(np.array(square(mask, "L", size))) > 127, grid)
    else:
        marked = torch.as_tensor(mask) != 0
        if marked.shape in ((grid, grid), (grid * grid,)):
            cells = marked.reshape(-1)
        elif marked.shape == (size, size):
            cells = _pixel_cells(marked, grid)
        else:
            raise UserError(
                f"--mask: expected {grid} x {grid} codes or {size} x {size} pixels, got {tuple(marked.shape)}"
            )
    if not cells.any():
        raise UserError("--mask: nothing is marked; white parts are generated, black parts are kept")
    return cells


def _pixel_cells(marked: Tensor, grid: int) -> Tensor:
    """(S, S) bool -> (N,) bool: the codes with any marked pixel."""
    return F.max_pool2d(marked[None, None].float(), marked.shape[0] // grid)[0, 0].flatten() > 0


def _box_cells(box: Box, grid: int) -> Tensor:
    """The codes that a box overlaps: (N,) bool. Overlaps of less than 1e-6 are ignored."""
    left, top, right, bottom = box
    start, end = torch.arange(grid) / grid + 1e-6, (torch.arange(grid) + 1) / grid - 1e-6
    columns, rows = (start < right) & (end > left), (start < bottom) & (end > top)
    return (rows[:, None] & columns[None]).flatten()


def transparent_mask(picture: Image.Image) -> Image.Image | None:
    """A mask that marks the transparent parts of a picture; None if it has none."""
    if not ("A" in picture.getbands() or "transparency" in picture.info):
        return None
    alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
    return ImageOps.invert(alpha) if np.array(alpha).min() < 128 else None


def completion_codes(loaded: Loaded, picture: Picture, mask: Any) -> Tensor:
    """The codes (N,) of a picture, -1 where the mask is marked for sampling. See `mask_cells` for masks."""
    size = loaded.image_size
    codes = encode(loaded, picture_pixels(picture, size)[None])[0]
    return codes.masked_fill(mask_cells(mask, loaded.config.grid, size), -1)
