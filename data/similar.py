"""Similar images, by how many of their codes are equal, for --code-noise-similar."""
from __future__ import annotations

import torch

from data.order import epoch_order

SIMILAR = 8
"""Similar images of each one."""
_CANDIDATES = 4096
"""With more images, only so many are compared to each: a few minutes for the images of COCO."""
_ROWS = 256


def similar_rows(codes: torch.Tensor, seed: int) -> torch.Tensor:
    """The rows with the most codes in common with each, LongTensor (n, up to SIMILAR); -1 where there are fewer.

    codes (n, N), -1 where an image was not encoded. Rows that are equal, or have no code in common, are not similar.
    """
    compact = codes.float()
    candidates = epoch_order(len(codes), seed, 0)[:_CANDIDATES].sort().values
    candidates = candidates[compact[candidates, 0] >= 0]
    found = []
    for rows in compact.split(_ROWS):
        different = torch.cdist(rows, compact[candidates], p=0)  # (rows, candidates), how many codes
        different[different == 0] = codes.shape[1]
        least = different.topk(min(SIMILAR, len(candidates)), dim=1, largest=False)
        found.append(torch.where(least.values < codes.shape[1], candidates[least.indices], -1))
    return torch.cat(found)
