"""From prompts to codes to pictures: options, cache, decoders, one loop, one driver."""
from __future__ import annotations

from sampling.canvas import SoFar, first_sampled
from sampling.driver import (
    Batch,
    Sampler,
    Share,
    complete_caption,
    decode,
    encode,
    given_codes,
    image_seed,
    prime_rows,
    to_uint8,
)
from sampling.graphs import Graphs
from sampling.loop import SAMPLER, Sampled, Shared, complete_text, sample_codes
from sampling.options import COND_SCALES, DEFAULT_OPTIONS, TEMPERATURES, SamplingFlags, SamplingOptions, top_k_count
from sampling.partial import decode_partial
from sampling.windows import Windows

__all__ = [
    "COND_SCALES",
    "DEFAULT_OPTIONS",
    "SAMPLER",
    "TEMPERATURES",
    "Batch",
    "Graphs",
    "Sampled",
    "Sampler",
    "SamplingFlags",
    "SamplingOptions",
    "Share",
    "Shared",
    "SoFar",
    "Windows",
    "complete_caption",
    "complete_text",
    "decode",
    "decode_partial",
    "encode",
    "first_sampled",
    "given_codes",
    "image_seed",
    "prime_rows",
    "sample_codes",
    "to_uint8",
    "top_k_count",
]
