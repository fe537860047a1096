"""Drawing images from a caption: small functions over logits, and the loop that applies them with a key/value cache.

Letters: B images, N image tokens, P positions of the text part, C codebook size.
"""

from typing import Callable, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import torch
from torch import Tensor

from models.cache import LayerCache
from models.dalle import DALLE
from models.native_rows import draw_rows
from models.stepping import stepping
from utils.errors import UserError
from utils.flags import Range

TEMPERATURES, COND_SCALES = Range(1e-6, 1e6, or_zero=True), Range(0, 1e6)
"""Beyond these, logits of a usual size overflow float32, or vanish in it: no probabilities would be left."""


class SamplingOptions(NamedTuple):
    """How a token is drawn from its logits."""

    top_k: Optional[int] = None
    """Keep the k likeliest tokens, and those that tie with the k-th. None: all."""
    top_p: Optional[float] = None
    """Keep the likeliest tokens up to and including the one that crosses this probability. None: all."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    cond_scale: float = 1.0
    """Classifier-free guidance: null + scale * (conditional - null). 1: none."""

    def check(self, **names: str) -> "SamplingOptions":
        """Return these options. Raises UserError for one that is out of range, by its name in `names` if it has one."""
        for name, value in self._asdict().items():
            allowed, meaning = _ALLOWED[name]
            try:
                fits = allowed.holds(value) and (name != "top_k" or value == int(value))
            except TypeError:  # no number
                fits = value is None and name in ("top_k", "top_p")
            if not fits:
                raise UserError("{} must be {}, got {!r}".format(names.get(name, name), meaning.format(allowed), value))
        return self


_ALLOWED = {
    "top_k": (Range(1), "a whole number of {}, or None for all codes"),
    "top_p": (Range(0, 1, above=True), "{}, or None for all codes"),
    "temperature": (TEMPERATURES, "{}"),
    "cond_scale": (COND_SCALES, "{}"),
}
DEFAULT_OPTIONS = SamplingOptions()


class Drawn(NamedTuple):
    """Codes (B, N) and the log-likelihood in nats (B,) the unfiltered model gives to those that were drawn."""

    codes: Tensor
    log_likelihood: Tensor


def top_k_count(top_k: float, vocabulary: int) -> Optional[int]:
    """Read --top_k: below 1 a share of the vocabulary to drop, max(int((1 - t) * n), 1) stay; else a count; 0: None."""
    if top_k == 0:
        return None
    return max(int((1 - top_k) * vocabulary), 1) if top_k < 1 else min(int(top_k), vocabulary)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits (and ties with the k-th) to -inf. (..., C) -> (..., C)."""
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(probabilities: Tensor, p: float) -> Tensor:
    """Zero the tokens after the one that crosses cumulative probability p, and renormalise. (..., C) -> (..., C)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill((before >= p) & (before > 0), 0.0)  # the first always stays: p may round to 0
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return kept / kept.sum(dim=-1, keepdim=True)


def draw(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution at `uniform`. (B, C), (B,) in [0, 1) -> (B,).

    The random number comes from outside, so that an image's draws do not depend on the batch it is drawn in.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.temperature != 1:  # the largest is taken away first, or a low temperature would let logits overflow
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / options.temperature
    probabilities = torch.softmax(logits, dim=-1)
    if options.top_p is not None and options.top_p < 1:
        probabilities = keep_top_p(probabilities, options.top_p)
    # Scaled by the true sum: rounding must never leave a gap behind the last token that has any probability.
    cumulative = probabilities.double().cumsum(dim=-1)
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def draw_and_score(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> Tuple[Tensor, Tensor]:
    """`draw`, and the log-likelihoods in nats (B,) that the unfiltered logits give to what is drawn."""
    drawn = draw_rows(logits, uniform, options.temperature, options.top_k, options.top_p)
    if drawn is not None:
        return drawn
    token = draw(logits, uniform, options)
    return token, torch.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Return (len(seeds), length) uniform numbers in [0, 1): row i depends on seeds[i] alone, on every device."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def guided(logits: Tensor, cond_scale: float) -> Tensor:
    """Apply guidance to logits whose second half of rows is unconditional. (2B, C) -> (B, C); scale 1: unchanged."""
    if cond_scale == 1:
        return logits
    # Half precision could not hold the product.
    conditional, null = logits.to(torch.promote_types(logits.dtype, torch.float32)).chunk(2, dim=0)
    return null + (conditional - null) * cond_scale


def prefill(
    model: DALLE, text: Tensor, images: int, caches: Optional[Sequence[LayerCache]] = None
) -> Tuple[Tensor, Sequence[LayerCache]]:
    """Run each prompt's text part once. text (prompts, T) -> hidden state at its last position (prompts, D), caches.

    caches: empty ones to fill, for `images` images of each prompt; None: new ones.
    """
    ids = model.text_part(text)
    if caches is None:
        caches = model.transformer.make_cache(text.shape[0], images, text.device, model.text_emb.weight.dtype)
    x = model.transformer.extend_text(model.embed_text(ids), 0, caches)
    return model.hidden(x[:, -1:])[:, 0], caches


def first_codes(model: DALLE, codes: Tensor, caches: Sequence[LayerCache]) -> Tensor:
    """Feed the first n codes of each image at once, (B, n); return the hidden state after the last of them (B, D)."""
    x = model.transformer.first_codes(model.embed_codes(codes), caches)
    return model.hidden(x[:, -1:])[:, 0]


class Request(NamedTuple):
    """A batch to draw, on the model's device."""

    prompts: Tensor
    """(prompts, T), or (2 * prompts, T) with guidance: then the same number of empty ones follow."""
    noise: Tensor
    """(B, N) uniform numbers, one for each code."""
    kept: List[int]
    """N codes to keep in every image, -1 where the model draws."""
    options: SamplingOptions
    on_token: Optional[Callable[[], None]]

    @property
    def prefix(self) -> int:
        """How many codes are kept before the first one that is drawn."""
        return next((i for i, code in enumerate(self.kept) if code < 0), len(self.kept))


class Recorded(Protocol):
    """What draws a batch in another way where it can (see graphs.py), and returns None where it cannot."""

    def draw(self, request: Request) -> Optional[Drawn]:
        """Draw the batch, or nothing."""


@torch.no_grad()
def draw_codes(
    model: DALLE,
    text: Tensor,
    seeds: Sequence[int],
    options: SamplingOptions = DEFAULT_OPTIONS,
    given: Optional[Tensor] = None,
    on_token: Optional[Callable[[], None]] = None,
    graphs: Optional[Recorded] = None,
) -> Drawn:
    """Draw the codes of len(seeds) images: all of one caption, or equally many of each of several.

    text (T,) or (prompts, T) token ids; seeds: one for each image, the first caption's first. given (N,): codes to
    keep in every image, -1 where the model shall draw (image completion, priming). on_token is called after each code.
    graphs: a `models.graphs.Graphs` of this model, which draws the same in less time on a GPU.
    Returns codes (B, N) on the model's device, images of one caption next to each other. Raises UserError for options
    that are out of range.
    """
    options.check()
    device = model.text_emb.weight.device
    text = text.reshape(-1, text.shape[-1]).to(device)  # (prompts, T)
    if len(seeds) == 0 or len(seeds) % len(text):
        raise ValueError("{} seeds cannot be shared equally by {} captions".format(len(seeds), len(text)))
    # With guidance each image is also drawn without its caption.
    prompts = torch.cat([text, torch.zeros_like(text)]) if options.cond_scale != 1 else text
    num_codes = model.config.image_seq_len
    kept = [-1] * num_codes if given is None else given.tolist()
    request = Request(prompts, uniforms(seeds, num_codes).to(device), kept, options, on_token)
    drawn = None if graphs is None else graphs.draw(request)
    return _draw(model, request) if drawn is None else drawn


def _draw(model: DALLE, request: Request) -> Drawn:
    """Draw a batch step by step."""
    prompts, noise, kept, options, on_token = request
    prefix, (batch, num_codes), device = request.prefix, noise.shape, noise.device
    branches = 2 if options.cond_scale != 1 else 1
    images = batch * branches // len(prompts)
    codes = torch.zeros(batch, num_codes, dtype=torch.long, device=device)
    log_likelihood = torch.zeros(batch, device=device)

    hidden, caches = prefill(model, prompts, images)
    hidden = hidden.repeat_interleave(images, dim=0)  # (B or 2B, D)
    if prefix:
        codes[:, :prefix] = torch.tensor(kept[:prefix], device=device)
        if prefix < num_codes:
            hidden = first_codes(model, codes[:, :prefix].repeat(branches, 1), caches)
    with stepping(model, batch * branches) as step:
        for position in range(prefix, num_codes):
            if kept[position] >= 0:
                token = torch.full_like(codes[:, position], kept[position])
            else:
                logits = guided(step.logits(hidden), options.cond_scale).float()
                token, score = draw_and_score(logits, noise[:, position], options)
                log_likelihood += score
            codes[:, position] = token
            if position + 1 < num_codes:  # nothing follows the last one
                hidden = step(token if branches == 1 else token.repeat(branches), position, caches)
            if on_token is not None:
                on_token()
    return Drawn(codes, log_likelihood)


@torch.no_grad()
def complete_text(model: DALLE, ids: Sequence[int], seed: int, options: SamplingOptions = DEFAULT_OPTIONS) -> List[int]:
    """Go on writing a caption after `ids` until the model predicts a pad or T tokens are reached. Returns all ids."""
    options.check()
    config, device = model.config, model.text_emb.weight.device
    ids = list(ids)[: config.text_seq_len]
    noise = uniforms([seed], config.text_seq_len).to(device)
    if not ids and not config.bos:
        raise ValueError("a model without <bos> needs at least one text token to go on from")
    caches = model.transformer.make_cache(1, 1, device, model.text_emb.weight.dtype)
    done = 0
    while len(ids) < config.text_seq_len:
        part = ([0] if config.bos else []) + ids
        # Token shift mixes neighbouring positions, so it takes the whole part again; otherwise only what is new.
        done = 0 if config.shift_tokens else done
        new = torch.tensor([part[done:]], device=device)
        hidden = model.hidden(model.transformer.extend_text(model.embed_text(new, done), done, caches)[:, -1:])[:, 0]
        done = len(part)
        token = int(draw(model.text_head(hidden).float(), noise[:, len(ids)], options))
        if token == 0 or token >= config.num_text_tokens:
            break
        ids.append(token)
    return ids
