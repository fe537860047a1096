"""The orthogonalised update of Muon on CPUs, with half of the work, and in float32 where there is no bfloat16."""
from __future__ import annotations

import torch
from torch import Tensor

from ops.matmul import add_matmul, multiplies_in_bfloat16

_MOST = 3
"""Steps of the iteration on one Gram matrix; in more of them its rounding to bfloat16 grows beyond the result."""


def orthogonalized(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of torch.optim.Muon (Jordan et al. 2024). (M, N) -> (M, N), float32.

    x <- (a + b G + c G^2) x with G = x x^T. These polynomials of one G commute, so several steps need only their matmul
    and the next G, which are symmetric and as small as x is narrow: less work if it is twice as long.
    """
    x = grad.float().contiguous()
    x = x / x.norm().clamp(min=eps)
    tall, side = len(x) > x.shape[1], min(x.shape)
    while ns_steps:
        count = min(ns_steps, _MOST) if max(x.shape) >= 2 * side else 1
        ns_steps -= count
        gram = x.new_zeros(side, side)
        add_matmul(gram, *((x.t(), x) if tall else (x, x.t())), symmetric=True)
        scale, rest = _polynomial(gram, ns_coefficients, count)
        x = add_matmul(scale * x, *((x, rest) if tall else (rest, x)))
    return x


def _polynomial(gram: Tensor, coefficients: tuple[float, float, float], steps: int) -> tuple[float, Tensor]:
    """What `steps` of the iteration multiply by, for a gram (m, m): a multiple of the identity, and the rest.

    Only the rest is rounded to bfloat16: so the result is nearer to the exact one than PyTorch's.
    """
    a, b, c = coefficients
    scale, total = 1.0, torch.zeros_like(gram)
    for left in range(steps, 0, -1):
        mean = float(gram.diagonal().mean())
        rest = gram.clone()
        rest.diagonal().sub_(mean)
        # a + b G + c G^2 = shift + rest
        shift = a + b * mean + c * mean**2
        rest = add_matmul((b + 2 * c * mean) * rest, rest, rest, c, symmetric=True)
        first = left == steps
        total = rest if first else add_matmul((shift * total).add_(rest, alpha=scale), rest, total, symmetric=True)
        scale *= shift
        if left > 1:
            half = add_matmul(shift * gram, rest, gram, symmetric=True)
            gram = add_matmul(shift * half, half, rest, symmetric=True)
    return scale, total


def choose_precision(device: torch.device) -> None:
    """Make torch.optim.Muon compute by `orthogonalized` on CPUs, unless they have a matrix unit for bfloat16.

    PyTorch takes bfloat16. Where a CPU has no instructions for it, emulation is six times as slow as float32: it took 6
    of the 7 seconds of the demo's step on a CPU with AVX2.
    """
    module, function = getattr(torch.optim, "_muon", None), "_zeropower_via_newtonschulz"
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    if device.type == "cpu" and hasattr(module, function) and (multiplies_in_bfloat16() or not supported()):
        setattr(module, function, orthogonalized)
