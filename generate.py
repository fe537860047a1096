"""Draw images from captions with a trained model.

    python generate.py --dalle_path demo --text "woman astronaut: medium-dark skin tone" --num_images 16
    python generate.py --dalle_path output/ckpt/dalle_799.pt --text "a plate of food|a cat on a sofa" --batch_size 16

    python generate.py --dalle_path demo --text "woman astronaut" --num_images 64 --clip_path CLIP_FOLDER --keep 8
    python generate.py --dalle_path demo --text "a red ball" --image ball.png --mask 0,0.5,1,1 --num_images 8

Images go to <outputs_dir>/<prompt with _ for blanks>/: 0.jpg, 1.jpg, ..., caption.txt, grid.png and generation.json.
"""
from __future__ import annotations

import argparse
import logging
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import torch
from PIL import Image
from torch import Tensor

import log
from args import Parser
from bpe import warn_of_unknown
from dalle.completion import completion_codes, first_drawn, open_picture, parse_box, transparent_mask
from dalle.loading import Loaded, load
from dalle.outputs import PromptFolder, check_folders
from dalle.pictures import FORMATS, to_pil
from dalle.reranking import Best, Candidate, ClipRanker
from data.images import BROKEN_IMAGE_ERRORS, load_image
from engines.native import pick_device
from models.quantization import DTYPES
from sampling import (
    COND_SCALES,
    TEMPERATURES,
    Batch,
    Graphs,
    Sampler,
    SamplingOptions,
    Share,
    complete_caption,
    given_codes,
    prime_rows,
    top_k_count,
)
from utils.errors import UsageError, UserError, run_main
from utils.files import sha256_file
from utils.flags import add_model_flags, number, parse_flags, path, share_or_count, whole

logger = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 1000  # far above any token's length: what lies behind can not be read by the model


class Caption(NamedTuple):
    """A prompt as the model reads it."""

    prompt: str
    """As it was given."""
    text: str
    """The prompt, or with --gentxt the caption it became."""
    ids: list[int]
    """Token ids, at most T."""


def make_parser() -> Parser:
    """The flags of generate.py."""
    parser = Parser(
        prog="generate.py",
        usage="%(prog)s --dalle_path FILE --text PROMPT [flags]",
        description="Draw images from captions.",
        epilog="Flags may be spelled with _ or -.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120),
    )
    add_model_flags(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--text", metavar="PROMPT", help="caption to draw; several are separated by |")
    prompts.add_argument(
        "--prompts_file",
        type=path,
        metavar="FILE",
        help="file with a caption on each line, instead of --text or in addition",
    )
    prompts.add_argument("--gentxt", action="store_true", help="let the model complete each caption before it draws")
    prompts.add_argument(
        "--prime_image", type=path, metavar="FILE", help="picture whose upper part the images take over"
    )
    prompts.add_argument(
        "--prime_rows",
        type=whole(1),
        metavar="N",
        help="rows of codes taken from --prime_image (default: 0.4375 of them)",
    )
    prompts.add_argument(
        "--image", type=path, metavar="FILE", help="picture of which the images keep all but the masked part"
    )
    prompts.add_argument(
        "--mask",
        metavar="FILE|BOX",
        help="part of --image to draw anew: a picture in which it is white, or left,top,right,bottom as fractions, "
        "such as 0,0.5,1,1 for the lower half (default: where --image is transparent)",
    )
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--num_images", type=whole(1, 10**6), default=128, metavar="N", help="images of each caption (default: 128)"
    )
    drawing.add_argument(
        "--batch_size", type=whole(1, 65536), default=4, metavar="N", help="images drawn at the same time (default: 4)"
    )
    drawing.add_argument(
        "--top_k",
        type=share_or_count,
        default=0.99,
        metavar="K",
        help="below 1: share of the likeliest codes that is NOT taken into account; from 1 on: number of the "
        "likeliest codes that are; 0: all are (default: 0.99)",
    )
    drawing.add_argument(
        "--top_p",
        type=number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="take the likeliest codes up to this probability (default: 1, all)",
    )
    drawing.add_argument(
        "--temperature",
        type=number(*TEMPERATURES),
        default=1.0,
        metavar="T",
        help="below 1 more likely, above 1 more varied images; 0: always the likeliest code (default: 1)",
    )
    drawing.add_argument(
        "--cond_scale",
        type=number(*COND_SCALES),
        default=1.0,
        metavar="S",
        help="weight of the caption (classifier-free guidance) for models trained with --null-cond-prob; "
        "1 (default): none",
    )
    drawing.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=42,
        metavar="N",
        help="image i is the same for the same seed, whatever the batch size (up to 96, with guidance 48) in float32 "
        "and int8 on a CPU; in bfloat16 and on a GPU rounding depends on it (default: 42)",
    )
    drawing.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="how the transformer's weights are kept: bfloat16 takes half the memory, int8 a quarter "
        "(default: float32)",
    )
    drawing.add_argument(
        "--cuda_graphs",
        choices=("auto", "off"),
        default="auto",
        help="off: on a GPU too, ask for each step anew instead of replaying recorded ones (default: auto)",
    )
    drawing.add_argument(
        "--clip_path",
        type=path,
        metavar="DIR|NAME",
        help="order the images by how well they fit their caption: folder or name of a CLIP model of transformers",
    )
    drawing.add_argument(
        "--keep",
        type=whole(1),
        metavar="N",
        help="write only the best N of --num_images: by --clip_path, else the likeliest (default: all)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--outputs_dir",
        type=path,
        default="./outputs",
        metavar="DIR",
        help="where the folders of the captions go (default: ./outputs)",
    )
    output.add_argument("--format", choices=FORMATS, default="jpg", help="of the images (default: jpg)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    options = parse_flags(make_parser(), argv)
    check_options(options)
    log.setup()
    prompts = read_prompts(options)
    make_folder(options.outputs_dir)
    check_folders(Path(options.outputs_dir), prompts)
    loaded = load(
        options.dalle_path,
        options.bpe_path,
        options.vqgan_model_path,
        options.vqgan_config_path,
        pick_device(options.device, 0),
        options.dtype,
    )
    given = read_prime(options, loaded) if options.image is None else read_completion(options, loaded)
    ranker = None if options.clip_path is None else ClipRanker(options.clip_path, loaded.device)
    warn_of_unknown(loaded.tokenizer, prompts, "--prompts_file" if options.text is None else "--text")
    captions = [read_caption(prompt, loaded, options) for prompt in prompts]
    draw_captions(captions, loaded, options, given, ranker)


def check_options(options: argparse.Namespace) -> None:
    """Checks over several flags."""
    if options.text is None and options.prompts_file is None:
        raise UsageError("--text: give a caption to draw, or a file of captions with --prompts_file")
    if options.prime_rows is not None and options.prime_image is None:
        raise UsageError("--prime_rows needs --prime_image, the picture the rows are taken from")
    if options.mask is not None and options.image is None:
        raise UsageError("--mask needs --image, the picture whose other parts are kept")
    if options.image is not None and options.prime_image is not None:
        raise UsageError("--image and --prime_image exclude each other: --mask can mark the lower rows, too")
    if options.keep is not None and options.keep > options.num_images:
        raise UsageError(
            f"--keep {options.keep}: only --num_images {options.num_images} are drawn of each caption"
        )


def make_folder(folder: str) -> None:
    """Make --outputs_dir now: a run of hours must not end at its first image."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outputs_dir {folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--outputs_dir {folder}: no permission to write there")


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The captions of --text and --prompts_file without surrounding blanks, each once, empty ones left out."""
    texts = [] if options.text is None else options.text.split("|")
    if options.prompts_file is not None:
        try:
            texts += Path(options.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"--prompts_file {options.prompts_file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompts_file {options.prompts_file} is no UTF-8 text (byte {error.start})"
            ) from error
    # Bytes of the command line that are no text arrive as lone surrogates, which no file can hold.
    texts = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip() for text in texts]
    prompts = list(dict.fromkeys(text for text in texts if text))
    if not prompts:
        raise UsageError("{}: there is no caption in it".format("--prompts_file" if options.text is None else "--text"))
    repeated = sum(map(bool, texts)) - len(prompts)
    if repeated:
        logger.warning("%d of the captions are given more than once: each is drawn once", repeated)
    return prompts


def read_prime(options: argparse.Namespace, loaded: Loaded) -> Tensor | None:
    """The codes (N,) that --prime_image gives, -1 where the model draws; None without the flag."""
    if options.prime_image is None:
        return None
    grid = loaded.config.grid
    rows = prime_rows(grid) if options.prime_rows is None else options.prime_rows
    if rows >= grid:
        raise UsageError(
            f"--prime_rows: the model draws {grid} rows of codes, so at most {grid - 1} can be given, not {rows}"
        )
    options.prime_rows = rows
    try:
        return given_codes(loaded, load_image(options.prime_image, loaded.image_size), rows)
    except BROKEN_IMAGE_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prime_image {options.prime_image} cannot be read: {reason}") from error


def read_completion(options: argparse.Namespace, loaded: Loaded) -> Tensor:
    """The codes (N,) that --image gives, -1 where --mask lets the model draw."""
    picture = _read_picture("--image", options.image)
    mask: Any = transparent_mask(picture)
    if options.mask is not None:
        mask = parse_box(options.mask) or _read_picture("--mask", os.path.expanduser(options.mask))
    if mask is None:
        raise UsageError(
            f"--image needs --mask, which says what to draw anew: {options.image} is not transparent"
        )
    return completion_codes(loaded, picture, mask)


def _read_picture(flag: str, file: str) -> Image.Image:
    try:
        return open_picture(file)
    except BROKEN_IMAGE_ERRORS as error:
        raise UserError(
            "{} {} cannot be read: {}".format(flag, file, getattr(error, "strerror", None) or error)
        ) from error


def read_caption(prompt: str, loaded: Loaded, options: argparse.Namespace) -> Caption:
    """Turn a prompt into token ids: cut to what the model reads, with a warning, or completed with --gentxt."""
    config, limit = loaded.config, _CHARACTERS_PER_TOKEN * loaded.config.text_seq_len
    shown = prompt if len(prompt) <= 80 else prompt[:77] + "..."
    ids = loaded.tokenizer.encode(prompt if len(prompt) <= limit else re.sub(r"\s+", " ", prompt)[:limit])
    if len(ids) > config.text_seq_len:
        logger.warning(
            "the model reads %d tokens of a caption, the end of %r (%d tokens) is left out",
            config.text_seq_len,
            shown,
            len(ids),
        )
        ids = ids[: config.text_seq_len]
    if not ids:
        logger.warning("%r has no words for the model: the images are drawn without a caption", shown)
    if not options.gentxt or not (ids or config.bos):
        return Caption(prompt, prompt, ids)
    ids = complete_caption(loaded, ids, options.seed, sampling_options(options, config.num_text_tokens))
    text = loaded.tokenizer.decode(ids).strip()
    logger.info("completed %r: %s", shown, text)
    return Caption(prompt, text, ids)


def sampling_options(options: argparse.Namespace, vocabulary: int) -> SamplingOptions:
    """How to draw from `vocabulary` codes (or words)."""
    return SamplingOptions(
        top_k_count(options.top_k, vocabulary),
        options.top_p if options.top_p < 1 else None,
        options.temperature,
        options.cond_scale,
    )


class Writer:
    """Hands the images of each batch to the folders of their captions: at once, or the best ones in their order."""

    def __init__(
        self,
        captions: Sequence[Caption],
        options: argparse.Namespace,
        about: dict[str, Any],
        ranker: ClipRanker | None = None,
    ) -> None:
        self.captions, self.options, self.about, self.ranker = captions, options, about, ranker
        self.folders: dict[int, PromptFolder] = {}  # of captions that are not complete yet
        self.best: dict[int, Best] = {}  # the same, when images are ranked
        self.taken: set[str] = set()

    def write(self, batch: Batch, images_per_second: float) -> None:
        """Write a batch, and the grids of the captions that it completes."""
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
                self._finish(index, folder, images_per_second)

    def _rank(self, index: int, batch: Batch, own: slice) -> None:
        """Note how good the images of a caption are."""
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

    def _finish(self, index: int, folder: PromptFolder, images_per_second: float) -> None:
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
        folder.finish(images_per_second=round(images_per_second, 4))
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


def draw_captions(
    captions: Sequence[Caption],
    loaded: Loaded,
    options: argparse.Namespace,
    given: Tensor | None,
    ranker: ClipRanker | None = None,
) -> None:
    """Draw and write the images of all captions."""
    config = loaded.config
    text = torch.zeros(len(captions), config.text_seq_len, dtype=torch.long)
    for row, caption in zip(text, captions):
        row[: len(caption.ids)] = torch.tensor(caption.ids, dtype=torch.long)
    sampling = sampling_options(options, config.num_image_tokens)
    writer = Writer(captions, options, describe_run(loaded, options), ranker)
    tokens = config.image_seq_len - (0 if given is None else first_drawn(given))  # steps of one image
    begin = time.perf_counter()

    def images_per_second() -> float:
        return bar.count / tokens / max(time.perf_counter() - begin, 1e-9)

    def on_token(share: Share) -> None:
        bar.update(share.num_images, 0, **{"images/s": images_per_second()})

    with log.progress(len(captions) * options.num_images * tokens, "drawing", unit="token") as bar:
        sampler = Sampler(loaded, Graphs(loaded.dalle) if options.cuda_graphs == "auto" else None)
        for batch in sampler.images(
            text, options.num_images, options.batch_size, options.seed, sampling, given, on_token
        ):
            writer.write(batch, images_per_second())
    logger.info(log.throughput_line(images_per_second(), "images"))


def describe_run(loaded: Loaded, options: argparse.Namespace) -> dict[str, Any]:
    """What generation.json says of the run: settings, and which files were used."""
    settings = {
        key: getattr(options, key)
        for key in (
            "num_images",
            "batch_size",
            "seed",
            "top_k",
            "top_p",
            "temperature",
            "cond_scale",
            "gentxt",
            "prime_image",
            "prime_rows",
            "image",
            "mask",
            "dtype",
            "clip_path",
            "keep",
            "format",
        )
    }
    branches = 1 if options.cond_scale == 1 else 2
    checkpoint = {
        "name": str(options.dalle_path),
        "sha256": sha256_file(loaded.checkpoint.path),
        "format": loaded.checkpoint.format,
        "epoch": loaded.checkpoint.epoch,
    }
    return {
        "settings": settings,
        "device": str(loaded.device),
        "batch_size_changes_images": loaded.batch_changes_images(options.batch_size * branches),
        "checkpoint": checkpoint,
        "tokenizer": loaded.tokenizer.identity,
        "vqgan": {"sha256": loaded.vqgan.identity},
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    run_main(main)
