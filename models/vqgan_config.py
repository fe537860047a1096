"""The configuration of a VQGAN, read from and written to the YAML layouts of taming-transformers and minDALL-E."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping

import yaml

from utils.errors import UserError, nearest
from utils.files import PathLike, atomic_write
from utils.untrusted import shown
from utils.yaml_files import read_yaml

# The YAML names a class to import. It is never imported: only the end of its name is compared.
_VARIANT_OF_TARGET = {"VQModel": "vq", "VQModelInterface": "vq", "GumbelVQ": "gumbel"}
_TARGET_OF_VARIANT = {"vq": "taming.models.vqgan.VQModel", "gumbel": "taming.models.vqgan.GumbelVQ"}

#: Options of latent diffusion's encoder and decoder for which only one value is supported.
_FIXED = {"attn_type": "vanilla", "use_linear_attn": False, "tanh_out": False, "resamp_with_conv": True}

# Far above any trainable model: an untrusted file must not make us build for hours or fill the memory.
_LIMITS = {
    "num_codes": 1 << 20,
    "embed_dim": 1 << 14,
    "resolution": 1 << 14,
    "z_channels": 1 << 14,
    "ch": 1 << 14,
    "num_res_blocks": 64,
    "in_channels": 64,
    "out_ch": 64,
    "num_groups": 1 << 14,
    "patch_size": 256,
}
#: Keys of `ddconfig` that every file has, and that are fields here.
NETWORK_KEYS = ("z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks",
                "attn_resolutions")
_MAX_LEVELS = 16
_MAX_CHANNELS = 1 << 14


@dataclass(frozen=True)
class VqganConfig:
    """Architecture of a VQGAN; the defaults are those of the published f16 model with 1024 codes."""

    variant: str = "vq"
    """How features become codes: "vq" (nearest codebook entry) or "gumbel" (largest logit of a projection)."""
    num_codes: int = 1024
    """Entries in the codebook (`n_embed`)."""
    embed_dim: int = 256
    """Length of a codebook entry."""
    resolution: int = 256
    """Height and width of images in pixels."""
    z_channels: int = 256
    """Channels of the encoder's output and the decoder's input."""
    ch: int = 128
    """Channels at full resolution, before the multipliers."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier for each resolution, full resolution first; each further level halves height and width."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Feature-map heights at which every residual block is followed by self-attention."""
    in_channels: int = 3
    """Channels of the input image."""
    out_ch: int = 3
    """Channels of the output image."""
    dropout: float = 0.0
    """Dropout probability inside residual blocks (training only)."""
    num_groups: int = 32
    """Groups of every GroupNorm. Published models all have 32 without stating it; small models may need fewer."""
    patch_size: int = 1
    """Side of the pixel squares folded into channels before the first convolution, and back after the last; published
    models have 1. With 2 no layer runs at full resolution, where a small model spends most of its time."""

    def __post_init__(self) -> None:
        if self.variant not in _TARGET_OF_VARIANT:
            raise UserError(f"VQGAN configuration: variant '{self.variant}' is not one of vq, gumbel")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise UserError(
                    f"VQGAN configuration: {name} must be a positive whole number, {limit} at most, not {shown(value)}"
                )
        if (self.in_channels, self.out_ch) != (3, 3):
            raise UserError(
                f"VQGAN configuration: in_channels {self.in_channels}, out_ch {self.out_ch}: only models of colour "
                "images (3 and 3) are supported; they also take greyscale images"
            )
        for name in ("ch_mult", "attn_resolutions"):
            values = getattr(self, name)
            if not all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values):
                raise UserError(f"VQGAN configuration: {name} must list positive whole numbers")
            if len(values) > _MAX_LEVELS:
                raise UserError(f"VQGAN configuration: {name} lists more than {_MAX_LEVELS} levels")
        if not self.ch_mult:
            raise UserError("VQGAN configuration: ch_mult must list at least one level")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"VQGAN configuration: dropout must be in [0, 1), not {shown(self.dropout)}")
        if self.resolution % self.downsampling:
            raise UserError(
                f"VQGAN configuration: resolution {self.resolution} is not a multiple of {self.downsampling}, the "
                "pixels per code along one side from ch_mult and patch_size"
            )
        for multiplier in (1, *self.ch_mult):
            if self.ch * multiplier > _MAX_CHANNELS:
                raise UserError(
                    f"VQGAN configuration: {self.ch * multiplier} channels (ch * ch_mult) are more than {_MAX_CHANNELS}"
                )
            if self.ch * multiplier % self.num_groups:
                raise UserError(
                    f"VQGAN configuration: {self.ch * multiplier} channels (ch * ch_mult) do not split into "
                    f"{self.num_groups} GroupNorm groups; set ddconfig.num_groups"
                )
        if self.variant == "gumbel" and self.embed_dim != self.z_channels:
            raise UserError("VQGAN configuration: the gumbel variant needs embed_dim equal to z_channels")

    @property
    def downsampling(self) -> int:
        """Pixels per code along one side (8 for an f8 model, 16 for f16)."""
        return self.patch_size * 2 ** (len(self.ch_mult) - 1)

    def height(self, level: int) -> int:
        """Height of the feature maps of a level (0 is the finest)."""
        return self.resolution // self.patch_size // 2**level

    @property
    def grid(self) -> int:
        """Codes along one side of an image of `resolution` pixels."""
        return self.resolution // self.downsampling

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], source: str = "VQGAN configuration") -> VqganConfig:
        """Build the configuration from a parsed taming-transformers document `{"model": {"target", "params"}}`.

        Models built on a VQGAN (latent diffusion, taming-transformers' Net2NetTransformer) have it as
        "first_stage_config". A document with the key "stage1" instead is minDALL-E's config.yaml. Keys about training
        or data are ignored. Raises UserError naming `source` and the key.
        """
        if "stage1" in document and "model" not in document:
            return stage1_config(document, source)
        model, where = _mapping(document, "model", source), f"{source}: model"
        outer = model.get("params")
        if isinstance(outer, dict) and isinstance(outer.get("first_stage_config"), dict):
            model, where = outer["first_stage_config"], f"{where}.params.first_stage_config"
        target = model.get("target")
        target = target[:200] if isinstance(target, str) else shown(target)
        variant = next((v for name, v in _VARIANT_OF_TARGET.items() if target.split(".")[-1] == name), None)
        if variant is None:
            raise UserError(f"{where}.target '{target}' ends in none of {', '.join(_VARIANT_OF_TARGET)}")
        params = _mapping(model, "params", where)
        network = _mapping(params, "ddconfig", where + ".params")
        if network.get("double_z"):
            raise UserError(f"{where}.params.ddconfig.double_z is true: this is an autoencoder without a codebook")
        if params.get("remap") is not None:
            raise UserError(f"{where}.params.remap renumbers the codes, which is not supported; use a model without it")
        for key, value in _FIXED.items():
            if network.get(key) not in (None, value):
                raise UserError(f"{where}.params.ddconfig.{key} can only be {value}, not {shown(network[key])}")
        values: dict[str, Any] = {"variant": variant}
        for name, key in (("num_codes", "n_embed"), ("embed_dim", "embed_dim")):
            values[name] = _required(params, key, where + ".params")
        for key in NETWORK_KEYS:
            values[key] = _required(network, key, where + ".params.ddconfig")
        for key in ("dropout", "num_groups", "patch_size"):
            if network.get(key) is not None:
                values[key] = network[key]
        for key in ("ch_mult", "attn_resolutions"):
            if not isinstance(values[key], (list, tuple)):
                raise UserError(f"{where}.params.ddconfig.{key} must be a list")
            values[key] = tuple(values[key])
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, path: PathLike) -> VqganConfig:
        """Read a YAML file of either layout. Raises UserError when it is missing, malformed or incomplete."""
        return cls.from_dict(read_yaml(path, "VQGAN configuration"), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the taming-transformers document that `from_dict` reads back to an equal configuration."""
        network: dict[str, Any] = {"double_z": False}
        for key in (*NETWORK_KEYS, "dropout"):
            value = getattr(self, key)
            network[key] = list(value) if isinstance(value, tuple) else value
        # Our own keys are omitted if they have the value of all published models.
        for key, usual in (("num_groups", 32), ("patch_size", 1)):
            if getattr(self, key) != usual:
                network[key] = getattr(self, key)
        params = {"embed_dim": self.embed_dim, "n_embed": self.num_codes, "ddconfig": network}
        return {"model": {"target": _TARGET_OF_VARIANT[self.variant], "params": params}}

    def to_yaml(self, path: PathLike) -> None:
        """Write the configuration for `from_yaml`, atomically."""
        with atomic_write(path) as file:
            yaml.safe_dump(self.to_dict(), file, sort_keys=False, default_flow_style=None)


def stage1_config(document: Mapping[str, Any], source: str) -> VqganConfig:
    """Read the VQGAN's options from minDALL-E's config.yaml (as a dictionary), where every key may be absent: those of
    its published VQGAN are the defaults here, but for the number of codes.

    Raises UserError naming `source` and the key.
    """
    stage = document.get("stage1") or {}
    hparams = (stage.get("hparams") or {}) if isinstance(stage, Mapping) else None
    if not isinstance(stage, Mapping) or not isinstance(hparams, Mapping):
        raise UserError(f"{source}: stage1 and its hparams must be tables of options")
    if stage.get("type", "vqgan") != "vqgan":
        raise UserError("{}: stage1.type {} is not supported; known: vqgan".format(source, shown(stage["type"])))
    network = {key: getattr(VqganConfig, key) for key in NETWORK_KEYS}
    network.update((str(key), value) for key, value in hparams.items() if key != "pdrop")
    params = {
        "embed_dim": stage.get("embed_dim", 256),
        "n_embed": stage.get("n_embed", 16384),
        "ddconfig": network,
    }
    return VqganConfig.from_dict({"model": {"target": "VQModel", "params": params}}, source + ": stage1")


def stage1_options(config: VqganConfig) -> dict[str, Any]:
    """Return the table "stage1" that `stage1_config` reads back to an equal configuration, except for dropout.

    Raises UserError for a variant that minDALL-E does not have.
    """
    if config.variant != "vq":
        raise UserError(f"minDALL-E's layout has no VQGAN of the variant {config.variant}; use one of vq")
    params = config.to_dict()["model"]["params"]
    hparams = {key: value for key, value in params["ddconfig"].items() if key != "dropout"}
    return {
        "type": "vqgan",
        "embed_dim": config.embed_dim,
        "n_embed": config.num_codes,
        "hparams": dict(hparams, pdrop=config.dropout),
    }


_SMALL = VqganConfig(
    num_codes=512,
    embed_dim=32,
    resolution=64,
    z_channels=32,
    ch=16,
    ch_mult=(2, 4),
    num_res_blocks=1,
    attn_resolutions=(),
    num_groups=8,
    patch_size=4,
)
DEMO_CONFIGS: dict[str, VqganConfig] = {
    "f8_demo": _SMALL,
    "f16_demo": replace(_SMALL, num_codes=2048, ch_mult=(3, 4, 5)),
}
"""Small models for 64x64 images on a CPU: with patches of 4x4 pixels no layer runs above 16x16."""


def _mapping(document: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{source}: the mapping '{key}' is missing.{_nearest(key, document)}")
    return value


def _required(document: Mapping[str, Any], key: str, source: str) -> Any:
    value: Any | None = document.get(key)
    if value is None:
        raise UserError(f"{source}: the key '{key}' is missing.{_nearest(key, document)}")
    return value


def _nearest(key: str, document: Mapping[str, Any]) -> str:
    return nearest(key, [name[:100] for name in list(document)[:100] if isinstance(name, str)])
