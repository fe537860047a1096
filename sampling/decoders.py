"""What feeds codes to a model and gives the logits of the next: by PyTorch, or natively (native.py).

All have the interface of `Decoder`. A decoder refuses by name what it does not know, and the next one takes over:
recorded CUDA graphs (graphs.py) replay this one's steps.

Letters: R rows (images, twice as many with guidance), n positions of a chunk, D width, C codebook size.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from models.config import DalleConfig
from models.dalle import DalleModel, Operands
from models.positions import Positions, text_positions
from models.transformer import projection
from sampling.cache import Cache
from sampling.canvas import Canvas

MAX_BYTES = 2 * 2**30
"""Bytes of weights up to which a second copy is made. Larger models need the memory more than the time."""


def unknown_option(config: DalleConfig, known: frozenset[str]) -> str | None:
    """The first model option that is not known and not what it is by default, or None."""
    for field in dataclasses.fields(config):
        if field.name not in known and getattr(config, field.name) != field.default:
            return field.name
    return None


def computed_in(model: DalleModel) -> torch.dtype:
    """The type in which a linear layer computes now, under autocast or not."""
    like = model.text_emb.weight.detach()[:1, :1]
    return F.linear(like, like).dtype


def is_small(model: DalleModel) -> bool:
    """Whether a second copy of the weights is no burden."""
    layers = model.operands(lambda module: module).projections
    weights = [layer.weight for layer in layers if hasattr(layer, "weight")]
    return sum(weight.numel() * weight.element_size() for weight in weights) <= MAX_BYTES


class Copies:
    """Copies of weights in one layout at a time, kept from batch to batch."""

    def __init__(self) -> None:
        self.layout: Any = None
        self.weights: dict[Any, Any] = {}
        """By the module they are of."""
        self.unfit: dict[str, str | None] = {}
        """By the kind of decoder: why it cannot take these weights, whatever is sampled."""
        self.idle: Any = None
        """The decoder of the last batch, if the next one may use its memory."""

    def of(self, layout: Any) -> dict[Any, Any]:
        """Those in this layout; those in another are let go."""
        if layout != self.layout:
            self.layout, self.weights = layout, {}
        return self.weights


class Decoder:
    """Feeds chunks of codes to a model, by its own forward pass over a cache. Weights must not change meanwhile.

    A position may be fed again with another code: nothing before it saw the first.

        # under torch.no_grad()
        decoder = Decoder(model, prompts, images)
        hidden = decoder.prompt(text)                   # (prompts, D)
        with decoder:
            logits = decoder.logits(hidden)
            hidden = decoder.feed(codes, positions)     # codes (R, n) -> (R, n, D)
    """

    most_rows = 0
    """Rows of a pass up to which its logits do not depend on their number; 0: they do."""
    calculates_in: torch.dtype | None = None
    """The type of its arithmetic and of what it keeps, if that does not follow from the weights."""

    def __init__(self, model: DalleModel, prompts: int, images: int, copies: Copies | None = None) -> None:
        """images: of each of the prompts, which are next to each other in the R = prompts * images rows.

        copies: of weights, kept for the decoders of later batches of the same model, whose weights must not change.
        """
        self.model, self.rows, self.dtype = model, prompts * images, self.calculates_in or computed_in(model)
        self.copies = Copies() if copies is None else copies
        self.cache = Cache(model.config, prompts, images, model.text_emb.weight.device, self.dtype)
        self._casts, self._lays_out = self.dtype != model.text_emb.weight.dtype, False
        self.operands = self._operands()
        self._plain = model.operands() if self._lays_out else self.operands

    def _operands(self) -> Operands:
        self._lays_out = not self._casts and is_small(self.model) and ops.refusal(self.model.text_emb.weight) is None
        return self.model.operands(self._copied) if self._lays_out or self._casts else self.model.operands()

    def _copied(self, module: nn.Module) -> ops.Projection:
        found, copies = projection(module), self.copies.of((self._casts or self.rows, self.dtype))
        if isinstance(found, ops.Matrix) and module not in copies:
            copies[module] = ops.for_few_rows(found, self.rows, self.dtype)
        return copies.get(module, found)

    def __enter__(self) -> Decoder:
        if self._lays_out:  # for a row or two, oneDNN takes longer to set up its gelu than PyTorch's own runs
            self._before = torch.backends.mkldnn.set_flags(False)[0]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._lays_out:
            torch.backends.mkldnn.set_flags(self._before)

    def prompt(self, text: Tensor) -> Tensor:
        """Read each prompt once, text (prompts, T). Returns what predicts its first code, (prompts, D)."""
        ids = self.model.text_part(text)
        return self._read(ids, text_positions(0, ids.shape[1]))[:, -1]

    def feed(self, codes: Tensor, positions: Positions) -> Tensor:
        """Feed codes (R, n) at image positions; return what predicts those that follow each, (R, n, D)."""
        return self._read(codes, positions)

    def guess(self, canvas: Canvas, width: int, num_rows: int) -> float:
        """Guess the codes of the window that `advance` is given next, of so many rows of one code each, if that pays.

        Returns the seconds it took, if they are as usual.
        """
        return 0.0

    def advance(
        self, canvas: Canvas, width: int, start: int | None = None, reach: int = 0, together: bool = False
    ) -> None:
        """Feed a window of each image from its front on, choose the codes behind its places, and move the front on.

        start: where all windows begin, if the host knows it: views instead of copies. Else all end before `reach`, or
        behind the last code, and the host may at least know that all images are at the same position.
        """
        last = canvas.num_codes - 1
        at = canvas.fronts[:, None] + torch.arange(width, device=canvas.fronts.device)  # (B, n)
        positions = Positions(width, start)
        if start is None:
            index = at.clamp(max=last)  # what is fed behind the last does not count
            index = index[:1] if together else canvas.rows(index)
            positions = Positions.of(index, reach or last + 1)
        hidden = self.feed(canvas.rows(canvas.codes.gather(1, at)), positions)
        canvas.fronts.add_(canvas.choose(self.logits(hidden), at + 1)).clamp_(max=last)

    def release(self) -> None:
        """Let the next batch have this decoder, if that pays."""

    def reader(self, prompts: int) -> Decoder:
        """A decoder with the same weights for so many prompts of one image each, in memory of its own."""
        reader = copy.copy(self)
        reader.rows = prompts
        reader.cache = Cache(self.model.config, prompts, 1, self.model.text_emb.weight.device, self.dtype)
        return reader

    def part(self, first: int, end: int) -> Decoder:
        """A decoder of rows `first` up to `end`, where each is of a prompt of its own, in the same memory."""
        part = copy.copy(self)
        part.rows, part.cache = end - first, self.cache.part(first, end)
        return part

    def _read(self, ids: Tensor, positions: Positions) -> Tensor:
        # Copies are laid out for one code of each row.
        return self.model.read(ids, positions, self.cache, self.operands if positions.count == 1 else self._plain)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        return ops.linear(hidden, self.operands.image_head)
