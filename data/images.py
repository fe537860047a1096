"""Pictures as tensors: one file -> RGB, square, resized, uint8 (3, S, S).

The pipeline is deterministic, so the image tokens of a photo are the same in every epoch.
"""

import torch
from PIL import Image


def flatten_on_white(image: Image.Image) -> Image.Image:
    """Return the picture as RGB; where it is transparent, white shows through."""
    rgba = image.convert("RGBA")
    background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    background.alpha_composite(rgba)
    return background.convert("RGB")


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an RGB picture of width W and height H as a uint8 tensor (3, H, W) that owns its memory."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # (H * W * 3,)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()  # (3, H, W)
