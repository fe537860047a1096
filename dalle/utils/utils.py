"""Seeding and CLIP ranking, with minDALL-E's names.

from dalle.utils.utils import clip_score, set_seed
"""
from __future__ import annotations

import random
from typing import Any, Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils.errors import UserError

_BATCH = 64  # images per CLIP call


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, including all GPUs."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy's limit
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)


def clip_score(
    prompt: str,
    images: np.ndarray,
    model_clip: Any,
    preprocess_clip: Any = None,
    device: str | torch.device | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Return the images' indices (N,), the best match of the prompt first. See `clip_similarity`."""
    scores = clip_similarity(prompt, images, model_clip, preprocess_clip, device, tokenizer)
    return torch.argsort(scores, descending=True).cpu().numpy()


@torch.no_grad()
def clip_similarity(
    prompt: str,
    images: np.ndarray,
    model_clip: Any,
    preprocess_clip: Any = None,
    device: str | torch.device | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> Tensor:
    """Return the cosine similarity (N,) of each image with the prompt. images: (N, H, W, 3) floats in [0, 1].

    model_clip, preprocess_clip: one of
      - a `dalle.reranking.ClipRanker`, alone;
      - what OpenAI's `clip.load` returns;
      - model and preprocessing of `open_clip.create_model_and_transforms`, with `tokenizer` (by default CLIP's own);
      - a CLIPModel and a CLIPProcessor of `transformers`.
    Raises UserError for objects of another kind, and for images of another shape.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(f"images: expected an array (N, H, W, 3), got {images.shape}")
    if images.dtype != np.uint8:
        images = (np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)  # truncated, as in minDALL-E's code
    pil_images = [Image.fromarray(image) for image in images]
    if hasattr(model_clip, "similarity"):
        return model_clip.similarity(prompt, pil_images)
    device = _device(model_clip) if device is None else device
    if hasattr(model_clip, "encode_image"):
        return _encode_style(prompt, pil_images, model_clip, preprocess_clip, device, tokenizer)
    if hasattr(model_clip, "get_image_features"):
        return _transformers_style(prompt, pil_images, model_clip, preprocess_clip, device)
    raise UserError(
        f"model_clip is a {type(model_clip).__name__}: expected a model of clip, open_clip or transformers, or a "
        "ClipRanker"
    )


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _encode_style(
    prompt: str, pil_images: Sequence[Image.Image], model: Any, preprocess: Any, device: Any, tokenizer: Any
) -> Tensor:
    """For OpenAI's clip and open_clip: both have encode_image and encode_text, and differ in the tokenizer."""
    if not callable(preprocess):
        raise UserError("preprocess_clip must be the function that clip.load or open_clip returns with the model")
    tokens = (tokenizer or _clip_tokenizer(model))([prompt]).to(device)
    text = model.encode_text(tokens)
    return torch.cat(
        [
            F.cosine_similarity(model.encode_image(torch.stack([preprocess(p) for p in part]).to(device)), text)
            for part in _parts(pil_images)
        ]
    )


def _clip_tokenizer(model: Any) -> Callable[..., Any]:
    """The tokenizer of a model: from the package of its class."""
    package = type(model).__module__.partition(".")[0]
    try:
        if package == "open_clip":
            import open_clip

            return open_clip.tokenize
        import clip

        return clip.tokenize
    except ImportError as error:
        raise UserError(f"give clip_score the model's tokenizer: {error}") from error


def _transformers_style(
    prompt: str, pil_images: Sequence[Image.Image], model: Any, processor: Any, device: Any
) -> Tensor:
    if not callable(processor):
        raise UserError("preprocess_clip must be the CLIPProcessor that belongs to the model")
    text = features(model.get_text_features, processor(text=[prompt], return_tensors="pt", truncation=True), device)
    return torch.cat(
        [
            F.cosine_similarity(features(model.get_image_features, _pixels(processor, part), device), text)
            for part in _parts(pil_images)
        ]
    )


def _pixels(processor: Any, pil_images: Sequence[Image.Image]) -> Any:
    return processor(images=list(pil_images), return_tensors="pt")


def features(encode: Callable[..., Any], inputs: Any, device: Any) -> Tensor:
    """Call a `transformers` encoder, which since version 5 returns an object that holds the features."""
    output = encode(**{name: value.to(device) for name, value in inputs.items()})
    return output if isinstance(output, Tensor) else output.pooler_output


def _parts(pil_images: Sequence[Image.Image]) -> Sequence[Sequence[Image.Image]]:
    return [pil_images[start : start + _BATCH] for start in range(0, len(pil_images), _BATCH)]
