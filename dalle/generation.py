"""The work of generate.py: prompts in, images out, shared by several processes."""
from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

import log
from bpe import warn_of_unknown
from dalle.completion import completion_codes, open_picture, parse_box, transparent_mask
from dalle.loading import Loaded, describe_checkpoint, warn_of_guidance
from dalle.outputs import Caption, Outputs, ResultOptions
from dalle.pictures import to_pil
from dalle.reranking import ClipRanker
from data.images import BROKEN_IMAGE_ERRORS, load_image
from sampling import (
    SAMPLER,
    Batch,
    Graphs,
    Sampler,
    SamplingFlags,
    Share,
    complete_caption,
    first_sampled,
    given_codes,
    prime_rows,
)
from utils.errors import UsageError, UserError
from utils.flags import ModelOptions, PartsOptions, PromptsFileOptions
from utils.options import VERSION, Command, Options, again, option
from utils.processes import Processes
from utils.prompt_lists import read_prompts as read_prompts_file

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.5
"""At what other processes have done."""
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
        if self.layout != "tar" and "--images-per-shard" in self.given():
            raise UsageError(f"--images-per-shard has no use with --layout {self.layout}: it is for tar")
        ranked = self.keep is not None or self.clip_path is not None
        if self.layout == "tar" and ranked and (self.keep or self.num_images) > self.images_per_shard:
            raise UsageError(f"--images-per-shard {self.images_per_shard}: images of a caption that are ranked share "
                             f"a shard; give at least {self.keep or self.num_images}")


COMMAND = Command("generate.py", "Generate images from captions.", GenerateOptions)


def generate(
    options: GenerateOptions, prompts: Sequence[str], loaded: Loaded, outputs: Outputs, processes: Processes
) -> None:
    """Sample and write the images of all prompts, as far as `outputs` lacks them. Raises UserError.

    processes: those that share the work, all of which call this.
    """
    warn_of_guidance(loaded, options.cond_scale)
    given, rows = read_completion(options, loaded), options.prime_rows
    if options.prime_image is not None:
        rows = options.prime_rows or prime_rows(loaded.config.grid)
        given = read_prime(options.prime_image, rows, loaded)
    outputs.check(describe_run(loaded, options, rows, given))
    missing = outputs.missing()
    if options.resume:
        logger.info("--resume: %d of %d images are there", outputs.total - len(missing), outputs.total)
    ranker = None
    if options.clip_path is not None and len(missing):
        ranker = ClipRanker(options.clip_path, loaded.device)
    warn_of_unknown(loaded.tokenizer, prompts, "--text" if options.text else "--prompts-file")
    captions = [read_caption(prompt, loaded) for prompt in prompts]
    if options.gentxt:
        places = range(processes.rank, len(prompts), processes.size)
        own = [[place, *complete(captions[place], loaded, options)] for place in places]
        captions = [Caption(*fields) for _, *fields in sorted(processes.gather("captions", own))]
    processes.barrier("read")  # from here on files change
    outputs.begin(captions)
    sample_missing(options, loaded, outputs, missing, given, ranker)


def read_prompts(options: GenerateOptions) -> list[str]:
    """The captions of --text and --prompts-file, stripped, without duplicates and empty ones."""
    texts = options.text.split("|")
    if options.prompts_file is not None:
        texts += [prompt.text for prompt in read_prompts_file(options.prompts_file, options.caption_column)]
    texts = [clean(text) for text in texts]
    prompts = list(dict.fromkeys(text for text in texts if text))
    if not prompts:
        flag = "--text" if options.text else "--prompts-file"
        raise UsageError(f"{flag}: no captions found")
    repeated = sum(map(bool, texts)) - len(prompts)
    if repeated:
        logger.warning("%d duplicate captions are ignored", repeated)
    return prompts


def clean(prompt: str) -> str:
    """A prompt without surrounding spaces, and without lone surrogates (undecodable bytes), which files cannot hold."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


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


def token_ids(prompt: str, loaded: Loaded) -> list[int]:
    """All token ids of a prompt; of one that is far too long, those of its beginning."""
    limit = _CHARACTERS_PER_TOKEN * loaded.config.text_seq_len
    return loaded.tokenizer.encode(prompt if len(prompt) <= limit else re.sub(r"\s+", " ", prompt)[:limit])


def text_of(ids: Sequence[Sequence[int]], loaded: Loaded) -> Tensor:
    """Token ids of some prompts, each at most T, as the model reads them: (prompts, T)."""
    text = torch.zeros(len(ids), loaded.config.text_seq_len, dtype=torch.long)
    for row, own in zip(text, ids):
        row[: len(own)] = torch.tensor(own, dtype=torch.long)
    return text


def read_caption(prompt: str, loaded: Loaded) -> Caption:
    """Turn a prompt into token ids: truncated to the text length, with a warning."""
    config = loaded.config
    shown = _shown(prompt)
    ids = token_ids(prompt, loaded)
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
    return Caption(prompt, prompt, ids)


def complete(caption: Caption, loaded: Loaded, options: GenerateOptions) -> Caption:
    """--gentxt: let the model go on with a caption."""
    if not (caption.ids or loaded.config.bos):
        return caption
    ids = complete_caption(loaded, caption.ids, options.seed, options.sampling(loaded.config.num_text_tokens))
    text = loaded.tokenizer.decode(ids).strip()
    logger.info("completed %r: %s", _shown(caption.prompt), text)
    return Caption(caption.prompt, text, ids)


def _shown(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else prompt[:77] + "..."


def sample_missing(
    options: GenerateOptions,
    loaded: Loaded,
    outputs: Outputs,
    missing: Tensor,
    given: Tensor | None,
    ranker: ClipRanker | None,
) -> None:
    """Sample and write the images of these numbers, (n,), shared with the other processes.

    given: codes (N,), -1 where the model samples; None: sample all codes.
    """
    config, captions, processes = loaded.config, outputs.captions, outputs.processes
    text = text_of([caption.ids for caption in captions], loaded)
    tokens = config.image_seq_len - (0 if given is None else first_sampled(given.tolist()))  # steps of one image
    batches = missing.split(options.batch_size) if len(missing) else ()
    with Told(len(missing), tokens, processes) as told:
        graphs = Graphs(loaded.dalle) if options.cuda_graphs == "auto" else None
        sampler = Sampler(loaded, graphs, parallel=options.parallel)
        shares = (Share.of(batches[i].tolist(), options.num_images) for i in processes.share("batches", len(batches)))
        choice = options.sampling(config.num_image_tokens)
        for batch in sampler.images(
            text, options.num_images, options.batch_size, options.seed, choice, given, told.token, shares=shares
        ):
            notes = dict(sampler.windows.about, images_per_second=round(told.images_per_second, 4))
            outputs.add(batch, None if ranker is None else clip_scores(ranker, captions, batch), notes)
            told.batch(batch.share.num_images)
        told.wait()
        speed = told.images_per_second
    outputs.end(dict(sampler.windows.about, images_per_second=round(speed, 4)))
    if len(missing):
        logger.info(f"{sampler.windows.codes_per_pass:.2f} codes of an image per pass")
        logger.info(log.throughput_line(speed, "images"))


def clip_scores(ranker: ClipRanker, captions: Sequence[Caption], batch: Batch) -> list[float]:
    """The similarity of each image of a batch to its caption."""
    found: list[float] = []
    for prompt, own in itertools.groupby(range(batch.share.num_images), lambda row: batch.share.prompts[row]):
        found += ranker.similarity(captions[prompt].text, [to_pil(batch.pixels[row]) for row in own]).tolist()
    return found


class Told:
    """Progress of all processes, which the first one shows: codes as they are sampled here, images of the others."""

    def __init__(self, num_images: int, tokens: int, processes: Processes) -> None:
        self.num_images, self.tokens, self.processes = num_images, tokens, processes
        self._begin = self._looked = time.perf_counter()
        self._others = 0
        total = num_images * tokens
        self._bar = log.progress(total, "sampling", unit="token", is_main=processes.is_first)

    @property
    def images_per_second(self) -> float:
        """Of all processes, in the first one."""
        return self._bar.count / self.tokens / max(time.perf_counter() - self._begin, 1e-9)

    def token(self, share: Share, _: object = None) -> None:
        """A code of each image of a batch is sampled."""
        if time.perf_counter() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._look(self.processes.add("images of others", 0))
        self._bar.update(share.num_images, 0, **{"images/s": self.images_per_second})

    def batch(self, count: int) -> None:
        """So many images are written."""
        if not self.processes.is_first:
            self.processes.add("images of others", count)
        self.processes.add("images", count)

    def wait(self) -> None:
        """Wait until the images of all processes are written."""
        self.processes.wait("images", self.num_images, lambda _: self._look(self.processes.add("images of others", 0)))

    def _look(self, others: int) -> None:
        self._looked = time.perf_counter()
        if self.processes.is_first and others > self._others:
            self._bar.update((others - self._others) * self.tokens, 0, **{"images/s": self.images_per_second})
            self._others = others

    def __enter__(self) -> Told:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def settings_of(options: GenerateOptions) -> dict[str, Any]:
    """The flags that decide what is sampled and written."""
    names = "num_images batch_size seed top_k top_p temperature cond_scale gentxt prime_image prime_rows image mask "
    names += "dtype clip_path keep format parallel"
    settings = {name: getattr(options, name) for name in names.split()}
    return dict(settings, images_per_shard=options.images_per_shard) if options.layout == "tar" else settings


def describe_run(loaded: Loaded, options: GenerateOptions, rows: int | None, given: Tensor | None) -> dict[str, Any]:
    """What generation.json records of the run: settings (with the actual prime_rows) and the files used."""
    settings = dict(settings_of(options), prime_rows=rows)
    codes = b"" if given is None else str(given.tolist()).encode("ascii")
    branches = 1 if options.cond_scale == 1 else 2
    return {
        "settings": settings,
        "device": str(loaded.device),
        "sampler": SAMPLER,
        "batch_size_changes_images": loaded.batch_changes_images(options.batch_size * branches),
        "checkpoint": describe_checkpoint(loaded, options.dalle_path),
        "tokenizer": loaded.tokenizer.identity,
        "vqgan": {"sha256": loaded.vqgan.identity},
        "given_sha256": hashlib.sha256(codes).hexdigest() if codes else None,
        "torch": torch.__version__,
        "version": VERSION,
    }
