"""From captions to codes: the loop over positions that every decoder shares.

Letters: B images, R rows (B, twice as many with guidance), N image tokens, T text tokens, C codebook size.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Callable, Protocol, Sequence

import torch
from torch import Tensor

import ops
from models.dalle import DalleModel
from models.positions import Positions, text_positions
from ops import noise
from sampling.cache import Cache
from sampling.canvas import Canvas, Request, Sampled, SoFar
from sampling.decoders import Copies, Decoder
from sampling.native import best_decoder
from sampling.options import DEFAULT_OPTIONS, SamplingOptions
from sampling.windows import Windows

logger = logging.getLogger(__name__)


SAMPLER = 2
"""Version of what a seed stands for: 1 inverted cumulative distributions, 2 adds Gumbel noise (ops/noise.py)."""


class Shared:
    """What the batches of one model share, while its weights stay the same."""

    def __init__(self, parallel: str | int | Windows = "auto") -> None:
        """parallel: see `Windows`; or those of earlier batches, which know what pays."""
        self.copies = Copies()
        self.windows = parallel if isinstance(parallel, Windows) else Windows(parallel)


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
    on_token: Callable[[SoFar], None] | None = None,
    graphs: Recorded | None = None,
    shared: Shared | None = None,
) -> Sampled:
    """Sample the codes of len(seeds) images: all of one caption, or equally many of each of several.

    text (T,) or (prompts, T) token ids; seeds: one for each image, the first caption's first. given (N,): codes to
    keep in every image, -1 where the model shall sample (image completion, priming). on_token is called after each
    code, with what gives the codes so far. graphs: a `sampling.graphs.Graphs` of this model, which samples the same in
    less time on a GPU. shared: to be given to later calls too while the weights stay the same.
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


class Progress:
    """Calls `on_token` for each code of the mean image."""

    def __init__(self, canvas: Canvas, first: int, on_token: Callable[[SoFar], None] | None) -> None:
        self.canvas, self.on_token, self.told = canvas, on_token, first
        self.tell([first])

    def tell(self, fronts: Sequence[int]) -> None:
        """Images are as far as this: positions of the last code of each that is certain."""
        while self.told <= sum(fronts) // len(fronts):
            self.told += 1
            if self.on_token is not None:
                self.on_token(functools.partial(self.canvas.so_far, fronts))


def one_pass(decoder: Decoder, canvas: Canvas, windows: Windows, fronts: list[int], rows: int) -> list[int]:
    """Move images on from these fronts, by a window of each that lacks codes: so many rows in all. Returns fronts."""
    most = decoder.most_rows
    width = windows.width(rows, most) if most else windows.fixed(rows, canvas.codes.is_cuda)
    width = min(width, canvas.num_codes - 1 - min(fronts))
    guessing, begin = decoder.guess(canvas, width, rows), time.perf_counter()
    decoder.advance(canvas, width, fronts[0] if min(fronts) == max(fronts) else None)
    reached: list[int] = canvas.fronts.tolist()
    accepted = [front - before for front, before in zip(reached, fronts) if front > before]
    windows.note(rows * width, width, accepted, time.perf_counter() - begin, guessing)
    return reached


def _sample(model: DalleModel, request: Request, copies: Copies) -> Sampled:
    """Sample a batch, window by window."""
    num_codes, batch, prefix = len(request.kept), len(request.keys), request.prefix
    decoder, refused = best_decoder(model, len(request.prompts), request.images, copies)
    if refused is not None:
        _say(refused)
    canvas = Canvas(batch, num_codes, request.options, request.keys.device)
    canvas.begin(request)
    canvas.blocks = noise.Blocks(batch) if canvas.codes.is_cpu else None
    canvas.keeps = any(code >= 0 for code in request.kept[prefix:])
    hidden = read_request(decoder, canvas, request)
    if prefix == num_codes:
        return canvas.result()
    with decoder:
        canvas.choose_first(decoder.logits(hidden), prefix)
        progress, fronts, windows = Progress(canvas, prefix, request.on_token), [prefix] * batch, request.windows
        while min(fronts) < num_codes - 1:
            unfinished = batch - fronts.count(num_codes - 1) if decoder.most_rows else batch
            fronts = one_pass(decoder, canvas, windows, fronts, unfinished * decoder.rows // batch)
            progress.tell(fronts)
    decoder.release()
    return canvas.result()


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
