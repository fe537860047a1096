"""How well a VQGAN reconstructs images: error, codebook use, and whether images remain distinguishable.

Images are uint8. Letters: n and m images, N codes per image, S image height and width, K codes in the codebook.
"""
from __future__ import annotations

from typing import Any, Iterable, NamedTuple

import torch
from torch import Tensor

from models.vqgan import VQGAN, image_codes
from utils.errors import UserError


class Reconstructions(NamedTuple):
    """Images and a model's reconstructions."""

    originals: Tensor
    """(n, 3, S, S)."""
    images: Tensor
    """(n, 3, S, S)."""
    codes: Tensor
    """(n, N)."""

    def figures(self, num_codes: int) -> dict[str, float]:
        """PSNR and codebook use."""
        return {"psnr": psnr(self.originals, self.images), **code_use(self.codes, num_codes)}


@torch.no_grad()
def reconstruct(model: VQGAN, parts: Iterable[Tensor], device: Any = "cpu") -> Reconstructions:
    """Encode batches of images (B, 3, S, S) as training does, and decode them. Raises UserError if there are none."""
    model.eval()
    done: list[Reconstructions] = []
    for originals in parts:
        codes = image_codes(model, originals.to(device))
        images = (model.decode_by_parts(codes) * 255).round().to(torch.uint8)
        done.append(Reconstructions(originals, images.cpu(), codes.cpu()))
    if not done:
        raise UserError("there are no images to evaluate the VQGAN on")
    return Reconstructions(*(torch.cat(tensors) for tensors in zip(*done)))


def psnr(images: Tensor, others: Tensor) -> float:
    """Mean over pairs of the peak signal-to-noise ratio in dB; both uint8 (n, 3, S, S)."""
    error = torch.stack([(a.float() - b.float()).pow(2).mean() for a, b in zip(images, others)])  # (n,)
    return float((20.0 * torch.log10(255.0 / error.clamp_min(1e-5).sqrt())).mean())


def code_use(codes: Tensor, num_codes: int) -> dict[str, float]:
    """Share of the K = num_codes codes that occur in codes (n, N), and the perplexity (K if all occur equally)."""
    return use_of_counts(torch.bincount(codes.flatten(), minlength=num_codes))


def use_of_counts(counts: Tensor) -> dict[str, float]:
    """`code_use` from how often each code occurs, (K,)."""
    share = counts.double() / counts.sum()
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"codes_used": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}


def nearest_images(images: Tensor, gallery: Tensor, device: Any = "cpu", chunk: int = 512) -> Tensor:
    """The index of the image in gallery (m, 3, S, S) nearest to each of (n, 3, S, S) by squared distance, all uint8.

    Returns (n,); ties go to the first. A float32 matmul finds the few nearest candidates and integer arithmetic the
    nearest of them: some images differ little.
    """

    def centred(images: Tensor) -> Tensor:
        return images.to(device).flatten(1).float() / 255 - 0.5

    queries = centred(images)
    distances = []  # each (n, chunk), up to |query|^2
    for part in gallery.split(chunk):
        keys = centred(part)
        distances.append((keys.pow(2).sum(dim=1) - 2 * queries @ keys.T).cpu())
    candidates = torch.cat(distances, dim=1).topk(min(8, len(gallery)), largest=False).indices  # (n, 8)
    candidates = candidates.sort(dim=1).values
    exact = torch.stack(
        [
            (gallery[row].short() - image.short()).int().pow(2).flatten(1).sum(dim=1)
            for row, image in zip(candidates, images)
        ]
    )  # (n, 8)
    return candidates.gather(1, exact.argmin(dim=1, keepdim=True))[:, 0]


def retrieval(images: Tensor, own: Tensor, gallery: Tensor, device: Any = "cpu") -> float:
    """Share of images (n, 3, S, S) whose nearest one in gallery (m, 3, S, S), all uint8, has the index own (n,).

    An equal image counts too: at a small size images may become identical.
    """
    found = nearest_images(images, gallery, device)
    return float((gallery[found] == gallery[own]).flatten(1).all(dim=1).double().mean())
