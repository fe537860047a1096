"""What runs on this machine, and why: `python -m ops`."""
from __future__ import annotations

from typing import NamedTuple, Sequence

import torch

from ops import build, convolution, dispatch, elementwise, matmul, native_attention, rows
from utils.options import Command, Options

PYTORCH = "PyTorch"


class Choice(NamedTuple):
    """Which implementation of an op runs here for float32 on a CPU."""

    op: str
    implementation: str
    reason: str


def _choice(
    op: str, source: str, available: bool, tensors: list[torch.Tensor], missing: str = "", more: str = ""
) -> Choice:
    refused = dispatch.refusal(*tensors)
    if refused is None and not available:
        refused = build.reasons.get(source) or missing or "no compiled kernels"
    return Choice(op, PYTORCH if refused else f"csrc/{source}.c", refused or "compiled for this processor" + more)


def explain(like: torch.Tensor | None = None) -> list[Choice]:
    """Return a choice for each op with a native implementation: what would run for tensors like this one (any shape).

    like: a tensor with the device and dtype in question; None: float32 on the CPU. Single calls still run in PyTorch if
    a kernel does not support their sizes, strides or gradients.
    """
    tensors = [torch.empty(1) if like is None else like]
    available = build.library("rows") is not None
    more = "; bfloat16 and int8 weights by the matrix unit (AMX)" if rows.multiplies() else ""
    units = "bfloat16" if matmul.multiplies_in_bfloat16() else "matrix"
    return [
        _choice("matmul", units, matmul.available(), tensors, "the processor has no matrix unit (AMX)"),
        _choice("attention in training", "attention", native_attention.available(), tensors),
        _choice("gelu, dropout, heads, residual add, norms", "training", elementwise.suits(), tensors),
        _choice("3x3 convolution, group norm with swish", "convolution", convolution.available(), tensors),
        _choice("decoding codes, sampling from logits", "rows", available, tensors, more=more),
    ]


COMMAND = Command("python -m ops", "Print which implementation of each op runs on this machine, and why.", Options)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the choices."""
    COMMAND.parse(argv)
    for choice in explain():
        print("{:<44}{:<20}{}".format(*choice))  # noqa: T201
