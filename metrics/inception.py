"""The Inception network that FID, KID and IS are defined on: TensorFlow's of 2015-12-05, in plain PyTorch.

    network = load_inception()                       # downloads 95 MB once; or load_inception("weights.pth")
    pooled, logits = network(images)                 # uint8 (B, 3, H, W) -> (B, 2048), (B, 1008) without bias

Parameters have the names of torch-fidelity's file. Three things differ from other Inception networks and are kept, as
published figures depend on them: images are resized as TensorFlow 1 did (pixels are points, no antialiasing), average
pooling does not count the padding, and the last block takes the maximum where it should take the average.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.vqgan import read_tensors
from utils.caches import cache_folder
from utils.downloads import download
from utils.errors import UserError
from utils.files import PathLike, sha256_file

logger = logging.getLogger(__name__)

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_MAX_BYTES = 1 << 28
SIDE, FEATURES, CLASSES = 299, 2048, 1008


class Conv(NamedTuple):
    """A convolution with batch norm and ReLU; padded to keep the size where the stride is 1."""

    channels: int
    height: int
    width: int
    stride: int = 1


class Pool(NamedTuple):
    """A pooling of 3x3: "max" or "mean"; of stride 1 it is padded to keep the size."""

    kind: str
    stride: int = 1


def _tall(channels: int) -> Conv:
    return Conv(channels, 7, 1)


def _wide(channels: int) -> Conv:
    return Conv(channels, 1, 7)


_FORK = (Conv(384, 1, 3), Conv(384, 3, 1))
"""Two convolutions of the same input, whose outputs are concatenated."""


def _block_a(pooled: int) -> dict:
    return {
        "branch1x1": [Conv(64, 1, 1)],
        "branch5x5": [Conv(48, 1, 1), Conv(64, 5, 5)],
        "branch3x3dbl": [Conv(64, 1, 1), Conv(96, 3, 3), Conv(96, 3, 3)],
        "branch_pool": [Pool("mean"), Conv(pooled, 1, 1)],
    }


def _block_c(c: int) -> dict:
    return {
        "branch1x1": [Conv(192, 1, 1)],
        "branch7x7": [Conv(c, 1, 1), _wide(c), _tall(192)],
        "branch7x7dbl": [Conv(c, 1, 1), _tall(c), _wide(c), _tall(c), _wide(192)],
        "branch_pool": [Pool("mean"), Conv(192, 1, 1)],
    }


def _block_e(pool: str) -> dict:
    return {
        "branch1x1": [Conv(320, 1, 1)],
        "branch3x3": [Conv(384, 1, 1), _FORK],
        "branch3x3dbl": [Conv(448, 1, 1), Conv(384, 3, 3), _FORK],
        "branch_pool": [Pool(pool), Conv(192, 1, 1)],
    }


_BLOCKS: dict[str, dict] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": {
        "branch3x3": [Conv(384, 3, 3, 2)],
        "branch3x3dbl": [Conv(64, 1, 1), Conv(96, 3, 3), Conv(96, 3, 3, 2)],
        "branch_pool": [Pool("max", 2)],
    },
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": {
        "branch3x3": [Conv(192, 1, 1), Conv(320, 3, 3, 2)],
        "branch7x7x3": [Conv(192, 1, 1), _wide(192), _tall(192), Conv(192, 3, 3, 2)],
        "branch_pool": [Pool("max", 2)],
    },
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


class _ConvNorm(nn.Module):
    def __init__(self, width: int, conv: Conv, padded: bool = True) -> None:
        super().__init__()
        size = (conv.height, conv.width)
        padding = (conv.height // 2, conv.width // 2) if padded and conv.stride == 1 else 0
        self.conv = nn.Conv2d(width, conv.channels, size, conv.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Block(nn.Module):
    """Branches of the same input, concatenated."""

    def __init__(self, width: int, branches: dict) -> None:
        super().__init__()
        self.channels = 0
        self.branches: list[list] = []
        for name, steps in branches.items():
            layers: list[Pool | list[str]] = []
            channels = width
            single, number = sum(not isinstance(step, Pool) for step in steps) == 1, 0
            for step in steps:
                if isinstance(step, Pool):
                    layers.append(step)
                    continue
                number += 1
                own, convs = name if single else f"{name}_{number}", [step] if isinstance(step, Conv) else step
                names = [own] if len(convs) == 1 else [own + end for end in "ab"]
                for key, conv in zip(names, convs):
                    setattr(self, key, _ConvNorm(channels, conv))
                layers.append(names)
                channels = sum(conv.channels for conv in convs)
            self.branches.append(layers)
            self.channels += channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(x, layers) for layers in self.branches], dim=1)

    def _branch(self, x: Tensor, layers: list) -> Tensor:
        for layer in layers:
            if isinstance(layer, Pool):
                padding = 1 if layer.stride == 1 else 0
                if layer.kind == "max":
                    x = F.max_pool2d(x, 3, layer.stride, padding)
                else:
                    x = F.avg_pool2d(x, 3, layer.stride, padding, count_include_pad=False)
            else:
                x = torch.cat([getattr(self, name)(x) for name in layer], dim=1)
        return x


class Inception(nn.Module):
    """Features and logits of images, in evaluation mode and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, Conv(32, 3, 3, 2))
        self.Conv2d_2a_3x3 = _ConvNorm(32, Conv(32, 3, 3), padded=False)
        self.Conv2d_2b_3x3 = _ConvNorm(32, Conv(64, 3, 3))
        self.Conv2d_3b_1x1 = _ConvNorm(64, Conv(80, 1, 1))
        self.Conv2d_4a_3x3 = _ConvNorm(80, Conv(192, 3, 3), padded=False)
        width = 192
        for name, branches in _BLOCKS.items():
            block = _Block(width, branches)
            setattr(self, name, block)
            width = block.channels
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.identity = "random"
        """SHA-256 of the weights file."""
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8, of any size -> features (B, 2048), logits without bias (B, 1008), float32."""
        x = (resize_as_tensorflow(images.to(self.fc.weight.device).float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        pooled = x.mean(dim=(2, 3))
        return pooled, pooled @ self.fc.weight.T


def _ends(length: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two source pixels of each of `side` target pixels, and the weight of the second."""
    place = torch.arange(side, device=like.device, dtype=torch.float32) * (length / side)
    first = place.floor()
    return first.long(), (first.long() + 1).clamp(max=length - 1), place - first


def resize_as_tensorflow(images: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, side, side) as TensorFlow 1 did: bilinear, target pixel i lies at i * H / side."""
    top, bottom, down = _ends(images.shape[2], side, images)
    left, right, across = _ends(images.shape[3], side, images)
    rows = images[:, :, top].lerp(images[:, :, bottom], down[:, None].expand(-1, images.shape[3]))
    return rows[..., left].lerp(rows[..., right], across.expand(side, -1))


def load_inception(path: PathLike | None = None, device: str | torch.device = "cpu") -> Inception:
    """Load torch-fidelity's weights file; None: the published one, downloaded once. Raises UserError."""
    if path is None:
        file = cache_folder("dalle", holding=URL.rpartition("/")[2]) / URL.rpartition("/")[2]
        if not file.is_file():
            logger.info(f"downloading the Inception network (95 MB): {file}")
        try:
            path = download(URL, file, sha256=SHA256, size_limit=_MAX_BYTES)
        except UserError as error:
            raise UserError(f"{error}; or give the file with --inception-weights") from None
    weights, network = read_tensors(path, "--inception-weights"), Inception()
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[-1].strip()[:300]
        raise UserError(f"--inception-weights {path}: not torch-fidelity's Inception network: {first}") from None
    network.identity = sha256_file(Path(path))
    return network.to(device)
