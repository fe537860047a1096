"""The interface between the training loop and devices: one optimizer step."""
from __future__ import annotations

import contextlib
import logging
from typing import Any, Callable, Generator, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from args import Config
from models.building import build_dalle
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import image_codes
from utils.errors import UserError
from utils.schedules import whole_steps

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """The result of one optimizer step: scalars that stay on the device until the caller reads them."""

    loss: Tensor
    """Mean loss of this process's samples, nats."""
    text_loss: Tensor | None = None
    """Its text part."""
    image_loss: Tensor | None = None
    """Its image part."""
    grad_norm: Tensor | None = None
    """Euclidean norm of the whole gradient before clipping; None if the device does not report it."""
    bad_steps: Tensor | None = None
    """Steps skipped because of a non-finite gradient, (2,): since training began, and in a row up to now. The same in
    every process; None if the device does not skip such steps."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into matrices with weight decay and vectors (biases, norms, LayerScale) without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.numel() != max(p.shape)]
    vectors = [p for p in trainable if p.numel() == max(p.shape)]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class Engine:
    """One kind of device. Exactly `steps_per_call` optimizer steps happen per `step`."""

    name: str
    config: Config
    """The configuration, with the random seed that all processes share."""
    is_main: bool
    """This process logs and saves; exactly one does."""
    rank: int = 0
    """Index of this process."""
    world_size: int
    """Number of processes that train together."""
    device_choice: str = ""
    """What --device auto found, for the log; empty if the device was given."""
    model: TextToImage
    """What `prepare` got."""
    steps_per_call: int = 1
    """Optimizer steps per call of `step`, and so per batch of `loader`: --device-iterations, on an IPU."""

    def introduce(self) -> None:
        """Log how the device was chosen and how it reaches the global batch."""
        for line in filter(None, (self.device_choice, self.describe())):
            logger.info("%s", line)

    def describe(self) -> str:
        """One line on how the configuration's global batch is reached on this device."""
        raise NotImplementedError

    def steps_per_epoch(self, num_samples: int, start: int = 0) -> int:
        """Optimizer steps in an epoch, or from its sample `start` on; samples that do not fill a call are skipped.

        Raises UserError if a whole epoch has no step.
        """
        if not whole_steps(num_samples, self.config.global_batch, self.steps_per_call):
            execution = self.config.execution
            factors = {name: getattr(execution, name) for name in ("gradient_accumulation", "replication_factor")}
            factors["batch_size"] = execution.batch_size
            if self.steps_per_call > 1:
                factors = dict(device_iterations=self.steps_per_call, **factors)
            whole = self.config.global_batch * self.steps_per_call
            enough = [name for name, factor in factors.items() if whole // factor <= num_samples]
            lowered = enough[:1] or [name for name, factor in factors.items() if factor > 1]
            flags = " and ".join("--" + name.replace("_", "-") for name in lowered)
            raise UserError(
                f"{num_samples} training samples do not fill one {self._call()}; lower {flags} or give more data"
            )
        return whole_steps(num_samples - start, self.config.global_batch, self.steps_per_call)

    def _call(self) -> str:
        """The samples of one call of `step`, for messages."""
        flags = "--batch-size x --gradient-accumulation x --replication-factor"
        return f"global batch of {self.config.global_batch} ({flags})"

    def loader(
        self, dataset: Any, epoch: int, start: int = 0, left: int | None = None
    ) -> Generator[Any, None, None]:
        """Yield one batch for each call of `step` in `epoch`, from its sample `start` on.

        Order and content depend only on seed and epoch. left: remaining optimizer steps of the run, the limit of
        prefetching (None: to the end of its epochs). Close a generator that is not exhausted: this ends its workers.
        """
        raise NotImplementedError

    def prepare(self, model: TextToImage, dataset: Any = None) -> None:
        """Wrap, place and compile `model` and build its optimizer; logs "Compiled model in X secs" if it compiled.

        dataset: the training data, which shows a compiler whether batches hold images or codes. None: images if the
        model has a VQGAN.
        """
        raise NotImplementedError

    def encode(self, vqgan: nn.Module, images: Tensor) -> Tensor:
        """Return the codes LongTensor (B, N), on the CPU, of images uint8 (B, 3, S, S): the same as in `step`.

        Does not need `prepare`. Moves the VQGAN to its device; with IPUs, that is the host.
        """
        return image_codes(vqgan, images)

    def step(self, batch: Any) -> StepResult:
        """Train on one batch of `loader`."""
        raise NotImplementedError

    def evaluate(self, dataset: Any, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """Return mean loss, text_loss and image_loss (nats) over a whole dataset, without training.

        stop: polled during evaluation; if it is true in any process, an engine may return None early, in all of them.
        """
        raise NotImplementedError

    def remedies(self) -> list[str]:
        """Flags that make non-finite losses and gradients less likely on this engine, for error messages."""
        options = self.config.optimizer
        return ["a lower --learning-rate"] + ([] if options.clip_grad_norm else ["--clip-grad-norm 1"])

    def memory_plan(self, model: DalleConfig) -> str:
        """One line on the memory that training a model will take; empty if --plan reports it."""
        return ""

    def peak_memory(self) -> int | None:
        """Peak memory of this process in bytes; None if unknown."""
        return None

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the following steps."""
        raise NotImplementedError

    def mean(self, value: Tensor) -> float:
        """Average a scalar over all processes."""
        raise NotImplementedError

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process; every process must call it."""
        return flag if self.world_size == 1 else self.mean(torch.tensor(float(flag))) > 0

    def model_state(self, averaged: bool = False) -> dict[str, Tensor]:
        """Weights of the DALL-E under its own module names, on the CPU. averaged: their moving average, if any.

        Every process must call it; only the main process's result need be complete.
        """
        raise NotImplementedError

    @contextlib.contextmanager
    def sampling_model(self) -> Iterator[DalleModel | None]:
        """Within the context: the DALL-E to sample from, in eval mode, with averaged weights if there are any.

        None in all processes but the main one; every one must enter. Here it is a copy on the CPU.
        """
        weights = self.model_state(averaged=True)
        with torch.random.fork_rng(devices=[]):  # a new model has random weights at first
            model = build_dalle(self.model.dalle.config, weights).eval() if self.is_main else None
        with torch.no_grad():
            yield model

    def state_dict(self) -> dict[str, Any]:
        """Everything else that exact resume needs: optimizer, loss scale, averaged weights, random states.

        Every process must call it; only the main process's result need be complete.
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the result of `state_dict`."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait for all processes."""

    def close(self) -> None:
        """Release the device and leave the process group."""
