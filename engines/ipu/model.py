"""Adapts a built model to IPUs from outside: pipeline blocks, recomputation checkpoints, serialized tables, the loss.

`poptorch` is imported inside forward passes, so that modules stay copyable and importing this file needs no SDK.
Letters as in models/: B batch, T text tokens, N image tokens, D width, V rows of the text embedding table.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from engines.ipu.plan import LAYER, Placement, block_starts
from models.dalle import TextToImage
from models.vqgan import VQGAN


class ImageEncoder(nn.Module):
    """The encoder half of a frozen VQGAN, as a module: a pipeline block can only begin at a module's call."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        vqgan = copy.deepcopy(vqgan)  # the caller's model keeps decoder, precision and memory format
        del vqgan.decoder, vqgan.post_quant_conv
        for parameter in vqgan.parameters():
            # Weights are copied to the device in their memory layout; `load_vqgan` makes them channels-last.
            parameter.data = parameter.data.contiguous()
        self.vqgan = vqgan.requires_grad_(False).eval()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> codes (B, N): what TextToImage calls."""
        return self(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> codes (B, N)."""
        import poptorch

        codes = self.vqgan.encode(pixels.to(next(self.vqgan.parameters()).dtype))
        # Kept, so that the backward pass of the embeddings does not recompute the whole encoder.
        return poptorch.recomputationCheckpoint(codes)


class SerializedEmbedding(nn.Module):
    """An embedding table in several parts, looked up serially, so that gradients need no copy of the whole table."""

    def __init__(self, embedding: nn.Embedding, factor: int) -> None:
        super().__init__()
        self.rows = embedding.num_embeddings // factor
        self.parts = nn.ModuleList()
        for weight in embedding.weight.data.split(self.rows):
            part = nn.Embedding(self.rows, embedding.embedding_dim, _weight=weight.clone())
            part.weight.requires_grad_(embedding.weight.requires_grad)
            self.parts.append(part)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, n) -> (B, n, D): each id is in exactly one part, the others add zeros."""
        found: list[Tensor] = []
        for index, part in enumerate(self.parts):
            local = ids - index * self.rows
            inside = (local >= 0) & (local < self.rows)
            x = part(local.masked_fill(~inside, 0))  # (B, n, D)
            found.append(x * inside.unsqueeze(-1).to(x.dtype))
        return sum(found[1:], found[0])


class SerializedLinear(nn.Module):
    """A linear layer whose matmul is serialized over `factor` parts of its outputs; shares weight and bias."""

    def __init__(self, linear: nn.Linear, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, V)."""
        import poptorch

        mode = poptorch.MatMulSerializationMode.OutputChannels
        out = poptorch.serializedMatMul(x.flatten(0, 1), self.weight.t(), mode, self.factor)  # (B * n, V)
        out = out.view(x.shape[0], x.shape[1], out.shape[-1])
        return out if self.bias is None else out + self.bias


class IpuStep(nn.Module):
    """The module that runs on the IPU: a TextToImage and its loss, for one micro-batch.

    Training returns (total, text, image) losses, scalars, the first marked as the loss to differentiate. Evaluation
    returns the sums of text and image losses over the samples that count.
    """

    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor, images: Tensor, counts: Tensor | None = None) -> tuple[Tensor, ...]:
        """text (B, T); images as TextToImage takes them; counts (B,), 1.0 or 0.0, for evaluation."""
        import poptorch

        with ops.use("reference"):  # PopTorch supports neither custom autograd functions nor native kernels
            if counts is not None:
                return self.loss_sums(text, images, counts)
            losses = self.model(text, images)
        # The loss contains two cross-entropies: unmarked, PopTorch reports "multiple independent losses".
        return poptorch.identity_loss(losses.total, reduction="none"), losses.text, losses.image

    def loss_sums(self, text: Tensor, images: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over samples of their mean text loss and mean image loss, weighted by counts."""
        dalle = self.model.dalle
        codes = self.model.codes(images)
        text_logits, image_logits = dalle(text, codes)

        def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
            return (loss.view(targets.shape[0], targets.shape[1]).mean(dim=1) * counts).sum()

        return loss_sum(text_logits, dalle.text_part(text)[:, 1:]), loss_sum(image_logits, codes)


def adapt(model: TextToImage, half: bool, serialization_factor: int, encodes_images: bool) -> TextToImage:
    """Adapt a built model to an IPU, in place: serialized tables, only the VQGAN's encoder, precision."""
    changed: Any = model  # its new modules have other types
    if serialization_factor > 1:
        changed.dalle.text_emb = SerializedEmbedding(model.dalle.text_emb, serialization_factor)
        changed.dalle.text_head = SerializedLinear(model.dalle.text_head, serialization_factor)
    changed.vqgan = ImageEncoder(changed.vqgan) if encodes_images else None
    to_dtype(model, torch.float16 if half else torch.float32)
    return model


def to_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all parameters. Buffers keep their dtype: masks are boolean, rotary angles need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def place(model: TextToImage, plan: list[Placement]) -> set[str]:
    """Begin a block at each change of IPU, and checkpoint each layer's output for the backward pass.

    Returns a set that collects the paths of blocks that begin, to detect those that never do.
    """
    import poptorch

    begun: set[str] = set()
    for placement in block_starts(plan):
        module = model.get_submodule(placement.path)
        module.register_forward_pre_hook(_Note(begun, placement.path))
        poptorch.BeginBlock(module, user_id=placement.path, ipu_id=placement.ipu)
    for placement in plan:
        if placement.path.startswith(LAYER):
            model.get_submodule(placement.path).register_forward_hook(_checkpoint)
    return begun


class _Note:
    """A hook that records that a module was called."""

    def __init__(self, calls: set[str], path: str) -> None:
        self.calls, self.path = calls, path

    def __call__(self, *_: Any) -> None:
        self.calls.add(self.path)

    def __deepcopy__(self, memo: Any) -> _Note:
        return self  # a copy of the model reports to the same set


def made(inputs: Any, output: tuple[Tensor | None, ...]) -> list[bool]:
    """Which of a block's results are stored with it: not the first layer's values that it only passes on."""
    return [part is not None and part is not inputs[-1] for part in output]


def _checkpoint(_module: nn.Module, inputs: Any, output: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A block's hook."""
    import poptorch

    own = made(inputs, output)
    return tuple(poptorch.recomputationCheckpoint(part) if is_own else part for part, is_own in zip(output, own))


def canonical_state(dalle: nn.Module) -> dict[str, Tensor]:
    """Return copies of a DALL-E's weights under their names before `adapt`, as plain float32 tensors."""
    state: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for key, value in dalle.state_dict().items():
        value = plain(value).float()
        module, _, rest = key.partition(".parts.")
        if rest:
            parts.setdefault(module + ".weight", []).append(value)
            state[module + ".weight"] = value  # keeps the order of keys
        else:
            state[key] = value
    state.update((key, torch.cat(values)) for key, values in parts.items())
    return state


def plain(value: Tensor | nn.Parameter) -> Tensor:
    """Return a copy on the host as a plain Tensor: PopTorch changes the class of a model's parameters."""
    return value.detach().cpu().clone().as_subclass(torch.Tensor)
