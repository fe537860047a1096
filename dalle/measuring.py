"""Metrics of images for evaluate.py: sampled from captions, in a folder, or reconstructed by a tokenizer."""
from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, NamedTuple, Sequence

import torch
from torch import Tensor

import log
from checkpoints.vqgan import load_perceptual, load_vqgan
from dalle.clip_score import ClipCollector
from dalle.loading import Loaded
from dalle.outputs import GRID
from dalle.pictures import Cell, labelled_grid, save_picture
from dalle.reranking import ClipRanker
from dalle.scoring import Scores, scores_report
from metrics import memorization, reconstruction
from metrics.distances import METRICS, distances
from metrics.features import Collector, Features, features_of
from metrics.images import folder_images
from metrics.inception import Inception, load_inception
from sampling import Graphs, Sampler
from utils.errors import UsageError, UserError
from utils.flags import NetworkOptions
from utils.options import VERSION, Options, again, option
from utils.prompt_lists import read_prompts

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
        _refuse(options, "--images", ("--dalle-path", "--vqgan-model-path", "--num-images", "--max-pairs"))
        other = wanted - set(METRICS)
        if other or not wanted:
            raise UsageError(f"--images: give --metrics of {', '.join(METRICS)}, not {', '.join(other) or 'none'}")
        if wanted != {"is"} and options.reference is None:
            raise UsageError(f"--metrics {', '.join(sorted(wanted - {'is'}))} needs --reference: the real images")
    elif options.reference is not None:
        raise UsageError("--reference needs --images")
    if options.image_size is not None and not (options.images or options.reconstruction):
        raise UsageError("--image-size needs --images or --reconstruction: a model has its own size")
    if options.reconstruction:
        _refuse(options, "--reconstruction", ("--num-images", "--clip-path", "--sheet"))
        if wanted - {"fid", "kid"}:
            raise UsageError("--reconstruction: --metrics may add fid and kid (rFID, rKID) alone")
        if options.dalle_path is None and not (options.vqgan_model_path and options.vqgan_config_path):
            raise UsageError("--reconstruction needs --vqgan-model-path and --vqgan-config-path, or --dalle-path")
    if ("clip" in wanted) != (options.clip_path is not None):
        raise UsageError("--metrics clip and --clip-path belong together")
    if options.prompts_file is not None:
        unused = ("--input-folder", "--split", "--max-pairs", "--sheet", "--skip-retrieval", "--best-of")
        _refuse(options, "--prompts-file", unused)
        if wanted - {"is", "clip"} or not (wanted or options.scorer):
            raise UsageError("--prompts-file has no images to compare with: give --metrics is or clip, or --scorer")
    if options.scorer and (options.images is not None or options.reconstruction):
        raise UsageError("--scorer is for sampled images, not for --images or --reconstruction")
    if len(options.cond_scale) > 1 and not options.sampled_metrics:
        raise UsageError("--cond-scale: several scales are for --metrics fid, kid, is, prc and clip")
    if options.plot is not None and not {"fid", "clip"} <= wanted:
        raise UsageError("--plot needs --metrics fid clip")
    if options.num_images and not options.sampled_metrics:
        raise UsageError("--num-images needs --metrics of sampled images")


def _refuse(options: Options, mode: str, flags: Sequence[str]) -> None:
    unused = [flag for flag in flags if flag in options.given()]
    if unused:
        raise UsageError(f"{unused[0]} has no use with {mode}")


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


def measure_folder(options: EvaluateOptions, device: torch.device) -> dict[str, Any]:
    """--images: metrics of the images in a folder. Raises UserError."""
    assert options.images is not None
    images = folder_images("--images", options.images, options.image_size, GRID)
    real = folder_images("--reference", options.reference, options.image_size, GRID) if options.reference else None
    network = load_inception(options.inception_weights, device)
    found = features_of(images, network, options.batch_size)
    wanted = None if real is None else features_of(real, network, options.batch_size)
    facts = {"images": options.images, "reference": options.reference, "image_size": options.image_size}
    about = protocol(options, images.num_images, real.num_images if real else 0, inception=network.identity, **facts)
    return {"protocol": about, "metrics": [distances(options.metrics, found, wanted)]}


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
    real: Features | None
    """Of the real images of these pairs, where they are needed."""


def read_asked(options: EvaluateOptions, loaded: Loaded, dataset: Any, network: Inception | None) -> Asked:
    """The prompts of --prompts-file, or the first --num-images pairs of the data."""
    tokenizer = loaded.tokenizer
    if options.prompts_file is not None:
        prompts = read_prompts(options.prompts_file, options.caption_column)
        if not prompts:
            raise UserError(f"--prompts-file {options.prompts_file}: there are no prompts in it")
        captions = [prompt.text for prompt in prompts]
        text = tokenizer.tokenize(captions, loaded.config.text_seq_len, truncate=True)
        return Asked(text, captions, [prompt.record for prompt in prompts], None)
    collector = None if network is None or set(options.metrics) & set(METRICS) == {"is"} else Collector(network)
    texts, pairs = [], min(options.num_images or len(dataset), len(dataset))
    with log.progress(pairs, "reading pairs", unit="pair") as bar:  # once for all scales
        for part, images in batches_of(dataset, pairs, options.batch_size):
            texts.append(part)
            if collector is not None:
                collector.add(images)
            bar.update(len(part), len(part))
    text = torch.cat(texts)
    captions = [tokenizer.decode(row.tolist()) for row in text]
    records = [{"caption": caption} for caption in captions]
    return Asked(text, captions, records, None if collector is None else collector.result())


def measure_sampled(options: EvaluateOptions, loaded: Loaded, dataset: Any) -> dict[str, Any]:
    """Metrics of images sampled from the captions of a data set, for each --cond-scale. Raises UserError.

    Image i is of pair or prompt i of a fixed order, which repeats, and has random numbers of its own. Real images are
    those of the same pairs. dataset: not read with --prompts-file.
    """
    wanted = [name for name in options.metrics if name in METRICS]
    network = load_inception(options.inception_weights, loaded.device) if wanted else None
    clip = ClipRanker(options.clip_path, loaded.device) if options.clip_path else None
    asked = read_asked(options, loaded, dataset, network)
    count = options.num_images or len(asked.text)
    results = []
    for scale in options.cond_scale:
        found: dict[str, Any] = {"cond_scale": scale}
        collected = None if network is None else Collector(network)
        clips = None if clip is None else ClipCollector(clip)
        scores = Scores(options.scorer) if options.scorer else None
        kept: list[Tensor] = []
        for places, images in sampled_images(options, loaded, asked.text, count, scale):
            captions = [asked.captions[place] for place in places]
            if collected is not None:
                collected.add(images)
            if clips is not None:
                clips.add(images, captions)
            if scores is not None:
                scores.add(images, captions, [asked.records[place] for place in places])
            kept += list(images[: max(0, SHOWN_COPIES - len(kept))]) if "copies" in options.metrics else []
        if collected is not None:
            found.update(distances(wanted, collected.result(), asked.real))
        if clips is not None:
            found.update(clips.result())
        if scores is not None:
            found["scores"] = scores.result()
        if kept:
            scaled = f"-{scale:g}" if len(options.cond_scale) > 1 else ""
            found.update(copies(options, torch.stack(kept), dataset, f".copies{scaled}.png"))
        results.append(found)
    facts: dict[str, Any] = {"top_k": options.top_k, "top_p": options.top_p}
    facts["temperature"] = options.sampling(1).temperature
    facts.update(inception=network.identity if network else None, clip=options.clip_path, scorer=list(options.scorer))
    about = protocol(options, count, 0 if asked.real is None else len(asked.real.pooled), **facts)
    return {"protocol": about, "metrics": results}


def batches_of(dataset: Any, count: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` pairs of a data set: text (n, T) and images uint8 (n, 3, S, S)."""
    for start in range(0, count, batch_size):
        text, images = zip(*(dataset[index] for index in range(start, min(start + batch_size, count))))
        yield torch.stack(text), torch.stack(images)


def sampled_images(
    options: EvaluateOptions, loaded: Loaded, text: Tensor, count: int, scale: float
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places in text (prompts, T), which repeats, and their images uint8 (n, 3, S, S): `count` in all."""
    sampler = Sampler(loaded, Graphs(loaded.dalle))
    sampling = options.sampling(loaded.config.num_image_tokens)._replace(cond_scale=scale)
    places, numbers = torch.arange(count) % len(text), range(count)
    with log.progress(count, f"sampling at guidance {scale:g}", unit="image") as bar:
        for batch in sampler.images(text[places], 1, options.batch_size, options.seed, sampling, numbers=numbers):
            own = places[batch.share.first_prompt : batch.share.end_prompt].tolist()
            yield own, batch.pixels
            bar.update(len(own), len(own))


def copies(options: EvaluateOptions, generated: Tensor, dataset: Any, ending: str) -> dict[str, Any]:
    """Distances of generated images to the nearest images of the data, and a sheet of both beside the results."""
    batches = (images for _, images in batches_of(dataset, len(dataset), 256))
    found = memorization.nearest(generated, batches)
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
