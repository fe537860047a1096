"""Ranking images by CLIP similarity to their prompt (arXiv 2103.00020), with a CLIP model of `transformers`.

ranker = ClipRanker("clip-vit-base-patch32")            # a folder with config.json, weights, tokenizer
scores = ranker.similarity("a cat", pil_images)         # (N,) cosine similarities
"""
from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle.utils.utils import features
from utils.errors import UserError
from utils.files import PathLike, open_regular
from utils.untrusted import is_number, shown

logger = logging.getLogger(__name__)

_BATCH = 64
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
_FILE = "preprocessor_config.json"


def ranked(score: float | None, number: int) -> tuple[float, int]:
    """Sort key of candidate `number` of a prompt: the highest score first, those without one (None, NaN) last."""
    return (float("inf") if score is None or math.isnan(score) else -score, number)


class ClipRanker:
    """A CLIP model with its tokenizer and preprocessing, on one device, in float32."""

    def __init__(self, path: PathLike, device: str | torch.device = "cpu") -> None:
        """Load a folder, or a name that `transformers` downloads. Raises UserError if that fails."""
        self.path, self.device = str(path), torch.device(device)
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise UserError(
                f"--clip-path needs the package transformers: python -m pip install transformers ({error})"
            ) from error
        local = Path(self.path).expanduser()
        if local.exists() and not (local / "config.json").is_file():
            raise UserError(f"--clip-path {path}: not a folder of a CLIP model (it lacks config.json)")
        name = str(local) if local.exists() else self.path
        only_local = local.exists()
        if only_local:
            _check_config(path, local / "config.json")
        # Pickled weights are loaded with weights_only, which runs no code; safetensors contain none, and code next to
        # the model is not imported.
        settings: dict[str, Any] = {"local_files_only": only_local, "trust_remote_code": False}
        with _load_errors(self.path, only_local):
            self.model = CLIPModel.from_pretrained(name, weights_only=True, **settings)
            self.model = self.model.float().eval().to(self.device)
            self.tokenizer = AutoTokenizer.from_pretrained(name, **settings)
            self._size, self._mean, self._std = self._preprocessing(name, only_local)

    def _preprocessing(self, name: str, only_local: bool) -> tuple[int, Tensor, Tensor]:
        """Image size, mean and standard deviation per channel (3, 1, 1): from the model's file, else CLIP's."""
        table: dict[str, Any] = {}
        file = Path(name) / _FILE
        if only_local and file.is_file():
            table = _read_table(file)
        mean, std = table.get("image_mean", _MEAN), table.get("image_std", _STD)
        for values in (mean, std):
            if not (isinstance(values, (list, tuple)) and len(values) == 3 and all(map(is_number, values))):
                raise ValueError(f"{_FILE}: image_mean and image_std must be three numbers each")
        size = self.model.config.vision_config.image_size
        return size, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Preprocess images as CLIP does: (N, 3, size, size), bicubic, centre square, normalised."""
        rows = []
        for image in images:
            image = image.convert("RGB")
            scale = self._size / min(image.size)
            width, height = (max(self._size, int(side * scale)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - self._size) // 2, (height - self._size) // 2
            image = image.crop((left, top, left + self._size, top + self._size))
            flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            rows.append(flat.view(self._size, self._size, 3).permute(2, 0, 1).float() / 255)
        return (torch.stack(rows) - self._mean) / self._std

    def similarity(self, prompt: str, images: Sequence[Image.Image]) -> Tensor:
        """Return the cosine similarity (N,) of each image with the prompt, on the CPU."""
        return self.embed_images(images) @ self.embed_texts([prompt])[0]

    @torch.no_grad()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as unit vectors (N, P), on the CPU."""
        limit, found = self.model.config.text_config.max_position_embeddings, []
        for start in range(0, len(prompts), _BATCH):
            batch = list(prompts[start : start + _BATCH])
            tokens = self.tokenizer(batch, truncation=True, max_length=limit, padding=True, return_tensors="pt")
            tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            found.append(F.normalize(features(self.model.get_text_features, tokens, self.device).float()))
        return torch.cat(found).cpu()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as unit vectors (N, P), on the CPU."""
        found = []
        for start in range(0, len(images), _BATCH):
            pixels = {"pixel_values": self.pixels(images[start : start + _BATCH])}
            found.append(F.normalize(features(self.model.get_image_features, pixels, self.device).float()))
        return torch.cat(found).cpu()


# Upper limits for options of CLIP models: the largest published ones are far below.
_LIMITS = {
    "num_hidden_layers": 256,
    "hidden_size": 1 << 14,
    "intermediate_size": 1 << 16,
    "num_attention_heads": 1 << 10,
    "vocab_size": 1 << 21,
    "max_position_embeddings": 1 << 14,
    "image_size": 1 << 12,
    "patch_size": 1 << 12,
    "num_channels": 16,
    "projection_dim": 1 << 14,
}
_MAX_CONFIG_BYTES = 1 << 20


def _read_table(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError or OSError."""
    with open_regular(file) as source:
        content = source.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{file.name} is too large")
    try:
        table = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{file.name} is nested too deeply") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file.name} is not a table of options")
    return table


def _check_config(path: PathLike, file: Path) -> None:
    """Check the sizes in a folder's config.json, before transformers allocates them. Raises UserError."""
    try:
        table = _read_table(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--clip-path {path}: config.json cannot be read: {error}") from error
    for part in (table, table.get("text_config"), table.get("vision_config")):
        if not isinstance(part, dict):
            continue
        for name, limit in _LIMITS.items():
            value = part.get(name)
            if value is not None and not (type(value) is int and 1 <= value <= limit):
                raise UserError(
                    f"--clip-path {path}: {name} in config.json is {shown(value)}, not a whole number from 1 to {limit}"
                )


@contextlib.contextmanager
def _load_errors(path: str, only_local: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises many classes for damaged or hostile folders
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            "--clip-path {}: cannot be {} as a CLIP model: {}".format(
                path, "read" if only_local else "found locally or downloaded", reason
            )
        ) from error
