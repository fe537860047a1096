"""Muon in float32, for CPUs without bfloat16 instructions."""
from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of torch.optim.Muon (Jordan et al. 2024), in float32. (M, N) -> (M, N)."""
    a, b, c = ns_coefficients
    x = grad.float()
    x = x.t() if len(grad) > grad.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if len(grad) > grad.shape[1] else x


def choose_precision(device: torch.device) -> None:
    """Make torch.optim.Muon compute in float32 on CPUs without bfloat16 instructions, where PyTorch emulates bfloat16.

    Emulation is six times as slow: it took 6 of the 7 seconds of the demo's step on a CPU with AVX2.
    """
    module, function = getattr(torch.optim, "_muon", None), "_zeropower_via_newtonschulz"
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    if device.type == "cpu" and hasattr(module, function) and not supported():
        setattr(module, function, orthogonalized)
