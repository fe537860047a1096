"""How codes are sampled: the options, their ranges, and what they are as tensors for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sampling.windows import problem
from utils.errors import UserError
from utils.options import Options, Range, option

TOP_PS, TEMPERATURES, COND_SCALES = Range(gt=0, le=1), Range(ge=1e-6, le=1e6, or_zero=True), Range(ge=0, le=1e6)
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
    "top_k": (Range(ge=1), "a whole number of {}, or None for all codes"),
    "top_p": (TOP_PS, "{}, or None for all codes"),
    "temperature": (TEMPERATURES, "{}"),
    "cond_scale": (COND_SCALES, "{}"),
}
DEFAULT_OPTIONS = SamplingOptions()


def top_k_count(top_k: float, vocabulary: int) -> int | None:
    """Read --top-k: below 1 a share of the vocabulary to drop, max(int((1 - t) * n), 1) stay; else a count; 0: None."""
    if top_k == 0:
        return None
    return max(int((1 - top_k) * vocabulary), 1) if top_k < 1 else min(int(top_k), vocabulary)


def _share_or_count(value: float) -> str:
    return "a share below 1 or a whole number" if value >= 1 and value != int(value) else ""


@dataclass(frozen=True)
class SamplingFlags(Options, title="sampling"):
    """The flags of commands that sample images."""

    batch_size: int = option(4, "images sampled at the same time", ge=1, le=65536)
    top_k: float = option(0.99, "below 1: share of the likeliest codes that is NOT taken into account; from 1 "
                          "on: number of the likeliest codes that are; 0: all", ge=0, metavar="K",
                          check=_share_or_count)
    top_p: float = option(1.0, "take the likeliest codes up to this probability; 1: all", within=TOP_PS, metavar="P")
    temperature: float = option(1.0, "below 1 more likely, above 1 more varied images; 0: always the likeliest code",
                                within=TEMPERATURES, metavar="T")
    cond_scale: float = option(1.0, "weight of the caption (classifier-free guidance) for models trained with "
                               "--null-cond-prob; 1: none", within=COND_SCALES, metavar="S")
    parallel: str = option("auto", "codes of an image that a pass guesses ahead: the same image in fewer passes; off: "
                           "none; auto: as many as pay", check=problem, metavar="auto|off|W")
    seed: int = option(42, "image i is the same for the same seed, whatever the batch size (up to 96, with guidance "
                       "48) on a CPU with native kernels; on a GPU rounding depends on it",
                       ge=0, le=2**63 - 1)

    def sampling(self, vocabulary: int) -> SamplingOptions:
        """How to sample from so many codes (or words)."""
        top_p = self.top_p if self.top_p < 1 else None
        return SamplingOptions(top_k_count(self.top_k, vocabulary), top_p, self.temperature, self.cond_scale)
