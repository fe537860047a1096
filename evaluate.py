"""Measure a trained model: its loss on pairs of image and caption, and how well its demo pictures can be told apart.

    python evaluate.py --dalle_path demo                         # the shipped model on the held-out demo pictures
    python evaluate.py --dalle_path output/ckpt/dalle_799.pt --input_folder data/COCO/val2017 --json result.json

Validation loss: nats for a token, text and image part, and bits for a code (one drawn blindly costs log2(codebook)).
Retrieval@1, on the demo set: the model draws one image from each held-out caption and from 200 training captions; it
counts when the nearest of all pictures of the set by pixel distance is the caption's own. No model can do better than
the VQGAN that draws its codes, so the same number for reconstructions of the true pictures stands beside it.
"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it says what stops the imports below

# isort: split
import argparse
import contextlib
import hashlib
import json
import logging
import math
import sys
from typing import Any, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

import log
from args import Parser
from dalle.loading import Loaded, load
from dalle.pictures import Sample, make_sheet, save_picture
from data import DEMO, create_dataset, epoch_order
from data.demo import DemoRecord, demo_images, demo_records
from engines.native import pick_device
from models.dalle import TextToImage
from models.vqgan import image_codes
from models.vqgan_metrics import nearest_pictures
from sampling import COND_SCALES, TEMPERATURES, Graphs, Sampler, SamplingOptions, decode, encode, top_k_count
from utils.errors import UsageError, UserError, run_main
from utils.files import atomic_write, sha256_file
from utils.flags import add_model_flags, number, parse_flags, path, share_or_count, whole
from utils.loading import make_loader, read

logger = logging.getLogger(__name__)

TRAINING_CAPTIONS = 200
"""Training captions that retrieval draws from."""
SHEET_SAMPLES = (36, 24)
"""Samples of a contact sheet at most: held out (or of any other data), training."""


def make_parser() -> Parser:
    """The flags of evaluate.py."""
    parser = Parser(
        prog="evaluate.py",
        usage="%(prog)s --dalle_path FILE [flags]",
        description="Measure a trained model.",
        epilog="Flags may be spelled with _ or -.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120),
    )
    add_model_flags(parser)
    pairs = parser.add_argument_group("data")
    pairs.add_argument(
        "--input_folder",
        type=path,
        default=DEMO,
        metavar="DIR",
        help="folder of images and captions, or shards, as for training; demo (default): the built-in set",
    )
    pairs.add_argument(
        "--split",
        choices=("heldout", "train", "all"),
        default="heldout",
        help="part of the demo set the loss is measured on (default: heldout)",
    )
    pairs.add_argument(
        "--max_pairs", type=whole(1), metavar="N", help="measure the loss on so many pairs only, always the same ones"
    )
    pairs.add_argument(
        "--batch_size",
        type=whole(1, 65536),
        default=32,
        metavar="N",
        help="pairs, or images drawn, at the same time (default: 32)",
    )
    pairs.add_argument(
        "--max_bad_fraction",
        type=number(0, 1),
        default=0.01,
        metavar="F",
        help="share of the pairs that may be left out, because image or captions cannot be read (default: 0.01)",
    )
    pairs.add_argument(
        "--dataloader_workers",
        type=whole(0, 1024),
        default=0,
        metavar="N",
        help="processes that read images (default: 0)",
    )
    drawing = parser.add_argument_group("retrieval on the demo set")
    drawing.add_argument("--skip_retrieval", action="store_true", help="measure the loss alone")
    drawing.add_argument(
        "--temperature",
        type=number(*TEMPERATURES),
        default=0.0,
        metavar="T",
        help="0 (default): always the likeliest code",
    )
    drawing.add_argument(
        "--top_k", type=share_or_count, default=0.0, metavar="K", help="as in generate.py (default: 0, all codes)"
    )
    drawing.add_argument(
        "--cond_scale",
        type=number(*COND_SCALES),
        default=1.0,
        metavar="S",
        help="classifier-free guidance (default: 1, none)",
    )
    drawing.add_argument(
        "--best_of",
        type=whole(1, 4096),
        default=1,
        metavar="N",
        help="of N images take the one the model finds likeliest; needs a --temperature (default: 1)",
    )
    drawing.add_argument(
        "--seed", type=whole(0, 2**63 - 1), default=42, metavar="N", help="of captions and images (default: 42)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=path, metavar="FILE", help="write the numbers there as JSON")
    output.add_argument(
        "--sheet",
        type=path,
        metavar="FILE",
        help="write a contact sheet there, as .png or .jpg: caption, real picture, reconstruction, generated picture",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says."""
    options = parse_flags(make_parser(), argv)
    check_options(options)
    log.setup()
    loaded = load(
        options.dalle_path,
        options.bpe_path,
        options.vqgan_model_path,
        options.vqgan_config_path,
        pick_device(options.device, 0),
    )
    dataset = open_data(loaded, options)
    result: dict[str, Any] = {
        "checkpoint": describe_checkpoint(loaded, options.dalle_path),
        "data": {"input_folder": options.input_folder, "num_pairs": len(dataset)},
        "validation": validation_loss(loaded, dataset, options),
    }
    groups: list[tuple[str, list[Sample]]] = []
    if options.input_folder == DEMO:
        result["data"]["split"] = options.split
    if options.input_folder == DEMO and not options.skip_retrieval:
        result["retrieval"], groups = measure_retrieval(loaded, options)
    elif options.sheet is not None:
        groups = [(options.input_folder, sample_pairs(loaded, dataset, options))]
    encoding = sys.stdout.encoding or "utf-8"  # which may not hold every file name
    sys.stdout.write(report(result).encode(encoding, "backslashreplace").decode(encoding) + "\n")
    if options.json is not None:
        with written("--json", options.json), atomic_write(options.json) as file:
            file.write(json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
    if options.sheet is not None:
        with written("--sheet", options.sheet):
            save_picture(make_sheet(groups), options.sheet)


@contextlib.contextmanager
def written(flag: str, target: str) -> Iterator[None]:
    """Turn an error of writing into one line that names the flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {target}: {error.strerror or error}") from error


def check_options(options: argparse.Namespace) -> None:
    """Checks over several flags."""
    if options.best_of > 1 and options.temperature == 0:
        raise UsageError(
            f"--best_of {options.best_of}: at --temperature 0 all images of a caption are the same; give a "
            "--temperature, 1 say"
        )
    if options.sheet is not None and not options.sheet.endswith((".png", ".jpg")):
        raise UsageError(f"--sheet: the file's name must end in .png or .jpg, not {options.sheet!r}")


def describe_checkpoint(loaded: Loaded, name: str) -> dict[str, Any]:
    """Which model was measured."""
    return {
        "name": name,
        "sha256": sha256_file(loaded.checkpoint.path),
        "epoch": loaded.checkpoint.epoch,
        "parameters": sum(parameter.numel() for parameter in loaded.dalle.parameters()),
        "codebook": loaded.config.num_image_tokens,
        "codes": loaded.config.image_seq_len,
    }


# Validation loss -----------------------------------------------------------------------------------------------------


def open_data(loaded: Loaded, options: argparse.Namespace) -> Any:
    """The pairs to measure on. Captions are cut to what the model reads."""
    dataset = create_dataset(
        input_folder=options.input_folder,
        tokenizer=loaded.tokenizer,
        text_seq_len=loaded.config.text_seq_len,
        image_size=loaded.image_size,
        truncate_captions=True,
        seed=options.seed,
        demo_split=options.split,
        max_bad_fraction=options.max_bad_fraction,
    )
    if options.max_pairs is not None and options.max_pairs < len(dataset):
        dataset = dataset.subset(epoch_order(len(dataset), options.seed, 0)[: options.max_pairs])
    return dataset


@torch.no_grad()
def validation_loss(loaded: Loaded, dataset: Any, options: argparse.Namespace) -> dict[str, float]:
    """Mean loss over all pairs: nats for a token, and what follows from it."""
    model = TextToImage(loaded.dalle).eval()
    batches = read(make_loader(dataset, options.dataloader_workers, batch_size=options.batch_size))
    sums = torch.zeros(3, dtype=torch.float64)
    with contextlib.closing(batches), log.progress(len(dataset), "measuring", unit="pair") as bar:
        for text, images in batches:
            losses = model(text.to(loaded.device), image_codes(loaded.vqgan, images.to(loaded.device)))
            sums += torch.stack(tuple(losses)).double().cpu() * len(text)  # the last batch may be smaller
            bar.update(len(text), len(text))
    loss, text_loss, image_loss = (sums / len(dataset)).tolist()
    return {
        "loss": loss,
        "text_loss": text_loss,
        "image_loss": image_loss,
        "bits_per_code": image_loss / math.log(2),
        "text_perplexity": _exp(text_loss),
        "image_perplexity": _exp(image_loss),
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 709.0))  # beyond lies infinity; NaN stays NaN


def finite(value: Any) -> Any:
    """The same tables with null for numbers that JSON does not know (the losses of a model that has diverged)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Retrieval -----------------------------------------------------------------------------------------------------------


class Gallery(NamedTuple):
    """All pictures of the demo set."""

    records: list[DemoRecord]
    images: Tensor
    """(n, 3, S, S) uint8"""

    def positions(self, records: Sequence[DemoRecord]) -> Tensor:
        """Where these records are in the gallery, LongTensor."""
        place = {record.stem: index for index, record in enumerate(self.records)}
        return torch.tensor([place[record.stem] for record in records])


def training_records(records: Sequence[DemoRecord], count: int) -> list[DemoRecord]:
    """A fixed choice of training records: those whose hash is smallest, in the order of the set."""

    def draw(record: DemoRecord) -> bytes:
        return hashlib.sha256(b"evaluate/" + record.stem.encode("ascii")).digest()

    return sorted(sorted(records, key=draw)[:count], key=lambda record: record.stem)


def draw_best(loaded: Loaded, text: Tensor, options: argparse.Namespace) -> Tensor:
    """One image for each caption, text (n, T): the likeliest of --best_of. Returns (n, 3, S, S) uint8."""
    sampling = SamplingOptions(
        top_k_count(options.top_k, loaded.config.num_image_tokens), None, options.temperature, options.cond_scale
    )
    best = torch.full((len(text),), -math.inf)
    pictures = torch.zeros(len(text), 3, loaded.image_size, loaded.image_size, dtype=torch.uint8)
    with log.progress(len(text) * options.best_of, "drawing", unit="image") as bar:
        sampler = Sampler(loaded, Graphs(loaded.dalle))
        for batch in sampler.images(text, options.best_of, options.batch_size, options.seed, sampling):
            share = batch.share
            count = share.end_image - share.first_image
            for row, prompt in enumerate(range(share.first_prompt, share.end_prompt)):
                own = slice(row * count, (row + 1) * count)
                likelihood, index = batch.log_likelihood[own].max(dim=0)
                if likelihood > best[prompt] or share.first_image == 0:
                    best[prompt], pictures[prompt] = likelihood, batch.pixels[own][index]
            bar.update(share.num_images, share.num_images)
    return pictures


def retrieve(
    loaded: Loaded, gallery: Gallery, records: Sequence[DemoRecord], options: argparse.Namespace
) -> tuple[dict[str, Any], list[Sample]]:
    """Retrieval@1 of images drawn from these records' captions and of reconstructions, and samples to look at."""
    own = gallery.positions(records)
    real = gallery.images[own]
    reconstructions = torch.cat([decode(loaded, encode(loaded, part)) for part in real.split(options.batch_size)])
    text = loaded.tokenizer.tokenize([record.caption for record in records], loaded.config.text_seq_len, truncate=True)
    generated = draw_best(loaded, text, options)
    found = nearest_pictures(generated, gallery.images, loaded.device) == own
    found_again = nearest_pictures(reconstructions, gallery.images, loaded.device) == own
    samples = [
        Sample(record.caption, real[index], reconstructions[index], generated[index], bool(found[index]))
        for index, record in enumerate(records)
    ]
    return {
        "captions": len(records),
        "generated": float(found.float().mean()),
        "reconstructions": float(found_again.float().mean()),
    }, samples


def measure_retrieval(
    loaded: Loaded, options: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[str, list[Sample]]]]:
    """Retrieval@1 for the held-out captions and for 200 training captions among all pictures of the demo set."""
    records = demo_records("all")
    gallery = Gallery(records, demo_images(records, loaded.image_size))
    result: dict[str, Any] = {
        "pictures": len(records),
        "temperature": options.temperature,
        "top_k": options.top_k,
        "cond_scale": options.cond_scale,
        "best_of": options.best_of,
        "seed": options.seed,
    }
    groups = []
    for name, chosen, shown in (
        ("heldout", demo_records("heldout"), SHEET_SAMPLES[0]),
        ("train", training_records(demo_records("train"), TRAINING_CAPTIONS), SHEET_SAMPLES[1]),
    ):
        numbers, samples = retrieve(loaded, gallery, chosen, options)
        result[name] = numbers
        spread = [samples[index * len(samples) // shown] for index in range(shown)] if len(samples) > shown else samples
        groups.append(
            (
                "{} captions: {:.1%} of {} found (reconstructions {:.1%})".format(
                    "held-out" if name == "heldout" else "training",
                    numbers["generated"],
                    numbers["captions"],
                    numbers["reconstructions"],
                ),
                spread,
            )
        )
    return result, groups


def sample_pairs(loaded: Loaded, dataset: Any, options: argparse.Namespace) -> list[Sample]:
    """A few pairs of any data for a contact sheet, drawn from their captions."""
    count = min(SHEET_SAMPLES[0], len(dataset))
    text, images = zip(*(dataset[index * len(dataset) // count] for index in range(count)))
    real = torch.stack(images)
    reconstructions = torch.cat([decode(loaded, encode(loaded, part)) for part in real.split(options.batch_size)])
    generated = draw_best(loaded, torch.stack(text), options)
    return [
        Sample(loaded.tokenizer.decode(row.tolist()), *pictures)
        for row, *pictures in zip(text, real, reconstructions, generated)
    ]


# Report --------------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The numbers as text."""
    checkpoint, losses = result["checkpoint"], result["validation"]
    data = "{input_folder} ({num_pairs} pairs)".format(**result["data"])
    if "split" in result["data"]:
        data = "demo set, {split} ({num_pairs} pairs)".format(**result["data"])
    lines = [
        "checkpoint   {} (sha256 {}..., {:.2f} M parameters)".format(
            checkpoint["name"], checkpoint["sha256"][:12], checkpoint["parameters"] / 1e6
        ),
        "data         " + data,
        "loss         {:.4f} nats".format(losses["loss"]),
        "  text       {:.4f} nats for a token, perplexity {:.2f}".format(
            losses["text_loss"], losses["text_perplexity"]
        ),
        "  image      {:.4f} nats for a code, perplexity {:.2f}".format(
            losses["image_loss"], losses["image_perplexity"]
        ),
        "             {:.4f} bits for a code (drawn blindly: {:.2f})".format(
            losses["bits_per_code"], math.log2(checkpoint["codebook"])
        ),
    ]
    if "retrieval" in result:
        retrieval = result["retrieval"]
        lines.append("retrieval@1 among {} pictures".format(retrieval["pictures"]))
        for name, label in (("heldout", "held-out"), ("train", "training")):
            lines.append(
                "  {}   {captions} captions: generated {generated:.1%}, reconstructions {reconstructions:.1%}".format(
                    label, **retrieval[name]
                )
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
