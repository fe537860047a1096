"""The device for --device auto, cpu or cuda, and its capabilities."""
from __future__ import annotations

import torch

from utils.errors import UsageError
from utils.threads import share_cores


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """Return the torch device for --device auto, cpu or cuda. Raises UsageError if it is not available."""
    share_cores()
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"--device cuda: PyTorch {torch.__version__} sees no CUDA GPU here; use --device cpu or auto"
            )
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine; lower "
                "--nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(wanted)


def multiplies_bf16() -> bool:
    """Whether this CPU has matrix units for bfloat16 (AMX): with them --matmul-precision medium almost halves a step.
    """
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
