"""How many codes of an image one pass takes: guesses that turn out right need no pass of their own.

Given its noise, an image is a fixed point: each code is the choice that the codes before it and its own noise make. So
the next W codes are guessed, one pass gives the logits behind each of them, and each is chosen with its own noise. What
was guessed right is accepted, and the first code after it; then the window moves on. The image is the one that a code
per pass gives (predictive sampling, Wiggers and Hoogeboom, arXiv 2002.09928).

Letters: B images, N codes of an image, W width of a window: the codes of an image that are fed in one pass.
"""
from __future__ import annotations

from bisect import bisect_left
from typing import Any, Sequence

from utils.errors import UserError

MOST = 64
"""The widest window."""
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_UNKNOWN, _PRIOR = 0.7, 2.0
"""Least share of the windows right up to a place that are taken to be right there; how many windows say otherwise."""
_FORGET = 0.98
_RECONSIDER = 12
"""Passes for which a width stays: to find it takes as long as a tenth of a small model's pass."""
_AGAIN = 48
"""Passes after which a neighbouring width is tried again: its time was perhaps another program's fault."""


def problem(parallel: str | int) -> str:
    """What is wrong with a value of --parallel; nothing for a right one."""
    text = str(parallel)
    right = text in ("auto", "off") or (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST)
    return "" if right and not isinstance(parallel, bool) else f"auto, off or a number of codes from 1 to {MOST}"


def _follow(known: dict[int, float], rows: int, seconds: float) -> None:
    """Take note of a time: it falls at once, and rises slowly, because other programs disturb it."""
    before = known.get(rows, seconds)
    known[rows] = min(seconds, before + 0.1 * (min(seconds, 2 * before) - before))


class Windows:
    """The width of the next window, by what windows brought and cost so far; and how many codes a pass gave."""

    def __init__(self, parallel: str | int = "auto") -> None:
        """parallel: "auto", "off", or a width for all passes. Raises UserError for anything else."""
        expected = problem(parallel)
        if expected:
            raise UserError(f"parallel must be {expected}, got {parallel!r}")
        self.auto = str(parallel) == "auto"
        self._given = 1 if str(parallel) in ("auto", "off") else int(parallel)
        self._fixed = None if self.auto else self._given
        self.codes = self.passes = 0
        """Codes of an image that were sampled, and the passes that they took."""
        self._accepted, self._tried = [0.0] * MOST, [0.0] * MOST
        self._seconds: dict[int, float] = {}
        self._guess: dict[int, float] = {}
        self._since, self._choice = 0, ((0, 0), 1)

    @property
    def codes_per_pass(self) -> float:
        """Mean over all images so far; 1 if there were none."""
        return self.codes / self.passes if self.passes else 1.0

    @property
    def about(self) -> dict[str, Any]:
        """What generation.json says; no width where it changed from pass to pass."""
        return {"codes_per_pass": round(self.codes_per_pass, 3), "window": self._fixed}

    def fixed(self, rows: int, on_gpu: bool) -> int:
        """The width where logits depend on it up to rounding: by nothing but the configuration. rows: of one code."""
        self._fixed = max(1, min(8, (32 if on_gpu else 4) // rows)) if self.auto else self._given
        return self._fixed

    def width(self, rows: int, most_rows: int) -> int:
        """The width of the next pass, for so many rows of one code each, that fit together with so many in all."""
        limit = max(1, min(MOST, most_rows // rows))
        if not self.auto:
            self._fixed = self._fixed if self._given <= limit else None
            return min(self._given, limit)
        self._since += 1
        again = self._since % _AGAIN < 2  # twice: the first time the weights for guesses are no longer in the cache
        if self._since % _RECONSIDER and self._choice[0] == (rows, limit) and self._since > _AGAIN and not again:
            return self._choice[1]
        widths = [width for width in _WIDTHS if width <= limit]
        if min(self._seconds, default=rows + 1) > rows:  # nothing to compare with
            return 1
        widest = max(self._seconds)
        known = max(sum(rows * width <= widest for width in widths), 1)
        widths = widths[: known + 1]  # one wider than any so far
        gains = self._gains(widths[-1])
        rates = [gains[width - 1] / (self._cost(rows * width) + self._guessing(rows, width)) for width in widths]
        best = rates.index(max(rates[:known]))
        if best == known - 1 and best + 1 < len(widths) and rates[best + 1] > rates[best]:
            best += 1
        self._choice = (rows, limit), widths[best]
        if again and self._since > 1:
            step = 1 if self._since // _AGAIN % 2 else -1
            best = min(max(best + step, 0), len(widths) - 1)
        return widths[best]

    def _gains(self, most: int) -> list[float]:
        """Codes that a pass is expected to give, with windows of 1 up to `most` codes."""
        gains, share, ratio = [1.0], 1.0, _UNKNOWN
        for place in range(1, most):
            expected = self._accepted[place] + _PRIOR * ratio * share
            before, share = share, min(share, expected / (self._tried[place] + _PRIOR))
            gains.append(gains[-1] + share)
            ratio = max(_UNKNOWN, share / before)
        return gains

    def _cost(self, rows: int) -> float:
        """Seconds of a pass, between those that were measured; beyond them a guess that is rather low."""
        known = sorted(self._seconds)
        place = bisect_left(known, rows)
        if place == len(known):
            last, before = known[-1], known[-2] if len(known) > 1 else 0
            slope = 0.5 * (self._seconds[last] - self._seconds.get(before, 0.4 * self._seconds[last])) / (last - before)
            return self._seconds[last] + max(slope, 0.0) * (rows - last)
        if known[place] == rows or place == 0:
            return self._seconds[known[place]]
        low, high = known[place - 1], known[place]
        part = (rows - low) / (high - low)
        return self._seconds[low] * (1 - part) + self._seconds[high] * part

    def _guessing(self, rows: int, width: int) -> float:
        """Seconds that the guesses of a window take, in so many rows of one code each."""
        return (width - 1) * self._guess.get(rows, 0.0)

    def note(
        self, rows: int, width: int, accepted: Sequence[int], seconds: float = 0.0, guessing: float = 0.0
    ) -> None:
        """Take note of a pass of so many rows, of the codes that it gave to each image, and of what guesses took."""
        for count in accepted:
            self.codes += count
            self.passes += 1
        if not self.auto or not seconds:
            return
        _follow(self._seconds, rows, seconds)
        if guessing:
            _follow(self._guess, rows // width, guessing / (width - 1))
        for place in range(1, width):
            self._tried[place] = self._tried[place] * _FORGET + len(accepted)
            self._accepted[place] = self._accepted[place] * _FORGET + sum(count > place for count in accepted)
