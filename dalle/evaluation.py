"""The work of evaluate.py: loss of a trained model on image-caption pairs, and retrieval@1 on the demo set."""
from __future__ import annotations

import contextlib
import hashlib
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

import log
from dalle.loading import Loaded, describe_checkpoint, warn_of_guidance
from dalle.measuring import (
    MetricOptions,
    check_metrics,
    check_sampled,
    measure_folder,
    measure_reconstruction,
    measure_sampled,
    metrics_report,
    settings_of,
)
from dalle.pictures import Sample
from dalle.scoring import Scorers
from data import DEMO, DataSettings, create_dataset, epoch_order
from data.demo import DemoRecord, demo_images, demo_records
from models.dalle import TextToImage
from models.vqgan import image_codes
from models.vqgan_metrics import nearest_images
from sampling import Graphs, Sampler, SamplingFlags, SamplingOptions, Share, decode, encode
from utils.errors import UsageError
from utils.files import sha256_file
from utils.flags import DataOptions, ModelOptions, PartsOptions, PromptsFileOptions
from utils.loading import make_loader, read
from utils.options import Command, Options, again, option
from utils.parts import Found, Parts
from utils.prompt_lists import Prompt

TRAINING_CAPTIONS = 200
"""Number of training captions for retrieval."""
SHEET_SAMPLES = (36, 24)
"""Most samples on a contact sheet: held-out ones (or those of other data), training."""


@dataclass(frozen=True)
class PairOptions(DataOptions, title="pairs"):
    """Which pairs to measure."""

    input_folder: str = again(DataOptions, "input_folder", default=DEMO)
    split: str = option("heldout", "part of the demo set", choices=("heldout", "train", "all"))
    max_pairs: int | None = option(None, "take this many pairs only, always the same ones", ge=1, none="all")


@dataclass(frozen=True)
class RetrievalOptions(SamplingFlags, title="retrieval on the demo set"):
    """How to sample images for retrieval."""

    batch_size: int = again(SamplingFlags, "batch_size", default=32, help="pairs, or images sampled, at the same time")
    top_k: float = again(SamplingFlags, "top_k", default=0.0)
    temperature: float | None = again(  # type: ignore[assignment]
        SamplingFlags, "temperature", default=None, none="1 for --metrics of sampled images, else 0")
    cond_scale: tuple[float, ...] = again(SamplingFlags, "cond_scale", default=(1.0,))  # type: ignore[assignment]
    skip_retrieval: bool = option(False, "measure the loss only")
    best_of: int = option(1, "keep the likeliest of N images by the model; with a --temperature", ge=1, le=4096)


@dataclass(frozen=True)
class ReportOptions(Options, title="results"):
    """Where to write the results."""

    json: str | None = option(None, "write the results to this file as JSON", path=True, metavar="FILE")
    resume: bool = option(False, "continue an interrupted run with the same options: what is computed is kept in a "
                          "folder beside --json until the results are written", needs="json")
    sheet: str | None = option(None, "write a contact sheet to this file, .png or .jpg: caption, real image, "
                               "reconstruction, generated image", path=True, metavar="FILE")


@dataclass(frozen=True)
class EvaluateOptions(
    ModelOptions, PartsOptions, PairOptions, PromptsFileOptions, RetrievalOptions, MetricOptions, ReportOptions
):
    """The flags of evaluate.py."""

    dalle_path: str | None = again(ModelOptions, "dalle_path", default=None)  # type: ignore[assignment]
    prompts_file: str | None = again(PromptsFileOptions, "prompts_file", none="captions of --input-folder")

    @property
    def sampled_metrics(self) -> bool:
        """Whether images are sampled for --metrics."""
        wanted = bool(self.scorer) or bool(set(self.metrics) - {"loss"})
        return wanted and self.images is None and not self.reconstruction

    @property
    def samples(self) -> bool:
        """Whether images are sampled."""
        return self.sheet is not None or self.sampled_metrics or self.retrieves

    @property
    def retrieves(self) -> bool:
        """Whether retrieval on the demo set is measured."""
        other = self.metrics or self.scorer or self.images is not None or self.reconstruction
        return self.input_folder == DEMO and not self.skip_retrieval and not other

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        check_metrics(self)
        if self.best_of > 1 and self.sampling(1).temperature == 0:
            raise UsageError(f"--best-of {self.best_of}: at --temperature 0 all images of a caption are the same; "
                             "give a --temperature, such as 1")
        if self.sheet is not None and not self.sheet.endswith((".png", ".jpg")):
            raise UsageError(f"--sheet: the file's name must end in .png or .jpg, not {self.sheet!r}")
        unused = {"--top-k", "--top-p", "--temperature", "--cond-scale", "--best-of", "--parallel"} & set(self.given())
        if unused and not self.samples:
            raise UsageError(f"{min(unused)}: images are only sampled for retrieval on the demo set, --metrics of "
                             "sampled images, or with --sheet")
        if self.input_folder != DEMO and "--split" in self.given():
            raise UsageError(f"--split is for the demo set, not for --input-folder {self.input_folder}")


    def sampling(self, vocabulary: int) -> SamplingOptions:
        """How to sample, at the first of the guidance scales."""
        temperature = float(self.sampled_metrics) if self.temperature is None else self.temperature
        return super().sampling(vocabulary)._replace(cond_scale=self.cond_scale[0], temperature=temperature)


COMMAND = Command("evaluate.py", "Evaluate a trained model.", EvaluateOptions)


def evaluate(
    options: EvaluateOptions,
    loaded: Loaded | None,
    device: torch.device,
    parts: Parts,
    prompts: Sequence[Prompt] = (),
) -> tuple[dict[str, Any], list[tuple[str, list[Sample]]]]:
    """Return the metrics that the options select, and titled samples for a contact sheet.

    loaded: the model of --dalle-path, None for --images and --reconstruction without one. parts: of all processes,
    which share the work and all call this; the result is that of the first one. prompts: of --prompts-file.
    """
    if options.images is not None:
        return measure_folder(options, device, parts), []
    if options.reconstruction or loaded is None:
        return measure_reconstruction(options, loaded, device), []
    model = describe_model(loaded, str(options.dalle_path))
    result: dict[str, Any] = {"checkpoint": model}
    settings = {**settings_of(options), **_contents(loaded, model), "--scorer": Scorers(options.scorer).identity}
    for scale in options.cond_scale if options.samples else ():
        warn_of_guidance(loaded, scale)
    if options.prompts_file is not None:
        result["data"] = {"prompts_file": options.prompts_file, "sha256": sha256_file(Path(options.prompts_file))}
        parts.begin({**settings, "--prompts-file": f"of sha256 {result['data']['sha256']}"})
        return {**result, **measure_sampled(options, loaded, None, parts, prompts)}, []
    dataset = open_data(loaded, options)
    if options.sampled_metrics:
        check_sampled(options, len(dataset))
    parts.begin({**settings, "the number of pairs": len(dataset)})
    result["data"] = {"input_folder": options.input_folder, "num_pairs": len(dataset)}
    if "loss" in options.metrics or not (options.metrics or options.scorer):
        result["validation"] = validation_loss(loaded, dataset, options, parts)
    groups: list[tuple[str, list[Sample]]] = []
    if options.input_folder == DEMO:
        result["data"]["split"] = options.split
    if options.sampled_metrics:
        result.update(measure_sampled(options, loaded, dataset, parts))
    if options.retrieves:
        result["retrieval"], groups = measure_retrieval(loaded, options, parts)
    elif options.sheet is not None:
        groups = [(options.input_folder, sample_pairs(loaded, dataset, options, parts))]
    return result, groups


def _contents(loaded: Loaded, model: dict[str, Any]) -> dict[str, Any]:
    """What results depend on besides options, by the flag that sets it."""
    files = {"--dalle-path": model["sha256"], "--vqgan-model-path": loaded.vqgan.identity}
    files["--bpe-path"] = loaded.tokenizer.identity.get("sha256")
    return {flag: f"of sha256 {str(digest)[:12]}..." for flag, digest in files.items()}


def describe_model(loaded: Loaded, name: str) -> dict[str, Any]:
    """Describe the evaluated model."""
    return {
        **describe_checkpoint(loaded, name),
        "parameters": sum(parameter.numel() for parameter in loaded.dalle.parameters()),
        "codebook": loaded.config.num_image_tokens,
        "codes": loaded.config.image_seq_len,
    }


# Validation loss -----------------------------------------------------------------------------------------------------


def open_data(loaded: Loaded, options: EvaluateOptions) -> Any:
    """The pairs to measure on. Captions are truncated to the model's text length."""
    settings = DataSettings(
        text_seq_len=loaded.config.text_seq_len,
        image_size=loaded.image_size,
        truncate_captions=True,
        seed=options.seed,
        max_bad_fraction=options.max_bad_fraction,
    )
    dataset = create_dataset(options.input_folder, loaded.tokenizer, settings, demo_split=options.split)
    if options.max_pairs is not None and options.max_pairs < len(dataset):
        dataset = dataset.subset(epoch_order(len(dataset), options.seed, 0)[: options.max_pairs])
    return dataset


@torch.no_grad()
def validation_loss(loaded: Loaded, dataset: Any, options: EvaluateOptions, parts: Parts) -> dict[str, float]:
    """Mean loss over all pairs in nats per token, and derived metrics."""
    model = TextToImage(loaded.dalle).eval()

    def work(numbers: Iterator[range]) -> Iterator[Found]:
        batches = read(make_loader(dataset, options.dataloader_workers, batch_sampler=numbers))
        with contextlib.closing(batches):
            for text, images in batches:
                losses = model(text.to(loaded.device), image_codes(loaded.vqgan, images.to(loaded.device)))
                # The last batch may be smaller.
                yield {"losses": torch.stack(tuple(losses)).double().cpu()[None] * len(text)}

    with log.progress(len(dataset), "measuring", unit="pair", is_main=parts.is_first) as bar:
        found = parts.compute("loss", len(dataset), options.batch_size, work, bar.reach)
    loss, text_loss, image_loss = (found["losses"].sum(dim=0) / len(dataset)).tolist()
    return {
        "loss": loss,
        "text_loss": text_loss,
        "image_loss": image_loss,
        "bits_per_code": image_loss / math.log(2),
        "text_perplexity": _exp(text_loss),
        "image_perplexity": _exp(image_loss),
    }


def _exp(value: float) -> float:
    return math.exp(min(value, 709.0))  # without overflow; NaN stays NaN


def finite(value: Any) -> Any:
    """Replace non-finite numbers (the losses of a diverged model), which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Retrieval -----------------------------------------------------------------------------------------------------------


class Gallery(NamedTuple):
    """All images of the demo set."""

    records: list[DemoRecord]
    images: Tensor
    """(n, 3, S, S) uint8"""

    def positions(self, records: Sequence[DemoRecord]) -> Tensor:
        """Positions of these records in the gallery, LongTensor."""
        place = {record.stem: index for index, record in enumerate(self.records)}
        return torch.tensor([place[record.stem] for record in records])


def training_records(records: Sequence[DemoRecord], count: int) -> list[DemoRecord]:
    """A fixed choice of training records: those with the smallest hashes, in the order of the set."""

    def stem_hash(record: DemoRecord) -> bytes:
        return hashlib.sha256(b"evaluate/" + record.stem.encode("ascii")).digest()

    return sorted(sorted(records, key=stem_hash)[:count], key=lambda record: record.stem)


def sample_best(
    loaded: Loaded, text: Tensor, options: EvaluateOptions, parts: Parts | None = None, name: str = "best"
) -> Tensor:
    """One image per caption, the likeliest of --best-of. text: (n, T). Returns (n, 3, S, S) uint8.

    parts: of the processes that share the captions, in which these have this name.
    """
    parts, count, best_of = Parts() if parts is None else parts, len(text), options.best_of
    sampling = options.sampling(loaded.config.num_image_tokens)
    sampler = Sampler(loaded, Graphs(loaded.dalle), parallel=options.parallel)

    def work(batches: Iterator[range]) -> Iterator[Found]:
        begun: deque[range] = deque()

        def shares() -> Iterator[Share]:
            for captions in batches:
                begun.append(captions)
                images = range(captions.start * best_of, captions.stop * best_of)
                yield from Share.of(images, best_of).split(options.batch_size)

        best: dict[int, tuple[float, Tensor]] = {}
        for batch in sampler.images(text, best_of, options.batch_size, options.seed, sampling, shares=shares()):
            rows = zip(*batch.share, batch.log_likelihood.tolist(), batch.pixels)
            for prompt, image, likelihood, pixels in rows:
                if image == 0 or likelihood > best[prompt][0]:
                    best[prompt] = likelihood, pixels
            if (prompt, image) == (begun[0].stop - 1, best_of - 1):
                yield {"images": torch.stack([best.pop(prompt)[1] for prompt in begun.popleft()])}

    with log.progress(count, "sampling", unit="image", is_main=parts.is_first) as bar:
        together = max(1, options.batch_size // best_of)
        return parts.compute(f"{name}-{sampling.cond_scale:g}", count, together, work, bar.reach)["images"]


def retrieve(
    loaded: Loaded,
    gallery: Gallery,
    records: Sequence[DemoRecord],
    options: EvaluateOptions,
    parts: Parts | None = None,
    name: str = "retrieval",
) -> tuple[dict[str, Any], list[Sample]]:
    """Retrieval@1 of images sampled from these records' captions and of reconstructions, and samples to show."""
    own = gallery.positions(records)
    real = gallery.images[own]
    reconstructions = torch.cat([decode(loaded, encode(loaded, part)) for part in real.split(options.batch_size)])
    text = loaded.tokenizer.tokenize([record.caption for record in records], loaded.config.text_seq_len, truncate=True)
    generated = sample_best(loaded, text, options, parts, name)
    found = nearest_images(generated, gallery.images, loaded.device) == own
    reconstructions_found = nearest_images(reconstructions, gallery.images, loaded.device) == own
    samples = [
        Sample(record.caption, real[index], reconstructions[index], generated[index], bool(found[index]))
        for index, record in enumerate(records)
    ]
    return {
        "captions": len(records),
        "generated": float(found.float().mean()),
        "reconstructions": float(reconstructions_found.float().mean()),
    }, samples


def measure_retrieval(
    loaded: Loaded, options: EvaluateOptions, parts: Parts
) -> tuple[dict[str, Any], list[tuple[str, list[Sample]]]]:
    """Retrieval@1 for the held-out captions and for 200 training captions among all images of the demo set."""
    records = demo_records("all")
    gallery = Gallery(records, demo_images(records, loaded.image_size))
    result: dict[str, Any] = {
        "pictures": len(records),
        "temperature": options.sampling(1).temperature,
        "top_k": options.top_k,
        "cond_scale": options.cond_scale[0],
        "best_of": options.best_of,
        "seed": options.seed,
    }
    groups = []
    for name, chosen, shown in (
        ("heldout", demo_records("heldout"), SHEET_SAMPLES[0]),
        ("train", training_records(demo_records("train"), TRAINING_CAPTIONS), SHEET_SAMPLES[1]),
    ):
        numbers, samples = retrieve(loaded, gallery, chosen, options, parts, name)
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


def sample_pairs(loaded: Loaded, dataset: Any, options: EvaluateOptions, parts: Parts) -> list[Sample]:
    """A few pairs of any data set for a contact sheet, with images generated from their captions."""
    count = min(SHEET_SAMPLES[0], len(dataset))
    text, images = zip(*(dataset[index * len(dataset) // count] for index in range(count)))
    real = torch.stack(images)
    reconstructions = torch.cat([decode(loaded, encode(loaded, part)) for part in real.split(options.batch_size)])
    generated = sample_best(loaded, torch.stack(text), options, parts, "sheet")
    return [
        Sample(loaded.tokenizer.decode(row.tolist()), *row_images)
        for row, *row_images in zip(text, real, reconstructions, generated)
    ]


# Report --------------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """Format the results as text."""
    lines = []
    if "checkpoint" in result:
        kinds = {"prompts_file": "{prompts_file}", "split": "demo set, {split} ({num_pairs} pairs)"}
        form = next((kinds[key] for key in kinds if key in result["data"]), "{input_folder} ({num_pairs} pairs)")
        data = form.format(**result["data"])
        lines += [
            "checkpoint   {name} (sha256 {sha256:.12}..., {parameters} parameters)".format(
                **dict(result["checkpoint"], parameters=f"{result['checkpoint']['parameters'] / 1e6:.2f} M")
            ),
            "data         " + data,
        ]
    if "validation" in result:
        uniform = math.log2(result["checkpoint"]["codebook"])
        lines += [
            line.format(uniform=uniform, **result["validation"])
            for line in (
                "loss         {loss:.4f} nats",
                "  text       {text_loss:.4f} nats per token, perplexity {text_perplexity:.2f}",
                "  image      {image_loss:.4f} nats per code, perplexity {image_perplexity:.2f}",
                "             {bits_per_code:.4f} bits per code (uniform: {uniform:.2f})",
            )
        ]
    if "metrics" in result:
        lines += metrics_report(result)
    if "retrieval" in result:
        retrieval = result["retrieval"]
        lines.append("retrieval@1 among {} images".format(retrieval["pictures"]))
        for name, label in (("heldout", "held-out"), ("train", "training")):
            lines.append(
                "  {}   {captions} captions: generated {generated:.1%}, reconstructions {reconstructions:.1%}".format(
                    label, **retrieval[name]
                )
            )
    return "\n".join(lines)
