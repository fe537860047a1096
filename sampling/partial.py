"""Pictures of codes that are not all there yet: while an image is sampled, and of what a completion keeps.

Letters: B images, N = G * G codes, S image height and width.
"""
from __future__ import annotations

import torch
from torch import Tensor

from sampling.driver import Model, decode

BLANK, LINE = 236, 212
"""Grey levels of a square without a code, and of the lines around it."""


def decode_partial(model: Model, codes: Tensor) -> Tensor:
    """Codes (B, N), -1 where there is none yet -> pictures (B, 4, S, S) uint8 on the CPU.

    Squares without a code are transparent, over grey ones with lines around: plainly not there yet.
    """
    grid = model.dalle.config.grid
    pixels = decode(model, _filled(codes, grid))
    size = pixels.shape[-1]
    there = (codes.cpu() >= 0).view(-1, 1, grid, grid)
    there = there.repeat_interleave(size // grid, dim=2).repeat_interleave(size // grid, dim=3)
    line = torch.arange(size) % (size // grid) == 0
    blank = torch.where(line[:, None] | line, LINE, BLANK).to(torch.uint8)
    return torch.cat([torch.where(there, pixels, blank), there.to(torch.uint8) * 255], dim=1)


def _filled(codes: Tensor, grid: int) -> Tensor:
    """Codes for the decoder, whose pixels depend on their surroundings: the code above, or else the one before."""
    rows = codes.view(-1, grid, grid).clone()
    for row in range(1, grid):
        rows[:, row] = torch.where(rows[:, row] < 0, rows[:, row - 1], rows[:, row])
    codes = rows.flatten(1)
    places = torch.arange(codes.shape[1], device=codes.device).where(codes >= 0, torch.tensor(-1, device=codes.device))
    return codes.gather(1, places.cummax(dim=1).values.clamp(min=0)).clamp(min=0)
