"""Plain PyTorch on CPU or CUDA: one process, or several under torchrun, over gloo or nccl.

Several processes replicate the model (DistributedDataParallel) or shard it (--shard, see sharding.py).
"""
from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from itertools import islice
from typing import Any, Callable, ContextManager, Generator, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import log
import ops
from args import Config
from data.order import random_bits
from engines import sharding
from engines.base import Engine, StepResult
from engines.batching import Rows, split_batch
from engines.devices import multiplies_bf16, pick_device
from engines.memory import peak_bytes, total_bytes, training_memory
from engines.optimizers import make_optimizers, make_scaler
from models.config import DalleConfig
from models.dalle import DalleModel, TextToImage
from models.vqgan import image_codes
from ops.elementwise import total_norm
from utils.errors import UserError
from utils.loading import make_loader, read
from utils.resume import load_moments

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 0.3
_MANY_WEIGHTS = 10**7
"""From so many weights on, matmuls dominate a step, and the log suggests a faster precision."""


class NativeEngine(Engine):
    """The model on one device for each process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        execution = config.execution
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = pick_device(execution.device, int(os.environ.get("LOCAL_RANK", "0")))
        self.name = self.device.type
        self.is_main = self.rank == 0
        self.batching = split_batch(config.global_batch, execution.batch_size, self.world_size)
        if execution.threads:
            torch.set_num_threads(execution.threads)
        if execution.shard:
            sharding.check(self.world_size)
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.name == "cuda" else "gloo")
            # Host-side communication uses gloo: on the device it would wait for queued kernels.
            self.hosts = dist.new_group(backend="gloo") if self.name == "cuda" else None
        self.sharding: sharding.Sharding | None = None
        precision = execution.native_precision(self.name)
        self.autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.precision = precision
        scale = {"enabled": precision == "fp16", "init_scale": float(config.optimizer.loss_scaling)}
        self.scaler = sharding.make_scaler(self.name, **scale) if execution.shard else make_scaler(self.name, scale)
        self.previous_precision: str | None = None  # of matmuls; engines that set one must close in reverse order
        if execution.matmul_precision is not None or self.name == "cuda":
            self.previous_precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(execution.matmul_precision or "high")
        if self.name == "cuda":
            torch.backends.cudnn.allow_tf32 = True
        self.averaged: dict[str, Tensor] | None = None
        self.num_updates = 0
        self.bad_steps = torch.zeros(2, device=self.device)  # skipped: in all, in a row

    def describe(self) -> str:
        precision = self.config.execution.matmul_precision
        matmuls = f", matmuls of {precision} precision" if precision else ""
        shard = ", model sharded over the processes" if self.config.execution.shard else ""
        return f"{self.device}, {self.precision}{matmuls}{shard}: {self.batching.describe()}"

    # Data

    def loader(
        self, dataset: Any, epoch: int, start: int = 0, left: int | None = None
    ) -> Generator[Any, None, None]:
        dataset.set_epoch(epoch)
        order = dataset.order(self.config.execution.random_seed, epoch)
        batching, steps = self.batching, self.steps_per_epoch(len(dataset), start)
        steps = steps if left is None else min(steps, left)
        # (steps, processes, micro-batches, samples): each process takes its part of each step's global batch.
        shares = order[start : start + steps * batching.global_batch].view(
            steps, batching.world_size, batching.accumulation, batching.micro
        )
        with self._batches(dataset, Rows(shares[:, self.rank].flatten(0, 1))) as source:
            for _ in range(steps):
                yield islice(source, batching.accumulation)

    def _batches(self, dataset: Any, numbers: Iterable[list[int]]) -> ContextManager[Iterator[Any]]:
        workers = self.config.data.dataloader_workers
        options = {"pin_memory": self.name == "cuda", "prefetch_factor": 4 if workers else None}
        return contextlib.closing(read(make_loader(dataset, workers, batch_sampler=numbers, **options)))

    def _to_device(self, batch: Any) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True) for tensor in batch]

    # Model

    def prepare(self, model: TextToImage, dataset: Any = None) -> None:
        begin = time.perf_counter()
        execution, options = self.config.execution, self.config.optimizer
        self.model = model if execution.shard else model.to(self.device)
        blocks = self.model.dalle.transformer.layers
        if execution.activation_checkpointing:
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if execution.shard:
            self.sharding = sharding.Sharding(self.model, self.device, self.autocast_dtype)
        self.optimizers = make_optimizers(self.model, options)
        if self.sharding is not None:
            self.sharding.localize(self.optimizers)
        self.parameters = [
            p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        ]
        if options.ema_decay:
            self.averaged = {key: value.detach().clone() for key, value in self._weights().items()}
        torch.manual_seed(self.config.execution.random_seed + self.rank)  # dropout, code noise
        self.module: Any = self._parallel(self.model)
        if execution.compile:
            self._compile(blocks)
        if execution.compile or log.read_by_runner():
            logger.info(log.compiled_line(time.perf_counter() - begin))
        exact = self.precision == "fp32" and torch.get_float32_matmul_precision() == "highest"
        large = sum(p.numel() for p in self.parameters) >= _MANY_WEIGHTS
        if self.name == "cpu" and exact and large and multiplies_bf16():
            logger.info("this CPU has bfloat16 matrix units (AMX): --matmul-precision medium trains faster")

    def _parallel(self, model: TextToImage) -> nn.Module:
        if self.world_size == 1 or self.sharding is not None:
            return model
        # Buffers are constants, equal in every process, and older versions of gloo cannot send bool ones: DDP must not
        # broadcast them. Its own option for this differs between versions of PyTorch.
        constants = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constants)
        devices = [self.device] if self.name == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def _compile(self, blocks: Iterable[nn.Module]) -> None:
        if self.sharding is None:
            self.module = torch.compile(self.module)
        else:
            for block in blocks:  # one by one: FSDP2's hooks between them gather weights and cannot be compiled
                block.forward = torch.compile(block.forward)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run a micro-batch of zeros forward and backward, so that compilation happens before the first step."""
        config = self.model.dalle.config
        text = torch.zeros(self.batching.micro, config.text_seq_len, dtype=torch.long, device=self.device)
        codes = torch.zeros(self.batching.micro, config.image_seq_len, dtype=torch.long, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.name == "cuda" else []):
            self.module.train()
            self._losses(text, codes).total.backward()
        self._zero_grad()

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.sharding is not None:
            self.sharding.clear_gradients()

    def encode(self, vqgan: nn.Module, images: Tensor) -> Tensor:
        return image_codes(vqgan.to(self.device), images.to(self.device)).cpu()

    def _codes(self, images: Tensor) -> Tensor:
        """Return codes, (B, N) or (B, 2, N), unchanged, and for images (B, 3, S, S) the same codes as `encode`."""
        return images if images.dim() <= 3 else image_codes(self.model.vqgan, images)

    def _losses(self, text: Tensor, images: Tensor) -> Any:
        # Outside autocast: codes must not depend on the precision of the transformer.
        codes = self._codes(images)
        with torch.autocast(self.name, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.module(text, codes)

    def step(self, batch: Any) -> StepResult:
        with ops.use(attention=self.config.model.attention_impl):
            return self._step(batch)

    def _step(self, batch: Any) -> StepResult:
        self.module.train()
        accumulation = self.batching.accumulation
        sums = torch.zeros(3, device=self.device)
        for index, micro_batch in enumerate(batch):
            text, images = self._to_device(micro_batch)
            last = index == accumulation - 1
            alone = self.world_size == 1 or self.sharding is not None
            with contextlib.nullcontext() if last or alone else self.module.no_sync():
                losses = self._losses(text, images)
                self.scaler.scale(losses.total / accumulation).backward()
            sums += torch.stack([losses.total.detach(), losses.text.detach(), losses.image.detach()]).float()
        if self.sharding is not None:
            self.sharding.reduce_gradients()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = self._clip()
        self._update_weights(~torch.isfinite(grad_norm))
        self._zero_grad()
        self.num_updates += 1
        self._update_average()
        sums /= accumulation
        return StepResult(sums[0], sums[1], sums[2], grad_norm, self.bad_steps.clone())

    def _clip(self) -> Tensor:
        """Clip the gradients to the norm --clip-grad-norm; return the norm before clipping."""
        clip = self.config.optimizer.clip_grad_norm
        if self.sharding is not None:
            return self.sharding.clip(clip)
        if not hasattr(torch.nn.utils, "get_total_norm"):  # before PyTorch 2.6
            return torch.nn.utils.clip_grad_norm_(self.parameters, clip or float("inf")).detach()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(gradients)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        return norm

    def _update_weights(self, bad: Tensor) -> None:
        """Take an optimizer step, unless the gradient is `bad` (bool, 0-d): then no optimizer state changes.

        The gradients are already reduced, so all processes decide alike without communication.
        """
        # (total, row) -> (total + bad, row + 1 or 0)
        self.bad_steps = torch.stack([self.bad_steps[0] + bad, (self.bad_steps[1] + 1) * bad])
        if all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers):
            # Fused kernels decide on the device, as for GradScaler: the host does not synchronise.
            for optimizer in self.optimizers:
                scaled: Any = optimizer  # these attributes are not declared
                scaled.grad_scale, scaled.found_inf = None, bad.float()
                optimizer.step()
        elif not bad:
            for optimizer in self.optimizers:
                if self.sharding is not None:
                    self.sharding.step(optimizer)
                else:
                    optimizer.step()
        self.scaler.update()  # in half precision: a smaller scale after a bad step

    def _weights(self) -> dict[str, Tensor]:
        """This process's part of each weight by name (all of it without --shard); shares memory with the model."""
        return self.model.dalle.state_dict() if self.sharding is None else self.sharding.weights()

    def _update_average(self) -> None:
        if self.averaged is None:
            return
        # The decay grows to its final value, so that the random initialisation does not dominate early averages.
        decay = min(self.config.optimizer.ema_decay, (1 + self.num_updates) / (10 + self.num_updates))
        state = self._weights()
        torch._foreach_lerp_(list(self.averaged.values()), [state[key] for key in self.averaged], 1.0 - decay)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Within the context the model holds the averaged weights, if there are any."""
        if self.averaged is None:
            yield
            return
        weights = self._weights()
        own = {key: value.detach().clone() for key, value in weights.items()}
        try:
            for key, value in weights.items():
                value.copy_(self.averaged[key])
            yield
        finally:
            for key, value in weights.items():
                value.copy_(own[key])

    def evaluate(self, dataset: Any, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        dataset.set_epoch(0)
        mine = list(range(self.rank, len(dataset), self.world_size))
        size = max(self.batching.micro, 8)
        batches = [mine[first : first + size] for first in range(0, len(mine), size)]
        own = len(batches)
        if self.sharding is not None:
            # Equally many passes in each process, since gathering weights needs all of them; extra ones do not count.
            batches += [[0]] * (-(-len(dataset) // (self.world_size * size)) - own)
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)  # three losses, samples, processes that stopped
        self.model.eval()
        attention = ops.use(attention=self.config.model.attention_impl)
        with attention, torch.no_grad(), self._averaged_weights(), self._batches(dataset, batches) as source:
            for index, batch in enumerate(source):
                if stop is not None and (stop() if self.sharding is None else self.any(stop())):
                    sums[4] += 1
                    break
                text, images = self._to_device(batch)
                codes = self._codes(images)
                with torch.autocast(self.name, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                    losses = self.model(text, codes)
                samples = len(text) if index < own else 0
                sums[:4] += torch.stack([*losses, torch.ones_like(losses.total)]).double() * samples
        if self.sharding is not None:
            self.sharding.release()
        if self.world_size > 1:
            dist.all_reduce(sums)
        if sums[4] > 0:
            return None
        total, text_loss, image_loss = (sums[:3] / sums[3].clamp(min=1)).tolist()
        return {"loss": total, "text_loss": text_loss, "image_loss": image_loss}

    def remedies(self) -> list[str]:
        precision = {"fp16": ["--precision bf16 or fp32"], "bf16": ["--precision fp32"]}
        return super().remedies() + precision.get(self.precision, [])

    def memory_plan(self, model: DalleConfig) -> str:
        plan = training_memory(model, self.config, self.precision, self.world_size)
        total = total_bytes(self.device)
        if plan.total > total:
            share = ", or --shard on several GPUs" if self.name == "cuda" and not self.config.execution.shard else ""
            logger.warning(
                "training takes more memory than the available %.1f GB: lower --batch-size, or give "
                "--activation-checkpointing or --optimizer Adafactor%s",
                total / 1e9,
                share,
            )
        return plan.describe()

    def peak_memory(self) -> int | None:
        return peak_bytes(self.device)

    def set_learning_rate(self, learning_rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_scale", 1.0)  # see engines/optimizers.py

    def mean(self, value: Tensor) -> float:
        value = value.detach().to(self.device, torch.float64, copy=True)
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return float(value)

    def any(self, flag: bool) -> bool:
        if self.world_size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags)

    # State

    def model_state(self, averaged: bool = False) -> dict[str, Tensor]:
        weights = self._weights() if self.averaged is None or not averaged else self.averaged
        if self.sharding is not None:
            return self.sharding.collect(weights)
        return {key: value.detach().cpu().clone() for key, value in weights.items()}

    @contextlib.contextmanager
    def sampling_model(self) -> Iterator[DalleModel | None]:
        if self.sharding is not None:  # no process has it whole
            with super().sampling_model() as model:
                yield model
            return
        self.model.eval()
        with torch.no_grad(), self._averaged_weights():
            yield self.model.dalle if self.is_main else None

    def state_dict(self) -> dict[str, Any]:
        random_state = {"cpu": torch.get_rng_state()}
        if self.name == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        states = [random_state]
        if self.world_size > 1:
            states = [{} for _ in range(self.world_size)]
            dist.all_gather_object(states, random_state)
        state_of: Any = (lambda own: own.state_dict()) if self.sharding is None else self.sharding.optimizer_state
        optimizers = [state_of(optimizer) for optimizer in self.optimizers]
        return {
            "engine": "native",
            "optimizer": optimizers[0] if len(optimizers) == 1 else {"parts": optimizers},
            "scaler": self.scaler.state_dict(),
            "loss_scaling": self.config.optimizer.loss_scaling,
            "ema": None if self.averaged is None else self.model_state(averaged=True),
            "num_updates": self.num_updates,
            "bad_steps": [int(count) for count in self.bad_steps.tolist()],
            "random_states": states,
            "threads": torch.get_num_threads(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("engine") != "native":
            logger.warning(
                "the checkpoint's optimizer state was saved by another engine (%s); ignored", state.get("engine")
            )
            return
        parts = state["optimizer"].get("parts", [state["optimizer"]])
        groups = [[len(group["params"]) for group in part["param_groups"]] for part in parts]
        if groups != [[len(group["params"]) for group in optimizer.param_groups] for optimizer in self.optimizers]:
            raise UserError(
                f"--resume: the checkpoint's optimizer differs from --optimizer {self.config.optimizer.optimizer}; "
                "resume with the optimizer it was trained with, or start from it with --pretrained-checkpoint"
            )
        for optimizer, part in zip(self.optimizers, parts):
            if self.sharding is not None:
                self.sharding.distribute_optimizer_state(optimizer, part)
            load_moments(optimizer, part)
        first_scale = self.config.optimizer.loss_scaling
        if state["scaler"] and self.scaler.is_enabled() and state.get("loss_scaling", first_scale) == first_scale:
            self.scaler.load_state_dict(state["scaler"])
        self.num_updates = state["num_updates"]
        self.bad_steps = torch.tensor(state.get("bad_steps", [0, 0]), dtype=torch.float32, device=self.device)
        if self.averaged is not None and state["ema"] is not None:
            if self.sharding is not None:
                self.averaged = self.sharding.distribute(state["ema"], self.device)
            else:
                self.averaged = {key: value.to(self.device) for key, value in state["ema"].items()}
        states = state["random_states"]
        if len(states) != self.world_size:
            logger.warning(
                "the checkpoint was written by %d processes, now there are %d: random states are reinitialised",
                len(states),
                self.world_size,
            )
            # Different from those of the run's first steps.
            seed = self.config.execution.random_seed
            torch.manual_seed(random_bits("random state", seed, self.num_updates, self.rank))
            return
        threads = state.get("threads", 0)  # some of PyTorch's sums depend on the number of threads
        if threads and not self.config.execution.threads and threads != torch.get_num_threads():
            logger.info("resuming with %d CPU threads, as before; --threads %d gives PyTorch's default here",
                        threads, torch.get_num_threads())  # fmt: skip
            torch.set_num_threads(threads)
        torch.set_rng_state(states[self.rank]["cpu"])
        if "cuda" in states[self.rank] and self.name == "cuda":
            torch.cuda.set_rng_state(states[self.rank]["cuda"], self.device)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.previous_precision is not None:
            torch.set_float32_matmul_precision(self.previous_precision)
        if self.world_size > 1 and dist.is_initialized():
            # Avoid a deadlock: gloo's thread needs the GIL to release the last collective's tensors, and dropping the
            # last reference to the group (in DDP, holding the GIL) waits for that thread. Let it finish first.
            time.sleep(_CLOSE_SECONDS)
            dist.destroy_process_group()
