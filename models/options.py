"""Options of a transformer's blocks, as flags and configurations name them."""
from __future__ import annotations

from dataclasses import dataclass

from models.config import ACTIVATIONS, NORMS
from utils.options import Options, option
from utils.resume import FIXED


@dataclass(frozen=True)
class BlockOptions(Options, title="blocks"):
    """What a transformer block is made of."""

    sandwich_norm: bool = option(False, "a second LayerNorm after each sub-layer", resume=FIXED)
    norm: str = option("layer", "norms: LayerNorm, or RMSNorm", choices=NORMS, resume=FIXED)
    qk_norm: bool = option(False, "RMS-normalise queries and keys of each head", resume=FIXED)
    rotary_2d: bool = option(False, "rotary positions of queries and keys, by row and column", resume=FIXED)
    activation: str | None = option(None, "of the feed-forward layers; geglu and swiglu are gated", none="geglu",
                                    choices=ACTIVATIONS, resume=FIXED)
    ff_mult: int = option(4, "hidden width of the feed-forward layers as a multiple of --hidden-size; with 6, one that "
                             "is not gated has as many weights as a gated one with 4", ge=1, resume=FIXED)
    layer_scale: bool = option(True, "a learned factor for each channel of each residual branch (mini-dalle only)",
                               resume=FIXED)
