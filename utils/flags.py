"""Options that several commands share, each declared once; `utils.options.again` adds one to another table."""
from __future__ import annotations

from dataclasses import dataclass

from utils.options import REQUIRED, Options, again, option
from utils.resume import FREE


@dataclass(frozen=True)
class DeviceOptions(Options, title="device"):
    """Where and how to compute."""

    device: str = option("auto", "where to compute; auto: cuda if available, else cpu",
                         choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads; 0: as PyTorch chooses", ge=0)
    matmul_precision: str | None = option(None, "precision of float32 matmuls, as in "
                                          "torch.set_float32_matmul_precision: highest (float32), high (TF32 on a "
                                          "GPU, 16 bits on a CPU with AMX), medium (bfloat16)",
                                          none="high on a GPU, highest on a CPU", choices=("highest", "high", "medium"))


@dataclass(frozen=True)
class ModelOptions(Options, title="model"):
    """Which model to load, and onto which device."""

    dalle_path: str = option(REQUIRED, "checkpoint of the model, folder in minDALL-E's layout or minDALL-E/1.3B; demo: "
                             "the one that comes with this repository", path=True)
    device: str = again(DeviceOptions, "device")


@dataclass(frozen=True)
class PartsOptions(Options, title="vocabulary and VQGAN"):
    """Vocabulary and VQGAN: arguments of `dalle.loading.load`."""

    bpe_path: str | None = option(None, "vocabulary of YouTokenToMe, tokenizer.json of Hugging Face, or list of "
                                  "classes", none="the one the model was trained with, if found, else CLIP's",
                                  path=True)
    vqgan_model_path: str | None = option(None, "weights of the VQGAN (.ckpt or .safetensors)", path=True,
                                          none="those the model was trained with, if found, else the "
                                          "published f16-1024 model, downloaded")
    vqgan_config_path: str | None = option(None, "YAML file of the VQGAN", path=True, none="that of its weights")


@dataclass(frozen=True)
class DataOptions(Options, title="data"):
    """Which images and captions to read."""

    input_folder: str = option(REQUIRED, "folder of images and captions, webdataset shards such as "
                               "'DIR/{00000..00099}.tar', or 'demo' for the built-in set", path=True)
    max_bad_fraction: float = option(0.01, "fraction of the data that may be skipped because it is unreadable; "
                                     "skipped.jsonl next to the results lists it", ge=0, le=1)
    dataloader_workers: int = option(0, "processes that read data", ge=0, le=1024)


@dataclass(frozen=True)
class NetworkOptions(Options):
    """The networks that metrics of images need."""

    inception_weights: str | None = option(None, "Inception network in torch-fidelity's layout", path=True,
                                           none="the published one, downloaded")
    clip_path: str | None = option(None, "folder or name of a CLIP model of transformers", path=True,
                                   metavar="DIR|NAME")


@dataclass(frozen=True)
class EvaluationConfig(Options, title="evaluation while training"):
    """Images and metrics of held-out pairs while train.py runs."""

    evaluate_every: int = option(0, "optimizer steps between evaluations: validation loss, images of some held-out "
                                 "captions, metrics; 0: none", ge=0, resume=FREE)
    evaluate_captions: int = option(8, "captions, always the same ones, of which images are sampled", ge=1, le=64,
                                    needs="evaluate_every", resume=FREE)
    evaluate_images: int = option(256, "images to sample for FID and KID (--inception-weights), the CLIP score "
                                  "(--clip-path) and retrieval (on the demo set); 0: none", ge=0, le=10000,
                                  needs="evaluate_every", resume=FREE)
    inception_weights: str | None = again(NetworkOptions, "inception_weights", none="no FID, no KID",
                                          needs="evaluate_every", resume=FREE)
    clip_path: str | None = again(NetworkOptions, "clip_path", none="no CLIP score", needs="evaluate_every",
                                  resume=FREE)


@dataclass(frozen=True)
class ShardOptions(Options, title="data"):
    """Which entries of webdataset shards to read."""

    shard_images: str | None = option(None, "suffixes of the images in shards, comma-separated (img,jpg)",
                                      none="those of image folders, and img")


@dataclass(frozen=True)
class CaptionOptions(Options):
    """How a list of captions is read (utils/caption_lists.py)."""

    caption_column: str | None = option(None, "column or JSON key of the caption, or its number in a table without a "
                                        "header", none="the usual names")


@dataclass(frozen=True)
class PromptsFileOptions(Options, title="prompts"):
    """Which file prompts are read from (utils/prompt_lists.py)."""

    prompts_file: str | None = option(None, "file of prompts: one a line, or a list in JSON, CSV or TSV, such as "
                                      "those of GenEval, DrawBench and PartiPrompts", path=True)
    caption_column: str | None = again(CaptionOptions, "caption_column", needs="prompts_file")
