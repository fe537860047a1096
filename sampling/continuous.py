"""Continuous batching: images of different prompts and options share passes, join while others run, and leave.

    images = Continuous(model, slots=32)
    number = images.start(Image(text, key, options))     # as long as images.fits(options)
    while images.running:
        for number in images.advance():                 # those that are complete
            codes, log_likelihood = images.finish(number)

Every image has a row of the decoder with its own prompt, noise, options, kept codes and position; a guided one has a
second row without its caption. An image is the one that `sample_codes` makes alone: the native decoder's rows do not
depend on each other (PyTorch's do, by rounding).

Letters: S slots (rows of the decoder), T text tokens, N codes of an image.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

import ops
from models.dalle import DalleModel
from models.positions import Positions
from ops import noise
from sampling.canvas import Canvas, Sampled, first_sampled
from sampling.decoders import Decoder
from sampling.loop import Shared, one_pass
from sampling.native import best_decoder
from sampling.options import DEFAULT_OPTIONS, SamplingOptions
from utils.errors import UserError


class Image(NamedTuple):
    """An image to sample."""

    text: Tensor
    """(T,) token ids."""
    seed: int
    """Of its own noise, as `image_seed` gives it."""
    options: SamplingOptions = DEFAULT_OPTIONS
    given: Tensor | None = None
    """(N,) codes to keep, -1 where the model samples; None: all are sampled."""

    @property
    def slots(self) -> int:
        """How many it takes."""
        return 2 if self.options.guided else 1


class _Read(NamedTuple):
    """What a prompt leaves behind, with guidance followed by the empty one."""

    hidden: Tensor
    """(1 or 2, D) what predicts the first code."""
    text: list[Tensor]
    """(2, 1 or 2, H, P, K) of each layer: keys and values."""


class _Running(NamedTuple):
    """An image that has its slots."""

    rows: list[int]
    """Its own, and the one without its caption."""
    choice: ops.Choice


class Continuous:
    """A fixed number of slots, in which images of one model are sampled. For one thread."""

    def __init__(self, model: DalleModel, slots: int, parallel: str | int = "auto") -> None:
        """slots: rows of the decoder. parallel: see `Windows`. Raises UserError for no slots at all."""
        if slots < 1:
            raise UserError(f"slots must be at least 1, got {slots}")
        self.shared, config = Shared(parallel), model.config
        self.decoder, self.refused = best_decoder(model, slots, 1, self.shared.copies)
        """The decoder, and why it is not the native one."""
        self.num_codes = config.image_seq_len
        self.canvas = Canvas(slots, self.num_codes, DEFAULT_OPTIONS, model.text_emb.weight.device)
        self.canvas.of, self.canvas.mixed = torch.arange(slots, device=self.canvas.codes.device), True
        self.canvas.fronts.fill_(self.num_codes - 1)  # nothing to do
        self.fronts = [self.num_codes - 1] * slots
        """Position of the last certain code of each row."""
        self.running: dict[int, _Running] = {}
        """By the number of the image, which is that of its row."""
        self.passes = self.rows_of_passes = 0
        """Passes so far, and the rows that they computed."""
        self._free = list(range(slots))
        self._prompts: OrderedDict[tuple[int, ...], _Read] = OrderedDict()
        self._readers: dict[int, Decoder] = {}

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self.fronts)

    def fits(self, image: Image) -> bool:
        """Whether there is room for an image now."""
        return image.slots <= len(self._free)

    @torch.no_grad()
    def start(self, image: Image) -> int:
        """Read an image's prompt and kept codes, and choose its first code. Returns its number.

        Raises UserError for options out of range.
        """
        image.options.check()
        rows = [self._free.pop(0) for _ in range(image.slots)]
        try:
            self._begin(image, rows)
        except BaseException:
            self.finish(rows[0])
            raise
        return rows[0]

    def _begin(self, image: Image, rows: list[int]) -> None:
        options, canvas, row = image.options, self.canvas, rows[0]
        device = canvas.codes.device
        choice = ops.choice_of(1, options.temperature, options.top_k, options.top_p, device)
        self.running[row] = _Running(rows, choice)
        kept = [-1] * self.num_codes if image.given is None else image.given.tolist()
        canvas.scores[row], canvas.keys[row] = 0, noise.keys([image.seed])[0]
        canvas.kept[row, : self.num_codes] = torch.tensor(kept, device=device)
        canvas.codes[row] = canvas.kept[row].clamp(min=0)
        canvas.cond_scale[row] = options.cond_scale
        canvas.nulls[row] = rows[1] if options.guided else -1
        canvas.of[rows] = row  # type: ignore[index]
        canvas.by.put(row, choice)
        self._told()
        prefix = first_sampled(kept)
        hidden = self._read(image.text.to(device), rows)
        if prefix < self.num_codes:
            codes = canvas.codes[row : row + 1, :prefix]
            if prefix:
                parts = [self.decoder.part(own, own + 1) for own in rows]
                hidden = torch.cat([part.feed(codes, Positions(prefix, 0))[:, -1] for part in parts])
            alone = canvas.part(row, row + 1, torch.zeros(2, dtype=torch.long, device=device) if rows[1:] else None)
            alone.by, alone.mixed = choice, False
            with self.decoder:
                alone.choose_first(self.decoder.logits(hidden), prefix)
            self.fronts[row] = prefix

    def _told(self) -> None:
        """Let the host know what some running image asks for."""
        asked = [own.choice[5:] for own in self.running.values()]
        self.canvas.by = ops.Choice(*self.canvas.by[:5], *map(max, zip(*asked)))

    def _read(self, text: Tensor, rows: Sequence[int]) -> Tensor:
        """Read a prompt, unless it was among the last, into some rows of the cache. Returns (rows, D)."""
        key = (len(rows), *text.tolist())
        if key not in self._prompts:
            count = len(rows)
            if count not in self._readers:
                self._readers[count] = self.decoder.reader(count)
            reader = self._readers[count]
            hidden = reader.prompt(torch.stack([text, torch.zeros_like(text)][:count]))
            self._prompts[key] = _Read(hidden, [layer.text.clone() for layer in reader.cache.layers])
            while len(self._prompts) > self.slots:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        read = self._prompts[key]
        for layer, text_keys in zip(self.decoder.cache.layers, read.text):
            layer.text[:, rows] = text_keys
        return read.hidden

    @torch.no_grad()
    def advance(self) -> list[int]:
        """Move all images on by one pass. Returns the numbers of those that are complete."""
        last = self.num_codes - 1
        active = [own.rows for row, own in self.running.items() if self.fronts[row] < last]
        if active:
            used, rows = self.slots, sum(map(len, active))
            decoder, canvas = self.decoder, self.canvas
            if not decoder.most_rows:  # PyTorch's computes every row up to the last
                used = rows = 1 + max(max(own.rows) for own in self.running.values())
                decoder, canvas = decoder.part(0, used), canvas.part(0, used, canvas.of[:used])  # type: ignore[index]
            with decoder:
                fronts = one_pass(decoder, canvas, self.shared.windows, self.fronts[:used], rows)
            self.fronts[:used] = fronts
            self.passes, self.rows_of_passes = self.passes + 1, self.rows_of_passes + len(active)
        return [row for row in self.running if self.fronts[row] == last]

    def codes(self, number: int) -> Tensor:
        """The codes (N,) of an image so far, -1 where one may still change."""
        return self.canvas.part(number, number + 1, None).so_far([self.fronts[number]])[0]

    def finish(self, number: int) -> Sampled:
        """What an image has become, codes (N,) and () nats; its slots are free then. It may be incomplete."""
        canvas = self.canvas.part(number, number + 1, None)
        sampled = Sampled(*(tensor[0] for tensor in canvas.result()))
        rows = self.running.pop(number).rows
        self.canvas.fronts[rows], self.canvas.nulls[rows] = self.num_codes - 1, -1
        self.canvas.of[rows] = torch.tensor(rows, device=self.canvas.codes.device)  # type: ignore[index]
        for row in rows:
            self.fronts[row] = self.num_codes - 1
        self._free = sorted(self._free + rows)
        return sampled
