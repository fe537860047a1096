"""CUDA graphs: recordings give the same samples, and nothing else is needed.

No GPU is used: a stand-in records the operations and replays them without Python (graph_stand_in.py).
"""
from __future__ import annotations

import contextlib
import copy
import logging

import pytest
import torch
from graph_stand_in import install
from helpers import tiny_vqgan
from models_for_tests import (
    ALL,
    EDGES,
    OPTIONS,
    TEXT,
    check_edge,
    conditional_logits,
    decode,
    likelihood,
    on_device,
    primed,
    random_codes,
    random_model,
)

from dalle.loading import Loaded
from models.quantization import Int8Linear
from models.vqgan import VQGAN
from sampling import Graphs, Sampler, SamplingOptions, driver, sample_codes
from sampling.decoders import Decoder
from sampling.graphs import CudaCapture
from sampling.loop import Shared

CPU = torch.device("cpu")
GUIDED = SamplingOptions(top_k=5, top_p=0.9, temperature=1.5, cond_scale=2.0)


@pytest.fixture
def graph(monkeypatch):
    """The class of the graphs that are recorded, with what it counts."""
    return install(monkeypatch)


def recorded(model):
    return Graphs(model, CudaCapture(CPU))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_are_as_wide_as_the_weights(dtype):
    model, codes = random_model(**OPTIONS["rotary and shift"]).to(dtype), random_codes(3)
    decoder = Decoder(model, 1, 3)
    assert decoder.cache.layers[0].codes.dtype == decoder.cache.layers[0].text.dtype == dtype
    whole = model(TEXT[:1].expand(3, -1), codes)[1].float()
    logits = decode(decoder, TEXT[:1], codes, step=on_device).float()
    # bfloat16 has 8 bits: logits of this model, which reach 40, are right to a unit in most places.
    assert (logits - whole.transpose(0, 1)).abs().mean((1, 2)).max() < (1e-4 if dtype == torch.float32 else 0.5)


@pytest.mark.skipif(torch.__version__ < "2.1", reason="on a CPU autocast leaves attention alone before 2.1")
@torch.no_grad()
def test_linear_layers_compute_in_the_type_of_autocast():
    model = random_model(**ALL).float()
    codes = random_codes(2)
    with torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(model, 1, 2)
        assert decoder.dtype == decoder.cache.layers[0].codes.dtype == torch.bfloat16
        expected = decode(Decoder(model, 1, 2), TEXT[:1], codes)
    assert expected.dtype == torch.bfloat16
    found = decode(decoder, TEXT[:1], codes, step=on_device)  # casts were done once: autocast is off
    assert (found.float() - expected.float()).abs().mean((1, 2)).max() < 0.5


def assert_as_without(found, model, *given, **options):
    """What was sampled is what the model gives without recordings, whose codes are returned."""
    expected = sample_codes(model, *given, shared=Shared("off"), **options)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options, parallel", [
    *((options, "auto") for options in OPTIONS.values()),
    (OPTIONS["rotary and shift"], "off"), (OPTIONS["rotary and shift"], 13),
], ids=[*OPTIONS, "one by one", "thirteen at once"])
def test_recordings_sample_the_same_images(options, parallel, graph):
    model, shared = random_model(**options), Shared(parallel)
    graphs, given = recorded(model), (TEXT, [4, 5, 6, 7], GUIDED)
    assert_as_without(sample_codes(model, *given, graphs=graphs, shared=shared), model, *given)
    assert graph.recorded == 4 and not graphs.failed
    windows = shared.windows
    assert windows.codes == 4 * 35 and windows.passes / 4 <= graph.replayed <= 35
    assert (graph.replayed, windows.passes) == (35, 4 * 35) if parallel == "off" else windows.codes_per_pass > 1.2


@pytest.mark.parametrize("options", EDGES, ids=str)
def test_options_at_the_ends_of_their_ranges(options, graph):
    model = random_model(**ALL)
    check_edge(model, options, recorded(model))
    assert 4 < graph.replayed <= 35


def test_one_recording_serves_all_batches_of_its_shape(graph):
    """What was sampled before stays as it was."""
    model, results = random_model(**ALL), []
    graphs, some = recorded(model), primed(slice(14, 20), slice(25, None))
    for row, seeds, kept, fed in ((0, [1, 2], None, 35), (1, [3, 4], some, 21), (0, [1, 2], None, 35)):
        before, steps, steps_without = graph.replayed, [], []
        found = sample_codes(model, TEXT[row], seeds, given=kept, on_token=steps.append, graphs=graphs)
        assert_as_without(found, model, TEXT[row], seeds, given=kept, on_token=steps_without.append)
        assert fed / 8 < graph.replayed - before < fed and len(steps) == len(steps_without) == fed + 1
        results.append((found, copy.deepcopy(found)))
        for layer in next(iter(graphs.sessions.values())).decoder.cache.layers:
            layer.codes.fill_(float("nan"))  # hidden from the next batch, but a nan times no weight is a nan
    assert graph.recorded == 4
    for found, before in results:
        assert torch.equal(found.codes, before.codes) and torch.equal(found.log_likelihood, before.log_likelihood)


@pytest.mark.parametrize("hidden", [[35], [0, 7, 35], []], ids=str)
def test_given_codes_are_kept(hidden, graph):
    model, given = random_model(), primed(hidden)
    found = sample_codes(model, TEXT[0], [1, 2], given=given, graphs=recorded(model))
    assert_as_without(found, model, TEXT[0], [1, 2], given=given)


def test_other_weights_are_recorded_anew(graph):
    model = random_model()
    graphs = recorded(model)
    first = sample_codes(model, TEXT[0], [1], graphs=graphs).codes
    with torch.no_grad():
        model.image_head.bias.normal_(std=3.0)
    assert not torch.equal(sample_codes(model, TEXT[0], [1], graphs=graphs).codes, first)
    model.float()
    assert sample_codes(model, TEXT[0], [1], graphs=graphs).codes.shape == first.shape
    assert graph.recorded == 12 and len(graphs.sessions) == 1
    for seeds in ([1, 2], [1, 2, 3]):
        sample_codes(model, TEXT[0], seeds, graphs=graphs)
    assert len(graphs.sessions) == 2  # no more than two: each has its cache


def test_int8_weights_are_recorded_too(graph):
    model = random_model().float()
    for block in model.transformer.layers:
        block.attention.fn.qkv = Int8Linear(block.attention.fn.qkv.weight, None)
    expected = sample_codes(model, TEXT[0], [1, 2])
    assert torch.equal(sample_codes(model, TEXT[0], [1, 2], graphs=recorded(model)).codes, expected.codes)
    assert graph.recorded == 4


@pytest.mark.parametrize("grid", [1, 2])
def test_the_smallest_pictures(grid, graph):
    model = random_model(grid=grid, attn_types=("full", "axial_col"))
    expected = sample_codes(model, TEXT[0], [1, 2]).codes
    assert torch.equal(sample_codes(model, TEXT[0], [1, 2], graphs=recorded(model)).codes, expected)
    assert graph.recorded == (0 if grid == 1 else 2) and graph.replayed <= grid * grid - 1


def test_a_copy_records_for_itself(graph):
    model = random_model()
    graphs = recorded(model)
    expected = sample_codes(model, TEXT[0], [1], graphs=graphs).codes
    copied = copy.deepcopy(graphs)
    assert not copied.sessions and graphs.sessions and copied.model is not model
    assert torch.equal(sample_codes(copied.model, TEXT[0], [1], graphs=copied).codes, expected) and graph.recorded == 8


@pytest.mark.skipif(torch.__version__ < "2.1", reason="on a CPU autocast leaves attention alone before 2.1")
def test_under_autocast_steps_are_recorded_in_its_type(graph):
    model = random_model(**ALL).float()
    graphs = recorded(model)
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample_codes(model, TEXT[0], [1, 2, 3], graphs=graphs)
    (session,) = graphs.sessions.values()
    assert session.decoder.dtype == session.decoder.cache.layers[0].codes.dtype == torch.bfloat16
    assert graph.replayed < 35
    expected = likelihood(conditional_logits(model, TEXT[0], sampled.codes), sampled.codes)
    # 36 codes, each right to a few hundredths of a nat.
    torch.testing.assert_close(sampled.log_likelihood, expected, rtol=0.1, atol=2.0)


def test_a_batch_is_decoded_while_the_next_is_sampled(graph, monkeypatch):
    """What a GPU does, without one: same batches in the same order, each handed on after the next was sampled."""
    vqgan = VQGAN(tiny_vqgan(num_codes=20, resolution=12, ch_mult=(1, 2))).eval()
    loaded = Loaded(random_model().float(), vqgan, None, None)
    expected, sampled = list(Sampler(loaded).images(TEXT, 4, batch_size=2, seed=1)), []

    class Beside(driver._Pictures):
        def __init__(self, model, floats):
            super().__init__(model, floats)
            self.stream, self.ahead = torch.cuda.Stream(), 1

        def start(self, share, *rest):
            sampled.append(share)
            return super().start(share, *rest)

    monkeypatch.setattr(driver, "_Pictures", Beside)
    monkeypatch.setattr(driver, "_room_on_host", torch.empty_like)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    for index, batch in enumerate(Sampler(loaded).images(TEXT, 4, batch_size=2, seed=1)):
        assert sampled[-1] == expected[min(index + 1, 3)].share
        assert batch.share == expected[index].share and batch.seeds == expected[index].seeds
        assert torch.equal(batch.pixels, expected[index].pixels) and torch.equal(batch.codes, expected[index].codes)
        assert torch.equal(batch.log_likelihood, expected[index].log_likelihood)
    assert index == 3


def test_without_a_gpu_nothing_is_recorded(graph):
    model = random_model()
    expected = sample_codes(model, TEXT[0], [1])
    assert torch.equal(sample_codes(model, TEXT[0], [1], graphs=Graphs(model)).codes, expected.codes)
    assert not graph.recorded


def test_what_cannot_be_recorded_is_sampled_without(graph, monkeypatch, caplog):
    model = random_model()
    graphs = recorded(model)
    head, calls = model.image_head, []
    expected = sample_codes(model, TEXT[0], [1, 2])

    class Asking(torch.nn.Module):
        """Waits for a number."""

        def forward(self, x):
            calls.append(float(x.sum()))
            return torch.nn.functional.linear(x, head.weight, head.bias)

    model.image_head = Asking()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(sample_codes(model, TEXT[0], [1, 2], graphs=graphs).codes, expected.codes)
    assert len(caplog.records) == 1 and "without CUDA graphs: operation not permitted" in caplog.text
    assert calls and not graph.replayed and not graphs.sessions


def test_memory_that_others_hold_is_freed_before_giving_up(graph, monkeypatch):
    model, full = random_model(), []

    class Capture(CudaCapture):
        def __call__(self, function):
            if full:
                full.pop()
                raise torch.cuda.OutOfMemoryError("full")
            return super().__call__(function)

    graphs = Graphs(model, Capture(CPU))
    sample_codes(model, TEXT[0], [1], graphs=graphs)
    full += [1, 1]  # also when nothing else is kept any more
    with pytest.raises(torch.cuda.OutOfMemoryError):
        sample_codes(model, TEXT[0], [1, 2], graphs=graphs)
    assert not graphs.sessions and not full
    sample_codes(model, TEXT[0], [1], graphs=graphs)
    sample_codes(model, TEXT[0], [1, 2], graphs=graphs)
    full.append(1)
    expected = sample_codes(model, TEXT[0], [1, 2, 3]).codes
    assert torch.equal(sample_codes(model, TEXT[0], [1, 2, 3], graphs=graphs).codes, expected)
    assert len(graphs.sessions) == 1 and not graphs.failed


@pytest.mark.skipif(torch.__version__ < "2.1", reason="torch.compile traces less before 2.1")
def test_a_step_is_one_graph_for_the_compiler_at_all_positions():
    dynamo = pytest.importorskip("torch._dynamo")
    model = random_model(**dict(OPTIONS["rotary and shift"], attn_types=("full", "conv_like")))
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    def capture(function):
        step = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        step()
        return step

    dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.callback(dynamo.reset)
        stack.enter_context(dynamo.config.patch(error_on_recompile=True))
        sampled = sample_codes(model, TEXT[0], [1, 2], GUIDED, graphs=Graphs(model, capture))
    assert torch.equal(sampled.codes, sample_codes(model, TEXT[0], [1, 2], GUIDED).codes) and 1 <= len(compiled) <= 4
