"""The optimizers of --optimizer in plain PyTorch, and loss scaling for half precision."""
from __future__ import annotations

import logging
from typing import Any

import torch

from args import OptimizerConfig
from engines import muon
from engines.base import parameter_groups
from models.dalle import TextToImage
from utils.errors import UsageError

logger = logging.getLogger(__name__)


def make_optimizers(model: TextToImage, options: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizer of all trainable parameters; for Muon two: it for the blocks' matrices, AdamW for the rest.

    Adafactor (arXiv 1804.04235) keeps almost no state; its steps are relative to the size of the weights.

    Muon (Jordan et al. 2024) orthogonalises each matrix's update; scaled to the size of an AdamW update (Moonlight,
    arXiv 2502.16982, section 2.2), both take the same learning rate.

    With --base-width, steps of AdamW for matrices of blocks and heads shrink as the width grows (muP, arXiv 2203.03466,
    table 8), and Muon's with its root: of that size, its update has a norm that grows with the root of the width.
    """
    betas, name = (options.beta1, options.beta2), options.optimizer
    common: dict[str, Any] = {"lr": options.learning_rate}
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    on_gpu = all(p.is_cuda for p in model.dalle.parameters())
    fused = on_gpu or version >= (2, 4)  # on the CPU only newer versions have fused kernels
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        logger.warning("PyTorch %s has no Muon (it needs 2.9 or newer): using AdamW", torch.__version__)
        name = "AdamW"
    if name == "Adafactor":
        if not hasattr(torch.optim, "Adafactor"):
            raise UsageError(f"--optimizer Adafactor needs PyTorch 2.5 or newer, this is {torch.__version__}")
        # One weight at a time: the multi-tensor form would hold the squares of all gradients at once.
        return [torch.optim.Adafactor(parameter_groups(model, options.weight_decay), foreach=False, **common)]
    if name != "Muon":
        kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[name]
        groups = [part for group in parameter_groups(model, options.weight_decay) for part in _scaled(model, group)]
        return [kind(groups, betas=betas, eps=options.eps, fused=fused, **common)]
    matrices = [p for p in model.dalle.transformer.parameters() if p.dim() == 2]
    muon.choose_precision(matrices[0].device)
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    first = [{"params": matrices, "lr_scale": model.dalle.config.width_ratio**0.5}]
    return [
        torch.optim.Muon(first, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw", **common),
        torch.optim.AdamW(
            _scaled(model, {"params": rest}), weight_decay=0.0, betas=betas, eps=options.eps, fused=fused, **common
        ),
    ]


def _scaled(model: TextToImage, group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group of AdamW: weights whose inputs grow with the width have smaller steps."""
    dalle = model.dalle
    if not dalle.config.base_width:
        return [group]
    inner = {id(p) for p in dalle.transformer.parameters() if p.dim() == 2}
    inner |= {id(dalle.text_head.weight), id(dalle.image_head.weight)}
    wide = [p for p in group["params"] if id(p) in inner]
    other = [p for p in group["params"] if id(p) not in inner]
    parts = [dict(group, params=wide, lr_scale=dalle.config.width_ratio), dict(group, params=other)]
    return [part for part in parts if part["params"]]


def make_scaler(device_type: str, options: dict[str, Any]) -> Any:
    """Return a GradScaler. PyTorch before 2.3 has only the one for CUDA; disabled, it does nothing on any device."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, **options)
    return torch.cuda.amp.GradScaler(**options)
