"""How well a VQGAN draws pictures again: error, use of the codebook, and whether pictures can still be told apart.

Pictures are uint8. Letters: n and m pictures, N codes per picture, S picture height and width, K codes in the codebook.
"""
from __future__ import annotations

from typing import Any, Iterable, NamedTuple

import torch
from torch import Tensor

from models.vqgan import VQGAN
from utils.errors import UserError


class Reconstructions(NamedTuple):
    """Pictures and what a model makes of them."""

    originals: Tensor
    """(n, 3, S, S)."""
    images: Tensor
    """(n, 3, S, S)."""
    codes: Tensor
    """(n, N)."""

    def figures(self, num_codes: int) -> dict[str, float]:
        """PSNR and use of the codebook."""
        return {"psnr": psnr(self.originals, self.images), **code_use(self.codes, num_codes)}


@torch.no_grad()
def reconstruct(model: VQGAN, parts: Iterable[Tensor], device: Any = "cpu") -> Reconstructions:
    """Encode and decode pictures that come in parts (B, 3, S, S). Raises UserError where there is none."""
    model.eval()
    done: list[Reconstructions] = []
    for originals in parts:
        codes = model.encode(originals.to(device).float() / 255)
        images = (model.decode(codes) * 255).round().to(torch.uint8)
        done.append(Reconstructions(originals, images.cpu(), codes.cpu()))
    if not done:
        raise UserError("there is no picture to evaluate the VQGAN on")
    return Reconstructions(*(torch.cat(tensors) for tensors in zip(*done)))


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Mean over pairs of the peak signal-to-noise ratio in dB; both uint8 (n, 3, S, S)."""
    error = torch.stack([(a.float() - b.float()).pow(2).mean() for a, b in zip(pictures, others)])  # (n,)
    return float((20.0 * torch.log10(255.0 / error.clamp_min(1e-5).sqrt())).mean())


def code_use(codes: Tensor, num_codes: int) -> dict[str, float]:
    """Share of K = num_codes that appears in codes (n, N), and the perplexity of its use (K where all appear alike)."""
    share = torch.bincount(codes.flatten(), minlength=num_codes).double() / codes.numel()  # (K,)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"codes_used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}


def nearest_pictures(pictures: Tensor, gallery: Tensor, device: Any = "cpu", chunk: int = 512) -> Tensor:
    """The number of the picture in gallery (m, 3, S, S) nearest to each of (n, 3, S, S) by squared distance, all uint8.

    Returns (n,). Of equally near ones it is the first. The few nearest are found by a matrix product in float32 and
    told apart by exact arithmetic: some pictures differ little.
    """

    def centred(images: Tensor) -> Tensor:
        return images.to(device).flatten(1).float() / 255 - 0.5

    queries = centred(pictures)
    distances = []  # each (n, chunk), up to |query|^2
    for part in gallery.split(chunk):
        keys = centred(part)
        distances.append((keys.pow(2).sum(dim=1) - 2 * queries @ keys.T).cpu())
    candidates = torch.cat(distances, dim=1).topk(min(8, len(gallery)), largest=False).indices  # (n, 8)
    candidates = candidates.sort(dim=1).values
    exact = torch.stack(
        [
            (gallery[row].short() - picture.short()).int().pow(2).flatten(1).sum(dim=1)
            for row, picture in zip(candidates, pictures)
        ]
    )  # (n, 8)
    return candidates.gather(1, exact.argmin(dim=1, keepdim=True))[:, 0]


def retrieval(pictures: Tensor, own: Tensor, gallery: Tensor, device: Any = "cpu") -> float:
    """Share of pictures (n, 3, S, S) whose nearest one in gallery (m, 3, S, S), all uint8, is number own (n,).

    One that equals the own picture counts too: at a small size pictures may become the same.
    """
    found = nearest_pictures(pictures, gallery, device)
    return float((gallery[found] == gallery[own]).flatten(1).all(dim=1).double().mean())
