"""How far two sets of images are from each other by their features: FID, KID, precision and recall; and the IS of one.

Features are (n, D) float32, computed in double precision. Protocols are those of torch-fidelity 0.4.0, with its subsets
and order (seed 2020), so that figures compare. Sources: FID Heusel et al. 2017; KID Binkowski et al. 2018; IS Salimans
et al. 2016; precision and recall Kynkaanniemi et al. 2019; FID without bias Chong and Forsyth 2020.
"""

from __future__ import annotations

import functools
import math
from typing import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from metrics.features import Features
from utils.errors import UsageError, UserError

SEED = 2020
METRICS = ("fid", "kid", "is", "prc")
"""prc: precision and recall."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10
NEIGHBOURS = 3
FID_SUBSETS = 5
"""Disjoint subsets whose FIDs tell how uncertain it is."""
_ROWS = 4096


class Moments:
    """Mean (D,) and a factor F (r, D) of the covariance, F^T F, of features (n, D); r is the smaller of n and D."""

    def __init__(self, features: Tensor) -> None:
        """Raises ValueError for fewer than two images."""
        if len(features) < 2:
            raise ValueError("a covariance needs at least 2 images")
        self.count = len(features)
        self.mean = features.double().mean(dim=0)
        if len(features) <= features.shape[1]:
            self.factor = (features.double() - self.mean) / (self.count - 1) ** 0.5
            return
        covariance = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
        for part in features.split(_ROWS):  # in double precision all at once would take twice the memory
            centred = part.double() - self.mean
            covariance.addmm_(centred.T, centred, alpha=1 / (self.count - 1))
        values, vectors = torch.linalg.eigh(covariance)
        self.factor = values.clamp(min=0).sqrt()[:, None] * vectors.T


def frechet(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With C = F^T F the trace of the root is the sum of the singular values of F1 F2^T: exact also where a covariance is
    singular, as it is for fewer images than features.
    """
    root = torch.linalg.svdvals(first.factor @ second.factor.T).sum()
    spread = first.factor.pow(2).sum() + second.factor.pow(2).sum() - 2 * root
    return float((first.mean - second.mean).pow(2).sum() + spread)


def fid(features: Tensor, real: Moments) -> float:
    """Frechet distance of features (n, D) to those of real images."""
    return frechet(Moments(features), real)


def fid_with_uncertainty(features: Tensor, real: Moments, seed: int = SEED) -> dict[str, float]:
    """FID, its value for infinitely many images, and its deviation between disjoint subsets.

    FID falls with 1/n; a line through its values for n, n/2 and n/5 images gives the limit. The deviation is that of
    subsets of n/5 images: an upper bound of the whole set's.
    """
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(features)))
    size = len(features) // FID_SUBSETS
    if size < 2:
        return {"fid": fid(features, real)}
    parts = [fid(features[part], real) for part in order[: size * FID_SUBSETS].split(size)]
    half = len(features) // 2
    halves = [fid(features[part], real) for part in (order[:half], order[half : 2 * half])]
    values = [float(np.mean(parts)), float(np.mean(halves)), fid(features, real)]
    _, limit = np.polyfit([1 / size, 1 / half, 1 / len(features)], values, deg=1)
    return {"fid": values[-1], "fid_infinity": float(limit), "fid_subset_deviation": float(np.std(parts))}


def kid(features: Tensor, real: Tensor, seed: int = SEED) -> tuple[float, float]:
    """Mean and deviation of the unbiased squared MMD with kernel (x y / D + 1)^3 over random subsets."""
    size = min(KID_SUBSET_SIZE, len(features), len(real))
    if size < 2:
        raise ValueError("KID needs at least 2 images")
    random, found = np.random.RandomState(seed), []
    for _ in range(KID_SUBSETS):
        x = features[torch.from_numpy(random.choice(len(features), size, replace=False))]
        y = real[torch.from_numpy(random.choice(len(real), size, replace=False))]
        found.append(_mmd(x, y))
    return float(np.mean(found)), float(np.std(found))


def _mmd(x: Tensor, y: Tensor) -> float:
    """x, y (m, D)"""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).double() ** 3

    m = len(x)
    own = sum(kernel(a, a).sum() - (a.double().pow(2).sum(dim=1) / a.shape[1] + 1).pow(3).sum() for a in (x, y))
    return float(own / (m * (m - 1)) - 2 * kernel(x, y).mean())


def inception_score(logits: Tensor, seed: int = SEED) -> tuple[float, float]:
    """exp(mean KL(p(class | image) || p(class))): mean and deviation over splits; logits (n, C)."""
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    scores = []
    for split in range(IS_SPLITS):
        own = logits[order[split * len(logits) // IS_SPLITS : (split + 1) * len(logits) // IS_SPLITS]].double()
        if not len(own):
            raise ValueError(f"the Inception Score needs at least {IS_SPLITS} images")
        log_p = own.log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(own))  # finite, also where all probabilities vanish
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _radii(features: Tensor) -> Tensor:
    """Distance of each to its third neighbour, (n,). Raises ValueError if there is none."""
    if len(features) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need more than {NEIGHBOURS} images")
    found = [torch.cdist(part, features).kthvalue(NEIGHBOURS + 1).values for part in features.split(_ROWS)]
    return torch.cat(found)  # (itself is the first)


def _covered(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of x that lies within the ball of any centre."""
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in x.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


def precision_recall(features: Tensor, real: Tensor, radii: Tensor | None = None) -> tuple[float, float]:
    """Share of images among the real ones' neighbourhoods, and of real ones among the images'.

    radii: of the real ones' neighbourhoods, if they are known.
    """
    radii = _radii(real) if radii is None else radii
    return _covered(features, real, radii), _covered(real, features, _radii(features))


class Real:
    """Features of real images, and what each metric needs of them, computed once for all sets that are compared."""

    def __init__(self, features: Features) -> None:
        self.features = features

    @functools.cached_property
    def moments(self) -> Moments:
        """For FID."""
        return Moments(self.features.pooled)

    @functools.cached_property
    def radii(self) -> Tensor:
        """For precision, (n,)."""
        return _radii(self.features.pooled)


LEAST = {"fid": 2, "kid": 2, "is": IS_SPLITS, "prc": NEIGHBOURS + 1}
"""The fewest images of each set that a metric is defined for."""


def check_counts(metrics: Iterable[str], generated: tuple[int, str], real: tuple[int, str] | None = None) -> None:
    """Raise UsageError for too few images, before they are sampled or read. Given are numbers, and where they are from.
    """
    for metric in metrics:
        for count, source in (generated, real) if real is not None and metric != "is" else (generated,):
            if count < LEAST.get(metric, 0):
                raise UsageError(f"--metrics {metric} needs at least {LEAST[metric]} images: {source} {count}")


def distances(metrics: Sequence[str], generated: Features, real: Features | Real | None) -> dict[str, float]:
    """The metrics asked for, of METRICS. Raises UserError for too few images."""
    found: dict[str, float] = {}
    real = Real(real) if isinstance(real, Features) else real
    try:
        if "is" in metrics:
            found["is"], found["is_deviation"] = inception_score(generated.logits)
        if real is not None and "fid" in metrics:
            found.update(fid_with_uncertainty(generated.pooled, real.moments))
        if real is not None and "kid" in metrics:
            found["kid"], found["kid_deviation"] = kid(generated.pooled, real.features.pooled)
        if real is not None and "prc" in metrics:
            both = precision_recall(generated.pooled, real.features.pooled, real.radii)
            found["precision"], found["recall"] = both
    except ValueError as error:
        raise UserError(f"--metrics: {error}") from None
    return found
