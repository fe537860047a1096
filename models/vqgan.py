"""VQGAN: images to a grid of discrete codes and back, with the parameter names of taming-transformers.

Letters: B images, D embed_dim, K num_codes, g codes along one side, N = g*g codes per image, S image height and width.
"""
from __future__ import annotations

import contextlib
import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vqgan_config import VqganConfig
from models.vqgan_layers import Decoder, Encoder
from ops.convolution import full_precision, images_at_once
from utils.caches import cache_folder
from utils.errors import UserError, nearest
from utils.files import PathLike, sha256_file
from utils.memory import freed_memory_kept
from utils.untrusted import check_archive

logger = logging.getLogger(__name__)

__all__ = [
    "PUBLISHED",
    "VQGAN",
    "VqganConfig",
    "VqganOutput",
    "check_size",
    "default_vqgan",
    "image_codes",
    "load_vqgan",
    "load_vqgan_state",
    "read_tensors",
]


class VqganOutput(NamedTuple):
    """What a training pass returns."""

    reconstruction: Tensor
    """(B, out_ch, S, S), on the scale of [0, 1] but not clamped."""
    codebook_loss: Tensor
    """Scalar: codebook plus commitment loss (vq) or weighted KL to the uniform distribution (gumbel)."""
    codes: Tensor
    """(B, N) integers."""


class VectorQuantizer(nn.Module):
    """The nearest codebook entry for each feature vector (van den Oord et al. 2017)."""

    def __init__(self, config: VqganConfig, commitment: float = 0.25) -> None:
        super().__init__()
        self.commitment = commitment
        self.embedding = nn.Embedding(config.num_codes, config.embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / config.num_codes, 1.0 / config.num_codes)

    @property
    def codebook(self) -> Tensor:
        """The codebook (K, D)."""
        return self.embedding.weight

    def codes(self, z: Tensor) -> Tensor:
        """Features (B, D, g, g) -> codes (B, N)."""
        flat = z.flatten(2).transpose(1, 2)  # (B, N, D)
        # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for every entry: one matrix product decides.
        bias = -0.5 * self.codebook.float().pow(2).sum(dim=1)  # (K,)
        return torch.argmax(F.linear(flat, self.codebook, bias.to(flat.dtype)), dim=-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, D, g, g) -> quantised features (straight-through gradient), loss, codes (B, N)."""
        with torch.no_grad():
            codes = self.codes(z)
        batch, dim, height, width = z.shape
        quantised = F.embedding(codes, self.codebook).transpose(1, 2).reshape(batch, dim, height, width)
        loss = F.mse_loss(quantised, z.detach()) + self.commitment * F.mse_loss(z, quantised.detach())
        return z + (quantised - z).detach(), loss, codes


class GumbelQuantizer(nn.Module):
    """The entry with the largest logit of a 1x1 projection, relaxed by Gumbel noise in training (Jang et al. 2017).

    Codes of an image are the plain argmax: the published code adds noise here too, which makes an image's codes random.
    """

    def __init__(self, config: VqganConfig, kl_weight: float = 1e-8) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.temperature = 1.0
        self.proj = nn.Conv2d(config.z_channels, config.num_codes, 1)
        self.embed = nn.Embedding(config.num_codes, config.embed_dim)

    @property
    def codebook(self) -> Tensor:
        """The codebook (K, D)."""
        return self.embed.weight

    def codes(self, z: Tensor) -> Tensor:
        """Features (B, D, g, g) -> codes (B, N)."""
        return torch.argmax(self.proj(z), dim=1).flatten(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, D, g, g) -> quantised features, loss, codes (B, N); hard samples, soft gradients."""
        logits = self.proj(z)  # (B, K, g, g)
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=1)  # (B, K, g, g)
        quantised = torch.einsum("bkhw,kd->bdhw", one_hot, self.codebook)
        probabilities = torch.softmax(logits, dim=1)
        divergence = probabilities * torch.log(probabilities * logits.shape[1] + 1e-10)
        return quantised, self.kl_weight * divergence.sum(dim=1).mean(), torch.argmax(one_hot, dim=1).flatten(1)


class VQGAN(nn.Module):
    """Encoder, quantiser and decoder. `encode` and `decode` speak pixels in [0, 1]; inside they are in [-1, 1].

    Quantisation compares distances: do not call `encode` under bf16 or fp16 autocast, where near ties change codes.
    """

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.identity: str | None = None
        """sha256 of the weights file it was loaded from, if any."""
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize: VectorQuantizer | GumbelQuantizer
        self.quantize = VectorQuantizer(config) if config.variant == "vq" else GumbelQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def grid(self) -> int:
        """Codes along one side of an image."""
        return self.config.grid

    @property
    def num_codes(self) -> int:
        """Entries in the codebook."""
        return self.config.num_codes

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return self.config.resolution

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> features before quantisation (B, D, g, g)."""
        return self.quant_conv(self.encoder(pixels * 2.0 - 1.0))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in [0, 1] -> codes (B, N), row by row from the top left."""
        return self.quantize.codes(self.features(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, N) -> pixels (B, 3, S, S) in [0, 1]."""
        grid = self.grid if codes.shape[1] == self.grid**2 else round(codes.shape[1] ** 0.5)
        if grid * grid != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes per image do not form a square grid")
        z = F.embedding(codes, self.quantize.codebook)  # (B, N, D)
        z = z.transpose(1, 2).reshape(codes.shape[0], self.config.embed_dim, grid, grid)  # (B, D, g, g)
        return self.pixels(z).clamp(0.0, 1.0)

    def decode_by_parts(self, codes: Tensor) -> Tensor:
        """`decode`, a few images at a time: those of 256x256 pixels take some 300 MB each while they are decoded."""
        return torch.cat([self.decode(part) for part in codes.split(images_at_once(codes))])

    def forward(self, pixels: Tensor) -> VqganOutput:
        """Training pass over pixels (B, 3, S, S) in [0, 1]."""
        quantised, loss, codes = self.quantize(self.features(pixels))
        return VqganOutput(self.pixels(quantised), loss, codes)

    def pixels(self, z: Tensor) -> Tensor:
        """Quantised features (B, D, g, g) -> pixels (B, out_ch, S, S) on the scale of [0, 1], not clamped."""
        return (self.decoder(self.post_quant_conv(z)) + 1.0) * 0.5


@freed_memory_kept()  # on a CPU the maps of one image take the place of the one before
@torch.no_grad()
def image_codes(vqgan: Any, images: Tensor) -> Tensor:
    """Images (B, 3, S, S), uint8 or floats in [0, 1] -> codes (B, N), each image encoded by itself.

    How many images a convolution takes at a time decides which kernel runs, and with it the last bits of features; a
    code that is nearly a tie can come out differently. One at a time, an image has the same codes in whatever batch it
    comes, and so encoding beforehand gives exactly what encoding in a training step gives. For the same reason the
    precision of float32 products is always the same: of a transformer's, that somebody chose, codes must not depend.
    """
    # Pixels of their own for each image: also where an image starts in memory may decide which kernel runs.
    pixels = [image.float() / 255 if image.dtype == torch.uint8 else image.clone() for image in images.split(1)]
    with full_precision(images):
        return torch.cat([vqgan.encode(image) for image in pixels])


# ---- weights files

_MAX_PARAMETERS = 2e9

# Classes that old Lightning checkpoints name as keys of their "callbacks" entry. Placeholders take their place:
# nothing of theirs runs.
_LIGHTNING_CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)


@contextlib.contextmanager
def _placeholders_allowed() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` see empty placeholder classes under Lightning's names."""
    placeholders: list[Any] = []
    for name in _LIGHTNING_CLASSES:
        module, _, qualname = name.rpartition(".")
        placeholders.append(type(qualname, (), {"__module__": module, "__qualname__": qualname}))
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(placeholders):
            yield
        return
    # Before torch 2.5 the allow-list is one cached dictionary.
    from torch import _weights_only_unpickler

    allowed = _weights_only_unpickler._get_allowed_globals()
    try:
        allowed.update(zip(_LIGHTNING_CLASSES, placeholders))
        yield
    finally:
        for name in _LIGHTNING_CLASSES:
            allowed.pop(name, None)


def _read_file(path: Path, flag: str) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise UserError(f"{flag} {path} is not a readable safetensors file: {error}") from None
    try:
        with _placeholders_allowed():
            return torch.load(str(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"{flag} {path} holds more than tensors and was not opened ({reason}); save its 'state_dict' alone, for "
            "example as "
            "safetensors"
        ) from None
    except Exception as error:  # whatever a damaged or hostile pickle makes the restricted unpickler raise
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{flag} {path} cannot be read: {reason}") from None


def _check_tensor(name: str, tensor: Tensor) -> int:
    """Return the bytes of a tensor. Raises UserError for one that claims more elements than the file holds."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    size = tensor.numel() * tensor.element_size()
    if not plain or size > tensor.untyped_storage().nbytes():
        raise UserError(f"weight '{name[:200]}' is no plain tensor, or claims more than the file holds")
    return size


def read_tensors(path: PathLike, flag: str) -> dict[str, Tensor]:
    """Read the named tensors of a `.safetensors` file or of a torch file (its "state_dict" entry if there is one).

    Returns float32 tensors on the CPU (a file may hold half precision). Nothing but tensors and plain containers is
    unpickled. Raises UserError naming `flag` and the file.
    """
    path = Path(path)
    if not path.is_file():
        what = "this is a folder, give a file" if path.is_dir() else "there is no such file"
        raise UserError(f"{flag} {path}: {what}")
    check_archive(path)
    document = _read_file(path, flag)
    state = document.get("state_dict", document) if isinstance(document, dict) else None
    tensors, size = {}, 0
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            try:
                size += _check_tensor(name, value)
            except UserError as error:
                raise UserError(f"{flag} {path}: {error}") from None
            # Many names may stand for one tensor, which would become as many copies.
            if size > 2 * path.stat().st_size:
                raise UserError(f"{flag} {path}: its weights claim more memory than the file holds")
            tensors[name] = value.float() if value.is_floating_point() else value
    if not tensors:
        raise UserError(f"{flag} {path} holds no named tensors")
    return tensors


def load_vqgan_state(path: PathLike) -> dict[str, Tensor]:
    """Read a VQGAN's float32 tensors from a `.ckpt` or `.safetensors` file, without its training losses (`loss.*`)."""
    return {
        name: value for name, value in read_tensors(path, "--vqgan_model_path").items() if not name.startswith("loss.")
    }


def check_size(config: VqganConfig) -> dict[str, Tensor]:
    """Return the weights of a model without taking their memory. Raises UserError for one that is absurdly large."""
    with torch.device("meta"):
        expected = VQGAN(config).state_dict()
    count = sum(value.numel() for value in expected.values())
    if count > _MAX_PARAMETERS:
        raise UserError(
            f"VQGAN configuration: it asks for {count:.3g} parameters; at most {_MAX_PARAMETERS:.3g} are built"
        )
    return expected


def _check_state(state: dict[str, Tensor], config: VqganConfig, weights: PathLike, config_path: PathLike) -> None:
    """Raise UserError for the first missing, unknown or misshapen tensor, before the model takes memory."""
    try:
        expected = check_size(config)
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from None
    problems = [f"'{name}' is missing" for name in expected if name not in state]
    problems += [f"'{name}' is unknown" for name in state if name not in expected]
    problems += [
        f"'{name}' has shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            "--vqgan_model_path {} does not fit {}: {}{}".format(weights, config_path, ", ".join(problems[:3]), more)
        )


def load_vqgan(
    weights_path: PathLike, config_path: PathLike, device: str | torch.device = "cpu", channels_last: bool = True
) -> VQGAN:
    """Load a frozen VQGAN in eval mode, float32, with `identity` set to the sha256 of its weights file.

    `weights_path`: `.ckpt` (taming-transformers) or `.safetensors`; `config_path`: its YAML. `channels_last` stores
    convolutions the way CPUs and GPUs compute them fastest. Raises UserError when file and configuration do not fit.
    """
    config = VqganConfig.from_yaml(config_path)
    state = load_vqgan_state(weights_path)
    _check_state(state, config, weights_path, config_path)
    model = VQGAN(config)
    model.load_state_dict(state)
    model.identity = sha256_file(weights_path)
    model = model.to(device)
    if channels_last:
        nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model.eval().requires_grad_(False)


# ---- published models


@dataclass(frozen=True)
class PublishedVqgan:
    """Where the authors of taming-transformers publish a model, and the file names it is cached under."""

    weights_url: str
    config_url: str
    weights_name: str
    config_name: str
    config: VqganConfig


_MAX_DOWNLOAD = {".ckpt": 2 << 30, ".yml": 1 << 18}  # bytes; the largest of the published ones has 0.98 GB
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
    """Return (weights, YAML) of a published model, downloading what `cache_dir` (default ~/.cache/dalle) lacks.

    Raises UserError that says what to fetch by hand and where to put it when a download fails.
    """
    if name not in PUBLISHED:
        raise UserError(
            "no published VQGAN is called '{}'; known: {}.{}".format(
                name, ", ".join(PUBLISHED), nearest(name, PUBLISHED)
            )
        )
    published = PUBLISHED[name]
    folder = Path(cache_dir) if cache_dir else cache_folder("dalle", holding=published.weights_name)
    weights, config = folder / published.weights_name, folder / published.config_name
    for url, path in ((published.config_url, config), (published.weights_url, weights)):
        if os.path.isfile(str(path)):
            continue
        from utils.downloads import download

        logger.info("Downloading the VQGAN %s: %s", name, path)
        try:
            download(url, path, size_limit=_MAX_DOWNLOAD[path.suffix])
        except (OSError, UserError) as error:
            reason = getattr(error, "reason", error)  # alone: its advice is part of the one below
            raise UserError(
                f"the published VQGAN {name} could not be downloaded ({reason}); fetch {published.weights_url} by "
                f"hand and save it as {weights}, and {published.config_url} as "
                f"{config}, or give --vqgan_model_path and --vqgan_config_path"
            ) from None
    return weights, config
