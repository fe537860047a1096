"""Metrics of images for evaluate.py: sampled from captions, in a folder, or reconstructed by a tokenizer."""
from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

import log
from checkpoints.vqgan import load_perceptual, load_vqgan
from dalle.clip_score import Embedded
from dalle.loading import Loaded
from dalle.outputs import GRID
from dalle.pictures import Cell, labelled_grid, save_picture
from dalle.reranking import ClipRanker
from dalle.scoring import Scorers, as_bytes, from_bytes, scores_report, summary
from data.code_cache import PIXEL_RULES
from metrics import memorization, reconstruction
from metrics.distances import METRICS, Real, check_counts, distances
from metrics.features import Features, cached_features, features_of, keep_features
from metrics.images import ImageSet, folder_images, identity_of
from metrics.inception import Inception, load_inception
from sampling import Batch, Graphs, Sampler, Share
from utils.errors import UsageError
from utils.flags import NetworkOptions
from utils.options import VERSION, Options, again, option, options_of
from utils.parts import Found, Parts
from utils.prompt_lists import Prompt

if TYPE_CHECKING:
    from dalle.evaluation import EvaluateOptions

FEW_IMAGES = 10_000
"""Below that FID, IS, precision and recall say more of the number of images than of the model."""
SHOWN_COPIES = 24
NETWORK = "Inception of 2015-12-05, TensorFlow 1 resizing, as torch-fidelity 0.4.0"


@dataclass(frozen=True)
class MetricOptions(Options, title="metrics of images"):
    """What to measure, and on which images."""

    metrics: tuple[str, ...] = option((), "what to measure; prc: precision and recall; clip: CLIP score and retrieval; "
                                      "copies: nearest images of the data", none="loss, and retrieval on the demo set",
                                      choices=("loss", *METRICS, "clip", "copies"))
    num_images: int = option(0, "images to sample for --metrics; 0: one for each pair or prompt", ge=0, le=10**7)
    images: str | None = option(None, "measure the images of this folder, whatever made them", path=True)
    reference: str | None = option(None, "with --images: folder of real images to compare with, or 'demo'", path=True)
    reconstruction: bool = option(False, "measure how well the VQGAN reconstructs images: rFID, PSNR, SSIM, LPIPS, use "
                                  "of the codebook")
    image_size: int | None = option(None, "centre squares of this size are measured", ge=8, le=4096,
                                    none="images as they are; with --reconstruction, the VQGAN's size")
    inception_weights: str | None = again(NetworkOptions, "inception_weights")
    clip_path: str | None = again(NetworkOptions, "clip_path")
    perceptual_weights: tuple[str, ...] | None = option(None, "VGG-16 of torchvision and the linear weights of LPIPS "
                                                        "0.1, for LPIPS", path=True, metavar="FILE",
                                                        needs="reconstruction")
    scorer: tuple[str, ...] = option((), "functions that score sampled images, such as "
                                     "examples.scorers:colour_names", none="none", metavar="MODULE:FUNCTION")
    plot: str | None = option(None, "plot FID against CLIP score over --cond-scale in this .png file", path=True,
                              metavar="FILE")


def check_metrics(options: EvaluateOptions) -> None:
    """Raise UsageError for options of metrics that contradict each other."""
    wanted = set(options.metrics)
    if options.images is not None and options.reconstruction:
        raise UsageError("--images and --reconstruction exclude each other")
    if options.images is None and not options.reconstruction and options.dalle_path is None:
        raise UsageError("missing --dalle-path PATH: a model to evaluate; or give --images or --reconstruction")
    if options.images is not None:
        _refuse_others(options, "--images", _OF_IMAGES | {"--scorer", "--plot", "--clip-path"})  # they say more below
        other = wanted - set(METRICS)
        if other or not wanted:
            raise UsageError(f"--images: give --metrics of {', '.join(METRICS)}, not {', '.join(other) or 'none'}")
        if wanted != {"is"} and options.reference is None:
            raise UsageError(f"--metrics {', '.join(sorted(wanted - {'is'}))} needs --reference: the real images")
        if wanted == {"is"} and options.reference is not None:
            raise UsageError("--reference has no use with --metrics is, which compares with no images")
    elif options.reference is not None:
        raise UsageError("--reference needs --images")
    if options.image_size is not None and not (options.images or options.reconstruction):
        raise UsageError("--image-size needs --images or --reconstruction: a model has its own size")
    if options.reconstruction:
        _refuse_others(options, "--reconstruction", _OF_RECONSTRUCTION | {"--scorer", "--plot"})
        if wanted - {"fid", "kid"}:
            raise UsageError("--reconstruction: --metrics may add fid and kid (rFID, rKID) alone")
        if options.dalle_path is None and not (options.vqgan_model_path and options.vqgan_config_path):
            raise UsageError("--reconstruction needs --vqgan-model-path and --vqgan-config-path, or --dalle-path")
    if ("clip" in wanted) != (options.clip_path is not None):
        raise UsageError("--metrics clip and --clip-path belong together")
    if options.prompts_file is not None:
        unused = ("--input-folder", "--split", "--max-pairs", "--max-bad-fraction", "--dataloader-workers", "--sheet",
                  "--skip-retrieval", "--best-of")
        _refuse(options, "--prompts-file", unused)
        if wanted - {"is", "clip"} or not (wanted or options.scorer):
            raise UsageError("--prompts-file has no images to compare with: give --metrics is or clip, or --scorer")
    if options.scorer and (options.images is not None or options.reconstruction):
        raise UsageError("--scorer is for sampled images, not for --images or --reconstruction")
    if len(options.cond_scale) > 1 and not options.sampled_metrics:
        raise UsageError("--cond-scale: several scales are for --metrics fid, kid, is, prc and clip")
    if len({f"{scale:g}" for scale in options.cond_scale}) < len(options.cond_scale):
        raise UsageError("--cond-scale: each scale is given once")
    if options.plot is not None and not {"fid", "clip"} <= wanted:
        raise UsageError("--plot needs --metrics fid clip")
    if options.inception_weights is not None and wanted.isdisjoint(METRICS):
        raise UsageError(f"--inception-weights is for --metrics of {', '.join(METRICS)}")
    if options.best_of > 1 and options.sampled_metrics and options.sheet is None:
        raise UsageError("--best-of is for retrieval and --sheet, not for --metrics of sampled images or --scorer")
    if options.num_images and not options.sampled_metrics:
        raise UsageError("--num-images needs --metrics of sampled images")
    if options.num_images:
        check_counts(options.metrics, (options.num_images, "--num-images is"))


_ANY = {"--batch-size", "--device", "--inception-weights", "--json", "--metrics", "--image-size"}
_OF_IMAGES = _ANY | {"--images", "--reference", "--resume"}
_OF_RECONSTRUCTION = _ANY | {"--reconstruction", "--input-folder", "--dalle-path", "--vqgan-model-path"}
_OF_RECONSTRUCTION |= {"--vqgan-config-path", "--bpe-path", "--perceptual-weights"}
"""What --images and --reconstruction have use for."""


def _refuse_others(options: Options, mode: str, flags: Collection[str]) -> None:
    _refuse(options, mode, [flag for flag in options.given() if flag not in flags])


def _refuse(options: Options, mode: str, flags: Sequence[str]) -> None:
    unused = [flag for flag in flags if flag in options.given()]
    if unused:
        raise UsageError(f"{unused[0]} has no use with {mode}")


_FREE = "--json --sheet --plot --resume --device --dataloader-workers --parallel --max-bad-fraction".split()
_FREE += ["--cond-scale"]  # each is computed apart
_FILES = "--dalle-path --vqgan-model-path --vqgan-config-path --bpe-path --inception-weights --prompts-file".split()
_FILES += ["--scorer"]
"""Known by their content."""


def settings_of(options: EvaluateOptions) -> dict[str, Any]:
    """What results depend on, by flag; but files, which are known by their content."""
    table = ((spec.flag, getattr(options, spec.name)) for spec in options_of(type(options)))
    return {flag: value for flag, value in table if flag not in (*_FREE, *_FILES)}


def protocol(options: EvaluateOptions, num_images: int, num_real: int, **more: Any) -> dict[str, Any]:
    """Everything that is needed to repeat a measurement, but the files themselves."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"mini-dalle": VERSION, "torch": torch.__version__},
        "network": NETWORK if more.get("inception") else None,
        "num_images": num_images,
        "num_real": num_real,
        "seed": options.seed,
        **more,
    }


def measure_folder(options: EvaluateOptions, device: torch.device, parts: Parts) -> dict[str, Any]:
    """--images: metrics of the images in a folder or in shards. Raises UserError."""
    assert options.images is not None
    images = folder_images("--images", options.images, options.image_size, GRID)
    real = folder_images("--reference", options.reference, options.image_size, GRID) if options.reference else None
    counts = [(found.num_images, f"{found.name} has") for found in (images, real) if found is not None]
    check_counts(options.metrics, *counts)
    network = load_inception(options.inception_weights, device)
    parts.begin({**settings_of(options), "--inception-weights": network.identity})
    found = features_of(images, network, options.batch_size, parts)
    wanted = None if real is None else features_of(real, network, options.batch_size, parts, "reference")
    facts = {"images": options.images, "reference": options.reference, "image_size": options.image_size}
    about = protocol(options, images.num_images, real.num_images if real else 0, inception=network.identity, **facts)
    return {"protocol": about, "metrics": [distances(options.metrics, found, wanted)] if parts.is_first else []}


def measure_reconstruction(options: EvaluateOptions, loaded: Loaded | None, device: torch.device) -> dict[str, Any]:
    """--reconstruction: how well a VQGAN reconstructs the images of --input-folder. Raises UserError."""
    if loaded is None:
        assert options.vqgan_model_path and options.vqgan_config_path
        vqgan = load_vqgan(options.vqgan_model_path, options.vqgan_config_path, device)
    else:
        vqgan = loaded.vqgan
    size = options.image_size or (vqgan.image_size if loaded is None else loaded.image_size)
    if size % vqgan.config.downsampling:
        raise UsageError(f"--image-size {size}: must be a multiple of {vqgan.config.downsampling} for this VQGAN")
    images = folder_images("--input-folder", options.input_folder, size)
    network = load_inception(options.inception_weights, device) if options.metrics else None
    lpips = load_perceptual(options.perceptual_weights).to(device) if options.perceptual_weights else None
    figures, features = reconstruction.measure(images, vqgan, device, options.batch_size, network, lpips)
    if network is not None:
        both = distances(options.metrics, features[1], features[0])
        figures.update({f"r{name}": value for name, value in both.items()})
    facts = {"input_folder": options.input_folder, "image_size": size, "vqgan": vqgan.identity}
    facts["inception"] = None if network is None else network.identity
    about = protocol(options, images.num_images, images.num_images, **facts)
    return {"protocol": about, "metrics": [figures]}


class Asked(NamedTuple):
    """What images are sampled for."""

    text: Tensor
    """(prompts, T) token ids."""
    captions: list[str]
    records: list[dict[str, Any]]
    """Entries of --prompts-file, or {"caption": text}."""

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], loaded: Loaded) -> Asked:
        """Those of --prompts-file."""
        captions = [prompt.text for prompt in prompts]
        text = loaded.tokenizer.tokenize(captions, loaded.config.text_seq_len, truncate=True)
        return cls(text, captions, [prompt.record for prompt in prompts])

    @classmethod
    def of_pairs(cls, text: Tensor, loaded: Loaded) -> Asked:
        """The captions of pairs, (n, T)."""
        captions = [loaded.tokenizer.decode(row.tolist()) for row in text]
        return cls(text, captions, [{"caption": caption} for caption in captions])


def measure_sampled(
    options: EvaluateOptions, loaded: Loaded, dataset: Any, parts: Parts, prompts: Sequence[Prompt] = ()
) -> dict[str, Any]:
    """Metrics of images sampled from the captions of a data set, for each --cond-scale. Raises UserError.

    Image i is of pair or prompt i of a fixed order, which repeats, and has random numbers of its own. Real images are
    those of the same pairs. Figures are those of the first process. prompts: instead of a data set.
    """
    wanted = [name for name in options.metrics if name in METRICS]
    network = load_inception(options.inception_weights, loaded.device) if wanted else None
    clip = ClipRanker(options.clip_path, loaded.device) if options.clip_path else None
    scorers, features = Scorers(options.scorer), None
    if prompts:
        asked = Asked.of_prompts(prompts, loaded)
    else:
        compared = network if set(wanted) - {"is"} else None
        text, features = read_pairs(options, dataset, compared, parts)
        asked = Asked.of_pairs(text, loaded)
    count = options.num_images or len(asked.text)
    real, results = None if features is None else Real(features), []
    for scale in options.cond_scale:
        measured = Measured(network, clip, scorers, loaded, asked, "copies" in options.metrics)
        sampled = measured.sample(options, count, scale, parts)
        if not parts.is_first:
            continue
        found: dict[str, Any] = {"cond_scale": scale}
        if network is not None:
            found.update(distances(wanted, Features(sampled["pooled"], sampled["logits"]), real))
        if clip is not None:
            found.update(Embedded(sampled["clip_images"], sampled["clip_texts"]).figures())
        if options.scorer:
            records = (asked.records[number % len(asked.records)] for number in range(count))
            found["scores"] = summary(from_bytes(sampled["scores"]), records)
        if "shown" in sampled:
            scaled = f"-{scale:g}" if len(options.cond_scale) > 1 else ""
            found.update(copies(options, sampled["shown"], dataset, f".copies{scaled}.png"))
        results.append(found)
    facts: dict[str, Any] = {"top_k": options.top_k, "top_p": options.top_p}
    facts["temperature"] = options.sampling(1).temperature
    facts.update(inception=network.identity if network else None, clip=options.clip_path, scorers=scorers.identity)
    about = protocol(options, count, 0 if features is None else len(features.pooled), **facts)
    return {"protocol": about, "metrics": results}


def check_sampled(options: EvaluateOptions, num_pairs: int) -> None:
    """Raise UsageError for too few images, before a model is loaded or an image is read."""
    source = (options.num_images, "--num-images is")
    pairs = (min(options.num_images or num_pairs, num_pairs), "the pairs to compare with are")
    check_counts(options.metrics, source if options.num_images else (num_pairs, "without --num-images it is"), pairs)


def read_pairs(
    options: EvaluateOptions, dataset: Any, network: Inception | None, parts: Parts
) -> tuple[Tensor, Features | None]:
    """The text (n, T) of the pairs that are measured, and features of their images, computed once for all scales."""
    count = min(options.num_images or len(dataset), len(dataset))
    facts = [PIXEL_RULES, dataset.origin(), *(dataset.image_identity(dataset.pair_at(index)) for index in range(count))]
    images = ImageSet(options.input_folder, count, identity_of(facts, dataset.image_size), lambda i: dataset[i][1])
    features = None if network is None else cached_features(images, network, parts.processes, "pairs")
    if network is None or features is not None:
        return torch.stack([dataset.text_at(index) for index in range(count)]), features

    def work(batches: Iterator[range]) -> Iterator[Found]:
        for numbers in batches:
            text, pixels = zip(*(dataset[index] for index in numbers))
            yield {"text": torch.stack(text), **Features.of(torch.stack(pixels), network)._asdict()}

    with log.progress(count, "reading pairs", unit="pair", is_main=parts.is_first) as bar:
        found = parts.compute("pairs", count, options.batch_size, work, bar.reach)
    features = Features(found["pooled"], found["logits"])
    replaced = sum(parts.processes.gather("pairs replaced", [getattr(dataset, "num_unreadable", 0)]))
    if not replaced:  # else images are those of other pairs
        keep_features(images, network, features, parts.processes)
    return found["text"], features


class Measured(NamedTuple):
    """What is computed of each sampled image, so that images need not be kept."""

    network: Inception | None
    clip: ClipRanker | None
    scorers: Scorers
    loaded: Loaded
    asked: Asked
    shown: bool
    """Whether the first SHOWN_COPIES images are kept."""

    def sample(self, options: EvaluateOptions, count: int, scale: float, parts: Parts) -> Found:
        """Sample `count` images of the captions, which are repeated; compute what is wanted of each."""
        sampling = options.sampling(self.loaded.config.num_image_tokens)._replace(cond_scale=scale)
        text, numbers = self.asked.text[torch.arange(count) % len(self.asked.text)], range(count)
        sampler = Sampler(self.loaded, Graphs(self.loaded.dalle), parallel=options.parallel)

        def work(batches: Iterator[range]) -> Iterator[Found]:
            given = (options.batch_size, options.seed, sampling)
            shares = (Share.of(batch, 1) for batch in batches)
            for batch in sampler.images(text, 1, *given, numbers=numbers, shares=shares):
                yield self._found(batch)

        with log.progress(
            count, f"sampling at guidance {scale:g}", unit="image", is_main=parts.is_first
        ) as bar:
            return parts.compute(f"guidance-{scale:g}", count, options.batch_size, work, bar.reach)

    def _found(self, batch: Batch) -> Found:
        found: Found = {}
        places = [prompt % len(self.asked.captions) for prompt in batch.share.prompts]
        captions = [self.asked.captions[place] for place in places]
        if self.network is not None:
            found.update(Features.of(batch.pixels, self.network)._asdict())
        if self.clip is not None:
            found["clip_images"], found["clip_texts"] = Embedded.of(self.clip, batch.pixels, captions)
        if self.scorers.names:
            records = [self.asked.records[place] for place in places]
            found["scores"] = as_bytes(self.scorers.score(batch.pixels, captions, records))
        first = batch.share.prompts[0]
        if self.shown and first < SHOWN_COPIES:
            found["shown"] = batch.pixels[: SHOWN_COPIES - first]
        return found


def copies(options: EvaluateOptions, generated: Tensor, dataset: Any, ending: str) -> dict[str, Any]:
    """Distances of generated images to the nearest images of the data, and a sheet of both beside the results."""
    images = ImageSet(options.input_folder, len(dataset), None, lambda index: dataset[index][1])
    found = memorization.nearest(generated, images.batches(256))
    result: dict[str, Any] = {"nearest_distance": float(found.distance.mean())}
    if options.json is not None:
        sheet = Path(options.json).with_suffix(ending)
        pairs = zip(generated, found.images, found.distance.tolist())
        cells = [Cell(pair, f"{distance:.3f}") for *pair, distance in pairs]
        legend = "Each pair: generated image, nearest image of the data; below: RMS distance of pixels (0 to 1)"
        save_picture(labelled_grid([("Nearest images", cells)], legend), sheet)
        result["nearest_sheet"] = str(sheet)
    return result


_NAMES = {
    "fid": "FID", "fid_infinity": "FID, extrapolated to infinitely many images", "kid": "KID x 1000",
    "is": "Inception Score", "precision": "precision", "recall": "recall", "clip": "CLIP score",
    "clip_retrieval": "CLIP retrieval@1 of 100", "rfid": "rFID", "rfid_infinity": "rFID, extrapolated", "rkid":
    "rKID x 1000", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "codes_used": "share of the codebook used",
    "perplexity": "perplexity of the codes", "nearest_distance": "distance to the nearest image of the data",
}  # fmt: skip


def metrics_report(result: dict[str, Any]) -> list[str]:
    """The metrics as lines of a table, a column for each guidance scale."""
    rows = result["metrics"]
    lines = []
    if len(rows) > 1 or "cond_scale" in rows[0]:
        lines.append(f"{'guidance':<48}" + "".join(f"{row['cond_scale']:>12g}" for row in rows))
    for key, name in _NAMES.items():
        if key not in rows[0]:
            continue
        factor = 1000 if key in ("kid", "rkid") else 1
        lines.append(f"{name:<48}" + "".join(f"{row[key] * factor:>12.4g}" for row in rows))
    lines += scores_report([row.get("scores", {}) for row in rows])
    few = result["protocol"]["num_images"]
    if few < FEW_IMAGES and not {"fid", "is", "precision", "rfid"}.isdisjoint(rows[0]):
        lines.append(f"note: {few} images: FID, IS, precision and recall depend on their number; compare equal numbers")
    return lines


def plot_sweep(result: dict[str, Any], path: str) -> None:
    """FID against CLIP score over guidance, as in the papers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = result["metrics"]
    x, y = [row["clip"] for row in rows], [row["fid"] for row in rows]
    axes.plot(x, y, marker="o", color="#2b6cb0")
    for row in rows:
        axes.annotate(f"{row['cond_scale']:g}", (row["clip"], row["fid"]), textcoords="offset points", xytext=(6, 6))
    axes.set(xlabel="CLIP score (higher is better)", ylabel="FID (lower is better)")
    axes.set_title(f"Guidance scales, {result['protocol']['num_images']:,} images each")
    figure.savefig(path, dpi=150)
