"""Scorers for evaluate.py --scorer: functions of images, captions and records.

    python evaluate.py --dalle_path demo --prompts-file prompts.txt --scorer examples.scorers:colour_names

A scorer gets images uint8 (B, 3, S, S), their captions and their entries in --prompts-file, and returns a dictionary of
numbers for each image, empty where it does not apply.
"""
from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

HUES = {"red": 0, "orange": 30, "yellow": 55, "green": 120, "blue": 220, "purple": 280}
"""Degrees on the colour circle."""
_WIDTH, _SATURATION, _BRIGHTNESS, _SHARE = 20, 0.4, 0.3, 0.1


def hues(image: Tensor) -> Tensor:
    """Hues in degrees of the vivid pixels of an image uint8 (3, H, W), (n,)."""
    pixels = image.flatten(1).float() / 255  # (3, H * W)
    highest, which = pixels.max(dim=0)
    spread = highest - pixels.min(dim=0).values
    vivid = (spread > _SATURATION * highest) & (highest > _BRIGHTNESS)
    red, green, blue = pixels[:, vivid]
    parts = torch.stack([(green - blue), (blue - red), (red - green)]) / spread[vivid]
    offsets = torch.tensor([0.0, 120.0, 240.0])[which[vivid]]
    return (60 * parts.gather(0, which[vivid][None])[0] + offsets) % 360


def colour_names(images: Tensor, captions: list[str], records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Whether the colours that a caption names are in its image: each on a tenth of the vivid pixels at least.

    A crude check: it looks at pixels alone, and not at which object has the colour.
    """
    found: list[dict[str, float]] = []
    for image, caption in zip(images, captions):
        named = [colour for colour in HUES if re.search(rf"\b{colour}\b", caption.lower())]
        if not named:
            found.append({})  # nothing to check
            continue
        own = hues(image)
        apart = [((own - HUES[colour] + 180) % 360 - 180).abs() for colour in named]
        present = [bool(len(own)) and float((distance < _WIDTH).float().mean()) >= _SHARE for distance in apart]
        found.append({"colours_present": sum(present) / len(present)})
    return found
