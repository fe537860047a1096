"""Prefixes of weight names, and averaged copies of weights: pure functions over dictionaries."""

from __future__ import annotations

import logging
from typing import Mapping

from torch import Tensor

from checkpoints.trust import Weights
from utils.files import PathLike

logger = logging.getLogger(__name__)

#: DistributedDataParallel and torch.compile prefix the name of every weight with these.
_WRAPPERS = ("module.", "_orig_mod.")
_AVERAGED = "model_ema."


def part(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    """The weights whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def unwrapped(weights: Mapping[str, Tensor]) -> Weights:
    """The weights without the prefixes of wrappers."""
    weights = dict(weights)
    for prefix in _WRAPPERS:
        if weights and all(name.startswith(prefix) for name in weights):
            weights = part(weights, prefix)
    return weights


def averaged(weights: Mapping[str, Tensor], path: PathLike) -> Weights:
    """The weights, replaced by their moving averages if latent diffusion's `LitEma` kept one of each.

    It names the average of `a.b.weight` `model_ema.abweight`. Averages of other modules are ignored, an incomplete set
    with a warning.
    """
    own = {name: tensor for name, tensor in weights.items() if not name.startswith(_AVERAGED)}
    copies = {name.replace(".", ""): tensor for name, tensor in part(weights, _AVERAGED).items()}
    found = {name: copies[name.replace(".", "")] for name in own if name.replace(".", "") in copies}
    if found and len(found) == len(own):
        logger.info("%s: using its averaged weights (model_ema.*)", path)
        return found
    if found:
        logger.warning(
            "%s: only %d of %d weights have an average (model_ema.*): none is used", path, len(found), len(own)
        )
    return own
