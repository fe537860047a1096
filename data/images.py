"""Pictures as tensors: one file -> RGB, centre square, resized, uint8 (3, S, S).

The pipeline is deterministic, so the image tokens of a photo are the same in every epoch. It equals, byte for byte, the
published one (a random resized crop with scale 1 and ratio 1, which always falls back to the centre square, then
torchvision's resize of a PIL picture: bilinear with antialiasing), with three additions for pictures outside COCO: a
photo is turned upright by its EXIF orientation, as every viewer shows it; transparency becomes white; 16-bit grey keeps
its upper 8 bits.
"""
from __future__ import annotations

import contextlib
import io
import os
import struct
import zlib
from typing import IO, Any

import torch
from PIL import Image, UnidentifiedImageError

from utils.files import open_regular

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""Formats that are read, whatever the file is called: large collections hold misnamed files.

Pillow knows more, but some of them start other programs (EPS: Ghostscript).
"""

BROKEN_IMAGE_ERRORS: tuple[type[Exception], ...] = (
    OSError,  # missing, cut off, not an image
    SyntaxError,  # how Pillow's PNG reader reports broken chunks
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,  # more pixels than Pillow takes for honest
)
"""What Pillow raises for files that it cannot decode."""

MAX_PIXELS = 1 << 27
"""Pixels of a picture at most: above the largest cameras' (11,648 x 8,736), and half a gigabyte of memory as RGB."""

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(file: str | IO[bytes], image_size: int | None) -> torch.Tensor:
    """Read a picture as uint8 (3, image_size, image_size), all of it as (3, H, W) where that is None.

    Raises one of BROKEN_IMAGE_ERRORS where that fails.
    """
    with contextlib.ExitStack() as opened:
        source = opened.enter_context(_Bounded(open_regular(file))) if isinstance(file, str) else file
        try:
            image = opened.enter_context(Image.open(source, formats=_FORMATS))
        except UnidentifiedImageError:  # Pillow names the object that it was given, for those who know Python
            raise UnidentifiedImageError(f"not one of the formats {', '.join(_FORMATS)}") from None
        check_pixels(image)
        return image_to_tensor(prepare_image(image, image_size))


class _Bounded(io.BufferedReader):
    """A file of which nobody gets more than there is.

    Pillow asks for whatever length a damaged chunk claims, and Python takes as much memory before it reads.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file.detach())  # type: ignore[attr-defined]
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self._size:
            size = max(0, self._size - self.tell())
        return super().read(size)


def check_pixels(image: Image.Image) -> None:
    """Raise Image.DecompressionBombError for a picture, not decoded yet, of more than MAX_PIXELS.

    Pillow's own limit is laxer, and switched off in some programs.
    """
    if image.width * image.height > MAX_PIXELS:
        message = "{} x {} pixels; {} at most are decoded"
        raise Image.DecompressionBombError(message.format(image.width, image.height, MAX_PIXELS))


def why_unreadable(error: BaseException) -> str:
    """Return what kind of file one of BROKEN_IMAGE_ERRORS speaks of, as a plural."""
    if isinstance(error, Image.DecompressionBombError):
        return "pictures with too many pixels"
    if isinstance(error, FileNotFoundError):
        return "pictures that vanished"
    if isinstance(error, UnidentifiedImageError):
        return "files that are no picture"
    if isinstance(error, OSError) and error.errno is not None:
        return f"pictures that cannot be read ({error.strerror or error})"
    return "damaged pictures"


def prepare_image(image: Image.Image, image_size: int | None) -> Image.Image:
    """Return the centre square of a picture as RGB, upright, image_size pixels high and wide; None: all of it."""
    image = to_rgb(_upright(image))
    if image_size is None:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as RGB: transparency becomes white, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip nearly all of it to white
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return flatten_on_white(image)
    return image.convert("RGB")


def flatten_on_white(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; where it is transparent, white shows through."""
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    background.alpha_composite(rgba)
    return background.convert("RGB")


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB picture of width W and height H as a uint8 tensor (3, H, W) that owns its memory."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # (H * W * 3,)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()  # (3, H, W)


def _upright(image: Image.Image) -> Image.Image:
    """Turn a photo as its EXIF orientation says. Broken EXIF data is no reason to lose the photo: it stays as it is."""
    try:
        orientation: Any = image.getexif().get(_EXIF_ORIENTATION)
    except BROKEN_IMAGE_ERRORS + (TypeError, KeyError, AttributeError):
        return image
    # Not ImageOps.exif_transpose, which also writes the metadata anew and can fail at that.
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
