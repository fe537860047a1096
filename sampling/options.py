"""How codes are sampled: the options, their ranges, and what they are as tensors for each image."""

from __future__ import annotations

from typing import NamedTuple

from utils.errors import UserError
from utils.flags import Range

TEMPERATURES, COND_SCALES = Range(1e-6, 1e6, or_zero=True), Range(0, 1e6)
"""Beyond these, logits of a usual size overflow float32, or vanish in it: no probabilities would be left."""


class SamplingOptions(NamedTuple):
    """How a token is sampled from its logits."""

    top_k: int | None = None
    """Keep the k likeliest tokens, and those that tie with the k-th. None: all."""
    top_p: float | None = None
    """Keep the likeliest tokens up to and including the one that crosses this probability. None: all."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    cond_scale: float = 1.0
    """Classifier-free guidance: null + scale * (conditional - null). 1: none."""

    @property
    def guided(self) -> bool:
        """Whether each image is computed without its caption too."""
        return self.cond_scale != 1

    def check(self, **names: str) -> SamplingOptions:
        """Return these options. Raises UserError for one that is out of range, by its name in `names` if it has one."""
        for name, value in self._asdict().items():
            allowed, meaning = _ALLOWED[name]
            try:
                fits = allowed.holds(value) and (name != "top_k" or value == int(value))
            except (TypeError, OverflowError):  # no number, or none that a float can hold
                fits = value is None and name in ("top_k", "top_p")
            if not fits:
                raise UserError(f"{names.get(name, name)} must be {meaning.format(allowed)}, got {value!r}")
        return self


_ALLOWED = {
    "top_k": (Range(1), "a whole number of {}, or None for all codes"),
    "top_p": (Range(0, 1, above=True), "{}, or None for all codes"),
    "temperature": (TEMPERATURES, "{}"),
    "cond_scale": (COND_SCALES, "{}"),
}
DEFAULT_OPTIONS = SamplingOptions()


def top_k_count(top_k: float, vocabulary: int) -> int | None:
    """Read --top_k: below 1 a share of the vocabulary to drop, max(int((1 - t) * n), 1) stay; else a count; 0: None."""
    if top_k == 0:
        return None
    return max(int((1 - top_k) * vocabulary), 1) if top_k < 1 else min(int(top_k), vocabulary)
