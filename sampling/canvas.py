"""A batch of images while it is sampled: the request, codes that are certain, and guesses behind them.

Letters: B images, R rows (B, twice as many with guidance), N image tokens, n codes of a window, C codebook size.
"""

from __future__ import annotations

import copy
from typing import Callable, NamedTuple, Sequence

import torch
from torch import Tensor

import ops
from ops import noise
from sampling.options import SamplingOptions
from sampling.windows import MOST, Windows

SoFar = Callable[[], Tensor]
"""Gives the codes (B, N) of a batch while it is sampled, -1 where one may still change."""


class Sampled(NamedTuple):
    """Codes (B, N) and the log-likelihood in nats (B,) the unfiltered model gives to those that were sampled."""

    codes: Tensor
    log_likelihood: Tensor


def guided(logits: Tensor, cond_scale: Tensor) -> Tensor:
    """Guide logits (R, n, C) whose second half of rows is unconditional, by a scale for each image (B, 1, 1)."""
    # Half precision could not hold the product.
    conditional, null = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2, dim=0)
    return null + (conditional - null) * cond_scale.to(null.dtype)


def first_sampled(codes: Sequence[int]) -> int:
    """The first position of an image's N codes that the model samples, where they are negative; N if there is none."""
    return next((place for place, code in enumerate(codes) if code < 0), len(codes))


class Request(NamedTuple):
    """A batch to sample, on the model's device."""

    prompts: Tensor
    """(prompts, T), or (2 * prompts, T) with guidance: then the same number of empty ones follow."""
    keys: Tensor
    """(B,) of each image's noise."""
    kept: list[int]
    """N codes to keep in every image, -1 where the model samples."""
    options: SamplingOptions
    windows: Windows
    on_token: Callable[[SoFar], None] | None = None

    @property
    def prefix(self) -> int:
        """How many codes are kept before the first one that is sampled."""
        return first_sampled(self.kept)

    @property
    def images(self) -> int:
        """Images of each prompt."""
        return len(self.keys) * (2 if self.options.guided else 1) // len(self.prompts)


class Canvas:
    """The codes of a batch while they are sampled, guesses behind them, and how each image's are chosen."""

    def __init__(self, batch: int, num_codes: int, options: SamplingOptions, device: torch.device) -> None:
        self.num_codes = num_codes
        shape = (batch, num_codes + 2 * MOST)  # a window, and the guesses for the next, may end behind the last code
        self.codes = torch.zeros(shape, dtype=torch.long, device=device)
        self.scores = torch.zeros(shape, device=device)
        self.kept = torch.full(shape, -1, dtype=torch.long, device=device)
        """Codes to keep, or -1."""
        self.keys = torch.zeros(batch, dtype=torch.long, device=device)
        self.fronts = torch.zeros(batch, dtype=torch.long, device=device)
        """Position of the last code of each image that nothing can change any more."""
        self.cond_scale = torch.full((batch, 1, 1), options.cond_scale, dtype=torch.float64, device=device)
        self.by = ops.choice_of(batch, options.temperature, options.top_k, options.top_p, device)
        images = torch.arange(batch, device=device)
        self.nulls = images + batch if options.guided else torch.full_like(images, -1)
        """The row of a decoder that has each image without its caption, or -1; row i has image i with it."""
        self.of: Tensor | None = images.repeat(2) if options.guided else None
        """(R,) the image of each row; None: its own number."""
        self.mixed = False
        """Whether some images are guided and others are not."""
        self.blocks: noise.Blocks | None = None
        """Where noise comes from, if not made for each pass."""
        self.keeps = True
        """Whether codes may be kept that are still to come."""
        self._choices: dict[int, ops.Choice] = {}

    def begin(self, request: Request) -> None:
        """Take a request's noise, and the codes that are kept."""
        self.scores.zero_()
        self.keys.copy_(request.keys)
        self.kept[:, : self.num_codes].copy_(torch.tensor([request.kept]))
        self.codes.copy_(self.kept.clamp(min=0))

    def rows(self, codes: Tensor) -> Tensor:
        """Codes (B, n) as a decoder is fed them, (R, n)."""
        return codes if self.of is None else codes[self.of]

    def part(self, first: int, end: int, of: Tensor | None) -> Canvas:
        """The same memory for images `first` up to `end`. of: the image of each row, counted from `first`."""
        part = copy.copy(self)
        for name in ("codes", "scores", "kept", "keys", "fronts", "cond_scale", "nulls"):
            setattr(part, name, getattr(self, name)[first:end])
        part.by, part.of, part._choices = self.by.each(lambda tensor: tensor[first:end]), of, {}
        part.blocks = None
        return part

    def _choice(self, count: int) -> ops.Choice:
        """The options for so many codes of each image."""
        if count not in self._choices:
            self._choices[count] = self.by.each(lambda tensor: tensor.repeat_interleave(count, dim=0))
        return self._choices[count]

    def _guided(self, logits: Tensor) -> Tensor:
        """Logits (R, n, C) of all rows -> (B, n, C) of the images."""
        if self.of is None:
            return logits
        if not self.mixed:
            return guided(logits, self.cond_scale)
        own = logits[: len(self.codes)]
        pairs = torch.cat([own, logits[self.nulls.clamp(min=0)]])
        return torch.where((self.nulls < 0)[:, None, None], own, guided(pairs, self.cond_scale))

    def choose(self, logits: Tensor, at: Tensor) -> Tensor:
        """Choose codes from logits (R, n, C) for their positions (B, n), and write them there; what is kept stays.

        Returns how many of them (B,) nothing can change any more: those that had been guessed, from the first on, and
        one more. Behind a window come guesses for the next: what its last logits give with the noise there.
        """
        logits = self._guided(logits)
        batch, width = at.shape
        if width > 1:
            at = torch.cat([at, at + width], dim=1)
            logits = torch.cat([logits, logits[:, -1:].expand(-1, width, -1)], dim=1)
        count = at.shape[1]
        keys = self.keys[:, None].expand(-1, count).flatten()
        tokens, scores = ops.sample(logits.float().flatten(0, 1), keys, at.flatten(), self._choice(count), self.blocks)
        tokens, scores = tokens.view(batch, count), scores.view(batch, count)
        if self.keeps:
            kept = self.kept.gather(1, at)
            tokens, scores = torch.where(kept < 0, tokens, kept), scores.masked_fill(kept >= 0, 0.0)
        certain = torch.ones_like(self.fronts)
        if width > 1:
            certain += (self.codes.gather(1, at) == tokens)[:, : width - 1].cumprod(dim=1).sum(dim=1)
        self.codes.scatter_(1, at, tokens)
        self.scores.scatter_(1, at, scores)
        return certain

    def choose_first(self, logits: Tensor, position: int) -> None:
        """Choose the code at a position of every image from logits (R, C): the front is there."""
        self.fronts.fill_(position)
        self.choose(logits[:, None], self.fronts[:, None])

    def so_far(self, fronts: Sequence[int]) -> Tensor:
        """Codes (B, N) of images that are certain up to these fronts, -1 where one may still change."""
        ends = torch.tensor(fronts, device=self.codes.device)[:, None]
        places = torch.arange(self.num_codes, device=self.codes.device)
        codes, kept = self.codes[:, : self.num_codes], self.kept[:, : self.num_codes]
        return codes.masked_fill((places > ends) & (kept < 0), -1)

    def result(self) -> Sampled:
        """What was sampled."""
        num_codes = self.num_codes  # scores in double: the order of the sum must not matter
        return Sampled(self.codes[:, :num_codes].clone(), self.scores[:, :num_codes].double().sum(dim=1).float())
