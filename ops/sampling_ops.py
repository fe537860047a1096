"""One token of each row from logits, under options of its own, and its log-likelihood.

Letters: R rows, C tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from ops import noise, rows


class Choice(NamedTuple):
    """How the token of each row is chosen; what no row asks for is known to the host."""

    temperature: Tensor
    """(R,) float64: logits are divided by it; 0 takes the likeliest token."""
    top_k: Tensor
    """(R,) int64: the k likeliest tokens are kept, and those that tie with the k-th; 0 or C and more: all."""
    top_p: Tensor
    """(R,) float64: the likeliest tokens up to and including the one that crosses this probability; 1: all."""
    kth: Tensor
    """(R, 1): the place of the k-th likeliest token, and `limited` (R, 1): whether it counts."""
    limited: Tensor
    most_k: int
    """At least the largest top_k; 0: no row has one."""
    any_top_p: bool
    any_greedy: bool
    """Whether the temperature of a row is 0."""

    def each(self, function: Callable[[Tensor], Tensor]) -> Choice:
        """The choice of other rows: what a function makes of each tensor."""
        tensors: dict[str, Any] = {name: function(getattr(self, name)) for name in self._fields[:5]}
        return self._replace(**tensors)

    def put(self, row: int, other: Choice) -> None:
        """Take one row of options over. What the host knows of all rows stays as it is."""
        for own, new in zip(self[:5], other[:5]):
            own[row : row + 1].copy_(new)


def keep_top_k(logits: Tensor, kth: Tensor, most: int) -> Tensor:
    """Set logits (R, C) below the one at place `kth` (R, 1) < most of their row to -inf; ties with it stay."""
    threshold = logits.topk(most, dim=-1).values.gather(-1, kth)
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(probabilities: Tensor, p: Tensor) -> Tensor:
    """Zero the tokens after the one that crosses probability p (R,), and renormalise; p >= 1: all. (R, C) -> (R, C)."""
    p = p[:, None]
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    # The first always stays: p may round to 0.
    ordered = ordered.masked_fill((before >= p) & (before > 0) & (p < 1), 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.where(p < 1, kept / kept.sum(dim=-1, keepdim=True), probabilities)


class _Kept(NamedTuple):
    """What may be sampled: K tokens of each row, or all C."""

    logits: Tensor
    """(R, K)"""
    dropped: Tensor | None
    """(R, K), True for those that may not be sampled after all."""
    tokens: Tensor | None = None
    """(R, K), in the order of their numbers; None: all."""


def _all(logits: Tensor, choice: Choice) -> _Kept:
    if not choice.most_k:
        return _Kept(logits, None)
    most = min(choice.most_k, logits.shape[-1])
    kept = keep_top_k(logits, choice.kth.clamp(max=most - 1), most)
    return _Kept(logits, (kept == float("-inf")) & choice.limited)


def _likeliest(logits: Tensor, choice: Choice) -> _Kept | None:
    """The likeliest tokens, or None where top_k leaves others too: ties with the k-th, or all tokens of some row."""
    most = choice.most_k
    if not 0 < most < logits.shape[-1]:
        return None
    values, tokens = logits.topk(most + 1, dim=-1)
    threshold = values.gather(-1, choice.kth.clamp(max=most - 1)).masked_fill_(~choice.limited, float("-inf"))
    dropped = values < threshold
    if not bool(dropped[:, most].all()):
        return None
    tokens, order = tokens[:, :most].sort(dim=-1)
    all_alike = int(dropped.sum()) == len(logits)
    return _Kept(values.gather(-1, order), None if all_alike else dropped.gather(-1, order), tokens)


def _take(kept: _Kept, gumbel: Tensor, choice: Choice) -> Tensor:
    """Take the token whose logit plus Gumbel noise is the largest. noise (R, K) -> tokens (R,).

    That is a sample of their softmax (the Gumbel-max trick), and where logits move a little, mostly the same token.
    """
    logits = kept.logits.float()
    temperature = choice.temperature.float().clamp_(min=2.0**-126)[:, None]  # 0 must not divide
    # The largest is subtracted first, or a low temperature would let logits overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature)
    if kept.dropped is not None:
        scaled = scaled.masked_fill_(kept.dropped, float("-inf"))
    if choice.any_top_p:
        chances = keep_top_p(torch.softmax(scaled, dim=-1), choice.top_p.float())
        scaled = scaled.masked_fill((chances == 0) & (choice.top_p < 1)[:, None], float("-inf"))
    place = scaled.add_(gumbel).argmax(dim=-1)
    if choice.any_greedy:
        place = torch.where(choice.temperature == 0, kept.logits.argmax(dim=-1), place)
    return place if kept.tokens is None else kept.tokens.gather(-1, place[:, None])[:, 0]


def reference(
    logits: Tensor, key: Tensor, position: Tensor, choice: Choice, blocks: noise.Blocks | None = None
) -> Tensor:
    """The token of each row, as `sample` says: (R,)."""
    vocabulary = logits.shape[-1]
    known = None if blocks is None else blocks.at(key, position, vocabulary)
    if known is not None:
        return _take(_all(logits, choice), known, choice)
    # A GPU would wait for the answer whether others matter too, and sums of fewer chances would round differently.
    few = logits.is_cpu and not choice.any_top_p
    kept = (_likeliest(logits, choice) if few else None) or _all(logits, choice)
    tokens = torch.arange(vocabulary, device=logits.device) if kept.tokens is None else kept.tokens
    return _take(kept, noise.gumbel(noise.stream(key, position, vocabulary), tokens), choice)


def sample(
    logits: Tensor, key: Tensor, position: Tensor, choice: Choice, blocks: noise.Blocks | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token of each row, (R,), and return its log-likelihood in nats under the unfiltered logits, (R,).

    logits (R, C); key and position (R,): of the noise, so that a row's token does not depend on the batch it is in
    (`ops.noise`). Where the last of several equally likely tokens do not fit into top_p, the lowest numbers stay.
    blocks: what makes the noise of several passes at once, if anything does.
    """
    if rows.refusal(logits) is None:
        state = noise.stream(key, position, logits.shape[-1])
        return rows.sample(logits, state, choice.temperature, choice.top_k, choice.top_p)
    token = reference(logits, key, position, choice, blocks)
    return token, torch.log_softmax(logits.float(), dim=-1).gather(-1, token[:, None])[:, 0]


def choice_of(
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    device: torch.device | None = None,
) -> Choice:
    """The same options for `count` rows; None: not limited."""
    k, p = min(int(top_k or 0), 2**62), 1.0 if top_p is None else top_p

    def full(value: Any, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full((count, *shape), value, dtype=dtype, device=device)

    return Choice(
        full(temperature, torch.float64), full(k, torch.int64), full(p, torch.float64),
        full(max(k - 1, 0), torch.int64, 1), full(k > 0, torch.bool, 1),
        k, p < 1, temperature == 0,
    )  # fmt: skip
