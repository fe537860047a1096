"""Perceptual distance on VGG-16 features (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features").

The user provides the weights: torchvision's `vgg16`, and optionally the linear weights of LPIPS 0.1; without the latter
all channels have equal weight.
Letters: B images, C channels, H and W height and width of a feature map.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Configuration D of Simonyan and Zisserman 2014: output channels of each convolution; a pooling layer between stages.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and deviation of LPIPS, for pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class PerceptualDistance(nn.Module):
    """Mean distance of two batches of images (B, 3, S, S) in [0, 1]; a scalar, frozen, differentiable in its inputs."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.features = nn.ModuleDict()
        index, width = 0, 3
        self.stages: list[list[str]] = []
        for stage in _STAGES:
            names = []
            for channels in stage:
                # torchvision numbers every layer: a convolution and its ReLU are two, a pooling layer is one.
                self.features[str(index)] = nn.Conv2d(width, channels, 3, padding=1)
                names.append(str(index))
                index, width = index + 2, channels
            self.stages.append(names)
            index += 1
        for i, stage in enumerate(_STAGES):
            self.register_buffer(f"lin{i}", torch.full((1, stage[-1], 1, 1), 1.0 / stage[-1]))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The last ReLU output of each stage, each (B, C, H, W), with unit-length channel vectors."""
        x = (images * 2.0 - 1.0 - self.shift) / self.scale
        maps = []
        for i, names in enumerate(self.stages):
            if i > 0:
                x = F.max_pool2d(x, 2)
            for name in names:
                x = F.relu(self.features[name](x))
            maps.append(x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return maps

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        total = images.new_zeros(())
        with torch.no_grad():
            wanted = self.maps(targets)
        for i, (ours, theirs) in enumerate(zip(self.maps(images), wanted)):
            weight = getattr(self, f"lin{i}")  # (1, C, 1, 1)
            total = total + ((ours - theirs).pow(2) * weight).sum(dim=1).mean()
        return total
