"""From captions to codes: the loop over positions that every decoder shares.

Letters: B images, R rows (B, twice as many with guidance), N image tokens, T text tokens, C codebook size.
"""

from __future__ import annotations

import functools
import logging
from typing import Callable, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

import ops
from models.dalle import DalleModel
from models.positions import Positions, next_code, text_positions
from sampling.cache import Cache
from sampling.decoders import Copies, Decoder
from sampling.native import best_decoder
from sampling.options import DEFAULT_OPTIONS, SamplingOptions

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """Codes (B, N) and the log-likelihood in nats (B,) the unfiltered model gives to those that were sampled."""

    codes: Tensor
    log_likelihood: Tensor


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Return (len(seeds), length) uniform numbers in [0, 1): row i depends on seeds[i] alone, on every device."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def guided(logits: Tensor, cond_scale: Tensor) -> Tensor:
    """Guide logits (R, C) whose second half of rows is unconditional, by a scale for each image (B,) -> (B, C)."""
    # Half precision could not hold the product.
    conditional, null = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2, dim=0)
    return null + (conditional - null) * cond_scale[:, None].to(null.dtype)


class Request(NamedTuple):
    """A batch to sample, on the model's device."""

    prompts: Tensor
    """(prompts, T), or (2 * prompts, T) with guidance: then the same number of empty ones follow."""
    uniform: Tensor
    """(B, N) uniform numbers, one for each code."""
    kept: list[int]
    """N codes to keep in every image, -1 where the model samples."""
    options: SamplingOptions
    on_token: Callable[[], None] | None = None

    @property
    def prefix(self) -> int:
        """How many codes are kept before the first one that is sampled."""
        return next((i for i, code in enumerate(self.kept) if code < 0), len(self.kept))

    @property
    def images(self) -> int:
        """Images of each prompt."""
        return len(self.uniform) * (2 if self.options.guided else 1) // len(self.prompts)


class Canvas:
    """The codes of a batch while they are sampled, and how each image's are chosen."""

    def __init__(self, batch: int, num_codes: int, options: SamplingOptions, device: torch.device) -> None:
        self.codes = torch.zeros(batch, num_codes, dtype=torch.long, device=device)
        self.log_likelihood = torch.zeros(batch, device=device)
        self.uniform = torch.zeros(batch, num_codes, dtype=torch.float64, device=device)
        self.kept = torch.full((1, num_codes), -1, dtype=torch.long, device=device)
        self.choice = ops.choice_of(batch, options.temperature, options.top_k, options.top_p, device)
        self.cond_scale = torch.full((batch,), options.cond_scale, dtype=torch.float64, device=device)
        self.guides = options.guided

    def begin(self, request: Request) -> None:
        """Take a request's random numbers, and the codes that are kept."""
        self.log_likelihood.zero_()
        self.uniform.copy_(request.uniform)
        self.kept.copy_(torch.tensor([request.kept]))
        self.codes.copy_(self.kept.clamp(min=0).expand_as(self.codes))

    def rows(self, at: Positions) -> Tensor:
        """The codes at some positions as a decoder is fed them, (B, N) -> (R, n)."""
        codes = at.take(self.codes, 1)
        return codes.repeat(2, 1) if self.guides else codes

    def choose(self, logits: Tensor, at: Positions) -> None:
        """Sample the code at a position from logits (R, C); what is kept there stays."""
        if self.guides:
            logits = guided(logits, self.cond_scale)
        token, score = ops.sample(logits.float(), at.take(self.uniform, 1)[:, 0], self.choice)
        if at.start is None:  # only the device knows what is kept there
            kept = at.take(self.kept, 1)[:, 0]
            token, score = torch.where(kept < 0, token, kept), score.masked_fill(kept >= 0, 0.0)
        at.put(self.codes, 1, token[:, None])
        self.log_likelihood.add_(score)

    def result(self) -> Sampled:
        """What was sampled."""
        return Sampled(self.codes, self.log_likelihood)


def read_request(decoder: Decoder, canvas: Canvas, request: Request) -> Tensor:
    """Read prompts and the codes that are given first. Returns what predicts the first other code, (R, D)."""
    hidden = decoder.prompt(request.prompts).repeat_interleave(request.images, dim=0)
    prefix = request.prefix
    if 0 < prefix < len(request.kept):
        first = Positions(prefix, 0)
        hidden = decoder.feed(canvas.rows(first), first)[:, -1]
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
    copies: Copies | None = None,
) -> Sampled:
    """Sample the codes of len(seeds) images: all of one caption, or equally many of each of several.

    text (T,) or (prompts, T) token ids; seeds: one for each image, the first caption's first. given (N,): codes to
    keep in every image, -1 where the model shall sample (image completion, priming). on_token is called after each
    code. graphs: a `sampling.graphs.Graphs` of this model, which samples the same in less time on a GPU. copies: of
    weights in a decoder's layout, to be given to later calls too while the weights stay the same.
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
    request = Request(prompts, uniforms(seeds, num_codes).to(device), kept, options, on_token)
    sampled = None if graphs is None else graphs.sample(request)
    return _sample(model, request, copies) if sampled is None else sampled


@functools.lru_cache(maxsize=None)
def _say(refused: str) -> None:
    logger.info("decoding by PyTorch: %s", refused)


def _sample(model: DalleModel, request: Request, copies: Copies | None) -> Sampled:
    """Sample a batch code by code."""
    kept, (batch, num_codes) = request.kept, request.uniform.shape
    decoder, refused = best_decoder(model, len(request.prompts), request.images, copies)
    if refused is not None:
        _say(refused)
    canvas = Canvas(batch, num_codes, request.options, request.uniform.device)
    canvas.begin(request)
    hidden = read_request(decoder, canvas, request)
    with decoder:
        for position in range(request.prefix, num_codes):
            at = next_code(position)
            if kept[position] < 0:
                canvas.choose(decoder.logits(hidden), at)
            if position + 1 < num_codes:  # nothing follows the last one
                hidden = decoder.feed(canvas.rows(at), at)[:, 0]
            if request.on_token is not None:
                request.on_token()
    return canvas.result()


@torch.no_grad()
def complete_text(
    model: DalleModel, ids: Sequence[int], seed: int, options: SamplingOptions = DEFAULT_OPTIONS
) -> list[int]:
    """Go on writing a caption after `ids` until the model predicts a pad or T tokens are reached. Returns all ids."""
    options.check()
    config, device = model.config, model.text_emb.weight.device
    ids = list(ids)[: config.text_seq_len]
    uniform = uniforms([seed], config.text_seq_len).to(device)
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
        token = int(ops.sample(model.text_head(hidden).float(), uniform[:, len(ids)], choice)[0])
        if token == 0 or token >= config.num_text_tokens:
            break
        ids.append(token)
    return ids
