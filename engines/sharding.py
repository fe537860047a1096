"""--shard: weights, gradients and optimizer state sharded over the processes by PyTorch's FSDP2 (`fully_shard`).

Each process owns some rows of every matrix. A transformer block's matrices are gathered just before the block runs and
released after it; embeddings and heads, which are needed first and last, are gathered once per micro-batch. Vectors
(biases, norms, LayerScale: a thousandth of a model) are replicated.

Optimizers, clipping and averaging work on plain tensors: this process's rows, which share memory with FSDP2's shards.
So they run the same kernels as without --shard, and checkpoints are the same: whole tensors, collected one by one in
the memory of process 0's host.
"""
from __future__ import annotations

import contextlib
import inspect
import warnings
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.dalle import TextToImage
from utils.errors import UsageError

#: Optimizer state with one value per weight, sharded like the weight; the rest (Adafactor's sums, step counts) is the
#: same in every process.
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def check(world_size: int) -> None:
    """Raise UsageError if --shard is impossible: with one process, or an older PyTorch."""
    if world_size == 1:
        raise UsageError(
            "--shard shards a model over processes, but there is only one: start train.py with torchrun "
            "--nproc-per-node N, or omit --shard"
        )
    try:
        from torch.distributed.fsdp import fully_shard

        usable = "ignored_params" in inspect.signature(fully_shard).parameters
    except ImportError:
        usable = False
    if not usable:
        raise UsageError(f"--shard needs PyTorch 2.7 or newer, this is {torch.__version__}")


def make_scaler(device_type: str, **options: Any) -> Any:
    """Return a GradScaler for sharded gradients: all processes lower the scale if one of them finds infinities."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(device_type, process_group=dist.group.WORLD, **options)


class Sharding:
    """A model's parameters, of which each process owns a part."""

    def __init__(self, model: TextToImage, device: torch.device, half: torch.dtype | None) -> None:
        """Shard a model that is on the CPU, block by block: no device ever holds all of it.

        half: the dtype of autocast; None for float32.
        """
        from torch.distributed.device_mesh import init_device_mesh

        # torch.compile asks for the gradients of gathered weights, which are no leaves.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        self.model = model
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(device.type, (self.world_size,))
        matrices = {p for p in model.dalle.parameters() if p.dim() == 2}
        self.replicated = [p for p in model.dalle.parameters() if p.dim() != 2]
        for parameter in self.replicated:
            parameter.data = parameter.data.to(device)
            dist.broadcast(parameter.data, 0)
        if model.vqgan is not None:
            model.vqgan.to(device)  # frozen and small: replicated
        self._wrap(half, {p for p in model.parameters() if p not in matrices})
        self.rows = {p: nn.Parameter(_local(p)) for p in model.dalle.parameters() if p.dim() == 2}
        self.matrix_of = {rows: matrix for matrix, rows in self.rows.items()}

    def _wrap(self, half: torch.dtype | None, ignored: Any) -> None:
        """Let FSDP2 shard all parameters except the ignored ones.

        In half precision autocast stays on, and blocks are gathered in that dtype: autocast would make the same copies
        of their matrices, but hold the whole model's in every process until the forward pass ends. So results are
        bit-identical to those without --shard, except the gradients of LayerScale, which are computed from these
        matrices. FSDP2's casting of a block's inputs (cast_forward_inputs) is off: it would round the residual stream
        and the norms.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        config = self.model.dalle.config
        settings: dict[str, Any] = {"mesh": self.mesh, "ignored_params": ignored}
        blocks = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if not (config.shared_attn_ids or config.shared_ff_ids):  # shared layers are gathered once, with the rest
            for block in self.model.dalle.transformer.layers:
                fully_shard(block, mp_policy=blocks, **settings)
        fully_shard(self.model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **settings)

    # Training

    def localize(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Make new optimizers work on this process's rows."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self.rows.get(p, p) for p in group["params"]]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """After the backward passes of a step: give each process the averaged gradients of its rows.

        FSDP2 averages those of the matrices after every micro-batch. Averaging only the final sums would save
        communication, but every process would hold gradients of the whole model until then, as without --shard.
        """
        for matrix, rows in self.rows.items():
            rows.data = _local(matrix)  # usually the same memory
            rows.grad = None if matrix.grad is None else _local(matrix.grad)
        gradients = [p.grad for p in self.replicated if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.world_size)
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(mean.view_as(gradient))

    def clear_gradients(self) -> None:
        """Free the gradients that FSDP2 holds; the optimizers' zero_grad covers only the rows."""
        self.model.zero_grad(set_to_none=True)

    def clip(self, max_norm: float) -> Tensor:
        """Clip all gradients to the global norm `max_norm` (0: no clipping); return the norm before clipping, 0-d."""
        whole = [p for p in self.replicated if p.grad is not None]
        parts = [rows for rows in self.rows.values() if rows.grad is not None]

        def square_of(parameters: Sequence[Tensor]) -> Tensor:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).square()

        square = square_of(parts)
        dist.all_reduce(square)
        norm = (square + square_of(whole)).sqrt()
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_([*whole, *parts], max_norm, norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer step.

        Adam is elementwise. Others need whole matrices: these are gathered one at a time in every process, which keeps
        its rows of the result. This does the same work as a step without --shard.
        """
        if isinstance(optimizer, torch.optim.Adam):
            optimizer.step()
            return
        groups = optimizer.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    optimizer.param_groups = [dict(group, params=[parameter])]
                    with self._whole(optimizer, parameter):
                        optimizer.step()
        finally:
            optimizer.param_groups = groups

    @contextlib.contextmanager
    def _whole(self, optimizer: torch.optim.Optimizer, rows: nn.Parameter) -> Iterator[None]:
        """Within the context a parameter, its gradient and its moments are whole matrices."""
        matrix: Any = self.matrix_of.get(rows)
        if matrix is None or rows.grad is None:
            yield
            return
        state, own, gradient = optimizer.state[rows], rows.data, rows.grad
        moments = {key: self._gathered(state[key], matrix) for key in _MOMENTS if key in state}
        rows.grad = None
        rows.data, rows.grad = self._gathered(own, matrix), self._gathered(gradient, matrix)
        state.update(moments)
        try:
            yield
        finally:
            own.copy_(self._own(rows.data))
            rows.grad = None
            rows.data, rows.grad = own, gradient
            state.update({key: self._own(state[key]).clone() for key in _MOMENTS if key in state})

    def _gathered(self, rows: Tensor, matrix: Any) -> Tensor:
        """Return a whole tensor of a matrix's shape in every process, from each one's rows."""
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(
            rows, self.mesh, matrix.placements, run_check=False, shape=matrix.shape, stride=matrix.stride()
        )
        return whole.full_tensor()

    def _own(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole tensor; FSDP2 splits like `chunk`, and the last processes may have none."""
        chunks = whole.chunk(self.world_size)
        return chunks[self.rank] if self.rank < len(chunks) else whole[:0]

    def release(self) -> None:
        """Reshard the embeddings and heads that a forward pass without backward left gathered: they may change."""
        self.model.reshard()  # type: ignore[operator]  # fully_shard makes it an FSDPModule

    # State

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """This process's part of each weight of the DALL-E, by name; shares memory with training."""
        return {name: _local(value) for name, value in self.model.dalle.state_dict().items()}

    def collect(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on the CPU in process 0, {} elsewhere. parts: as from `weights`. All must call it."""
        matrices = self._matrices()
        found = {name: self._collected(part, matrices.get(name)) for name, part in parts.items()}
        return {name: whole for name, whole in found.items() if whole is not None}

    def distribute(self, whole: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The inverse: return this process's parts, on the device, of whole tensors that each process has read."""
        matrices = self._matrices()
        return {
            name: (self._own(value) if name in matrices else value).to(device, copy=True)
            for name, value in whole.items()
        }

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the optimizer's state_dict as without --shard, complete only in process 0. All must call it."""
        state = optimizer.state_dict()
        state["state"] = dict(state["state"])
        for index, parameter in enumerate(_parameters(optimizer)):
            values = state["state"].get(index, {})
            if parameter in self.matrix_of and values:
                matrix = self.matrix_of[parameter]
                state["state"][index] = {
                    key: self._collected(value, matrix) if key in _MOMENTS else value for key, value in values.items()
                }
        return state

    def distribute_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Reduce a whole state_dict to this process's part, for the optimizer's `load_state_dict`."""
        for index, parameter in enumerate(_parameters(optimizer)):
            values = state["state"].get(index, {})
            if parameter in self.matrix_of:
                values.update({key: self._own(values[key]).clone() for key in _MOMENTS if key in values})

    def _matrices(self) -> dict[str, Any]:
        return {name: value for name, value in self.model.dalle.state_dict().items() if _is_sharded(value)}

    def _collected(self, part: Tensor, matrix: Any) -> Tensor | None:
        """Return a whole tensor on the CPU in process 0, else None. matrix: whose rows `part` is; None: it is whole.

        One at a time, which fits on a device: each pass gathers the largest ones together. Not done by
        torch.distributed.checkpoint.state_dict, which supports neither averages nor optimizers of plain rows.
        """
        whole = part if matrix is None else self._gathered(part, matrix)
        return None if self.rank else whole.detach().to("cpu", copy=True)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


@torch.no_grad()
def _local(tensor: Any) -> Tensor:
    """The plain tensor of this process's rows, or the tensor itself if it is not sharded."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order of state_dict's indices."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
