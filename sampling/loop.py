"""From captions to codes: the loop over positions that every decoder shares.

Letters: B images, R rows (B, twice as many with guidance), N image tokens, T text tokens, C codebook size.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Callable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

import ops
from models.dalle import DalleModel
from models.positions import Positions, text_positions
from ops import noise
from sampling.cache import Cache
from sampling.decoders import Copies, Decoder
from sampling.native import best_decoder
from sampling.options import DEFAULT_OPTIONS, SamplingOptions
from sampling.windows import MOST, Windows

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """Codes (B, N) and the log-likelihood in nats (B,) the unfiltered model gives to those that were sampled."""

    codes: Tensor
    log_likelihood: Tensor


SAMPLER = 2
"""Version of what a seed stands for: 1 inverted cumulative distributions, 2 adds Gumbel noise (ops/noise.py)."""


class Shared:
    """What the batches of one model share, while its weights stay the same."""

    def __init__(self, parallel: str | int = "auto") -> None:
        """parallel: see `Windows`."""
        self.copies, self.windows = Copies(), Windows(parallel)


def guided(logits: Tensor, cond_scale: Tensor) -> Tensor:
    """Guide logits (R, n, C) whose second half of rows is unconditional, by a scale for each image (B, 1, 1)."""
    # Half precision could not hold the product.
    conditional, null = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2, dim=0)
    return null + (conditional - null) * cond_scale.to(null.dtype)


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
    on_token: Callable[[], None] | None = None

    @property
    def prefix(self) -> int:
        """How many codes are kept before the first one that is sampled."""
        return next((i for i, code in enumerate(self.kept) if code < 0), len(self.kept))

    @property
    def images(self) -> int:
        """Images of each prompt."""
        return len(self.keys) * (2 if self.options.guided else 1) // len(self.prompts)


class Canvas:
    """The codes of a batch while they are sampled, guesses behind them, and how each image's are chosen."""

    def __init__(self, batch: int, num_codes: int, options: SamplingOptions, device: torch.device) -> None:
        self.num_codes = num_codes
        shape = (batch, num_codes + MOST)  # a window may end behind the last code
        self.codes = torch.zeros(shape, dtype=torch.long, device=device)
        self.scores = torch.zeros(shape, device=device)
        self.kept = torch.full((1, shape[1]), -1, dtype=torch.long, device=device)
        self.keys = torch.zeros(batch, dtype=torch.long, device=device)
        self.cond_scale = torch.full((batch, 1, 1), options.cond_scale, dtype=torch.float64, device=device)
        self.options = options
        self._choices: dict[int, ops.Choice] = {}

    def begin(self, request: Request) -> None:
        """Take a request's noise, and the codes that are kept."""
        self.scores.zero_()
        self.keys.copy_(request.keys)
        self.kept[:, : self.num_codes].copy_(torch.tensor([request.kept]))
        self.codes.copy_(self.kept.clamp(min=0).expand_as(self.codes))

    def rows(self, codes: Tensor) -> Tensor:
        """Codes (B, n) as a decoder is fed them, (R, n)."""
        return codes.repeat(2, 1) if self.options.guided else codes

    def _choice(self, rows: int) -> ops.Choice:
        if rows not in self._choices:
            options = self.options
            self._choices[rows] = ops.choice_of(
                rows, options.temperature, options.top_k, options.top_p, self.codes.device
            )
        return self._choices[rows]

    def choose(self, logits: Tensor, at: Tensor, images: Tensor | None = None) -> Tensor:
        """Choose codes from logits (R, n, C) for their places `at` (B, n), and write them there; what is kept stays.

        images (b,): rows are of these images alone. Returns how many of them (B,) nothing can change any more: those
        that were there already, from the first on, and one more.
        """
        if self.options.guided:
            logits = guided(logits, self.cond_scale[: len(at)])
        batch, width = at.shape
        keys = self.keys if images is None else self.keys[images]
        tokens, scores = ops.sample(
            logits.float().flatten(0, 1),
            keys.repeat_interleave(width) if width > 1 else keys,
            at.flatten(),
            self._choice(batch * width),
        )
        tokens, scores = tokens.view(batch, width), scores.view(batch, width)
        kept = self.kept[0, at]
        tokens, scores = torch.where(kept < 0, tokens, kept), scores.masked_fill(kept >= 0, 0.0)
        rows = torch.arange(batch, device=at.device)[:, None] if images is None else images[:, None]
        right = (self.codes[rows, at] == tokens)[:, :-1].cumprod(dim=1)
        self.codes[rows, at], self.scores[rows, at] = tokens, scores
        return right.sum(dim=1) + 1

    def result(self) -> Sampled:
        """What was sampled."""
        num_codes = self.num_codes  # scores in double: the order of the sum must not matter
        return Sampled(self.codes[:, :num_codes].clone(), self.scores[:, :num_codes].double().sum(dim=1).float())


def read_request(decoder: Decoder, canvas: Canvas, request: Request) -> Tensor:
    """Read prompts and the codes that are given first. Returns what predicts the first other code, (R, D)."""
    hidden = decoder.prompt(request.prompts).repeat_interleave(request.images, dim=0)
    prefix = request.prefix
    if 0 < prefix < len(request.kept):
        hidden = decoder.feed(canvas.rows(canvas.codes[:, :prefix]), Positions(prefix, 0))[:, -1]
    return hidden


class Recorded(Protocol):
    """What samples a batch in another way where it can (see graphs.py), and returns None where it cannot."""

    def sample(self, request: Request) -> Sampled | None:
        """Sample the batch, or nothing."""


@torch.no_grad()
def sample_codes(
    model: DalleModel,
    text: Tensor,
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_OPTIONS,
    given: Tensor | None = None,
    on_token: Callable[[], None] | None = None,
    graphs: Recorded | None = None,
    shared: Shared | None = None,
) -> Sampled:
    """Sample the codes of len(seeds) images: all of one caption, or equally many of each of several.

    text (T,) or (prompts, T) token ids; seeds: one for each image, the first caption's first. given (N,): codes to
    keep in every image, -1 where the model shall sample (image completion, priming). on_token is called after each
    code. graphs: a `sampling.graphs.Graphs` of this model, which samples the same in less time on a GPU. shared: to be
    given to later calls too while the weights stay the same.
    Returns codes (B, N) on the model's device, images of one caption next to each other. Raises UserError for options
    that are out of range.
    """
    options.check()
    device = model.text_emb.weight.device
    text = text.reshape(-1, text.shape[-1]).to(device)  # (prompts, T)
    if len(seeds) == 0 or len(seeds) % len(text):
        raise ValueError(f"{len(seeds)} seeds cannot be shared equally by {len(text)} captions")
    # With guidance each image is also computed without its caption.
    prompts = torch.cat([text, torch.zeros_like(text)]) if options.guided else text
    num_codes = model.config.image_seq_len
    kept = [-1] * num_codes if given is None else given.tolist()
    shared = Shared() if shared is None else shared
    request = Request(prompts, noise.keys(seeds).to(device), kept, options, shared.windows, on_token)
    sampled = None if graphs is None else graphs.sample(request)
    return _sample(model, request, shared.copies) if sampled is None else sampled


@functools.lru_cache(maxsize=None)
def _say(refused: str) -> None:
    logger.info("decoding by PyTorch: %s", refused)


class Fronts:
    """How far each image of a batch is: the position of the last code that nothing can change any more."""

    def __init__(self, batch: int, first: int, num_codes: int, on_token: Callable[[], None] | None) -> None:
        self.places, self.num_codes = [first] * batch, num_codes
        self._on_token, self._told = on_token, first
        self._tell()

    @property
    def unfinished(self) -> list[int]:
        """Images that lack codes."""
        return [image for image, place in enumerate(self.places) if place < self.num_codes - 1]

    def move(self, images: Sequence[int], accepted: Sequence[int]) -> list[int]:
        """Go on by so many codes in these images. Returns by how many, at most to the last."""
        moved = [min(n, self.num_codes - 1 - self.places[i]) for i, n in zip(images, accepted)]
        for image, count in zip(images, moved):
            self.places[image] += count
        self._tell()
        return moved

    def _tell(self) -> None:
        """Call on_token for each code of the mean image."""
        while self._told <= sum(self.places) // len(self.places):
            self._told += 1
            if self._on_token is not None:
                self._on_token()


def _sample(model: DalleModel, request: Request, copies: Copies) -> Sampled:
    """Sample a batch, window by window."""
    num_codes, batch, prefix = len(request.kept), len(request.keys), request.prefix
    decoder, refused = best_decoder(model, len(request.prompts), request.images, copies)
    if refused is not None:
        _say(refused)
    canvas = Canvas(batch, num_codes, request.options, request.keys.device)
    canvas.begin(request)
    hidden = read_request(decoder, canvas, request)
    if prefix == num_codes:
        return canvas.result()
    with decoder:
        device = request.keys.device
        canvas.choose(decoder.logits(hidden)[:, None], torch.full((batch, 1), prefix, device=device))
        fronts = Fronts(batch, prefix, num_codes, request.on_token)
        while fronts.unfinished:
            _pass(decoder, canvas, fronts, request.windows)
    return canvas.result()


def _pass(decoder: Decoder, canvas: Canvas, fronts: Fronts, windows: Windows) -> None:
    """Feed a window of each image, and accept what it gives."""
    begin, device, batch = time.perf_counter(), canvas.codes.device, len(canvas.codes)
    images = fronts.unfinished if decoder.most_rows else list(range(batch))
    rows = len(images) * decoder.rows // batch
    width = windows.width(rows, decoder.most_rows) if decoder.most_rows else windows.fixed(rows)
    width = min(width, max(canvas.num_codes - 1 - fronts.places[image] for image in images))
    first = torch.tensor([fronts.places[image] for image in images], device=device)
    at = first[:, None] + torch.arange(width, device=device)  # (b, n)
    some = None if len(images) == batch else torch.tensor(images, device=device)
    codes = canvas.codes.gather(1, at) if some is None else canvas.codes[some[:, None], at]
    hidden = decoder.feed_window(canvas.rows(codes), at.clamp(max=canvas.num_codes - 1), fronts.places, some)
    accepted = canvas.choose(decoder.logits(hidden), at + 1, some).tolist()
    moved = fronts.move(images, accepted)
    windows.note(rows * width, width, [count for count in moved if count], time.perf_counter() - begin)


@torch.no_grad()
def complete_text(
    model: DalleModel, ids: Sequence[int], seed: int, options: SamplingOptions = DEFAULT_OPTIONS
) -> list[int]:
    """Go on writing a caption after `ids` until the model predicts a pad or T tokens are reached. Returns all ids."""
    options.check()
    config, device = model.config, model.text_emb.weight.device
    ids = list(ids)[: config.text_seq_len]
    key = noise.keys([seed]).to(device)
    if not ids and not config.bos:
        raise ValueError("a model without <bos> needs at least one text token to go on from")
    cache = Cache(config, 1, 1, device, model.text_emb.weight.dtype)
    choice = ops.choice_of(1, options.temperature, options.top_k, options.top_p, device)
    done = 0
    while len(ids) < config.text_seq_len:
        part = ([0] if config.bos else []) + ids
        # Token shift mixes neighbouring positions, so it takes the whole part again; otherwise only what is new.
        done = 0 if config.shift_tokens else done
        new = torch.tensor([part[done:]], device=device)
        hidden = model.read(new, text_positions(done, new.shape[1]), cache)[:, -1]
        done = len(part)
        position = torch.full_like(key, len(ids))
        token = int(ops.sample(model.text_head(hidden).float(), key, position, choice)[0])
        if token == 0 or token >= config.num_text_tokens:
            break
        ids.append(token)
    return ids
