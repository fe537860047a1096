"""Cost of a placement: memory and arithmetic of each IPU, estimated from the model, and the best division of layers.

The model runs once on the `meta` device, which only computes shapes; all operator calls are counted. Needs no SDK.
Not counted is what only the compiler knows: program code, exchange buffers, scratch memory of operators.
"""
from __future__ import annotations

from itertools import compress
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from args import Config
from engines.ipu.model import made
from engines.ipu.plan import HEAD, LAYER, Placement, layer_ipus, num_stages, stage_of, uses_half
from models.dalle import TextToImage

#: Memory of one IPU (GC200), bytes.
IPU_MEMORY = 900 * 10**6


class PartCost(NamedTuple):
    """One placed part of the model. Bytes and FLOPs are those of one sample."""

    placement: Placement
    stage: int
    parameters: int
    trainable: int
    """Trainable parameters."""
    weight_bytes: int
    flops: float
    """Multiplications and additions of a forward pass."""
    stored_bytes: int
    """Its output, if that is stored for the backward pass instead of being recomputed."""
    written_bytes: int
    """All outputs of its operators: an upper bound of what is alive while a trained part is recomputed."""
    peak_bytes: int
    """Operands and output of its largest operator, and one more output: what is alive without a backward pass."""


class IpuCost(NamedTuple):
    """One IPU of a replica. Memory in bytes for a whole micro-batch, FLOPs of training on one sample."""

    ipu: int
    stages: tuple[int, ...]
    parts: tuple[str, ...]
    layers: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    stored: float
    """Activations stored for the backward pass, of all micro-batches in flight."""
    working: float
    """Activations alive while one part is computed."""
    flops: float

    @property
    def memory(self) -> float:
        """Total bytes."""
        return self.weights + self.gradients + self.optimizer + self.stored + self.working


class _Recorder(TorchDispatchMode):
    """Adds up the cost of each operator, for the part with the index `current`."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.current = 0
        self.flops, self.written, self.peak = [0.0] * count, [0] * count, [0] * count
        self.largest = [0] * count  # bytes of the largest result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func._schema.returns[0].alias_info is None:  # neither a view nor in place
            part, size = self.current, _bytes(result)
            operands = [value for value in args if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)]
            self.flops[part] += _flops(func, args, result)
            self.written[part] += size
            self.peak[part] = max(self.peak[part], sum(map(_bytes, operands)) + size)
            self.largest[part] = max(self.largest[part], size)
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _flops(func: Any, args: Sequence[Any], result: Tensor) -> float:
    """FLOPs of a matmul or convolution; everything else is not counted.

    torch.utils.flop_counter needs PyTorch 2.1; IPUs have 2.0.1.
    """
    name = func.overloadpacket.__name__
    if name in ("mm", "bmm"):
        return 2.0 * result.numel() * args[0].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2.0 * result.numel() * args[1].shape[-1]
    if name == "convolution":
        return 2.0 * result.numel() * args[1].numel() / args[1].shape[0]
    return 0.0


def measure(model: TextToImage, plan: list[Placement], image_size: int) -> list[PartCost]:
    """Return the cost of each part of a plan.

    model: on the meta device, with the same dtypes as on the IPU.
    """
    recorder = _Recorder(len(plan))
    stored = [0] * len(plan)
    hooks = []
    modules = dict(model.named_modules())
    for index, placement in enumerate(plan):
        module = modules.get(placement.path)
        if module is None:  # a model without these positions
            continue

        def begin(*_: Any, index: int = index) -> None:
            recorder.current = index

        def end(_module: Any, inputs: Any, output: tuple[Any, ...], index: int = index) -> None:
            stored[index] = sum(map(_bytes, compress(output, made(inputs, output))))

        hooks.append(module.register_forward_pre_hook(begin))
        if placement.path.startswith(LAYER):
            hooks.append(module.register_forward_hook(end))
    if model.vqgan is not None:  # `encode` is called, not the module, but it is the first part anyway
        dtype = next(model.vqgan.parameters()).dtype
        images = torch.empty(1, 3, image_size, image_size, device="meta", dtype=dtype)
    else:
        images = torch.empty(1, model.dalle.config.image_seq_len, device="meta", dtype=torch.long)
    text = torch.empty(1, model.dalle.config.text_seq_len, device="meta", dtype=torch.long)
    with torch.no_grad(), recorder, ops.use("reference"):  # as on an IPU: hooks need calls of the modules
        model(text, images)
    for hook in hooks:
        hook.remove()
    seen: dict[int, None] = {}
    costs = []
    for index, (placement, stage) in enumerate(zip(plan, stage_of(plan))):
        module = modules.get(placement.path)
        own = [p for p in module.parameters() if id(p) not in seen] if module is not None else []
        seen.update((id(p), None) for p in own)
        costs.append(
            PartCost(
                placement,
                stage,
                sum(p.numel() for p in own),
                sum(p.numel() for p in own if p.requires_grad),
                sum(_bytes(p) for p in own),
                recorder.flops[index],
                stored[index],
                recorder.written[index],
                recorder.peak[index] + recorder.largest[index],
            )
        )
    return costs


# Per IPU -------------------------------------------------------------------------------------------------------------


def training_flops(part: PartCost, stages: int) -> float:
    """FLOPs of one sample: forward, backward (twice as much) and, in a pipeline, recomputation of the forward."""
    if part.placement.path == "vqgan":
        return part.flops
    return part.flops * (3 if stages == 1 else 4)


def in_flight(stage: int, stages: int) -> int:
    """Micro-batches that have passed a stage forward, but not yet backward."""
    return 2 * (stages - 1 - stage) + 1


def ipu_costs(config: Config, parts: list[PartCost]) -> list[IpuCost]:
    """Add up the parts on each IPU of a replica."""
    stages = max(part.stage for part in parts) + 1
    return [
        _ipu_cost(config, ipu, [part for part in parts if part.placement.ipu == ipu], stages, _tokens(parts))
        for ipu in range(config.ipu.ipus_per_replica)
    ]


def _tokens(parts: list[PartCost]) -> int:
    """Bytes of the hidden state between two layers, the input of a stage."""
    return max(part.stored_bytes for part in parts)


def _ipu_cost(config: Config, ipu: int, parts: list[PartCost], stages: int, entering: int) -> IpuCost:
    batch = config.execution.batch_size
    paths = tuple(part.placement.path for part in parts)
    trained = [part for part in parts if part.placement.path != "vqgan"]
    trainable = sum(part.trainable for part in parts)
    if stages == 1:  # no recomputation: all activations are stored
        stored = float(sum(part.written_bytes for part in trained))
    else:
        stored = 0.0
        for stage in {part.stage for part in parts}:
            kept = sum(part.stored_bytes for part in parts if part.stage == stage) + (entering if stage else 0)
            stored += in_flight(stage, stages) * kept
    return IpuCost(
        ipu,
        tuple(sorted({part.stage for part in parts})),
        paths,
        sum(path.startswith(LAYER) for path in paths),
        sum(part.parameters for part in parts),
        float(sum(part.weight_bytes for part in parts)),
        float(trainable * gradient_bytes(config)),
        trainable * state_bytes(config),
        batch * stored,
        float(batch * _working(parts, stages)),
        sum(training_flops(part, stages) for part in parts),
    )


def _working(parts: list[PartCost], stages: int) -> int:
    """The largest of: a recomputed layer; all embeddings; norm, heads and loss; the VQGAN's peak."""
    groups: dict[str, int] = {}
    for part in parts:
        path = part.placement.path
        if path == "vqgan":
            groups[path] = part.peak_bytes
        elif stages > 1:
            group = path if path.startswith(LAYER) else "head" if path in HEAD else "embedding"
            groups[group] = groups.get(group, 0) + part.written_bytes
    return max(groups.values(), default=0)


def gradient_bytes(config: Config) -> int:
    """Bytes of the gradient accumulator of one parameter."""
    return 2 if uses_half(config) else 4


def state_bytes(config: Config) -> float:
    """Bytes on an IPU of Adam's two moments of one parameter."""
    if config.ipu.optimizer_state_offchip:
        return 0.0
    first = 2 if uses_half(config) and config.optimizer.enable_half_first_order_momentum else 4
    return (first + 4) / (config.execution.replication_factor if config.ipu.enable_rts else 1)


def balance(ipus: list[IpuCost]) -> float:
    """Return mean / maximum of the IPUs' FLOPs: 1 if all are equally busy."""
    busiest = max(ipu.flops for ipu in ipus)
    return sum(ipu.flops for ipu in ipus) / len(ipus) / busiest


# The best division ---------------------------------------------------------------------------------------------------


def divide(config: Config, parts: list[PartCost]) -> tuple[int, ...]:
    """Return the `layers_per_ipu` that minimises the FLOPs of the busiest IPU, then the memory of the fullest one.

    Only divisions that fit into memory count; if none fits, the one with the least memory on the fullest IPU.
    VQGAN, embeddings and heads stay on the configured IPUs.
    """
    ipus = config.ipu.ipus_per_replica
    stages = max(2, num_stages([part.placement for part in parts])) if ipus > 1 else 1
    layers = [part for part in parts if part.placement.path.startswith(LAYER)]
    others = [[part for part in parts if part.placement.ipu == ipu and part not in layers] for ipu in range(ipus)]
    costs: dict[tuple[int, int, int], IpuCost] = {}

    def cost(ipu: int, first: int, last: int) -> IpuCost:
        """The IPU's cost with layers first .. last - 1, as if every IPU after it were a stage."""
        if (ipu, first, last) not in costs:
            stage = 0 if stages == 1 else ipu
            own = [part._replace(stage=stage) for part in others[ipu] + layers[first:last]]
            costs[ipu, first, last] = _ipu_cost(config, ipu, own, ipus if stages > 1 else 1, _tokens(parts))
        return costs[ipu, first, last]

    def fits(ipu: int, first: int, last: int) -> bool:
        return cost(ipu, first, last).memory <= IPU_MEMORY

    never = float("inf")
    most, _ = _partition(ipus, len(layers), lambda *place: cost(*place).flops if fits(*place) else never)
    most *= 1 + 1e-9

    def memory(*place: int) -> float:
        return cost(*place).memory if most == never or (fits(*place) and cost(*place).flops <= most) else never

    return _partition(ipus, len(layers), memory)[1]


def _partition(ipus: int, layers: int, cost: Callable[[int, int, int], float]) -> tuple[float, tuple[int, ...]]:
    """Divide `layers`, in order, so that the maximum cost(ipu, first, last) is minimal; return it and the counts."""
    # best[n]: (maximum cost, counts) with the first n layers on the IPUs so far
    best: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * (layers + 1)
    best[0] = (0.0, ())
    for ipu in range(ipus):
        best = [
            min(
                (
                    (max(best[first][0], cost(ipu, first, last)), best[first][1] + (last - first,))
                    for first in range(last + 1)
                ),
                key=lambda choice: choice[0],
            )
            for last in range(layers + 1)
        ]
    return best[layers]


def moved(parts: list[PartCost], config: Config) -> list[PartCost]:
    """Return the same costs for another `layers_per_ipu`."""
    ipus = layer_ipus(config.ipu)
    places = [
        part.placement
        if not part.placement.path.startswith(LAYER)
        else part.placement._replace(ipu=ipus[int(part.placement.path[len(LAYER) :])])
        for part in parts
    ]
    return [part._replace(placement=place, stage=stage) for part, place, stage in zip(parts, places, stage_of(places))]
