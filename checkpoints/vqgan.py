"""Files of stage 1: a VQGAN's weights and YAML, downloads of published ones, and weights of a perceptual loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

import torch
from torch import Tensor, nn

from checkpoints.files import kind, read_safetensors, read_torch
from checkpoints.names import averaged, part, unwrapped
from checkpoints.trust import Weights, check_state, check_tensors, overlap
from models.building import shapes_only
from models.perceptual import PerceptualDistance
from models.vqgan import VQGAN, VqganConfig
from utils.caches import cache_folder
from utils.errors import UserError, nearest
from utils.files import PathLike, sha256_file
from utils.untrusted import verify_zip

logger = logging.getLogger(__name__)

_MAX_PARAMETERS = 2e9
#: Prefixes of a VQGAN inside the checkpoint of another model (latent diffusion, taming-transformers, minDALL-E).
_PARTS = ("first_stage_model.", "stage1.")


def read_tensors(path: PathLike, flag: str) -> Weights:
    """Return the named tensors of a torch file (of its "state_dict" if there is one) or a safetensors file, as stored.

    Raises UserError naming `flag` and the file.
    """
    path = Path(path)
    try:
        form = kind(path)
        if form == "torch":
            verify_zip(path)
        document = read_safetensors(path)[1] if form == "safetensors" else read_torch(path)
        state = document.get("state_dict", document) if isinstance(document, dict) else None
        tensors = {
            name: value
            for name, value in (state.items() if isinstance(state, dict) else ())
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        if not tensors:
            raise UserError(f"{path} holds no named tensors")
        check_tensors(tensors)
    except UserError as error:
        raise UserError(f"{flag}: {error}" if str(path) in str(error) else f"{flag} {path}: {error}") from None
    return tensors


def _in_float32(weights: Mapping[str, Tensor], path: PathLike, flag: str) -> Weights:
    """The weights in float32. Raises UserError if weights share storage: each would be copied."""
    if overlap(weights.values()):
        raise UserError(f"{flag} {path}: its weights claim more memory than the file holds")
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def load_vqgan_state(path: PathLike) -> Weights:
    """Read a VQGAN's float32 tensors, without its training losses (`loss.*`); averaged ones if complete.

    path: a `.ckpt` of taming-transformers or latent diffusion, also of a model that contains a VQGAN, or
    `.safetensors`.
    """
    weights = unwrapped(read_tensors(path, "--vqgan-model-path"))
    for prefix in _PARTS:
        weights = part(weights, prefix) or weights
    own = averaged({name: value for name, value in weights.items() if not name.startswith("loss.")}, path)
    return _in_float32(own, path, "--vqgan-model-path")


def check_size(config: VqganConfig) -> Weights:
    """Return the weights of a model on the meta device. Raises UserError for one that is too large."""
    with shapes_only():
        expected = VQGAN(config).state_dict()
    count = sum(value.numel() for value in expected.values())
    if count > _MAX_PARAMETERS:
        raise UserError(
            f"VQGAN configuration: the model has {count:.3g} parameters; at most {_MAX_PARAMETERS:.3g} are supported"
        )
    return expected


def build_vqgan(config: VqganConfig, weights: Mapping[str, Tensor], where: str, channels_last: bool = True) -> VQGAN:
    """Build a frozen VQGAN in eval mode, float32. `channels_last`: the fastest memory format on CPUs and GPUs.

    Raises UserError, which starts with `where`, if names or shapes of the weights do not fit the options, before any
    memory is allocated.
    """
    try:
        expected = check_size(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    check_state(expected, weights, where)
    model = VQGAN(config)
    model.load_state_dict(weights)
    if channels_last:
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model.eval().requires_grad_(False)


def load_vqgan(
    weights_path: PathLike, config_path: PathLike, device: str | torch.device = "cpu", channels_last: bool = True
) -> VQGAN:
    """Load a VQGAN as `build_vqgan` does, with `identity` set to the sha256 of its weights file.

    config_path: its YAML. Raises UserError if file and configuration do not fit.
    """
    config = VqganConfig.from_yaml(config_path)
    where = f"--vqgan-model-path {weights_path}, described by {config_path}"
    model = build_vqgan(config, load_vqgan_state(weights_path), where, channels_last)
    model.identity = sha256_file(weights_path)
    return model.to(device)


# ---- published models


@dataclass(frozen=True)
class PublishedVqgan:
    """URLs of a model published by the authors of taming-transformers, and its file names in the cache."""

    weights_url: str
    config_url: str
    weights_name: str
    config_name: str
    config: VqganConfig


_MAX_DOWNLOAD = {".ckpt": 2 << 30, ".yml": 1 << 18}  # bytes; the largest published one has 0.98 GB
_SHARE = "https://heibox.uni-heidelberg.de/f/{}/?dl=1"
PUBLISHED: dict[str, PublishedVqgan] = {
    "f16-1024": PublishedVqgan(
        _SHARE.format("140747ba53464f49b476"),
        _SHARE.format("6ecf2af6c658432c8298"),
        "vqgan.1024.model.ckpt",
        "vqgan.1024.config.yml",
        VqganConfig(),
    ),
    "f16-16384": PublishedVqgan(
        _SHARE.format("867b05fc8c4841768640"),
        _SHARE.format("274fb24ed38341bfa753"),
        "vqgan.16384.model.ckpt",
        "vqgan.16384.config.yml",
        VqganConfig(num_codes=16384),
    ),
    "gumbel-f8-8192": PublishedVqgan(
        _SHARE.format("34a747d5765840b5a99d"),
        _SHARE.format("b24d14998a8d4f19a34f"),
        "vqgan.gumbel.8192.model.ckpt",
        "vqgan.gumbel.8192.config.yml",
        VqganConfig(variant="gumbel", num_codes=8192, ch_mult=(1, 1, 2, 4), attn_resolutions=(32,)),
    ),
}


def default_vqgan(cache_dir: PathLike | None = None, name: str = "f16-1024") -> tuple[Path, Path]:
    """Return (weights, YAML) of a published model, downloading files that `cache_dir` (default ~/.cache/dalle) lacks.

    If a download fails, raises UserError that says what to download by hand and where to put it.
    """
    if name not in PUBLISHED:
        known = ", ".join(PUBLISHED) + "." + nearest(name, PUBLISHED)
        raise UserError(f"no published VQGAN is called '{name}'; known: {known}")
    published = PUBLISHED[name]
    folder = Path(cache_dir) if cache_dir else cache_folder("dalle", holding=published.weights_name)
    weights, config = folder / published.weights_name, folder / published.config_name
    missing = [(url, path) for url, path in ((published.config_url, config), (published.weights_url, weights))]
    missing = [(url, path) for url, path in missing if not path.is_file()]
    for index, (url, path) in enumerate(missing):
        from utils.downloads import download

        logger.info("Downloading the VQGAN %s: %s", name, path)
        try:
            download(url, path, size_limit=_MAX_DOWNLOAD[path.suffix])
        except UserError as error:  # it says where to put this file
            also = "".join(f", likewise {url} as {path}" for url, path in missing[index + 1 :])
            raise UserError(f"{error}{also}; or give --vqgan-model-path and --vqgan-config-path") from None
    return weights, config


# ---- the perceptual loss


def load_perceptual(paths: Sequence[PathLike]) -> PerceptualDistance:
    """Load VGG-16 (first file: torchvision's) and the linear weights of LPIPS 0.1 (second file, if given), frozen.

    Raises UserError naming the key that a file lacks.
    """
    if not 1 <= len(paths) <= 2:
        raise UserError(f"--perceptual-weights takes one or two files (VGG-16, LPIPS), not {len(paths)}")
    model = PerceptualDistance()
    for path, prefix, suffix in zip(paths, ("features.", "lin"), ("", ".model.1.weight")):
        found = _in_float32(read_tensors(path, "--perceptual-weights"), path, "--perceptual-weights")
        for name, value in model.state_dict().items():
            if not name.startswith(prefix):
                continue
            key = name + suffix
            if key not in found or found[key].shape != value.shape:
                raise UserError(f"--perceptual-weights {path}: '{key}' with shape {tuple(value.shape)} is missing")
            value.copy_(found[key])
    return model.eval().requires_grad_(False)
