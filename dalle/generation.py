"""The work of generate.py: prompts in, folders of images out.

options = COMMAND.parse(["--dalle-path", "demo", "--text", "red apple"])
generate(options, load(*options.files))
"""
from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

import log
from bpe import warn_of_unknown
from dalle.completion import completion_codes, first_sampled, open_picture, parse_box, transparent_mask
from dalle.loading import Loaded, describe_checkpoint, warn_of_guidance
from dalle.outputs import PromptFolder
from dalle.pictures import FORMATS, to_pil
from dalle.reranking import Best, Candidate, ClipRanker
from data.images import BROKEN_IMAGE_ERRORS, load_image
from models.quantization import DTYPES
from sampling import SAMPLER, Batch, Graphs, Sampler, SamplingFlags, Share, complete_caption, given_codes, prime_rows
from utils.errors import UsageError, UserError
from utils.flags import ModelOptions, PartsOptions, PromptsFileOptions
from utils.options import Command, Options, again, option
from utils.prompt_lists import read_prompts as read_prompts_file

logger = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 1000  # far above any token's length: the model cannot read more


@dataclass(frozen=True)
class PromptOptions(Options, title="prompts"):
    """What to generate."""

    text: str = option("", "caption of the images; several are separated by |", metavar="PROMPT")
    prompts_file: str | None = again(PromptsFileOptions, "prompts_file")
    caption_column: str | None = again(PromptsFileOptions, "caption_column")
    gentxt: bool = option(False, "let the model complete each caption first")
    prime_image: str | None = option(None, "picture whose upper part the images keep", path=True)
    prime_rows: int | None = option(None, "rows of codes taken from --prime-image", ge=1, none="0.4375 of them",
                                    needs="prime_image")
    image: str | None = option(None, "picture to complete: the images keep all but the masked part", path=True)
    mask: str | None = option(None, "part of the picture to generate: a mask in which it is white, or left,top,"
                              "right,bottom as fractions, such as 0,0.5,1,1 for the lower half", metavar="FILE|BOX",
                              none="where --image is transparent", needs="image")


@dataclass(frozen=True)
class ResultOptions(Options, title="results"):
    """How many images to generate, which ones to keep, and where."""

    num_images: int = option(128, "images per caption", ge=1, le=10**6)
    clip_path: str | None = option(None, "rank the images by CLIP similarity to their caption: folder or name of a "
                                   "CLIP model of transformers", path=True, metavar="DIR|NAME")
    keep: int | None = option(None, "write only the best N of --num-images: by --clip-path, else by likelihood", ge=1,
                              none="all")
    outputs_dir: str = option("./outputs", "folder for the captions' folders", path=True)
    format: str = option("jpg", "image format", choices=FORMATS)
    dtype: str = option("float32", "dtype of the transformer's weights: bfloat16 takes half the memory, int8 a "
                        "quarter", choices=DTYPES)
    cuda_graphs: str = option("auto", "off: on a GPU, launch kernels step by step instead of replaying CUDA graphs",
                              choices=("auto", "off"))


@dataclass(frozen=True)
class GenerateOptions(ModelOptions, PartsOptions, PromptOptions, SamplingFlags, ResultOptions):
    """The flags of generate.py."""

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if not self.text and self.prompts_file is None:
            raise UsageError("--text: give a caption, or a file of captions with --prompts-file")
        if self.image is not None and self.prime_image is not None:
            raise UsageError("--image and --prime-image exclude each other: --mask can mark the lower rows, too")
        if self.keep is not None and self.keep > self.num_images:
            raise UsageError(f"--keep {self.keep}: only --num-images {self.num_images} are sampled per caption")


COMMAND = Command("generate.py", "Generate images from captions.", GenerateOptions)


class Caption(NamedTuple):
    """A prompt and its token ids."""

    prompt: str
    """As given."""
    text: str
    """The prompt, or its completion with --gentxt."""
    ids: list[int]
    """Token ids, at most T."""


def generate(options: GenerateOptions, prompts: Sequence[str], loaded: Loaded) -> None:
    """Sample and write the images of all prompts. Raises UserError."""
    warn_of_guidance(loaded, options.cond_scale)
    given, rows = read_completion(options, loaded), options.prime_rows
    if options.prime_image is not None:
        rows = options.prime_rows or prime_rows(loaded.config.grid)
        given = read_prime(options.prime_image, rows, loaded)
    ranker = None if options.clip_path is None else ClipRanker(options.clip_path, loaded.device)
    warn_of_unknown(loaded.tokenizer, prompts, "--text" if options.text else "--prompts-file")
    captions = [read_caption(prompt, loaded, options) for prompt in prompts]
    writer = Writer(captions, options, describe_run(loaded, options, rows), ranker)
    sample_captions(writer, loaded, given)


def read_prompts(options: GenerateOptions) -> list[str]:
    """The captions of --text and --prompts-file, stripped, without duplicates and empty ones."""
    texts = options.text.split("|")
    if options.prompts_file is not None:
        texts += [prompt.text for prompt in read_prompts_file(options.prompts_file, options.caption_column)]
    # Undecodable bytes of the command line arrive as lone surrogates, which cannot be written to files.
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip() for text in texts]
    prompts = list(dict.fromkeys(text for text in texts if text))
    if not prompts:
        flag = "--text" if options.text else "--prompts-file"
        raise UsageError(f"{flag}: no captions found")
    repeated = sum(map(bool, texts)) - len(prompts)
    if repeated:
        logger.warning("%d duplicate captions are ignored", repeated)
    return prompts


def read_prime(file: str, rows: int, loaded: Loaded) -> Tensor:
    """The codes (N,) of --prime-image in its first rows, -1 below for sampling."""
    grid = loaded.config.grid
    if rows >= grid:
        raise UsageError(
            f"--prime-rows: the model has {grid} rows of codes, so at most {grid - 1} can be given, not {rows}"
        )
    picture = _read_picture("--prime-image", file, partial(load_image, image_size=loaded.image_size))
    return given_codes(loaded, picture, rows)


def read_completion(options: GenerateOptions, loaded: Loaded) -> Tensor | None:
    """The codes (N,) of --image, -1 where --mask is marked for sampling; None without the flag."""
    if options.image is None:
        return None
    picture = _read_picture("--image", options.image)
    mask: Any = transparent_mask(picture)
    if options.mask is not None:
        mask = parse_box(options.mask) or _read_picture("--mask", os.path.expanduser(options.mask))
    if mask is None:
        raise UsageError(
            f"--image needs --mask, which says what to generate: {options.image} is not transparent"
        )
    return completion_codes(loaded, picture, mask)


def _read_picture(flag: str, file: str, read: Callable[[str], Any] = open_picture) -> Any:
    try:
        return read(file)
    except BROKEN_IMAGE_ERRORS as error:
        raise UserError(f"{flag} {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_caption(prompt: str, loaded: Loaded, options: GenerateOptions) -> Caption:
    """Turn a prompt into token ids: truncated to the text length, with a warning, or completed with --gentxt."""
    config, limit = loaded.config, _CHARACTERS_PER_TOKEN * loaded.config.text_seq_len
    shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
    ids = loaded.tokenizer.encode(prompt if len(prompt) <= limit else re.sub(r"\s+", " ", prompt)[:limit])
    if len(ids) > config.text_seq_len:
        logger.warning(
            "the model reads %d tokens of a caption: %r (%d tokens) is truncated",
            config.text_seq_len,
            shown,
            len(ids),
        )
        ids = ids[: config.text_seq_len]
    if not ids:
        logger.warning("%r has no tokens: its images are sampled without a caption", shown)
    if not options.gentxt or not (ids or config.bos):
        return Caption(prompt, prompt, ids)
    ids = complete_caption(loaded, ids, options.seed, options.sampling(config.num_text_tokens))
    text = loaded.tokenizer.decode(ids).strip()
    logger.info("completed %r: %s", shown, text)
    return Caption(prompt, text, ids)


class Writer:
    """Writes the images of each batch to their captions' folders: immediately, or at the end if ranked."""

    def __init__(
        self,
        captions: Sequence[Caption],
        options: GenerateOptions,
        about: dict[str, Any],
        ranker: ClipRanker | None = None,
    ) -> None:
        self.captions, self.options, self.about, self.ranker = captions, options, about, ranker
        self.folders: dict[int, PromptFolder] = {}  # of incomplete captions
        self.best: dict[int, Best] = {}  # of incomplete captions, if images are ranked
        self.taken: set[str] = set()

    def write(self, batch: Batch, images_per_second: float, windows: dict[str, Any]) -> None:
        """Write a batch, and the grids of captions that are now complete. windows: see `Windows.about`."""
        share, options = batch.share, self.options
        images = share.end_image - share.first_image
        for place, index in enumerate(range(share.first_prompt, share.end_prompt)):
            own = slice(place * images, (place + 1) * images)
            folder = self.folders.get(index) or self._open(index)
            if index in self.best:
                self._rank(index, batch, own)
            else:
                folder.add(batch.pixels[own], batch.seeds[own], batch.codes[own], batch.log_likelihood[own])
            if share.end_image == options.num_images:
                self._finish(index, folder, dict(windows, images_per_second=round(images_per_second, 4)))

    def _rank(self, index: int, batch: Batch, own: slice) -> None:
        """Score the images of a caption."""
        pixels, likelihood = batch.pixels[own], batch.log_likelihood[own]
        scores = likelihood
        if self.ranker is not None:
            scores = self.ranker.similarity(self.captions[index].text, [to_pil(image) for image in pixels])
        first = batch.share.first_image
        for place, score in enumerate(scores.tolist()):
            self.best[index].add(
                Candidate(
                    score,
                    first + place,
                    batch.seeds[own][place],
                    batch.codes[own][place],
                    likelihood[place],
                    pixels[place],
                )
            )

    def _finish(self, index: int, folder: PromptFolder, about: dict[str, Any]) -> None:
        ranked = self.best.pop(index).ordered() if index in self.best else []
        for candidate in ranked:
            note: dict[str, Any] = {"candidate": candidate.number}
            if self.ranker is not None:
                note["clip_score"] = candidate.score
            folder.add(
                candidate.pixels[None],
                [candidate.seed],
                candidate.codes[None],
                candidate.log_likelihood[None],
                [note],
            )
        folder.finish(**about)
        del self.folders[index]
        num = len(ranked) or self.options.num_images
        logger.info("%s: %d image%s", folder.path, num, "s" if num > 1 else "")

    def _open(self, index: int) -> PromptFolder:
        caption = self.captions[index]
        about = dict(caption=caption.text, text_tokens=caption.ids, **self.about)
        folder = PromptFolder(Path(self.options.outputs_dir), caption.prompt, self.taken, self.options.format, about)
        self.folders[index] = folder
        if self.ranker is not None or self.options.keep is not None:
            self.best[index] = Best(self.options.keep or self.options.num_images)
        return folder


def sample_captions(writer: Writer, loaded: Loaded, given: Tensor | None) -> None:
    """Sample and write all images. given: codes (N,), -1 where the model samples; None: sample all codes."""
    config, options, captions = loaded.config, writer.options, writer.captions
    text = torch.zeros(len(captions), config.text_seq_len, dtype=torch.long)
    for row, caption in zip(text, captions):
        row[: len(caption.ids)] = torch.tensor(caption.ids, dtype=torch.long)
    sampling = options.sampling(config.num_image_tokens)
    tokens = config.image_seq_len - (0 if given is None else first_sampled(given))  # steps of one image
    begin = time.perf_counter()

    def images_per_second() -> float:
        return bar.count / tokens / max(time.perf_counter() - begin, 1e-9)

    def on_token(share: Share) -> None:
        bar.update(share.num_images, 0, **{"images/s": images_per_second()})

    with log.progress(len(captions) * options.num_images * tokens, "sampling", unit="token") as bar:
        graphs = Graphs(loaded.dalle) if options.cuda_graphs == "auto" else None
        sampler = Sampler(loaded, graphs, parallel=options.parallel)
        for batch in sampler.images(
            text, options.num_images, options.batch_size, options.seed, sampling, given, on_token
        ):
            writer.write(batch, images_per_second(), sampler.windows.about)
    logger.info(f"{sampler.windows.codes_per_pass:.2f} codes of an image per pass")
    logger.info(log.throughput_line(images_per_second(), "images"))


def describe_run(loaded: Loaded, options: GenerateOptions, rows: int | None) -> dict[str, Any]:
    """What generation.json records of the run: settings (with the actual prime_rows) and the files used."""
    names = "num_images batch_size seed top_k top_p temperature cond_scale gentxt prime_image prime_rows image mask "
    names += "dtype clip_path keep format parallel"
    settings = dict({name: getattr(options, name) for name in names.split()}, prime_rows=rows)
    branches = 1 if options.cond_scale == 1 else 2
    return {
        "settings": settings,
        "device": str(loaded.device),
        "sampler": SAMPLER,
        "batch_size_changes_images": loaded.batch_changes_images(options.batch_size * branches),
        "checkpoint": describe_checkpoint(loaded, options.dalle_path),
        "tokenizer": loaded.tokenizer.identity,
        "vqgan": {"sha256": loaded.vqgan.identity},
        "torch": torch.__version__,
    }
