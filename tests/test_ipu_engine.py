"""The IPU engine over a stand-in for PopTorch (see poptorch_stand_in.py): equal to the native engine, step by step; and
the graph that an IPU would get: L16 at full size, captured on the meta device, in operators that PopTorch names."""
from __future__ import annotations

import importlib
import itertools
import logging
import operator
import sys
import types

import poptorch_stand_in_device as device
import pytest
import torch
from helpers import refused
from ipu_helpers import (
    Pairs,
    install_poprun,
    largest_difference,
    make_config,
    make_model,
    published_model,
    small_model,
    train_plainly,
    train_with,
)
from poptorch_stand_in_device import NAMED_OPS, Capture, op_name
from torch.fx.experimental.proxy_tensor import make_fx

import args
import engines
from data import CodesDataset, epoch_order
from engines.ipu import IpuEngine
from engines.ipu.data import Padded, Stream
from engines.ipu.model import IpuStep, SerializedEmbedding, adapt, place
from engines.ipu.plan import Placement, pipeline_plan
from models.config import ARCHITECTURES
from models.dalle import DalleModel, TextToImage
from models.soft_codes import SoftCodes
from models.vqgan import VQGAN, VqganConfig
from utils.errors import UsageError

pytestmark = pytest.mark.usefixtures("poptorch")


def samples_for(config, calls=2):
    return calls * config.global_batch * config.execution.device_iterations + 1


def prepared(config, images=False, **model):
    """An engine with a model, and the data that it is prepared for."""
    engine, dataset = IpuEngine(config), Pairs(samples_for(config), images=images)
    engine.prepare(make_model(with_vqgan=images, **model), dataset)
    return engine, dataset


def equal_batches(batches, others):
    assert len(batches) == len(others)
    return all(torch.equal(a, b) for batch, other in zip(batches, others) for a, b in zip(batch, other))


def equals_native(config, dataset, rates=None, difference=2e-6, **model):
    """Train on an IpuEngine and on the native one, compare losses and weights; returns the first, and its losses."""
    engine, size = IpuEngine(config), config.execution.device_iterations
    losses = train_with(engine, config, make_model(**model), dataset, rates)
    # The same global batch in a single micro-batch: the mean of means must be the mean.
    whole = {"batch_size": config.global_batch, "gradient_accumulation": 1, "replication_factor": 1}
    native = engines.create(config.replace(device="cpu", **whole))
    expected = train_with(native, config, make_model(**model), dataset, rates)
    assert len(expected) == len(losses) * size
    means = [sum(expected[first : first + size]) / size for first in range(0, len(expected), size)]
    assert losses == pytest.approx(means, abs=1e-6)
    assert largest_difference(engine.model_state(), native.model_state()) < difference
    return engine, losses


# Equality ------------------------------------------------------------------------------------------------------------


#: (stages, serialization factor, device iterations, replicas): every pair of values at least once
FEW = [(1, 1, 1, 1), (1, 2, 2, 2), (2, 1, 1, 2), (2, 2, 2, 1), (4, 1, 2, 2), (4, 2, 1, 1), (4, 1, 1, 1), (4, 2, 2, 2)]
ALL = list(itertools.product([1, 2, 4], [1, 2], [1, 2], [1, 2]))


@pytest.mark.parametrize(
    "stages, factor, iterations, replicas",
    FEW + [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW],
)
def test_equals_the_native_engine(stages, factor, iterations, replicas):
    options = {"embedding_serialization_factor": factor, "device_iterations": iterations, "epochs": 1}
    config = make_config(stages, replication_factor=replicas, **options)
    calls = 3 if iterations == 1 else 2
    engine, losses = equals_native(config, Pairs(samples_for(config, calls)))
    assert len(losses) == calls and engine.executor.capture.switches == stages - 1
    assert engine.executor.capture.serialized == ([factor] if factor > 1 else [])  # the head
    assert isinstance(engine.model.dalle.text_emb, SerializedEmbedding) == (factor > 1)


def test_mindalles_architecture_trains_the_same():
    changes = dict(ARCHITECTURES["mindalle"], attn_types=("full",))
    config = make_config(4, embedding_serialization_factor=3, epochs=1)
    # The bias of the keys moves no attention weight: its gradient is rounding alone, which Adam makes larger.
    engine, _ = equals_native(config, Pairs(samples_for(config)), difference=1e-5, **changes)
    assert engine.executor.capture.switches == 3
    engine.close()
    engine, dataset = prepared(config.replace(synthetic_data=True), **changes)
    batches = list(engine.loader(dataset, 0))  # they cost the host nothing
    assert len(batches) == 2 and batches[0] is batches[1]
    engine.step(batches[0])


def test_losses_and_blocks_with_all_their_terms_train_the_same():
    changes = {"label_smoothing": 0.2, "z_loss": 0.1, "value_residual": True, "qk_norm": True, "rotary_2d": True}
    config = make_config(4, epochs=1)
    soft = SoftCodes(torch.randn(7, 4), 1e-9)  # so cold that each code is itself
    changes.update(norm="rms", shift_tokens=True, soft=soft)
    engine, _ = equals_native(config, Pairs(samples_for(config)), difference=1e-5, **changes)
    assert engine.executor.capture.checkpoints == 3 + 1  # each layer's output, and the first one's values


@pytest.mark.parametrize("byteio", [False, True])
def test_images_are_encoded_on_the_ipu(byteio):
    config = make_config(4, byteio=byteio, embedding_serialization_factor=2, epochs=1)
    engine, _ = equals_native(config, Pairs(samples_for(config), images=True), with_vqgan=True)
    assert engine.executor._signature[1][1] == (torch.uint8 if byteio else torch.float32)


def test_adamw_with_decay_and_clipping_under_a_changing_rate_is_that_of_plain_pytorch():
    config = make_config(2, optimizer="AdamW", weight_decay=0.1, clip_grad_norm=0.05, loss_scaling=1024.0)
    dataset, rates = Pairs(samples_for(config)), [1e-2, 1e-2, 1e-1, 1e-3]
    engine, losses = equals_native(config, dataset, rates)
    expected, model = train_plainly(config, make_model(), dataset, rates)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert largest_difference(engine.model_state(), model.dalle.state_dict()) < 2e-6


@pytest.mark.parametrize("stages, replicas", [(1, 1), (2, 2)])
def test_evaluation_equals_the_mean_over_all_pairs_and_leaves_training_alone(stages, replicas):
    config, held_out = make_config(stages, replication_factor=replicas, ff_dropout=0.5), Pairs(11)
    engine, dataset = prepared(config)
    batch = next(iter(engine.loader(dataset, 0)))
    engine.step(batch)
    model = make_model()
    model.dalle.load_state_dict(engine.model_state())
    text, codes = (torch.stack(tensors) for tensors in zip(*[held_out[index] for index in range(11)]))
    with torch.no_grad():
        expected = model.eval()(text, codes)
    for _ in range(2):  # the second time the program is there already
        losses = engine.evaluate(held_out)
        for name, part in (("loss", expected.total), ("text_loss", expected.text), ("image_loss", expected.image)):
            assert losses[name] == pytest.approx(float(part), abs=1e-6)
    later = [(float(engine.step(batch).loss), engine.evaluate(held_out)["loss"]) for _ in range(2)]
    assert losses["loss"] != later[0][1] != later[1][1]  # of the weights of the latest step
    engine.close()
    undisturbed, _ = prepared(config)
    assert [loss for loss, _ in later] == [float(undisturbed.step(batch).loss) for _ in range(3)][1:]


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_resuming_continues_as_if_nothing_had_happened():
    config = make_config(2, embedding_serialization_factor=2)
    engine, dataset = prepared(config)
    batches = list(engine.loader(dataset, 0))
    engine.step(batches[0])
    weights, state = engine.model_state(), engine.state_dict()
    assert {type(value) for value in weights.values()} == {torch.Tensor}
    expected = [float(engine.step(batch).loss) for batch in batches]
    engine.close()
    again, model = IpuEngine(config), make_model()
    model.dalle.load_state_dict(weights)  # has the names and shapes of every other engine's
    assert list(weights) == list(model.dalle.state_dict())
    again.prepare(model, dataset)
    again.load_state_dict(state)
    assert torch.equal(again.state_dict()["random_states"], state["random_states"])
    assert again.executor.rng_state == [42, 1]  # the seed, and what one call made of the state
    assert [float(again.step(batch).loss) for batch in batches] == expected


def test_what_a_checkpoint_says_of_other_options_engines_or_layouts_is_left_out(caplog):
    config = make_config(1)
    engine, dataset = prepared(config)
    engine.set_learning_rate(0.5)
    engine.step(next(iter(engine.loader(dataset, 0))))
    state = engine.state_dict()
    engine.close()
    again, _ = prepared(config.replace(beta1=0.5))
    again.load_state_dict(state)
    again.set_learning_rate(0.5)  # the saved rate: the device, which has the configured one, must still be told
    group = again.executor._device_optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.999))
    again.close()
    other, _ = prepared(config.replace(embedding_serialization_factor=2))
    native = engines.create(config.replace(device="cpu"))
    native.prepare(make_model())
    for refuses, given in ((other, state), (other, {"engine": "native", "optimizer": {}}), (native, state)):
        caplog.clear()
        refuses.load_state_dict(given)
        assert "the checkpoint's optimizer state" in caplog.text and "ignored" in caplog.text
    assert other.state_dict()["optimizer"]["ipu_state"] == {} and native.state_dict()["optimizer"]


# Placement and the captured graph ------------------------------------------------------------------------------------


def test_blocks_begin_where_the_plan_says_and_weights_lie_there():
    engine, _ = prepared(make_config(4), images=True)
    capture = engine.executor.capture
    assert capture.blocks == [f"dalle.transformer.layers.{layer}" for layer in range(3)]
    ipus = {name.replace("model.", "", 1): used for name, used in capture.weights.items()}
    planned = {placement.path: placement.ipu for placement in engine.plan}
    for name, used in ipus.items():
        assert used == {next(ipu for path, ipu in planned.items() if name.startswith(path + "."))}, name
    assert {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad} <= set(ipus)
    assert capture.checkpoints == 3 + 1  # every layer, and the codes
    assert not [name for name, _ in engine.model.named_parameters() if "decoder" in name]


def test_head_and_embedding_go_where_their_flags_say(monkeypatch):
    engine, _ = prepared(make_config(4, cls_ipu_id=0, embedding_ipu_id=0, gradient_accumulation=9))
    capture = engine.executor.capture
    assert (capture.blocks[-1], capture.switches) == ("dalle.norm", 4)
    assert capture.weights["model.dalle.text_head.weight"] == {0}
    # A block that never begins is found out: `text_pos_emb` is read but never called, so nothing could begin there.
    engine.close()
    for module in ("engines.ipu.model", "engines.ipu.engine"):
        monkeypatch.setattr(sys.modules[module], "block_starts", lambda plan: [Placement("dalle.text_pos_emb", 0)])
    with pytest.raises(RuntimeError, match="text_pos_emb were planned but never began"):
        prepared(make_config(1))


def test_half_precision_is_captured_with_losses_in_full():
    config = make_config(4, fp16=True, compile_only=True, enable_half_first_order_momentum=True, loss_scaling=512.0)
    engine, _ = prepared(config, images=True, rotary=True, dim_head=12)
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.float16}
    assert engine.model.dalle.transformer.angles.dtype == torch.float32
    assert {value.dtype for value in engine.model_state().values()} == {torch.float32}
    assert engine.executor._signature[1][1] == torch.float16
    optimizer = engine.optimizer
    assert (optimizer.accum_type, optimizer.first_order_momentum_accum_type) == (torch.float16, torch.float16)
    assert (optimizer.second_order_momentum_accum_type, optimizer.loss_scaling) == (torch.float32, 512.0)
    with pytest.raises(AssertionError, match="offline"):
        engine.step(engine._example(True))


def test_the_published_model_is_captured_whole():
    """Reading a value on the host (a branch on data, `.item()`) cannot be traced on meta tensors: it would raise."""
    config = args.parse(["--config", "L16"])
    with torch.device("meta"):
        model = TextToImage(DalleModel(published_model(config)), VQGAN(VqganConfig()))
        text = torch.empty(config.execution.batch_size, 80, dtype=torch.long)
        images = torch.empty(config.execution.batch_size, 3, 256, 256, dtype=torch.uint8)
    model = adapt(model, True, config.ipu.embedding_serialization_factor, True)
    begun = place(model, pipeline_plan(config))
    graph = make_fx(IpuStep(model).train())(text, images).graph  # a step on one micro-batch, by PyTorch's own tracer
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    names = [op_name(target) for target in called if target is not operator.getitem]
    assert set(names) <= NAMED_OPS, sorted(set(names) - NAMED_OPS)
    assert {
        "convolution", "argmax", "native_group_norm", "native_layer_norm", "gelu", "embedding", "nll_loss_forward",
        "masked_fill",
    } <= set(names)
    assert not any("scaled_dot_product" in name for name in names)
    assert names.count("_softmax") == 16 + 3  # one in each layer, and in the VQGAN's three attentions at 16x16
    assert len(begun) == 3
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    outputs = [node.meta["val"] if "val" in node.meta else node.meta["tensor_meta"] for node in results]
    assert [(tuple(output.shape), output.dtype) for output in outputs] == [((), torch.float32)] * 3


@pytest.mark.parametrize("changes", [
    {"rotary": True, "dim_head": 12}, {"shift_tokens": True}, {"stable": True}, {"sandwich_norm": True},
    {"activation": "gelu"}, {"activation": "quick_gelu"}, {"bos": False, "unique_pads": False},
    {"image_positions": "learned"}, {"ff_dropout": 0.1, "attn_dropout": 0.1}, {"attn_types": ("conv_like",)},
    {"attn_types": ("conv_causal",)},
], ids=str)
def test_options_of_other_checkpoints_are_captured_too(changes, monkeypatch):
    config, model = make_config(1, num_hidden_layers=1, layers_per_ipu=[1]), small_model(**{"depth": 1, **changes})
    model = adapt(TextToImage(DalleModel(model)), True, 1, False).to("meta")
    place(model, pipeline_plan(config, encodes_images=False))
    step = IpuStep(model).train()
    capture = Capture(list(step.named_parameters()), auto_increment=True)
    monkeypatch.setattr(device, "CAPTURES", [capture])
    with capture:  # raises for an operator without a name, and for what is read or made on the host
        step(*(torch.empty(2, size, dtype=torch.long, device="meta") for size in (6, 16)))
    assert capture.losses == 1 and {"_softmax", "nll_loss_forward"} <= capture.ops


def test_attention_of_the_native_engine_would_not_pass():
    """The checks above can fail: the fused attention is not among PopTorch's operators."""
    assert not {"scaled_dot_product_attention", "multinomial", "rms_norm"} & NAMED_OPS
    assert "softmax" in NAMED_OPS and len(NAMED_OPS) > 250


# Options -------------------------------------------------------------------------------------------------------------


def test_every_execution_flag_reaches_poptorch(tmp_path, poptorch):
    config = make_config(
        4, batch_size=3, gradient_accumulation=10, replication_factor=2, device_iterations=5,
        stochastic_rounding=True, enable_half_partials=True, enable_rts=True, optimizer_state_offchip=True,
        matmul_proportion=[0.1, 0.2, 0.3, 0.4], executable_cache_dir=str(tmp_path / "cache"),
        profile_dir=str(tmp_path / "profile"), synthetic_data=True, random_seed=7, enable_als=True, fp16=True,
    )
    options = IpuEngine(config).options
    for owner, expected in (
        (options, {"device_iterations": 5, "replication_factor": 2, "random_seed": 7, "synthetic": True}),
        (options, {"cache": str(tmp_path / "cache"), "offline": False, "auto_round_num_ipus": True, "relaxed": True}),
        (options, {"memory": {"IPU0": 0.1, "IPU1": 0.2, "IPU2": 0.3, "IPU3": 0.4}}),
        (options.strategy, {"auto_stage": poptorch.AutoStage.AutoIncrement}),
        (options.Training, {"gradient_accumulation": 10, "reduction": poptorch.ReductionType.Mean}),
        (options.Training, {"automatic_loss_scaling": True}),
        (options.Precision, {"stochastic_rounding": True, "partials_type": torch.float16}),
        (options.TensorLocations.optimizer, {"on_chip": False, "sharded": True}),
        (options._Popart, {"outlineThreshold": 10.0, "disableGradAccumulationTensorStreams": True}),
    ):
        assert {name: getattr(owner, name) for name in expected} == expected
    poplar = {"autoReport.directory": str(tmp_path / "profile"), "autoReport.all": "true"}
    poplar.update({"debug.allowOutOfMemory": "true", "opt.useAutoloader": "true"})
    assert poplar.items() <= options._Popart.engineOptions.items()
    plain = IpuEngine(make_config(2, compile_only=True)).options
    assert plain.offline is True and plain.cache is None and plain.Precision.partials_type is torch.float32
    assert plain.memory == {"IPU0": 0.6, "IPU1": 0.6} and "autoReport.all" not in plain._Popart.engineOptions


def test_the_optimizer_gets_what_the_flags_say():
    config = make_config(1, optimizer="AdamW", beta1=0.8, beta2=0.95, eps=1e-5, weight_decay=0.25, clip_grad_norm=2.0)
    engine, _ = prepared(config)
    matrices, vectors = engine.optimizer.param_groups
    assert (matrices["betas"], matrices["eps"], matrices["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.25)
    assert vectors["weight_decay"] == 0 and engine.optimizer.max_grad_norm == 2.0
    assert engine.optimizer.loss_scaling == 1.0  # nothing to scale in single precision
    variable = engine.optimizer.variable_attrs.variable
    assert "weight_decay" not in variable and "lr" in variable


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("broken, reason", [
    (None, ""),
    (ImportError("libpoplar.so: cannot open shared object file"), "libpoplar.so: cannot open shared object file"),
    (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "No module named 'torchvision'"),
    (AssertionError("works with torch==2.0.1\nonly"), "works with torch==2.0.1"), (RuntimeError(), "RuntimeError"),
    (types.ModuleType("poptorch"), "is not PopTorch"),
], ids=repr)
def test_a_poptorch_that_cannot_be_used_is_one_line(broken, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "poptorch", broken if isinstance(broken, types.ModuleType) else None)
    if isinstance(broken, Exception):
        importing = importlib.import_module
        fail = failing(broken)
        monkeypatch.setattr(importlib, "import_module", lambda name: (fail if name == "poptorch" else importing)(name))
    engine = engines.create(make_config(1, device="auto"))
    assert engine.name != "ipu" and bool(engine.device_choice) == bool(reason)
    told = refused(r"^--device ipu: PopTorch cannot be imported \(", engines.create, make_config(1), kind=UsageError)
    assert all(reason in line and "\n" not in line for line in (engine.device_choice, told))


@pytest.mark.parametrize("found, options, name, choice", [
    (lambda: True, {}, "ipu", "--device auto: the IPUs that PopTorch finds here"),
    (lambda: False, {}, "cpu", "--device auto: no IPUs, PopTorch finds none here"),
    (failing(RuntimeError("no driver\n...")), {}, "cpu", "PopTorch cannot look for them (no driver)"),
    (lambda: False, {"compile_only": True}, "ipu", "--device auto: IPUs, for --compile-only"),
    (lambda: True, {"device": "cpu"}, "cpu", ""), (lambda: False, {"device": "ipu"}, "ipu", ""),
])
def test_auto_means_the_ipus_that_are_there(found, options, name, choice, poptorch, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(poptorch, "ipuHardwareIsAvailable", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = engines.create(make_config(1, **dict({"device": "auto"}, **options)))
    assert engine.name == name and choice in engine.device_choice
    engine.introduce()
    assert caplog.messages == [engine.device_choice, engine.describe()][not choice :]


@pytest.mark.parametrize("stages, options, without, message", [
    (1, {"device": "auto", "optimizer": "Muon"}, None,
     "--optimizer Muon: IPUs support Adam.*--device auto: the IPUs.*--device cpu"),
    (1, {"device": "auto", "architecture": "image-gpt", "text_seq_len": 1}, None,
     "--architecture image-gpt: IPUs always.*--device auto: the IPUs"),
    (4, {"gradient_accumulation": 2}, "poptorch", "--gradient-accumulation 2: a pipeline of 4 stages needs at least 7"),
    (4, {}, "poptorch", "wheel of Poplar SDK 3.4.*--device cpu"),
    (1, {"embedding_serialization_factor": 4}, None,
     "--embedding-serialization-factor 4: does not divide the 14 rows.* 2 does"),
])
def test_what_cannot_work_is_told_before_poptorch_is_asked(stages, options, without, message, monkeypatch):
    if without:
        monkeypatch.setitem(sys.modules, without, None)
    with pytest.raises(UsageError, match=message):
        engines.create(make_config(stages, **options)).prepare(make_model(), Pairs(64))


def test_processes_of_torchrun_are_not_for_ipus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("--device ipu: torchrun has started 2 processes.* poprun", engines.create, make_config(1), kind=UsageError)
    reason = "--device auto: no IPUs, because torchrun has started this process"
    assert engines._choose(make_config(1, device="auto")) == (False, reason)


# Data ----------------------------------------------------------------------------------------------------------------


def test_the_asynchronous_loader_gives_the_same_batches_by_workers_that_stay():
    config = make_config(1)
    dataset, batches = Pairs(samples_for(config, 3)), []
    for ahead, workers in ((False, 0), (False, 2), (True, 2)):
        engine = IpuEngine(config.replace(async_dataloader=ahead, dataloader_workers=workers))
        batches.append([batch for epoch in range(2) for batch in engine.loader(dataset, epoch)])
        assert (engine._loader.workers, engine._loader.persistent) == (workers, workers > 0)
        engine.close()
        assert engine._loader is None
    assert len(batches[0]) == 6 and equal_batches(batches[0], batches[1]) and equal_batches(batches[0], batches[2])


def test_the_loader_goes_on_over_epochs_and_starts_anywhere():
    config = make_config(1)
    engine, dataset = IpuEngine(config), Pairs(samples_for(config, 3))
    everything = [list(engine.loader(dataset, epoch)) for epoch in range(2)]
    engine.close()
    engine = IpuEngine(config)
    first = list(engine.loader(dataset, 0, start=config.global_batch))
    loader = engine._loader
    second = list(engine.loader(dataset, 1))
    assert engine._loader is loader and equal_batches(first + second, everything[0][1:] + everything[1])
    next(iter(engine.loader(Pairs(samples_for(config, 3)), 1)))
    assert engine._loader is not loader and loader.closed and not torch.equal(everything[0][0][0], everything[1][0][0])


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_start_at_any_sample_takes_what_comes_after_it(iterations):
    """As after a resume with another global batch; the native engine takes the same samples."""
    config = make_config(1, device_iterations=iterations)
    size = config.global_batch
    engine, dataset = IpuEngine(config), Pairs(5 * size)
    assert engine.steps_per_epoch(len(dataset)) == 5 // iterations * iterations and engine.steps_per_call == iterations
    found, texts = list(engine.loader(dataset, 0, start=3)) + list(engine.loader(dataset, 1)), []
    for epoch, first in ((0, 3), (1, 0)):
        dataset.set_epoch(epoch)
        calls = engine.steps_per_epoch(len(dataset), first) // iterations
        assert calls == (5 * size - first) // (size * iterations)
        order = dataset.order(42, epoch)[first : first + calls * size * iterations]
        texts += [dataset[index][0] for index in order.tolist()]
    assert torch.equal(torch.cat([batch[0] for batch in found]), torch.stack(texts))
    native = engines.create(config.replace(device="cpu"))
    own = [text for step in native.loader(dataset, 0, start=3) for text, _ in step]
    assert torch.equal(torch.cat(own)[: len(found[0][0])], found[0][0])
    refused(f"3 training samples do not fill one call .*, which takes {4 * iterations}", engine.steps_per_epoch, 3)


def numbered(count):
    return torch.arange(count)[:, None].repeat(1, 16)


def test_codes_of_other_pairs_keep_their_own_epochs():
    dataset = CodesDataset(Pairs(8), numbered(8))
    stream = Stream(dataset, 0, (0, 0), 3, (2, 2), (4, 0, 1), torch.float32)
    assert len(stream) == 24
    dataset.set_epoch(99)  # somebody else's business
    texts = {int(image[0]): text for text, image in (stream[index] for index in range(8, 16))}
    dataset.set_epoch(1)
    assert all(torch.equal(text, dataset[pair][0]) for pair, text in texts.items()) and len(texts) == 8
    with pytest.raises(IndexError):
        stream[24]
    # A short run is not read ahead of.
    dataset = CodesDataset(Pairs(16), numbered(16))
    dataset.codes[dataset.order(0, 0)[12:]] = -1  # what a run of three steps of four samples never comes to
    stream = Stream(dataset, 0, (0, 0), 1, (4, 4), (4, 0, 1), None, left=3)
    assert len(list(stream)) == len(stream) == 12
    assert len(Stream(dataset, 0, (0, 8), 1, (2, 4), (4, 0, 1), None, left=1)) == 4
    assert len(Stream(dataset, 0, (0, 0), 1, (4, 4), (4, 0, 1), None)) == 16


def test_processes_share_every_sample_out_once():
    dataset = Pairs(24)
    dataset._text = torch.tensor
    seen = []
    for process in range(3):
        stream = Stream(dataset, 5, (0, 0), 1, (2, 2), (4, process, 3), None)
        stream._own, stream._epoch = None, -1
        seen.append([int(stream[index][0]) for index in range(len(stream))])
    assert sorted(sum(seen, [])) == list(range(24))
    assert sorted(seen[0][:4] + seen[1][:4] + seen[2][:4]) == sorted(epoch_order(24, 5, 0).tolist()[:12])
    padded = [Padded(dataset, process, 3, 4, None) for process in range(3)]
    counted = [int(item[0]) for part in padded for item in (part[index] for index in range(len(part))) if item[2]]
    assert sorted(counted) == list(range(24)) and {len(part) for part in padded} == {8}


# poprun --------------------------------------------------------------------------------------------------------------


class Horovod(types.ModuleType):
    """Two processes of which this is the second: the other one sends what is in `root`, and holds 3.0 of everything."""

    started, root = False, 1234

    def init(self):
        self.started = True

    def broadcast(self, tensor, root_rank):
        assert self.started and root_rank == 0
        return torch.full_like(tensor, self.root)

    def broadcast_parameters(self, parameters, root_rank):
        assert self.started and root_rank == 0
        for value in parameters.values():
            value.zero_()

    def allreduce(self, tensor):
        assert self.started
        return (tensor + 3.0) / 2


@pytest.fixture
def poprun(monkeypatch, poptorch):
    """`poprun --num-replicas 4 --num-instances 2`, seen from the second instance."""

    class Options(poptorch.Options):
        def __init__(self, ipus_per_replica):
            super().__init__()
            self._values["replication_factor"] = 2
            assert ipus_per_replica == 2

        def replicationFactor(self, value):
            raise RuntimeError("popdist sets the replication factor")

    return install_poprun(monkeypatch, Horovod("horovod.torch"), Options, index=1, count=2, replicas=4)


def test_poprun_shares_seed_weights_and_metrics(poprun):
    config = make_config(2, replication_factor=4)
    engine = IpuEngine(config)
    assert (engine.world_size, engine.is_main, engine.seed, engine.options.random_seed) == (2, False, 1234, 1234)
    assert config.global_batch == 2 * 3 * 4 and engine.share == 2 * 3 * 2
    assert "4 replicas" in engine.describe() and "2 processes" in engine.describe()
    dataset = Pairs(samples_for(config))
    engine.prepare(make_model(), dataset)
    assert all(not value.any() for value in engine.model_state().values())  # what process 0 has
    batch = next(iter(engine.loader(dataset, 0)))
    dataset.set_epoch(0)
    mine = epoch_order(len(dataset), 1234, 0)[12:24].tolist()  # of the order that the broadcast seed gives
    assert torch.equal(batch[0], torch.stack([dataset[index][0] for index in mine]))
    assert engine.step(batch).loss.shape == () and engine.mean(torch.tensor(1.0)) == 2.0
    engine.barrier()


def test_each_process_of_poprun_goes_on_with_its_own_random_state(poprun, monkeypatch, caplog):
    def broadcast(tensor, root_rank):
        return tensor if root_rank == 1 else tensor - torch.tensor([0, 0, 5])[: tensor.numel()]

    monkeypatch.setattr(poprun, "broadcast", broadcast)
    engine, _ = prepared(make_config(2, replication_factor=4))
    engine.executor.rng_state = [2**64 - 1, 7, 8]  # seeds have 64 bits and no sign
    state = engine.state_dict()
    assert state["random_states"].tolist() == [[-1, 7, 3], [-1, 7, 8]]
    engine.executor.rng_state = [0, 0, 0]
    engine.load_state_dict(state)
    assert engine.executor.rng_state == [2**64 - 1, 7, 8] and "random states" not in caplog.text
    engine.load_state_dict(dict(state, random_states=state["random_states"][:1], replicas=2))
    assert "written by 2 replicas in 1 processes, now there are 4 in 2: random states are reinitialised" in caplog.text


def test_poprun_and_the_configuration_must_agree(poprun, monkeypatch):
    four, eight = (make_config(2, replication_factor=count) for count in (4, 8))
    refused("--replication-factor 8: poprun has started 4 replicas", IpuEngine, eight, kind=UsageError)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    refused("horovod", IpuEngine, four, kind=UsageError)
    monkeypatch.setattr(sys.modules["popdist"], "isPopdistEnvSet", lambda: False)  # a single process
    engine = IpuEngine(four)
    assert engine.is_main and engine.hosts.local_replicas == 4 and engine.mean(torch.tensor(1.5)) == 1.5


def test_poprun_never_means_one_run_for_each_process(poprun, poptorch, monkeypatch):
    monkeypatch.setattr(poptorch, "ipuHardwareIsAvailable", lambda: False)  # so it may be before the options are made
    config = make_config(2, device="auto", replication_factor=4)
    engine = engines.create(config)
    assert (engine.name, engine.rank, engine.world_size) == ("ipu", 1, 2)
    assert engine.device_choice == "--device auto: IPUs, because poprun has started this process"
    for name in ("cpu", "cuda"):
        complaint = f"--device {name}: poprun has started this process"
        refused(complaint, engines.create, config.replace(device=name), kind=UsageError)
    monkeypatch.setitem(sys.modules, "poptorch", None)
    complaint = "PopTorch cannot be imported .*because poprun has started this process"
    refused(complaint, engines.create, config, kind=UsageError)
    monkeypatch.setitem(sys.modules, "popdist", None)
    assert engines.create(config.replace(device="cpu")).name == "cpu"
    monkeypatch.setenv("POPDIST_NUM_TOTAL_REPLICAS", "4")
    complaint = "poprun: popdist cannot be imported .*install the popdist wheel"
    refused(complaint, engines.create, config, kind=UsageError)
