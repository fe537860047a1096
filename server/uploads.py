"""Uploaded pictures: decoded from memory within limits, before anything large is allocated."""
from __future__ import annotations

import io
from typing import Any

from PIL import Image

from dalle.completion import mask_cells, picture_pixels, transparent_mask
from data.images import BROKEN_IMAGE_ERRORS
from server.schemas import ApiError
from utils.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def read_picture(content: bytes, name: str, max_pixels: int) -> Image.Image:
    """Decode a picture. name: of the parameter. Raises ApiError."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise Image.DecompressionBombError
            picture.load()
            return picture.copy()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's limit is higher
        limit = f"{max_pixels / 1e6:g} megapixels at most are accepted"
        raise ApiError(f"{name} has too many pixels: {limit}", name, "image_too_large") from error
    except BROKEN_IMAGE_ERRORS as error:
        listed = ", ".join(FORMATS)
        raise ApiError(f"{name} cannot be read as one of {listed}", name, "invalid_image") from error


def read_edit(image: bytes, mask: bytes | None, max_pixels: int, grid: int, size: int) -> tuple[Any, Any]:
    """The picture to complete as (3, S, S) uint8, and the codes (N,) to sample: where the mask, or else the picture, is
    transparent. Raises ApiError."""
    picture = read_picture(image, "image", max_pixels)
    marked = picture if mask is None else read_picture(mask, "mask", max_pixels)
    if marked.size != picture.size:
        raise ApiError(
            f"mask must be as large as image, {picture.width} x {picture.height} pixels, not {marked.width} x "
            f"{marked.height}", "mask", "invalid_mask",
        )  # fmt: skip
    area = transparent_mask(marked)
    if area is None:
        name = "image" if mask is None else "mask"
        way_out = "give a mask" if mask is None else "transparent parts are painted"
        raise ApiError(f"{name} is nowhere transparent: {way_out}", "mask", "invalid_mask")
    try:
        return picture_pixels(picture, size), mask_cells(area, grid, size)
    except UserError as error:
        raise ApiError("mask: nothing in the image's centre square is transparent", "mask", "invalid_mask") from error
