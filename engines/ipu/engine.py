"""The IPU engine: one compiled program that runs forward, backward, accumulation and update of a whole step.

    python train.py --config L16_POD16 --device ipu
    poprun --num-replicas 16 --num-instances 4 --ipus-per-replica 4 python train.py --config L16_POD64 --device ipu

The model is built for one device and adapted from outside (model.py); plan.py places its parts.
"""
from __future__ import annotations

import logging
import time
from typing import Any, Callable, Generator

import torch
from torch import Tensor

import log
from args import Config
from engines.base import Engine, StepResult
from engines.ipu.data import Padded, Stream, make_loader
from engines.ipu.hosts import find_hosts, import_poptorch
from engines.ipu.model import IpuStep, adapt, canonical_state, place, plain
from engines.ipu.options import build_evaluation_options, build_optimizer, build_options
from engines.ipu.plan import block_starts, check, num_stages, pipeline_plan, uses_half
from models.dalle import TextToImage
from utils.resume import load_moments

logger = logging.getLogger(__name__)


class IpuEngine(Engine):
    """Replicas of the model, each a pipeline over `ipus_per_replica` IPUs."""

    name = "ipu"

    def __init__(self, config: Config) -> None:
        check(config)
        self.poptorch = import_poptorch()
        self.hosts = find_hosts(config.execution.replication_factor)
        self.rank = self.hosts.index
        self.is_main = self.rank == 0
        self.world_size = self.hosts.count
        self.seed = self.hosts.broadcast_seed(config.execution.random_seed)
        self.config = config = config.replace(random_seed=self.seed)
        self.options = build_options(self.poptorch, config, self.hosts, self.seed)
        self.iterations = self.steps_per_call = config.execution.device_iterations
        self.half = uses_half(config)
        # The device gets bytes (None), or pixels scaled on the host.
        self.image_dtype = None if config.ipu.byteio else torch.float16 if self.half else torch.float32
        self.evaluator: Any = None
        self._loader: Any = None
        self._source: Any = None  # its iterator
        self._position: Any = None  # (data set, epoch, sample) of the next batch
        self._device_rate: float | None = None  # the learning rate on the device

    @property
    def share(self) -> int:
        """Samples of this process in one optimizer step."""
        run = self.config.execution
        return run.batch_size * run.gradient_accumulation * self.hosts.local_replicas

    def describe(self) -> str:
        run = self.config.execution
        return "ipu, {}: global batch {} = {} x {} x {}; {} for each replica, {}".format(
            "fp16" if self.half else "fp32",
            self.config.global_batch,
            counted(self.hosts.replicas, "replica"),
            counted(run.gradient_accumulation, "micro-batch", "es"),
            counted(run.batch_size, "sample"),
            counted(self.config.ipu.ipus_per_replica, "IPU"),
            counted(self.hosts.count, "process", "es"),
        )

    # Data

    def _call(self) -> str:
        flags = "--batch-size x --gradient-accumulation x --replication-factor x --device-iterations"
        return f"call of the device, which takes {self.config.global_batch * self.iterations} ({flags})"

    def loader(
        self, dataset: Any, epoch: int, start: int = 0, left: int | None = None
    ) -> Generator[Any, None, None]:
        per_call = self.config.global_batch * self.iterations
        calls = self.steps_per_epoch(len(dataset), start) // self.iterations
        if self.config.data.synthetic_data:
            batch = self._example(self.encodes_images)
            for _ in range(calls):
                yield batch
            return
        self._seek(dataset, epoch, start, left)
        for call in range(1, calls + 1):
            self._position = (dataset, epoch + 1, 0) if call == calls else (dataset, epoch, start + call * per_call)
            yield next(self._source)

    def _seek(self, dataset: Any, epoch: int, start: int, left: int | None) -> None:
        """Continue with the current loader if it is at this position, else start a new one."""
        at, ends = self._position, epoch >= self.config.execution.epochs  # where the stream ends
        if not ends and at is not None and at[0] is dataset and at[1:] == (epoch, start):
            return
        self._stop_loader()
        samples = Stream(
            dataset,
            self.seed,
            (epoch, start),
            self.config.execution.epochs,
            (self.steps_per_epoch(len(dataset), start), self.steps_per_epoch(len(dataset))),
            (self.share, self.hosts.index, self.hosts.count),
            self.image_dtype,
            None if left is None else -(-left // self.iterations) * self.iterations,
        )
        self._loader = make_loader(self.poptorch, self.options, self.config, samples, self.config.ipu.async_dataloader)
        self._source = iter(self._loader)

    def _stop_loader(self) -> None:
        self._source = self._position = None
        if self._loader is not None:
            self._loader.terminate()
            self._loader = None

    def _example(self, encodes_images: bool) -> list[Tensor]:
        """Zeros with the shapes and dtypes of a batch."""
        samples, model = self.share * self.iterations, self.model.dalle.config
        text = torch.zeros(samples, model.text_seq_len, dtype=torch.long)
        if not encodes_images:
            return [text, torch.zeros(samples, model.image_seq_len, dtype=torch.long)]
        size = self.config.model.image_size
        return [text, torch.zeros(samples, 3, size, size, dtype=self.image_dtype or torch.uint8)]

    # Model

    def prepare(self, model: TextToImage, dataset: Any = None) -> None:
        begin = time.perf_counter()
        check(self.config, model.dalle.config)
        self.encodes_images = model.vqgan is not None
        if dataset is not None:
            first = int(dataset.order(self.seed, 0)[0])  # in a short run, others may lack codes
            self.encodes_images = dataset[first][1].dim() > 1
        self.model = adapt(model, self.half, self.config.ipu.embedding_serialization_factor, self.encodes_images)
        self.hosts.broadcast_weights(self.model.state_dict())
        self.plan = pipeline_plan(self.config, self.encodes_images)
        begun = place(self.model, self.plan)
        self.module = IpuStep(self.model).train()
        self.optimizer = build_optimizer(self.poptorch, self.config, self.model)
        self.executor = self.poptorch.trainingModel(self.module, options=self.options, optimizer=self.optimizer)
        self.executor.compile(*self._example(self.encodes_images))
        missing = [block.path for block in block_starts(self.plan) if block.path not in begun]
        if missing:
            raise RuntimeError("the blocks {} were planned but never began".format(", ".join(missing)))
        logger.info(log.compiled_line(time.perf_counter() - begin))

    def step(self, batch: Any) -> StepResult:
        sums = self.executor(*batch)  # each 0-d, or one value for each replica of this process
        micro_batches = self.iterations * self.config.execution.gradient_accumulation
        loss, text_loss, image_loss = (value.float().mean() / micro_batches for value in sums)
        return StepResult(loss, text_loss, image_loss)

    def evaluate(self, dataset: Any, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        dataset.set_epoch(0)
        # Both programs use the same IPUs, in turn. Detaching copies weights and optimizer state to the host; calling a
        # program attaches it again, with the newest weights.
        if self.executor.isAttachedToDevice():
            self.executor.detachFromDevice()
        self.module.eval()
        if self.evaluator is None:
            stages = num_stages(self.plan)
            options = build_evaluation_options(self.poptorch, self.config, self.hosts, self.seed, stages)
            self.evaluator = self.poptorch.inferenceModel(self.module, options=options)
        options = self.evaluator.options
        per_call = self.config.execution.batch_size * options.device_iterations * self.hosts.local_replicas
        samples = Padded(dataset, self.hosts.index, self.hosts.count, per_call, self.image_dtype)
        sums = torch.zeros(3, dtype=torch.float64)
        for text, images, counts in make_loader(self.poptorch, options, self.config, samples, ahead=False):
            losses = [value.double().sum() for value in self.evaluator(text, images, counts)]
            sums += torch.stack([*losses, counts.double().sum()])
        self.evaluator.detachFromDevice()
        self.module.train()
        text_sum, image_sum, count = self.hosts.mean(sums).tolist()
        text_loss, image_loss = text_sum / count, image_sum / count
        weight = self.model.dalle.config.loss_img_weight
        loss = (text_loss + weight * image_loss) / (weight + 1)
        return {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}

    def remedies(self) -> list[str]:
        return super().remedies() + (["a lower --loss-scaling", "--precision fp32"] if self.half else [])

    def set_learning_rate(self, learning_rate: float) -> None:
        if learning_rate == self._device_rate:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.executor.setOptimizer(self.optimizer)
        self._device_rate = learning_rate

    def mean(self, value: Tensor) -> float:
        return float(self.hosts.mean(value.detach().double()))

    # State

    def model_state(self, averaged: bool = False) -> dict[str, Tensor]:
        self.executor.copyWeightsToHostIfNeeded()
        return canonical_state(self.model.dalle)

    @property
    def _layout(self) -> dict[str, Any]:
        """What must match for an optimizer state of the device to fit."""
        return {
            "embedding_serialization_factor": self.config.ipu.embedding_serialization_factor,
            "fp16": self.half,
            "optimizer": self.config.optimizer.optimizer,
        }

    def state_dict(self) -> dict[str, Any]:
        # Each process has the random states of its own replicas: the checkpoint holds a row per process.
        own = torch.tensor([signed(int(value)) for value in self.executor.rng_state], dtype=torch.int64)
        return {
            "engine": self.name,
            "optimizer": plain_values(self.optimizer.state_dict()),
            "layout": self._layout,
            "replicas": self.hosts.replicas,
            "random_states": self.hosts.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("engine") != self.name or state["layout"] != self._layout:
            logger.warning(
                "the checkpoint's optimizer state does not fit: it was saved by another engine or layout (%s); ignored",
                state.get("layout", state.get("engine")),
            )
            return
        load_moments(self.optimizer, state["optimizer"])
        self._device_rate = None
        states = state["random_states"]
        if state["replicas"] == self.hosts.replicas and len(states) == self.world_size:
            self.executor.rng_state = [value % 2**64 for value in states[self.rank].tolist()]
        else:
            logger.warning(
                "the checkpoint was written by %d replicas in %d processes, now there are %d in %d: "
                "random states are reinitialised",
                state["replicas"],
                len(states),
                self.hosts.replicas,
                self.world_size,
            )

    def barrier(self) -> None:
        self.hosts.barrier()

    def close(self) -> None:
        self._stop_loader()
        for program in (self.evaluator, getattr(self, "executor", None)):
            if program is not None:
                program.destroy()


def counted(number: int, noun: str, plural: str = "s") -> str:
    """Return "1 process" or "2 processes"."""
    return "{} {}{}".format(number, noun, "" if number == 1 else plural)


def signed(value: int) -> int:
    """Return an unsigned 64-bit number as the signed one with the same bits, for an int64 tensor."""
    return value - 2**64 if value >= 2**63 else value


def plain_values(value: Any) -> Any:
    """Return nested containers as plain dicts and lists of plain tensors, which a checkpoint can hold."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_values(item) for item in value) if type(value) in (list, tuple) else list(value)
    return plain(value) if isinstance(value, Tensor) else value
