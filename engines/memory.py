"""Memory of training on a CPU or GPU: an estimate before it starts, and the measured peak.

The estimate counts weights, gradients, moments, and the activations that each layer saves for its backward pass.
"""
from __future__ import annotations

import os
import sys
from typing import NamedTuple

import torch

from args import Config
from checkpoints.trust import aliases, empty_weights
from models.config import DalleConfig

_STATE_BYTES = {"Adam": 8, "AdamW": 8, "Muon": 4, "Adafactor": 0}
"""Bytes of optimizer state per weight. Muon's matrices have one moment (its few other weights two); Adafactor keeps
only row and column sums."""


class Memory(NamedTuple):
    """Memory of training in bytes."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and the averaged weights of --ema-decay."""
    activations: float
    """Activations saved for the backward pass, logits, half-precision copies of weights (--shard: gathered weights)."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self)

    def describe(self) -> str:
        """One line."""
        return "memory for training: about {:.2f} GB = {}".format(
            self.total / 1e9, " + ".join(f"{part / 1e9:.2f} {name}" for name, part in self._asdict().items())
        )


def training_memory(model: DalleConfig, config: Config, precision: str, processes: int = 1) -> Memory:
    """Estimate the memory of training a model in each process. precision: "fp32", "bf16" or "fp16", of the arithmetic.

    Not counted: Python and PyTorch themselves (about 0.5 GB), scratch memory of kernels, prefetched images.
    """
    weights = empty_weights(model)
    same = aliases(weights)
    sizes = {name: weight.numel() for name, weight in weights.items() if name not in same}
    count = sum(sizes.values())
    state = _STATE_BYTES[config.optimizer.optimizer] + (4 if config.optimizer.ema_decay else 0)
    if not config.execution.shard:
        return Memory(4.0 * count, 4.0 * count, float(state * count), activations(model, config, precision, count))
    own = count / processes
    blocks = sum(size for name, size in sizes.items() if ".layers." in name)
    if model.shared_attn_ids or model.shared_ff_ids:
        blocks = 0  # gathered with the rest
    # Gathered: embeddings and heads with their gradients, and two blocks, the current and the prefetched one.
    whole = 8.0 * (count - blocks) + 2 * (4 if precision == "fp32" else 2) * blocks / model.depth
    return Memory(4 * own, 4 * own, state * own, whole + activations(model, config, precision, count - blocks))


def activations(model: DalleConfig, config: Config, precision: str, num_weights: int) -> float:
    """Bytes saved for the backward pass of one micro-batch, and autocast's copies of `num_weights` weights."""
    run, half = config.execution, precision != "fp32"
    size = 2 if half else 4
    tokens, dim = run.batch_size * model.seq_len, model.dim
    inner, hidden, wide = model.heads * model.dim_head, model.hidden, model.up_width
    fused = model.norm == "layer" and not (model.sandwich_norm or (half and (model.attn_dropout or model.ff_dropout)))
    if fused:  # see ops/linear_ops.py: the input of each branch, queries, keys and values, the wide layer
        layer = tokens * (2 * 4 * dim + size * (3 * inner + wide))
        dense = sum(pattern == "full" or bool(model.rotary) for pattern in model.layer_patterns) / model.depth
        layer += dense * tokens * size * 2 * inner  # attention's output, and its copy
    else:
        # Also the norms, the activation's output, and both factors of a gate.
        layer = tokens * (4 * 4 * dim + size * (5 * inner + 2 * hidden + wide))
        layer += tokens * (2 * size * dim if half else 0)
        layer += tokens * size * dim * (2 * int(model.layer_scale) + 4 * int(model.sandwich_norm))
    if model.qk_norm or model.rotary_2d:
        layer += tokens * size * 3 * inner
    layer += tokens * (size * inner * int(model.value_residual) + (size + 4) * dim * int(model.shift_tokens))
    layers = model.depth * layer
    copies = size * num_weights if half else 0  # autocast copies each weight
    if run.activation_checkpointing:
        layers = model.depth * tokens * 4 * dim + layer
    if (fused or run.activation_checkpointing) and run.gradient_accumulation == 1:
        copies = max(0, copies - 4 * num_weights)  # freed before there are gradients
    rows = model.text_seq_len * model.text_table_size + model.image_seq_len * model.num_image_tokens
    return float(layers + copies + run.batch_size * rows * (size + 4 + 4))


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process in bytes: tensors on a GPU, everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_bytes(device: torch.device) -> int:
    """Memory of the device in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
