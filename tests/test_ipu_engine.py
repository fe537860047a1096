"""The IPU engine over a stand-in for PopTorch (see poptorch_stand_in.py): equal to the native engine, step by step."""
from __future__ import annotations

import importlib
import itertools
import logging
import sys
import types

import poptorch_stand_in
import pytest
import torch
from ipu_helpers import Pairs, largest_difference, make_config, make_model, train_plainly, train_with

import engines
from data import CodesDataset, epoch_order
from engines.ipu import IpuEngine
from engines.ipu.data import Padded, Stream
from engines.ipu.model import SerializedEmbedding, SerializedLinear
from engines.ipu.plan import Placement
from models.config import ARCHITECTURES, DalleConfig
from models.dalle import DalleModel
from utils.errors import UsageError, UserError


@pytest.fixture(autouse=True)
def poptorch(monkeypatch):
    return poptorch_stand_in.install(monkeypatch)


def native_losses(config, model, dataset, rates=None):
    """Losses and weights of the native engine on the CPU."""
    # The same global batch in a single micro-batch: the mean of means must be the mean.
    whole = {"batch_size": config.global_batch, "gradient_accumulation": 1, "replication_factor": 1}
    native = engines.create(config.replace(device="cpu", **whole))
    losses = train_with(native, config, model, dataset, rates)
    return losses, native.model_state()


def samples_for(config, calls=2):
    return calls * config.global_batch * config.execution.device_iterations + 1


def prepared(config, images=False, **model):
    """An engine with a model, and the data that it is prepared for."""
    engine, dataset = IpuEngine(config), Pairs(samples_for(config), images=images)
    engine.prepare(make_model(with_vqgan=images, **model), dataset)
    return engine, dataset


def equals_native(config, dataset, rates=None, difference=2e-6, **model):
    """Train on an IpuEngine and on the native one, compare losses and weights; returns the first, and its losses."""
    engine, size = IpuEngine(config), config.execution.device_iterations
    losses = train_with(engine, config, make_model(**model), dataset, rates)
    expected, weights = native_losses(config, make_model(**model), dataset, rates)
    assert len(expected) == len(losses) * size
    means = [sum(expected[first : first + size]) / size for first in range(0, len(expected), size)]
    assert losses == pytest.approx(means, abs=1e-6)
    assert largest_difference(engine.model_state(), weights) < difference
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
    config = make_config(
        stages, embedding_serialization_factor=factor, device_iterations=iterations, replication_factor=replicas,
        epochs=1,
    )
    calls = 3 if iterations == 1 else 2
    engine, losses = equals_native(config, Pairs(samples_for(config, calls)))
    assert len(losses) == calls
    assert engine.executor.capture.switches == stages - 1
    assert engine.executor.capture.serialized == ([factor] if factor > 1 else [])  # the head
    assert isinstance(engine.model.dalle.text_emb, SerializedEmbedding) == (factor > 1)


def test_mindalles_architecture_trains_the_same():
    changes = dict(ARCHITECTURES["mindalle"], attn_types=("full",))
    config = make_config(4, embedding_serialization_factor=3, epochs=1)
    # The bias of the keys moves no attention weight: its gradient is rounding alone, which Adam makes larger.
    engine, _ = equals_native(config, Pairs(samples_for(config)), difference=1e-5, **changes)
    assert engine.executor.capture.switches == 3


@pytest.mark.parametrize("byteio", [False, True])
def test_images_are_encoded_on_the_ipu(byteio):
    config = make_config(4, byteio=byteio, embedding_serialization_factor=2)
    engine, _ = equals_native(config, Pairs(samples_for(config), images=True), with_vqgan=True)
    assert engine.executor._signature[1][1] == (torch.uint8 if byteio else torch.float32)


def test_adamw_with_decay_and_clipping_under_a_changing_rate():
    config = make_config(2, optimizer="AdamW", weight_decay=0.1, clip_grad_norm=0.05, loss_scaling=1024.0)
    equals_native(config, Pairs(samples_for(config)), [1e-2, 1e-2, 1e-1, 1e-3])


def test_the_native_engine_equals_plain_pytorch():
    """So that the reference of the tests above is the same everywhere."""
    config = make_config(2, optimizer="AdamW", weight_decay=0.1, clip_grad_norm=0.05)
    dataset = Pairs(samples_for(config))
    losses, weights = native_losses(config, make_model(), dataset)
    expected, model = train_plainly(config, make_model(), dataset)
    assert losses == pytest.approx(expected, abs=1e-6)
    assert largest_difference(weights, model.dalle.state_dict()) < 2e-6


@pytest.mark.parametrize("stages, replicas", [(1, 1), (2, 2)])
def test_evaluation_equals_the_mean_over_all_pairs_and_leaves_training_alone(stages, replicas):
    config = make_config(stages, replication_factor=replicas, ff_dropout=0.5)
    dataset, held_out = Pairs(samples_for(config)), Pairs(11)
    engine = IpuEngine(config)
    engine.prepare(make_model(), dataset)
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
    undisturbed = IpuEngine(config)
    engine_losses = [float(engine.step(batch).loss) for _ in range(2)]
    engine.close()
    undisturbed.prepare(make_model(), dataset)
    assert engine_losses == [float(undisturbed.step(batch).loss) for _ in range(3)][1:]
    undisturbed.close()


def test_evaluation_sees_the_weights_of_the_latest_step():
    config = make_config(1)
    engine, dataset = prepared(config)
    batch = next(iter(engine.loader(dataset, 0)))
    seen = []
    for _ in range(3):
        engine.step(batch)
        seen.append(engine.evaluate(dataset)["loss"])
    assert seen[0] > seen[1] > seen[2]


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_weights_have_the_names_and_shapes_of_every_other_engine():
    config = make_config(2, embedding_serialization_factor=7)
    engine, _ = prepared(config)
    assert isinstance(engine.model.dalle.text_emb, SerializedEmbedding)
    state = engine.model_state()
    plain = DalleModel(DalleConfig(**dict(vars(make_model().dalle.config))))
    assert list(state) == list(plain.state_dict())
    assert {type(value) for value in state.values()} == {torch.Tensor}
    plain.load_state_dict(state)
    assert largest_difference(plain.state_dict(), make_model().dalle.state_dict()) == 0


def test_resuming_continues_as_if_nothing_had_happened():
    config = make_config(2, embedding_serialization_factor=2)
    engine, dataset = prepared(config)
    batches = list(engine.loader(dataset, 0))
    engine.step(batches[0])
    weights, state = engine.model_state(), engine.state_dict()
    expected = [float(engine.step(batch).loss) for batch in batches]
    engine.close()
    again, model = IpuEngine(config), make_model()
    model.dalle.load_state_dict(weights)
    again.prepare(model, dataset)
    again.load_state_dict(state)
    assert torch.equal(again.state_dict()["random_states"], state["random_states"])
    assert again.executor.rng_state == [42, 1]  # the seed, and what one call made of the state
    assert [float(again.step(batch).loss) for batch in batches] == expected


def test_saved_options_of_the_optimizer_do_not_outlive_those_of_the_resumed_run():
    config = make_config(1)
    engine, dataset = prepared(config)
    engine.set_learning_rate(0.5)
    engine.step(next(iter(engine.loader(dataset, 0))))
    state = engine.state_dict()
    engine.close()
    again = IpuEngine(config.replace(beta1=0.5))
    again.prepare(make_model(), dataset)
    again.load_state_dict(state)
    again.set_learning_rate(0.5)  # the saved rate: the device, which has the configured one, must still be told
    group = again.executor._device_optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.999))


def test_optimizer_states_do_not_cross_engines_or_layouts(caplog):
    config = make_config(1)
    engine, dataset = prepared(config)
    engine.step(next(iter(engine.loader(dataset, 0))))
    state = engine.state_dict()
    engine.close()
    with caplog.at_level(logging.WARNING):
        other = IpuEngine(config.replace(embedding_serialization_factor=2))
        other.prepare(make_model(), dataset)
        other.load_state_dict(state)
        other.load_state_dict({"engine": "native", "optimizer": {}})
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert all(message.startswith("the checkpoint's optimizer state does not fit") for message in warnings)
    assert other.state_dict()["optimizer"]["ipu_state"] == {}
    native = engines.create(config.replace(device="cpu"))
    native.prepare(make_model())
    native.load_state_dict(state)
    assert "ignored" in caplog.records[-1].message
    assert native.state_dict()["optimizer"]


# Placement and the captured graph ------------------------------------------------------------------------------------


def test_blocks_begin_where_the_plan_says_and_weights_lie_there():
    config = make_config(4)
    engine, _ = prepared(config, images=True)
    capture = engine.executor.capture
    assert capture.blocks == [f"dalle.transformer.layers.{layer}" for layer in range(3)]
    ipus = {name.replace("model.", "", 1): used for name, used in capture.weights.items()}
    planned = {placement.path: placement.ipu for placement in engine.plan}
    for name, used in ipus.items():
        assert used == {next(ipu for path, ipu in planned.items() if name.startswith(path + "."))}, name
    trained = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    assert trained <= set(ipus)
    assert capture.checkpoints == 3 + 1  # every layer, and the codes
    assert not [name for name, _ in engine.model.named_parameters() if "decoder" in name]


def test_head_and_embedding_go_where_their_flags_say():
    config = make_config(4, cls_ipu_id=0, embedding_ipu_id=0, gradient_accumulation=9)
    engine, _ = prepared(config)
    assert engine.executor.capture.blocks[-1] == "dalle.norm"
    assert engine.executor.capture.weights["model.dalle.text_head.weight"] == {0}
    assert engine.executor.capture.switches == 4


def test_a_block_that_never_begins_is_found_out(monkeypatch):
    """`text_pos_emb` is read but never called, so nothing could begin there."""
    config = make_config(1)
    engine = IpuEngine(config)
    for module in ("engines.ipu.model", "engines.ipu.engine"):
        monkeypatch.setattr(sys.modules[module], "block_starts", lambda plan: [Placement("dalle.text_pos_emb", 0)])
    with pytest.raises(RuntimeError, match="text_pos_emb were planned but never began"):
        engine.prepare(make_model(), Pairs(samples_for(config)))


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


def test_serialized_modules_equal_the_ones_they_replace():
    torch.manual_seed(0)
    embedding, linear = torch.nn.Embedding(12, 4), torch.nn.Linear(4, 12)
    ids, x = torch.randint(0, 12, (3, 5)), torch.randn(3, 5, 4, requires_grad=True)
    parts = SerializedEmbedding(embedding, 3)
    assert torch.equal(parts(ids), embedding(ids))
    parts(ids).square().sum().backward()
    embedding(ids).square().sum().backward()
    assert torch.equal(torch.cat([part.weight.grad for part in parts.parts]), embedding.weight.grad)
    assert torch.allclose(SerializedLinear(linear, 4)(x), linear(x), atol=1e-6)
    assert list(SerializedLinear(linear, 4).state_dict()) == list(linear.state_dict())


# Options -------------------------------------------------------------------------------------------------------------


def test_every_execution_flag_reaches_poptorch(tmp_path, poptorch):
    config = make_config(
        4, batch_size=3, gradient_accumulation=10, replication_factor=2, device_iterations=5,
        stochastic_rounding=True, enable_half_partials=True, enable_rts=True, optimizer_state_offchip=True,
        matmul_proportion=[0.1, 0.2, 0.3, 0.4], executable_cache_dir=str(tmp_path / "cache"),
        profile_dir=str(tmp_path / "profile"), synthetic_data=True, random_seed=7, enable_als=True, fp16=True,
    )
    options = IpuEngine(config).options
    assert (options.device_iterations, options.replication_factor, options.random_seed) == (5, 2, 7)
    assert options.Training.gradient_accumulation == 10
    assert options.Training.reduction is poptorch.ReductionType.Mean
    assert options.Training.automatic_loss_scaling is True
    assert options.Precision.stochastic_rounding is True and options.Precision.partials_type is torch.float16
    location = options.TensorLocations.optimizer
    assert (location.on_chip, location.sharded) == (False, True)
    assert options.memory == {"IPU0": 0.1, "IPU1": 0.2, "IPU2": 0.3, "IPU3": 0.4}
    assert options.strategy.auto_stage is poptorch.AutoStage.AutoIncrement
    assert options.cache == str(tmp_path / "cache") and options.synthetic is True and options.offline is False
    assert options.auto_round_num_ipus is True and options.relaxed is True
    engine_options = options._Popart.engineOptions
    assert engine_options["autoReport.directory"] == str(tmp_path / "profile")
    assert engine_options["autoReport.all"] == "true"
    assert engine_options["debug.allowOutOfMemory"] == "true" and engine_options["opt.useAutoloader"] == "true"
    assert options._Popart.outlineThreshold == 10.0 and options._Popart.disableGradAccumulationTensorStreams is True
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


def test_what_cannot_work_is_told_before_poptorch_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "poptorch", None)
    with pytest.raises(UsageError, match="--gradient-accumulation 2: a pipeline of 4 stages needs at least 7"):
        IpuEngine(make_config(4, gradient_accumulation=2))
    with pytest.raises(UsageError, match="wheel of Poplar SDK 3.4.*--device cpu"):
        IpuEngine(make_config(4))


def failing(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("broken, reason", [
    (None, ""),
    (ImportError("libpoplar.so: cannot open shared object file"), "libpoplar.so: cannot open shared object file"),
    (ModuleNotFoundError("No module named 'torchvision'", name="torchvision"), "No module named 'torchvision'"),
    (AssertionError("works with torch==2.0.1\nonly"), "works with torch==2.0.1"),
    (RuntimeError(), "RuntimeError"),
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
    with pytest.raises(UsageError) as error:
        engines.create(make_config(1))
    for line in (engine.device_choice, str(error.value)):
        assert reason in line and "\n" not in line
    assert str(error.value).startswith("--device ipu: PopTorch cannot be imported (")


@pytest.mark.parametrize("found, options, name, choice", [
    (lambda: True, {}, "ipu", "--device auto: the IPUs that PopTorch finds here"),
    (lambda: False, {}, "cpu", "--device auto: no IPUs, PopTorch finds none here"),
    (failing(RuntimeError("no driver\n...")), {}, "cpu", "PopTorch cannot look for them (no driver)"),
    (lambda: False, {"compile_only": True}, "ipu", "--device auto: IPUs, for --compile-only"),
    (lambda: True, {"device": "cpu"}, "cpu", ""),
    (lambda: False, {"device": "ipu"}, "ipu", ""),
])
def test_auto_means_the_ipus_that_are_there(found, options, name, choice, poptorch, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(poptorch, "ipuHardwareIsAvailable", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = engines.create(make_config(1, **dict({"device": "auto"}, **options)))
    assert engine.name == name and choice in engine.device_choice
    engine.introduce()
    assert caplog.messages == [engine.device_choice, engine.describe()][not choice :]


def test_what_ipus_cannot_do_is_refused_where_auto_takes_them():
    with pytest.raises(UsageError, match="--optimizer Muon: IPUs support Adam.*--device auto: the IPUs.*--device cpu"):
        engines.create(make_config(1, device="auto", optimizer="Muon"))
    with pytest.raises(UsageError, match="--architecture image-gpt is not for IPUs.*--device auto: the IPUs"):
        engines.create(make_config(1, device="auto", architecture="image-gpt", text_seq_len=1))


def test_processes_of_torchrun_are_not_for_ipus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--device ipu: torchrun has started 2 processes.* poprun"):
        engines.create(make_config(1))
    reason = "--device auto: no IPUs, because torchrun has started this process"
    assert engines._choose(make_config(1, device="auto")) == (False, reason)


def test_the_models_own_options_are_checked_before_compiling():
    engine = IpuEngine(make_config(1, embedding_serialization_factor=4))
    with pytest.raises(UsageError, match="--embedding-serialization-factor 4: does not divide the 14 rows.* 2 does"):
        engine.prepare(make_model(), Pairs(64))


# Data ----------------------------------------------------------------------------------------------------------------


def test_the_asynchronous_loader_gives_the_same_batches():
    config = make_config(1)
    dataset = Pairs(samples_for(config, 3))
    batches = []
    for ahead in (False, True):
        engine = IpuEngine(config.replace(async_dataloader=ahead))
        batches.append([batch for epoch in range(2) for batch in engine.loader(dataset, epoch)])
        engine.close()
    assert len(batches[0]) == len(batches[1]) == 6
    for one, other in zip(*batches):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("ahead", [False, True])
def test_worker_processes_stay_for_the_whole_run(ahead):
    config = make_config(1, dataloader_workers=2, async_dataloader=ahead)
    engine = IpuEngine(config)
    next(iter(engine.loader(Pairs(samples_for(config)), 0)))
    assert (engine._loader.workers, engine._loader.persistent) == (2, True)
    engine.close()
    assert engine._loader is None


def test_the_loader_goes_on_over_epochs_and_starts_anywhere():
    config = make_config(1)
    dataset = Pairs(samples_for(config, 3))
    engine = IpuEngine(config)
    everything = [list(engine.loader(dataset, epoch)) for epoch in range(2)]
    engine.close()
    engine = IpuEngine(config)
    first = list(engine.loader(dataset, 0, start=config.global_batch))
    loader = engine._loader
    second = list(engine.loader(dataset, 1))
    assert engine._loader is loader and len(first) == 2 and len(second) == 3
    for batch, expected in zip(first + second, everything[0][1:] + everything[1]):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected))
    other = Pairs(samples_for(config, 3))
    next(iter(engine.loader(other, 1)))
    assert engine._loader is not loader and loader.closed
    assert not torch.equal(everything[0][0][0], everything[1][0][0])


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_start_at_any_sample_takes_what_comes_after_it(iterations):
    """As after a resume with another global batch; the native engine takes the same samples."""
    config = make_config(1, device_iterations=iterations)
    size = config.global_batch
    dataset = Pairs(5 * size)
    engine = IpuEngine(config)
    assert engine.steps_per_epoch(len(dataset)) == 5 // iterations * iterations and engine.steps_per_call == iterations
    found = list(engine.loader(dataset, 0, start=3)) + list(engine.loader(dataset, 1))
    texts = []
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


def test_too_few_samples():
    engine = IpuEngine(make_config(1, device_iterations=4))
    with pytest.raises(UserError, match="15 training samples do not fill one call of the device, which takes 16"):
        engine.steps_per_epoch(15)


def test_codes_of_other_pairs_keep_their_own_epochs():
    codes = torch.arange(8).repeat(16, 1).t().contiguous()
    dataset = CodesDataset(Pairs(8), codes)
    stream = Stream(dataset, 0, (0, 0), 3, (2, 2), (4, 0, 1), torch.float32)
    assert len(stream) == 24
    dataset.set_epoch(99)  # somebody else's business
    texts = {int(image[0]): text for text, image in (stream[index] for index in range(8, 16))}
    dataset.set_epoch(1)
    assert all(torch.equal(text, dataset[pair][0]) for pair, text in texts.items()) and len(texts) == 8
    with pytest.raises(IndexError):
        stream[24]


def test_a_short_run_is_not_read_ahead_of():
    codes = torch.arange(8).repeat(16, 1).t().contiguous()
    dataset = CodesDataset(Pairs(16), codes.repeat(2, 1).contiguous())
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
    order = epoch_order(24, 5, 0).tolist()
    assert sorted(seen[0][:4] + seen[1][:4] + seen[2][:4]) == sorted(order[:12])
    padded = [Padded(dataset, process, 3, 4, None) for process in range(3)]
    counted = [int(item[0]) for part in padded for item in (part[index] for index in range(len(part))) if item[2]]
    assert sorted(counted) == list(range(24)) and {len(part) for part in padded} == {8}


def test_synthetic_data_costs_the_host_nothing():
    config = make_config(1, synthetic_data=True)
    engine = IpuEngine(config)
    dataset = Pairs(samples_for(config, 3))
    engine.prepare(make_model(), dataset)
    batches = list(engine.loader(dataset, 0))
    assert len(batches) == 3 and batches[0] is batches[2]
    engine.step(batches[0])


# poprun --------------------------------------------------------------------------------------------------------------


class Horovod(types.ModuleType):
    """Two processes of which this is the second: the other one sends what is in `root`, and holds 3.0 of everything."""

    def __init__(self):
        super().__init__("horovod.torch")
        self.started, self.root = False, 1234

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
def poprun(monkeypatch):
    """`poprun --num-replicas 4 --num-instances 2`, seen from the second instance."""
    popdist = types.ModuleType("popdist")
    answers = {"isPopdistEnvSet": True, "getNumTotalReplicas": 4, "getNumLocalReplicas": 2, "getNumInstances": 2,
               "getInstanceIndex": 1}
    for name, value in answers.items():
        setattr(popdist, name, lambda value=value: value)

    class Options(poptorch_stand_in.Options):
        def __init__(self, ipus_per_replica):
            super().__init__()
            self._values["replication_factor"] = 2
            assert ipus_per_replica == 2

        def replicationFactor(self, value):
            raise RuntimeError("popdist sets the replication factor")

    popdist.poptorch = types.ModuleType("popdist.poptorch")
    popdist.poptorch.Options = Options
    horovod = Horovod()
    for module in (popdist, popdist.poptorch, types.ModuleType("horovod"), horovod):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return horovod


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
    loss = engine.step(batch).loss
    assert loss.shape == () and engine.mean(torch.tensor(1.0)) == 2.0
    engine.barrier()


def test_each_process_of_poprun_goes_on_with_its_own_random_state(poprun, monkeypatch, caplog):
    def broadcast(tensor, root_rank):
        """A third number that tells the processes apart."""
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
    with pytest.raises(UsageError, match="--replication-factor 8: poprun has started 4 replicas"):
        IpuEngine(make_config(2, replication_factor=8))
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(UsageError, match="horovod"):
        IpuEngine(make_config(2, replication_factor=4))


def test_poprun_never_means_one_run_for_each_process(poprun, poptorch, monkeypatch):
    monkeypatch.setattr(poptorch, "ipuHardwareIsAvailable", lambda: False)  # so it may be before the options are made
    config = make_config(2, device="auto", replication_factor=4)
    engine = engines.create(config)
    assert (engine.name, engine.rank, engine.world_size) == ("ipu", 1, 2)
    assert engine.device_choice == "--device auto: IPUs, because poprun has started this process"
    for device in ("cpu", "cuda"):
        with pytest.raises(UsageError, match=f"--device {device}: poprun has started this process"):
            engines.create(config.replace(device=device))
    monkeypatch.setitem(sys.modules, "poptorch", None)
    with pytest.raises(UsageError, match="PopTorch cannot be imported .*because poprun has started this process"):
        engines.create(config)
    monkeypatch.setitem(sys.modules, "popdist", None)
    assert engines.create(config.replace(device="cpu")).name == "cpu"
    monkeypatch.setenv("POPDIST_NUM_TOTAL_REPLICAS", "4")
    with pytest.raises(UsageError, match="poprun: popdist cannot be imported .*install the popdist wheel"):
        engines.create(config)


def test_popdist_without_poprun_is_a_single_process(poprun, monkeypatch):
    monkeypatch.setattr(sys.modules["popdist"], "isPopdistEnvSet", lambda: False)
    engine = IpuEngine(make_config(2, replication_factor=4))
    assert engine.is_main and engine.hosts.local_replicas == 4 and engine.mean(torch.tensor(1.5)) == 1.5
