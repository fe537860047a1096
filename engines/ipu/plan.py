"""Which IPU holds which part of the model, and whether a configuration can train on IPUs. Needs no SDK.

Letters: S pipeline stages, M micro-batches of one optimizer step (gradient accumulation).
"""
from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from args import Config, IpuConfig
from models.config import DalleConfig
from utils.errors import UsageError

#: Path of a transformer layer, without its index.
LAYER = "dalle.transformer.layers."

#: The modules after the last layer; the loss is on their IPU.
HEAD = ("dalle.norm", "dalle.text_head", "dalle.image_head")

#: Parts of the embedding that are read, not called: they are on the IPU of the tables before them.
POSITIONS = ("dalle.text_pos_emb", "dalle.image_pos_emb")


class Placement(NamedTuple):
    """A module of a TextToImage and the IPU (of its replica) that holds its weights and runs it."""

    path: str
    ipu: int


def layer_ipus(ipu: IpuConfig) -> list[int]:
    """Return the IPU of each transformer layer, in order."""
    return [index for index, count in enumerate(ipu.layers_per_ipu) for _ in range(count)]


def head_ipu(ipu: IpuConfig) -> int:
    """Return the IPU of the last norm, the heads and the loss."""
    return ipu.ipus_per_replica - 1 if ipu.cls_ipu_id is None else ipu.cls_ipu_id


def pipeline_plan(config: Config, encodes_images: bool = True) -> list[Placement]:
    """Return every part of the model with its IPU, in the order of the forward pass.

    encodes_images: the VQGAN runs on IPU 0, before the embeddings; False if the data are already image codes.
    """
    ipu = config.ipu
    plan = [Placement("vqgan", 0)] if encodes_images else []
    plan += [Placement(path, ipu.embedding_ipu_id) for path in ("dalle.text_emb", "dalle.image_emb", *POSITIONS)]
    plan += [Placement(LAYER + str(layer), index) for layer, index in enumerate(layer_ipus(ipu))]
    plan += [Placement(path, head_ipu(ipu)) for path in HEAD]
    return plan


def block_starts(plan: list[Placement]) -> list[Placement]:
    """Return the modules at which execution moves to another IPU.

    What runs before the first of them is on IPU 0. Each start adds a pipeline stage, even on an IPU used before.
    """
    before = [0] + [placement.ipu for placement in plan]
    return [placement for placement, previous in zip(plan, before) if placement.ipu != previous]


def num_stages(plan: list[Placement]) -> int:
    """Return S, the stages of the forward pipeline."""
    return 1 + len(block_starts(plan))


def stage_of(plan: list[Placement]) -> list[int]:
    """Return the pipeline stage (0, 1, ...) of each entry of a plan."""
    starts = {placement.path for placement in block_starts(plan)}
    return list(accumulate(int(placement.path in starts) for placement in plan))


def min_accumulation(stages: int) -> int:
    """Return the smallest M that fills a training pipeline: S stages forward and S - 1 backward (the last has both)."""
    return 2 * stages - 1


def bubble(stages: int, accumulation: int) -> float:
    """Return the share of an optimizer step that an IPU idles, since the pipeline fills and drains once per step."""
    return (2 * stages - 2) / (accumulation + 2 * stages - 2)


# Checks ------------------------------------------------------------------------------------------------------------


def check(config: Config, model: DalleConfig | None = None) -> None:
    """Raise UsageError for the first reason why a configuration (and a model, if known) cannot train on IPUs."""
    found = problems(config, model)
    if found:
        raise UsageError(found[0])


def problems(config: Config, model: DalleConfig | None = None) -> list[str]:
    """Return why a configuration cannot train on IPUs, a line for each problem: flag, problem, way out."""
    found = _layout_problems(config.ipu, model.depth if model else config.model.num_hidden_layers)
    if not found:  # the rest needs a valid layout
        found += _pipeline_problems(config)
        if model is not None:
            found += _model_problems(config, model)
    return found + _option_problems(config)


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _layout_problems(ipu: IpuConfig, depth: int) -> list[str]:
    found = []
    ipus, layers = ipu.ipus_per_replica, " ".join(map(str, ipu.layers_per_ipu))
    if not _power_of_two(ipus):
        found.append(
            f"--ipus-per-replica {ipus}: IPUs come in powers of two; give the next one, and 0 in --layers-per-ipu "
            "for empty IPUs"
        )
    if len(ipu.layers_per_ipu) != ipus:
        found.append(
            f"--layers-per-ipu {layers}: {len(ipu.layers_per_ipu)} numbers for --ipus-per-replica {ipus}; give one "
            "for each IPU"
        )
    if sum(ipu.layers_per_ipu) != depth:
        found.append(
            f"--layers-per-ipu {layers}: adds up to {sum(ipu.layers_per_ipu)}, but the model has {depth} layers "
            "(--num-hidden-layers); --plan auto proposes a division"
        )
    for flag, index in (("--cls-ipu-id", head_ipu(ipu)), ("--embedding-ipu-id", ipu.embedding_ipu_id)):
        if index >= ipus:
            found.append(f"{flag} {index}: --ipus-per-replica {ipus} has IPUs 0 to {ipus - 1}")
    if len(ipu.matmul_proportion) not in (1, ipus):
        found.append(
            f"--matmul-proportion: {len(ipu.matmul_proportion)} numbers for {ipus} IPUs; give one for all or one for "
            "each"
        )
    return found


def _pipeline_problems(config: Config) -> list[str]:
    stages = num_stages(pipeline_plan(config))
    accumulation = config.execution.gradient_accumulation
    if stages > 1 and accumulation < min_accumulation(stages):
        return [
            f"--gradient-accumulation {accumulation}: a pipeline of {stages} stages needs at least "
            f"{min_accumulation(stages)} (2 x stages - 1)"
        ]
    return []


def _model_problems(config: Config, model: DalleConfig) -> list[str]:
    found = []
    ipu, rows = config.ipu, model.text_table_size
    factor = ipu.embedding_serialization_factor
    if rows % factor:
        nearest = max(divisor for divisor in range(1, factor) if rows % divisor == 0)
        found.append(
            f"--embedding-serialization-factor {factor}: does not divide the {rows} rows of the text table; "
            f"{nearest} does"
        )
    if model.tie_embeddings and (factor > 1 or head_ipu(ipu) != ipu.embedding_ipu_id):
        found.append(
            "this model's embeddings and heads share weights, which must be on one IPU, in one piece: give "
            f"--cls-ipu-id {ipu.embedding_ipu_id} and --embedding-serialization-factor 1"
        )
    ipus = layer_ipus(ipu)
    for shared in filter(None, (model.shared_attn_ids, model.shared_ff_ids)):
        where: dict[int, int] = {}  # the IPU of each set of shared weights
        for layer, index in enumerate(ipus):
            if where.setdefault(shared[layer % len(shared)], index) != index:
                found.append(
                    f"--layers-per-ipu: layer {layer} shares weights with a layer on IPU "
                    f"{where[shared[layer % len(shared)]]}, so it must be there too"
                )
                break
    return found


def _option_problems(config: Config) -> list[str]:
    run, ipu, optimizer = config.execution, config.ipu, config.optimizer
    found = []
    if not _power_of_two(run.replication_factor):
        found.append(
            f"--replication-factor {run.replication_factor}: IPUs come in powers of two; give 1, 2, 4, ..."
        )
    if ipu.enable_rts and run.replication_factor == 1:
        found.append(
            "--enable-rts shards the optimizer state over replicas, but --replication-factor is 1; omit it"
        )
    if ipu.async_dataloader and run.global_batch * run.device_iterations == 1:
        found.append(
            "--async-dataloader needs more than one sample for each call of the device; give "
            "--async-dataloader false or a larger --batch-size"
        )
    if optimizer.optimizer not in ("Adam", "AdamW"):
        found.append(f"--optimizer {optimizer.optimizer}: IPUs support Adam and AdamW; give one of them")
    if optimizer.enable_als and not uses_half(config):
        found.append("--enable-als scales losses for half precision; add --fp16, or omit it")
    if optimizer.ema_decay:
        found.append(
            f"--ema-decay {optimizer.ema_decay:g}: averaging of weights is not supported on IPUs; give --ema-decay 0"
        )
    if config.model.base_width:
        found.append(f"--base-width {config.model.base_width}: IPUs have one learning rate for all weights; omit it")
    if config.model.soft_codes_fade:
        found.append(
            f"--soft-codes-fade {config.model.soft_codes_fade:g}: the targets of a compiled program stay as they are; "
            "give --soft-codes-fade 0"
        )
    if config.model.code_noise_similar:
        found.append(
            f"--code-noise-similar {config.model.code_noise_similar:g}: programs read one image for a caption; give "
            "--code-noise-similar 0"
        )
    if config.model.attention_impl in ("sdpa", "local"):
        found.append(
            f"--attention-impl {config.model.attention_impl}: IPUs support only explicit attention; give explicit or "
            "auto"
        )
    if run.compile:
        found.append(
            "--compile is torch.compile, which does not support IPUs: their programs are always compiled; omit it"
        )
    if run.matmul_precision is not None:
        found.append(
            "--matmul-precision is for GPUs and CPUs; on IPUs --fp16 and --enable-half-partials set the precision of "
            "matmuls: omit it"
        )
    if run.shard:
        found.append(
            "--shard is for GPUs and CPUs; on IPUs --layers-per-ipu splits the model and --enable-rts shards the "
            "optimizer state: omit it"
        )
    return found


def uses_half(config: Config) -> bool:
    """Whether the transformer computes in half precision on an IPU (--fp16, unless --precision says otherwise)."""
    run = config.execution
    return run.fp16 if run.precision == "auto" else run.precision == "fp16"
