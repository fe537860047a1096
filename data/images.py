"""Image files as tensors: RGB, centre-cropped to a square, resized, uint8 (3, S, S).

The pipeline is deterministic, so the codes of an image are the same in every epoch. It equals, byte for byte, that of
the original Mini DALL-E (a random resized crop with scale 1 and ratio 1, which always falls back to the centre square,
then torchvision's resize of a PIL image: bilinear with antialiasing), with three additions for images outside COCO:
the EXIF orientation is applied; transparency becomes white; 16-bit grey keeps its upper 8 bits.
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
"""Formats that are read, regardless of the file name: large collections hold misnamed files.

Pillow supports more, but some of them start other programs (EPS: Ghostscript).
"""

BROKEN_IMAGE_ERRORS: tuple[type[Exception], ...] = (
    OSError,  # missing, truncated, not an image
    SyntaxError,  # from Pillow's PNG reader for broken chunks
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,  # more pixels than Pillow's limit
)
"""What Pillow raises for files that it cannot decode."""

MAX_PIXELS = 1 << 27
"""Largest number of pixels: more than the largest cameras have (11,648 x 8,736), and 400 MB of memory as RGB."""

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
        except UnidentifiedImageError:  # Pillow's message shows the repr of the file object
            raise UnidentifiedImageError(f"not one of the formats {', '.join(_FORMATS)}") from None
        check_pixels(image)
        return image_to_tensor(prepare_image(image, image_size))


class _Bounded(io.BufferedReader):
    """A file whose reads are limited to its size.

    Pillow requests any length that a damaged chunk claims, and Python allocates that much memory before it reads.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file.detach())  # type: ignore[attr-defined]
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self._size:
            size = max(0, self._size - self.tell())
        return super().read(size)


def check_pixels(image: Image.Image) -> None:
    """Raise Image.DecompressionBombError for an image, not yet decoded, of more than MAX_PIXELS.

    Pillow's own limit is higher, and disabled in some programs.
    """
    if image.width * image.height > MAX_PIXELS:
        message = "{} x {} pixels; {} at most are decoded"
        raise Image.DecompressionBombError(message.format(image.width, image.height, MAX_PIXELS))


def why_unreadable(error: BaseException) -> str:
    """Return the kind of file that caused one of BROKEN_IMAGE_ERRORS, as a plural."""
    if isinstance(error, Image.DecompressionBombError):
        return "images with too many pixels"
    if isinstance(error, FileNotFoundError):
        return "images that vanished"
    if isinstance(error, UnidentifiedImageError):
        return "files that are not images"
    if isinstance(error, OSError) and error.errno is not None:
        return f"images that cannot be read ({error.strerror or error})"
    return "damaged images"


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
    """Return the image as RGB: transparency becomes white, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip nearly all of it to white
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return flatten_on_white(image)
    return image.convert("RGB")


def flatten_on_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, composited on white."""
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    background.alpha_composite(rgba)
    return background.convert("RGB")


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB image of width W and height H as a uint8 tensor (3, H, W) that owns its memory."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # (H * W * 3,)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()  # (3, H, W)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Broken EXIF data is ignored."""
    try:
        orientation: Any = image.getexif().get(_EXIF_ORIENTATION)
    except BROKEN_IMAGE_ERRORS + (TypeError, KeyError, AttributeError):
        return image
    # Not ImageOps.exif_transpose, which also rewrites the metadata and can fail at that.
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)
