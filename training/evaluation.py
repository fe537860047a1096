"""--evaluate-every: images of some captions, and metrics of sampled images, while a DALL-E trains.

The main process samples with the weights that it trains, or their moving average; the others wait. Training is not
affected: weights, mode and random states are as before.

Letters: n images or captions, T text tokens, S image height and width.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import Tensor

import log
from args import Config
from checkpoints.vqgan import load_vqgan
from dalle.clip_score import ClipCollector
from dalle.evaluation import Gallery
from dalle.pictures import Sample, make_sheet, save_picture
from dalle.reranking import ClipRanker
from data import DEMO, epoch_order
from data.demo import demo_images, demo_records
from engines import Engine
from metrics.distances import distances
from metrics.features import Collector, Features
from metrics.inception import Inception, load_inception
from models.dalle import DalleModel
from models.vqgan import VQGAN
from models.vqgan_metrics import nearest_images
from sampling import Sampler, SamplingFlags, SamplingOptions, decode, encode
from training.files import move_aside
from training.setup import Parts
from utils.errors import UsageError, UserError

logger = logging.getLogger(__name__)

FOLDER = "samples"
"""Folder of the images, in that of the logs."""
DISTANCES = ("fid", "kid")


class Snapshot(NamedTuple):
    """A model in training, as `Sampler` takes it."""

    dalle: DalleModel
    vqgan: VQGAN

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.dalle.text_emb.weight.device


class _Stopped(Exception):
    """The run was asked to stop."""


class Evaluation:
    """Samples images while a model trains, always with the same captions and random numbers."""

    def __init__(self, config: Config, engine: Engine, parts: Parts, stop: Callable[[], bool]) -> None:
        """Choose pairs, and load the networks of metrics. stop: polled; an evaluation ends early. Raises UserError."""
        options, self.engine, self.tokenizer, self.stop = config.evaluation, engine, parts.tokenizer, stop
        self.every, self.folder = options.evaluate_every, config.log_dir / FOLDER
        self.seed, self.batch_size = config.execution.random_seed, max(config.execution.batch_size, 8)
        held_out = parts.train_set if parts.validation_set is None else parts.validation_set
        self.which = "training" if parts.validation_set is None else "held-out"
        pairs = held_out.without_null_captions()
        shown = min(options.evaluate_captions, len(pairs))
        self.shown = pairs.subset(torch.arange(shown) * len(pairs) // shown)
        self.measured = pairs.subset(epoch_order(len(pairs), self.seed, 0)[: options.evaluate_images])
        if options.inception_weights is not None and len(self.measured) < 2:
            raise UsageError(f"--inception-weights: FID needs at least 2 images; of {len(pairs)} {self.which} pairs "
                             f"--evaluate-images {options.evaluate_images} takes {len(self.measured)}")
        self.queries = demo_records("heldout") if config.data.input_folder == DEMO else []
        self.queries = self.queries[: options.evaluate_images]
        self.network: Inception | None = None
        self.clip: ClipRanker | None = None
        self.vqgan: VQGAN | None = None
        self._shown: tuple[Tensor, list[str], Tensor, Tensor] | None = None
        self._measured: tuple[Tensor, Features | None] | None = None
        self._gallery: Gallery | None = None
        if engine.is_main and options.evaluate_images:
            with torch.random.fork_rng(devices=[]):
                self.network = load_inception(options.inception_weights) if options.inception_weights else None
                self.clip = ClipRanker(options.clip_path) if options.clip_path else None

    def begin(self, parts: Parts, resumed: bool) -> None:
        """Load the VQGAN, and move an earlier run's images aside. parts: with the paths of the VQGAN."""
        if not self.engine.is_main or parts.vqgan_paths is None:
            return
        with torch.random.fork_rng(devices=[]):
            self.vqgan = load_vqgan(*parts.vqgan_paths)  # the run's own may be on the meta device
        if not resumed:
            done = "the sampled images of an earlier run are now in %s"
            move_aside(sorted(self.folder.glob("step_*.png")), "earlier.{}", "--log-dir: cannot make", done)

    def due(self, step: int, ended: bool = False) -> bool:
        """Whether to evaluate after this step. ended: it is the last one."""
        return ended or step % self.every < self.engine.steps_per_call

    def run(self, step: int, metrics: log.Metrics) -> None:
        """Evaluate. A failure is logged: training continues. Every process must call it."""
        with self.engine.sampling_model() as model:
            if model is not None and self.vqgan is not None:
                try:
                    with self._snapshot(model, self.vqgan) as snapshot:
                        self._show(snapshot, step, metrics)
                        figures = {**self._metrics(snapshot), **self._retrieval(snapshot)}
                        if figures:
                            metrics.log("evaluation", step, **figures)
                            shown = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
                            logger.info(f"evaluation at step {step}: {', '.join(shown)}")
                except _Stopped:
                    logger.info(f"evaluation at step {step}: interrupted")
                except (UserError, OSError, torch.cuda.OutOfMemoryError) as error:
                    logger.warning(f"evaluation at step {step} failed ({error}); training continues")
        self.engine.any(False)  # the others wait here for the main process

    @contextlib.contextmanager
    def _snapshot(self, model: DalleModel, vqgan: VQGAN) -> Iterator[Snapshot]:
        """The model with its VQGAN. Within the context all networks are on its device, else on the CPU."""
        snapshot, networks = Snapshot(model, vqgan), [vqgan, self.network, self.clip and self.clip.model]
        if self.clip is not None:
            self.clip.device = snapshot.device
        try:
            for network in filter(None, networks):
                network.to(snapshot.device)
            yield snapshot
        finally:
            for network in filter(None, networks):
                network.cpu()

    def _sampled(self, snapshot: Snapshot, text: Tensor, options: SamplingOptions) -> Iterator[Tensor]:
        """Yield images uint8 (n, 3, S, S) of captions, (prompts, T), in their order."""
        sampler, numbers = Sampler(snapshot), range(len(text))
        for batch in sampler.images(text, 1, self.batch_size, self.seed, options, numbers=numbers):
            yield batch.pixels
            self._poll()

    def _poll(self) -> None:
        if self.stop():
            raise _Stopped

    def _show(self, snapshot: Snapshot, step: int, metrics: log.Metrics) -> None:
        """Sample images of the fixed captions, as generate.py does by default, and write them."""
        if self._shown is None:
            text, real = _read(self.shown)
            self._shown = text, self._captions(text), real, decode(snapshot, encode(snapshot, real))
        text, captions, real, reconstructions = self._shown
        options = SamplingFlags().sampling(snapshot.dalle.config.num_image_tokens)
        generated = torch.cat(list(self._sampled(snapshot, text, options)))
        samples = [Sample(*cell) for cell in zip(captions, real, reconstructions, generated)]
        file = self.folder / f"step_{step:06}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        save_picture(make_sheet([(f"Step {step:,}, {self.which} captions", samples)]), file)
        logger.info(f"evaluation at step {step}: images of {self.which} captions are in {file}")
        metrics.images(FOLDER, step, captions, generated)

    def _captions(self, text: Tensor) -> list[str]:
        return [self.tokenizer.decode(row.tolist()) for row in text]

    def _metrics(self, snapshot: Snapshot) -> dict[str, float]:
        """FID and KID to the real images of the same pairs, and CLIP score, of images sampled from all codes."""
        if self.network is None and self.clip is None:
            return {}
        if self._measured is None:
            texts, collector = [], None if self.network is None else Collector(self.network)
            for numbers in torch.arange(len(self.measured)).split(self.batch_size):
                text, images = _read(self.measured.subset(numbers))
                texts.append(text)
                if collector is not None:
                    collector.add(images)
                self._poll()
            self._measured = torch.cat(texts), None if collector is None else collector.result()
        text, real = self._measured
        found = None if self.network is None else Collector(self.network)
        clips = None if self.clip is None else ClipCollector(self.clip)
        for images, rows in zip(self._sampled(snapshot, text, SamplingOptions()), text.split(self.batch_size)):
            if found is not None:
                found.add(images)
            if clips is not None:
                clips.add(images, self._captions(rows))
        figures = {} if found is None else distances(DISTANCES, found.result(), real)
        return figures if clips is None else {**figures, **clips.result()}

    def _retrieval(self, snapshot: Snapshot) -> dict[str, float]:
        """On the demo set: how often the real image nearest to a greedily sampled one is the caption's own."""
        if not self.queries:
            return {}
        if self._gallery is None:
            records = demo_records("all")
            size = snapshot.dalle.config.grid * snapshot.vqgan.config.downsampling
            self._gallery = Gallery(records, demo_images(records, size))
        captions = [record.caption for record in self.queries]
        text = self.tokenizer.tokenize(captions, snapshot.dalle.config.text_seq_len, truncate=True)
        images = torch.cat(list(self._sampled(snapshot, text, SamplingOptions(temperature=0))))
        found = nearest_images(images, self._gallery.images, snapshot.device)
        return {"retrieval": float((found == self._gallery.positions(self.queries)).double().mean())}


def _read(pairs: Any) -> tuple[Tensor, Tensor]:
    """All pairs of a data set: token ids (n, T), images uint8 (n, 3, S, S)."""
    text, images = zip(*(pairs[index] for index in range(len(pairs))))
    return torch.stack(text), torch.stack(images)
