"""How well a tokenizer reconstructs images: PSNR, SSIM, LPIPS, use of its codebook, and the features for rFID."""

from __future__ import annotations

from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import log
from metrics.features import Collector, Features
from metrics.images import ImageSet
from metrics.inception import Inception
from models import vqgan_metrics
from models.perceptual import PerceptualDistance
from models.vqgan import VQGAN


def _window() -> Tensor:
    """Gaussian of 11 points and deviation 1.5, (11,), float64."""
    weights = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    return weights / weights.sum()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, uint8 (n, 3, H, W) -> (n,), on whole windows only (Wang et al. 2004).

    Mean over channels. Images need at least 11 pixels on each side.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError("SSIM needs images of at least 11 x 11 pixels")
    window = _window()

    def mean(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)[:, None]
        flat = F.conv2d(F.conv2d(flat, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
        return flat.unflatten(0, x.shape[:2])[:, :, 0]

    x, y = images.double(), others.double()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    maps = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    maps = maps / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return maps.mean(dim=(1, 2, 3))


@torch.no_grad()
def measure(
    images: ImageSet,
    vqgan: VQGAN,
    device: Any,
    batch_size: int,
    network: Inception | None = None,
    lpips: PerceptualDistance | None = None,
) -> tuple[dict[str, float], Sequence[Features]]:
    """Measure reconstructions of all images, read once: figures, and features of images and reconstructions (rFID).

    psnr in dB; ssim; lpips where weights are given; codes_used: share of the codebook; perplexity of its use.
    """
    sums, counts = dict.fromkeys(("psnr", "ssim", *(["lpips"] if lpips else [])), 0.0), 0
    use = torch.zeros(vqgan.num_codes, dtype=torch.long)
    collectors = [] if network is None else [Collector(network), Collector(network)]
    with log.progress(images.num_images, "reconstructing", unit="image") as bar:
        for batch in images.batches(batch_size):
            _, again, codes = vqgan_metrics.reconstruct(vqgan, [batch], device)
            use += torch.bincount(codes.flatten(), minlength=vqgan.num_codes)
            sums["psnr"] += vqgan_metrics.psnr(batch, again) * len(batch)
            sums["ssim"] += float(ssim(batch, again).sum())
            if lpips is not None:
                pair = [part.to(device).float() / 255 for part in (again, batch)]
                sums["lpips"] += float(lpips(*pair)) * len(batch)
            for collector, part in zip(collectors, (batch, again)):
                collector.add(part)
            counts += len(batch)
            bar.update(len(batch), len(batch))
    figures = {**{name: value / counts for name, value in sums.items()}, **vqgan_metrics.use_of_counts(use)}
    return figures, [collector.result() for collector in collectors]
