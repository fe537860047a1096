"""Functions on tensors, each with a reference in plain PyTorch and native implementations where they pay.

dispatch.py decides which one runs. Ops know tensors, but no models, configurations or caches.
"""
from __future__ import annotations

from ops.attention_ops import Visible, attention, explicit, prepare_heads, prompt_attention, rotate, sdpa, split_heads
from ops.dispatch import refusal, use, uses_reference
from ops.explain import explain
from ops.few_rows import for_few_rows
from ops.linear_ops import (
    IDENTITY,
    Between,
    Function,
    Matrix,
    Norm,
    Projection,
    activation,
    add_feed_forward,
    add_linear,
    linear,
    norm_linear,
    normalise,
)
from ops.sampling_ops import Choice, choice_of, sample
from ops.token_shift import shift_codes, shift_text, shift_tokens

__all__ = [
    "IDENTITY",
    "Between",
    "Choice",
    "Function",
    "Matrix",
    "Norm",
    "Projection",
    "Visible",
    "activation",
    "add_feed_forward",
    "add_linear",
    "attention",
    "choice_of",
    "explain",
    "explicit",
    "for_few_rows",
    "linear",
    "norm_linear",
    "normalise",
    "prepare_heads",
    "prompt_attention",
    "refusal",
    "rotate",
    "sample",
    "sdpa",
    "shift_codes",
    "shift_text",
    "shift_tokens",
    "split_heads",
    "use",
    "uses_reference",
]
