"""From what the scheduler delivers to files, items of answers and events."""
from __future__ import annotations

import base64
import json
import math
from typing import Any

from PIL import Image

from dalle.pictures import picture_bytes, to_pil
from server.scheduler import Candidate, Partial
from server.schemas import ImageRequest, sampling_of
from utils.options import VERSION


def settings(request: ImageRequest, model: str, seed: int, number: int) -> dict[str, Any]:
    """What makes an image again: the parameters of a request for it alone."""
    return {"model": model, "prompt": request.prompt, "seed": seed, "first_image": number, **sampling_of(request)}


def encode(picture: Image.Image, request: ImageRequest, about: dict[str, Any] | None = None) -> bytes:
    """A picture as a file; a PNG holds its settings as text."""
    texts = None
    if about is not None:
        texts = {"Software": f"mini-dalle {VERSION}", "Description": request.prompt, "Comment": json.dumps(about)}
    return picture_bytes(picture, request.output_format, request.output_compression, texts)


def complete_file(picture: Candidate, request: ImageRequest, about: dict[str, Any]) -> bytes:
    """The file of a complete image."""
    return encode(to_pil(picture.pixels), request, about)


def partial_file(partial: Partial, request: ImageRequest) -> bytes:
    """The file of a partial picture: what is not there yet is transparent, or a grey grid in a jpeg."""
    return encode(to_pil(partial.pixels), request)


def base64_of(content: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(content).decode("ascii")


def item(picture: Candidate, seed: int, clip_score: float | None) -> dict[str, Any]:
    """What an answer says of an image besides its picture."""
    likelihood = picture.log_likelihood
    about = {"seed": seed, "image_index": picture.number, "image_seed": picture.seed,
             "log_likelihood": likelihood if math.isfinite(likelihood) else None}  # fmt: skip
    if clip_score is not None:
        about["clip_score"] = clip_score
    return about
