"""Similar images, by how many of their codes are equal, for --code-noise-similar."""
from __future__ import annotations

import torch

from data.order import epoch_order

SIMILAR = 8
"""Similar images of each one."""
_CANDIDATES = 4096
"""With more images, only so many are compared to each: a few minutes for the images of COCO."""
_ROWS = 64


def similar_rows(codes: torch.Tensor, seed: int) -> torch.Tensor:
    """The rows with the most codes in common with each, LongTensor (n, up to SIMILAR); -1 where there are fewer.

    codes (n, N), -1 where an image was not encoded. Rows that are equal, or have no code in common, are not similar.
    """
    compact = codes.to(torch.int32)
    candidates = epoch_order(len(codes), seed, 0)[:_CANDIDATES] if len(codes) > _CANDIDATES else torch.arange(len(codes))
    candidates = candidates[compact[candidates, 0] >= 0]
    found = []
    for rows in compact.split(_ROWS):
        common = (rows[:, None] == compact[candidates]).sum(dim=2)  # (rows, candidates)
        common[common == codes.shape[1]] = 0
        most = common.topk(min(SIMILAR, len(candidates)), dim=1)
        found.append(torch.where(most.values > 0, candidates[most.indices], -1))
    return torch.cat(found)
