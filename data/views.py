"""Views of an image for --augment: what is done to it, and the words that its caption then needs to stay true.

Each view is the same change of pixels everywhere, so that its codes are encoded once, like those of the image itself.
"""
from __future__ import annotations

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_STEP = 20
"""Views move an image by a twentieth of its side, or make it a tenth larger or smaller."""


class View(NamedTuple):
    """One view."""

    words: str
    """What is added to the caption after a comma; empty: nothing."""
    change: Callable[[Tensor], Tensor]
    """uint8 (3, S, S) -> uint8 (3, S, S)"""


def _mirror(image: Tensor) -> Tensor:
    return image.flip(-1)


def _window(image: Tensor, left: int, top: int, size: int) -> Tensor:
    """A square of an image whose border goes on forever, uint8 (3, S, S) -> (3, size, size)."""
    columns, rows = (torch.arange(size) + start for start in (left, top))
    limit = image.shape[-1] - 1
    return image[:, rows.clamp(0, limit)[:, None], columns.clamp(0, limit)]


def _move(right: int, down: int) -> Callable[[Tensor], Tensor]:
    def change(image: Tensor) -> Tensor:
        step = max(1, image.shape[-1] // _STEP)
        return _window(image, -right * step, -down * step, image.shape[-1])

    return change


def _zoom(steps: int) -> Callable[[Tensor], Tensor]:
    """Cut so many steps off each side, or add them."""

    def change(image: Tensor) -> Tensor:
        side = image.shape[-1]
        step = steps * max(1, side // _STEP)
        cut = _window(image, step, step, side - 2 * step).float()[None]
        resized = F.interpolate(cut, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        return resized[0].round().clamp(0, 255).to(torch.uint8)

    return change


AUGMENTATIONS: dict[str, tuple[View, ...]] = {
    "none": (),
    "flip": (View("", _mirror),),
    "views": (
        View("mirrored", _mirror),
        View("moved left", _move(-1, 0)),
        View("moved right", _move(1, 0)),
        View("moved up", _move(0, -1)),
        View("moved down", _move(0, 1)),
        View("smaller", _zoom(-1)),
        View("larger", _zoom(1)),
    ),
}
"""The views of each --augment, besides the unchanged image."""
