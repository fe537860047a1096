"""PopTorch's options and optimizer from the configuration. Every execution flag is applied here."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from args import Config
from engines.base import parameter_groups
from engines.ipu.hosts import Hosts
from engines.ipu.plan import uses_half


def build_options(poptorch: Any, config: Config, hosts: Hosts, seed: int) -> Any:
    """Return the options of the training program."""
    ipu, run = config.ipu, config.execution
    options = _common(poptorch, config, hosts, seed)
    options.deviceIterations(run.device_iterations)
    options.Training.gradientAccumulation(run.gradient_accumulation)
    options.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Mean)
    # Summed on the device: the loss of all micro-batches costs no more to fetch than that of the last one.
    options.outputMode(poptorch.OutputMode.Sum)
    options.Precision.enableStochasticRounding(ipu.stochastic_rounding)
    if config.optimizer.enable_als:
        options.Training.setAutomaticLossScaling(True)
    location = poptorch.TensorLocationSettings().useOnChipStorage(not ipu.optimizer_state_offchip)
    options.TensorLocations.setOptimizerLocation(location.useReplicatedTensorSharding(ipu.enable_rts))
    options.relaxOptimizerAttributesChecks()
    options._Popart.set("disableGradAccumulationTensorStreams", True)
    return options


def build_evaluation_options(poptorch: Any, config: Config, hosts: Hosts, seed: int, stages: int) -> Any:
    """Return the options of the evaluation program: no accumulation; device iterations fill the pipeline instead."""
    options = _common(poptorch, config, hosts, seed)
    options.deviceIterations(4 * stages)
    options.outputMode(poptorch.OutputMode.Sum)
    options.Precision.enableStochasticRounding(False)
    return options


def _common(poptorch: Any, config: Config, hosts: Hosts, seed: int) -> Any:
    ipu = config.ipu
    options = hosts.options(poptorch, ipu.ipus_per_replica)
    options.autoRoundNumIPUs(True)
    options.randomSeed(seed)
    options.setExecutionStrategy(poptorch.PipelinedExecution(poptorch.AutoStage.AutoIncrement))
    options.Precision.setPartialsType(torch.float16 if ipu.enable_half_partials else torch.float32)
    options.setAvailableMemoryProportion(memory_proportions(ipu.matmul_proportion, ipu.ipus_per_replica))
    if ipu.executable_cache_dir is not None:
        options.enableExecutableCaching(ipu.executable_cache_dir)
    if ipu.compile_only:
        options.useOfflineIpuTarget()
    if config.data.synthetic_data:
        options.enableSyntheticData(True)
    options._Popart.set("outlineThreshold", 10.0)
    options._Popart.set("engineOptions", engine_options(ipu.profile_dir))
    return options


def memory_proportions(proportions: Any, ipus: int) -> dict[str, float]:
    """Return the memory proportion of each IPU by PopTorch's name for it; a single one applies to all."""
    shares: list[float] = list(proportions) * (ipus if len(proportions) == 1 else 1)
    return {f"IPU{index}": share for index, share in enumerate(shares)}


def engine_options(profile_dir: Any) -> dict[str, str]:
    """Return the options of the Poplar engine; with `profile_dir` it writes a report there for PopVision."""
    options = {"opt.useAutoloader": "true", "target.syncReplicasIndependently": "true"}
    if profile_dir is not None:
        options.update(
            {
                "debug.allowOutOfMemory": "true",  # programs that do not fit need profiling most
                "autoReport.directory": str(profile_dir),
                "autoReport.all": "true",
                "profiler.format": "v3",
            }
        )
    return options


def build_optimizer(poptorch: Any, config: Config, model: nn.Module) -> Any:
    """Return PopTorch's Adam or AdamW over the trainable parameters."""
    options, half = config.optimizer, uses_half(config)
    kind = {"Adam": poptorch.optim.Adam, "AdamW": poptorch.optim.AdamW}[options.optimizer]
    settings: dict[str, Any] = {}
    if half:
        settings["loss_scaling"] = float(options.loss_scaling)
    if options.clip_grad_norm:
        settings["max_grad_norm"] = float(options.clip_grad_norm)
    if options.optimizer == "AdamW":
        settings["bias_correction"] = True
    first = torch.float16 if half and options.enable_half_first_order_momentum else torch.float32
    optimizer = kind(
        [group for group in parameter_groups(model, options.weight_decay) if group["params"]],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        accum_type=torch.float16 if half else torch.float32,
        first_order_momentum_accum_type=first,
        second_order_momentum_accum_type=torch.float32,
        **settings,
    )
    # Keyword arguments are variable and sent in each step; this one is constant.
    optimizer.variable_attrs.markAsConstant("weight_decay")
    return optimizer
