"""Load everything for sampling from a checkpoint's path: the DALL-E, its tokenizer and its VQGAN.

loaded = load("demo")                        # the model that comes with this repository
loaded = load("output/ckpt/dalle_799.pt")    # tokenizer and VQGAN: those it was trained with, if found
"""
from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch

from bpe import Tokenizer, load_tokenizer
from checkpoints import DalleCheckpoint, read_dalle
from checkpoints.deepspeed import AUXILIARY
from checkpoints.reading import weights_file
from checkpoints.vqgan import PUBLISHED, build_vqgan, default_vqgan, load_vqgan, load_vqgan_state
from dalle import published
from models.building import build_dalle
from models.config import DalleConfig
from models.dalle import DalleModel
from models.quantization import DTYPES
from models.vqgan import VQGAN, VqganConfig
from models.vqgan_config import stage1_config
from sampling.native import refusal
from utils.errors import UsageError, UserError, nearest
from utils.files import PathLike, sha256_file

logger = logging.getLogger(__name__)

DEMO = "demo"
"""The --dalle-path of the shipped model; write "./demo" for a file of this name."""

DEMO_PROMPTS = (
    "red apple", "grinning cat", "jack-o-lantern", "pizza", "octopus", "rainbow", "wolf", "flag: Italy",
    "woman astronaut: dark skin tone", "snowman",
)  # fmt: skip
"""Captions that the shipped model knows."""

ROOT = Path(__file__).resolve().parent.parent
_DEMO_DALLE = ROOT / "models" / "demo" / "dalle.safetensors"
_DEMO_VQGAN = ROOT / "models" / "demo" / "vqgan.safetensors"
_DEMO_VQGAN_CONFIG = ROOT / "models" / "demo" / "vqgan.yaml"
_DEMO_VOCABULARY = ROOT / "bpe" / "demo_vocab.txt"


class Loaded(NamedTuple):
    """A model ready for sampling: on one device, in eval mode, without gradients, the VQGAN in float32."""

    dalle: DalleModel
    vqgan: VQGAN
    tokenizer: Tokenizer
    checkpoint: DalleCheckpoint
    """The checkpoint without its tensors."""

    @property
    def config(self) -> DalleConfig:
        """Shape and options of the DALL-E."""
        return self.dalle.config

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.dalle.text_emb.weight.device

    def batch_changes_images(self, rows: int) -> bool:
        """Whether images may depend on the batch size, by rounding of logits. rows: images, twice that with guidance.

        With native kernels (on a CPU, up to 96 rows) they do not.
        """
        return refusal(self.dalle, rows) is not None

    @property
    def image_size(self) -> int:
        """Height and width of its images in pixels. The code grid may differ from the VQGAN's own."""
        return self.config.grid * self.vqgan.config.downsampling


def load(
    dalle_path: PathLike,
    bpe_path: PathLike | None = None,
    vqgan_model_path: PathLike | None = None,
    vqgan_config_path: PathLike | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
) -> Loaded:
    """Load a checkpoint in any layout that `checkpoints` reads, or "demo", the shipped model.

    "minDALL-E/1.3B" is the published model, which is downloaded; a folder in its layout has its own vocabulary and
    VQGAN. Otherwise, bpe_path None: the vocabulary the model was trained with, identified by its sha256, if found (at
    the recorded path, in this repository or next to the checkpoint), else the CLIP vocabulary. vqgan_model_path and
    vqgan_config_path None: the VQGAN in the checkpoint, or the one it was trained with if found, else the published
    f16-1024 model, which is downloaded. Arguments take precedence; a warning says if they are not what the model was
    trained with. Averaged weights (EMA) are used if the checkpoint has them.
    dtype: of the DALL-E's weights, one of models.quantization.DTYPES. Peak memory is the weights in the file and one or
    two tensors.

    Raises UserError naming the flag when something is missing or does not match.
    """
    if dtype not in DTYPES:
        raise UsageError("--dtype {}: expected one of {}".format(dtype, ", ".join(DTYPES)))
    if str(dalle_path) == DEMO:
        _check_demo()
        dalle_path, bpe_path = _DEMO_DALLE, bpe_path or _DEMO_VOCABULARY
        if vqgan_model_path is None and vqgan_config_path is None:
            vqgan_model_path, vqgan_config_path = _DEMO_VQGAN, _DEMO_VQGAN_CONFIG
    dalle_path = published.resolve(dalle_path)
    _check_exists(Path(dalle_path))
    checkpoint = read_dalle(dalle_path, for_sampling=True)
    path = checkpoint.path
    config = DalleConfig.from_dict(checkpoint.config)
    tokenizer = _open_tokenizer(bpe_path, checkpoint)
    # minDALL-E's table may be larger than its vocabulary: it has no pad ids after the vocabulary.
    spare = 0 if config.unique_pads else max(config.num_text_tokens - tokenizer.vocab_size, 0)
    if tokenizer.vocab_size + spare != config.num_text_tokens:
        raise UserError(
            f"--bpe-path {bpe_path or '(the CLIP vocabulary, by default)'}: this vocabulary has {tokenizer.vocab_size} "
            f"entries, but the model of --dalle-path {path} was trained with {config.num_text_tokens}; give the "
            "vocabulary it was trained with"
        )
    vqgan = _open_vqgan(vqgan_model_path, vqgan_config_path, checkpoint)
    if vqgan.num_codes != config.num_image_tokens:
        raise UserError(
            f"--vqgan-model-path {vqgan_model_path or '(by default)'}: this VQGAN has {vqgan.num_codes} codes, but the "
            f"model of --dalle-path {path} was trained with {config.num_image_tokens}; give that one"
        )
    if vqgan.grid != config.grid:
        own, used = vqgan.grid, config.grid
        logger.info("the VQGAN was trained with %dx%d codes and is used with %dx%d", own, own, used, used)
    weights = checkpoint.weights if checkpoint.ema is None else checkpoint.ema
    dalle = build_dalle(config, weights, dtype=dtype).to(device).eval().requires_grad_(False)
    options = {"config": (checkpoint.training or {}).get("config")}
    about = checkpoint._replace(
        weights={}, vqgan_weights=None, ema=None, opt_state=None, scheduler_state=None, training=options
    )
    return Loaded(dalle, vqgan.to(device), tokenizer, about)


def describe_checkpoint(loaded: Loaded, name: PathLike) -> dict[str, Any]:
    """What results say of the checkpoint they come from. name: as it was given."""
    checkpoint = loaded.checkpoint
    return {
        "name": str(name),
        "sha256": sha256_file(checkpoint.path),
        "format": checkpoint.format,
        "epoch": checkpoint.epoch,
    }


def knows_guidance(loaded: Loaded) -> bool:
    """Whether the model was trained with missing captions, or its checkpoint does not say."""
    options = (loaded.checkpoint.training or {}).get("config")
    return not (isinstance(options, dict) and options.get("null_cond_prob") == 0)


def warn_of_guidance(loaded: Loaded, cond_scale: float) -> None:
    """Warn of guidance with a model whose checkpoint says that it was not trained for it."""
    if cond_scale != 1 and not knows_guidance(loaded):
        logger.warning("--cond-scale %g: the model was trained with --null-cond-prob 0 and never saw a missing "
                       "caption, so guidance may only distort images", cond_scale)


def _check_exists(path: Path) -> None:
    """Raise UserError, with a suggestion, for a path without a model."""
    names = [DEMO, *published.PUBLISHED_MODELS]
    if not path.exists():
        raise UserError(
            "--dalle-path {}: no such file, folder or published model.{} Known names: {}".format(
                path, nearest(str(path), names), ", ".join(names)
            )
        )
    if weights_file(path).is_dir():
        raise UserError(
            f"--dalle-path {path}: not a folder in minDALL-E's layout (it lacks {published.STAGE2}) or of a DeepSpeed "
            f"run (it lacks {AUXILIARY}); for other folders, give one of the checkpoint files"
        )


def _lacks(path: Path, name: str, flags: str) -> UserError:
    return UserError(f"{path.parent} lacks {name}: put it there, or give {flags}")


def _check_demo() -> None:
    for path in (_DEMO_DALLE, _DEMO_VQGAN, _DEMO_VQGAN_CONFIG, _DEMO_VOCABULARY):
        if not path.is_file():
            raise UserError(
                f"--dalle-path demo: {path.relative_to(ROOT)} is missing, which comes with the repository; get a "
                "complete copy, or train a model with `bash run_train.sh` and give its checkpoint"
            )


def recorded_files(checkpoint: DalleCheckpoint, part: str) -> dict[str, str]:
    """The sha256 and paths of "tokenizer" or "vqgan" in the checkpoint. Only strings: the file is untrusted."""
    table: Any = checkpoint.identity.get(part)
    return (
        {key: value for key, value in table.items() if isinstance(value, str) and value}
        if isinstance(table, dict)
        else {}
    )


def _places(recorded: str, checkpoint_path: Path) -> Iterator[Path]:
    """Where a recorded file may be now: as recorded, in this repository, next to the checkpoint."""
    yield Path(recorded).expanduser()
    yield ROOT / recorded
    yield checkpoint_path.parent / Path(recorded).name


# Tokenizer -----------------------------------------------------------------------------------------------------------


def _open_tokenizer(given: PathLike | None, checkpoint: DalleCheckpoint) -> Tokenizer:
    path = checkpoint.path
    recorded = recorded_files(checkpoint, "tokenizer")
    sha256 = recorded.get("sha256")
    if given is not None:
        tokenizer = load_tokenizer(str(given))
        if sha256 and tokenizer.identity["sha256"] != sha256:
            logger.warning(
                "--bpe-path %s is not the vocabulary that %s was trained with: its ids may mean other words",
                given,
                path,
            )
        return tokenizer
    if checkpoint.format == "mindalle":
        if not (path.parent / published.TOKENIZER).is_dir():
            raise _lacks(path, published.TOKENIZER + "/", "--bpe-path")
        return load_tokenizer(str(path.parent / published.TOKENIZER))
    candidates: list[Path] = []
    if sha256:
        candidates += _places(recorded["path"], path) if recorded.get("path") else ()
        candidates += sorted((ROOT / "bpe").glob("*.txt"))
    for candidate in candidates:
        try:
            tokenizer = load_tokenizer(str(candidate)) if candidate.exists() else None
        except UserError:
            continue  # replaced by another file
        if tokenizer is not None and tokenizer.identity["sha256"] == sha256:
            logger.info("vocabulary: %s", candidate)
            return tokenizer
    tokenizer = load_tokenizer(None)
    if sha256 and tokenizer.identity["sha256"] != sha256:
        raise UserError(
            "the vocabulary that {} was trained with ({}) is not found: give it with --bpe-path".format(
                path, recorded.get("path") or "sha256 " + sha256[:80]
            )
        )
    return tokenizer


# VQGAN ---------------------------------------------------------------------------------------------------------------


def _open_vqgan(weights: PathLike | None, config: PathLike | None, checkpoint: DalleCheckpoint) -> VQGAN:
    path = checkpoint.path
    recorded = recorded_files(checkpoint, "vqgan")
    sha256 = recorded.get("sha256")
    if weights is not None:
        if config is None:
            raise UsageError("--vqgan-model-path needs --vqgan-config-path, the YAML file that belongs to it")
        vqgan = load_vqgan(weights, config)
        if sha256 and vqgan.identity != sha256:
            logger.warning(
                "--vqgan-model-path %s is not the VQGAN that %s was trained with: its codes may mean other images",
                weights,
                path,
            )
        return vqgan
    if checkpoint.vqgan_weights is not None:
        return _stored_vqgan(checkpoint, config)
    if config is not None:
        raise UsageError("--vqgan-config-path needs --vqgan-model-path, the weights that belong to it")
    if checkpoint.format == "mindalle":
        stage1 = path.parent / published.STAGE1
        if not stage1.is_file():
            raise _lacks(path, published.STAGE1, "--vqgan-model-path and --vqgan-config-path")
        described, where = _stage1_config(checkpoint)
        vqgan = build_vqgan(described, load_vqgan_state(stage1), f"{stage1}, described by {where}")
        vqgan.identity = sha256_file(stage1)
        return vqgan
    if sha256:
        for place, place_config in _vqgan_places(recorded, path):
            if place.is_file() and place_config.is_file() and sha256_file(place) == sha256:
                logger.info("VQGAN: %s", place)
                return load_vqgan(place, place_config)
        # A published VQGAN can be downloaded; another one has to be given.
        names = [model.weights_name for model in PUBLISHED.values()]
        if Path(recorded.get("weights", "")).name not in ["", *names]:
            raise UserError(
                "the VQGAN that {} was trained with ({}) is not found: give it with --vqgan-model-path and "
                "--vqgan-config-path".format(path, recorded["weights"])
            )
    vqgan = load_vqgan(*default_vqgan(name=_published_name(recorded)))
    if sha256 and vqgan.identity != sha256:
        logger.warning(
            "the published VQGAN is not the one that %s was trained with; give that one with --vqgan-model-path",
            path,
        )
    return vqgan


def _vqgan_places(recorded: dict[str, str], path: Path) -> Iterator[tuple[Path, Path]]:
    if recorded.get("weights") and recorded.get("config"):
        yield from zip(_places(recorded["weights"], path), _places(recorded["config"], path))
    yield _DEMO_VQGAN, _DEMO_VQGAN_CONFIG


def _published_name(recorded: dict[str, str]) -> str:
    """The published VQGAN of a recorded path, else f16-1024, the default."""
    file_name = Path(recorded.get("weights", "")).name
    return next((name for name, model in PUBLISHED.items() if model.weights_name == file_name), "f16-1024")


def _stage1_config(checkpoint: DalleCheckpoint) -> tuple[VqganConfig, str]:
    """The VQGAN's options in minDALL-E's layout, with the published model's as defaults, and where they are from."""
    where = str(checkpoint.path.parent / "config.yaml")
    return stage1_config(checkpoint.hparams, where), where


def _stored_vqgan(checkpoint: DalleCheckpoint, config_path: PathLike | None) -> VQGAN:
    """Build the VQGAN in the checkpoint: from its YAML, else as the published model with the same shapes."""
    weights, inside = checkpoint.vqgan_weights or {}, f"the VQGAN inside {checkpoint.path}"
    if config_path is not None:
        described = VqganConfig.from_yaml(config_path)
        return build_vqgan(described, weights, f"{inside}, described by --vqgan-config-path {config_path}")
    if checkpoint.format == "mindalle":
        described, where = _stage1_config(checkpoint)
        return build_vqgan(described, weights, f"{inside}, described by {where}")
    for model in PUBLISHED.values():
        with contextlib.suppress(UserError):
            return build_vqgan(model.config, weights, inside)
    raise UserError(f"{inside} is not a published one: give its YAML file with --vqgan-config-path")
