"""Functions on tensors, each with a reference in plain PyTorch and native implementations where they pay.

dispatch.py decides which one runs. Ops know tensors and nothing of models, configurations or caches.
"""

from ops.attention_ops import Visible, attention, explicit, rotate, sdpa, split_heads
from ops.dispatch import use, uses_reference
from ops.explain import explain
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
)

__all__ = [
    "IDENTITY",
    "Between",
    "Function",
    "Matrix",
    "Norm",
    "Projection",
    "Visible",
    "activation",
    "add_feed_forward",
    "add_linear",
    "attention",
    "explain",
    "explicit",
    "linear",
    "norm_linear",
    "rotate",
    "sdpa",
    "split_heads",
    "use",
    "uses_reference",
]
