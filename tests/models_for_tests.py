"""What tests of models, ops and sampling share: tiny models whose every term matters, and decoding code by code."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from pathlib import Path
from unittest import mock

import pytest
import torch

import ops
from models.config import DalleConfig
from models.dalle import DalleModel
from models.positions import Positions, next_code
from ops import build, matmul, noise, rows
from sampling import SamplingOptions, sample_codes

needs_kernels = pytest.mark.skipif(build.library("rows") is None, reason="no C compiler, or kernels are switched off")
needs_guesses = pytest.mark.skipif(
    build.library("rows") is None or not rows.functions().guesses(), reason="no matmuls for guesses"
)
TINY = DalleConfig(
    num_text_tokens=12, num_image_tokens=20, text_seq_len=5, grid=6, dim=16, depth=2, heads=2, dim_head=12,
    attn_types=("full",),
)  # fmt: skip
ALL_PATTERNS = ("full", "axial_row", "axial_col", "conv_like", "conv_causal")
ALL = {"attn_types": ALL_PATTERNS, "depth": 5}
#: Options of models to sample from, by name.
OPTIONS = {
    **{pattern: {"attn_types": (pattern,)} for pattern in ALL_PATTERNS},
    "all patterns": ALL, "rotary": dict(ALL, rotary=True, text_positions=False, image_positions="none"),
    "shift": {"shift_tokens": True, "attn_types": ("full", "conv_causal")},
    "rotary and shift": {"rotary": True, "shift_tokens": True, "attn_types": ("axial_row", "axial_col")},
    "stable sandwich tied": {"stable": True, "sandwich_norm": True, "tie_embeddings": True},
    "shared": {"depth": 4, "shared_attn_ids": (0, 1), "shared_ff_ids": (0,), "value_residual": True, "rotary": True},
    "modern": dict(ALL, norm="rms", qk_norm=True, rotary_2d=True, image_positions="none", activation="swiglu",
                   value_residual=True),
    "modern and shift": {
        "norm": "rms", "sandwich_norm": True, "activation": "relu2", "ff_mult": 6, "shift_tokens": True,
        "rotary_2d": True, "attn_types": ("conv_like", "axial_col"), "value_residual": True,
    },
    "mindalle": {
        "bos": False, "unique_pads": False, "layer_scale": False, "activation": "gelu", "image_positions": "learned",
        "qkv_bias": True,
    },
}  # fmt: skip
TEXT = torch.tensor([[3, 8, 1, 0, 0], [11, 2, 2, 9, 4]])
GREEDY = SamplingOptions(temperature=0)
#: Options of sampling at the ends of their ranges.
EDGES = [
    {"temperature": 1e-6}, {"temperature": 1e6}, {"top_p": 1e-300}, {"temperature": 0, "cond_scale": 1e6},
    {"temperature": 1e-6, "cond_scale": 1e6, "top_k": 5, "top_p": 0.9}, {"temperature": 1e6, "cond_scale": 0},
]


def randomised(module, seed=0):
    """Give every parameter random values, so that no term of the computation vanishes."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def random_model(**options):
    """A tiny DALL-E, in double precision, with weights large enough that its likeliest codes vary over the picture."""
    torch.manual_seed(5)
    model = DalleModel(dataclasses.replace(TINY, **options)).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue  # as they are: random ones make one code the likeliest everywhere
        torch.nn.init.normal_(parameter, std=1.0 if "emb" in name or "scale" in name else 0.3)
    return model


def random_codes(batch):
    return torch.randint(20, (batch, 36), generator=torch.Generator().manual_seed(8))


def primed(*hidden):
    """Codes of one image of which those at some positions (numbers or slices) are not given."""
    codes = random_codes(1)[0]
    for where in hidden:
        codes[where] = -1
    return codes


def conditional_logits(model, text, codes, cond_scale=1.0):
    """Image logits of the whole pass, without any cache. text (T,), codes (B, N) -> (B, N, C)."""
    text = text.expand(len(codes), -1)
    logits = model(text, codes)[1]
    if cond_scale == 1:
        return logits
    null = model(torch.zeros_like(text), codes)[1]
    return null + cond_scale * (logits - null)


def likelihood(logits, codes):
    """Log-likelihood of codes (B, N) under logits (B, N, C): (B,)."""
    return logits.log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2)).detach()


def decode(decoder, text, codes, first=0, step=next_code, count=35):
    """Logits after the prompt or the first codes, and after each further code up to `count`: (1 + count - first, R, C).

    step: makes Positions of the number of a code.
    """
    hidden = decoder.prompt(text)
    hidden = hidden.repeat_interleave(len(codes) // len(text), 0)
    if first:
        hidden = decoder.feed(codes[:, :first], Positions(first, 0))[:, -1]
    with decoder:
        logits = [decoder.logits(hidden)]
        for position in range(first, count):
            logits.append(decoder.logits(decoder.feed(codes[:, position : position + 1], step(position))[:, 0]))
    return torch.stack(logits)


def take_row(decoder, other, row):
    """Let one image of a decoder's cache be as far as another decoder is with it."""
    for layer, theirs in zip(decoder.cache.layers, other.cache.layers):
        layer.codes[:, row] = theirs.codes[:, row]
        for own, shown in zip(layer.shown, theirs.shown):
            own[row] = shown[row]


def on_device(position):
    """A position that the host does not know, and the part of the codes that is read for it."""
    return Positions.of(torch.tensor([[position]]), next(reach for reach in (9, 18, 27, 36) if position < reach))


def choice_for(options, rows):
    return ops.choice_of(rows, options.temperature, options.top_k, options.top_p)


def sample(logits, keys, options):
    """Tokens of position 0 by the reference implementation."""
    with ops.use("reference"):
        return ops.sample(logits, keys, torch.zeros_like(keys), choice_for(options, len(logits)))[0]


def noise_of(seeds, positions, vocabulary):
    """The noise of all codes of some images: (B, N, C)."""
    keys = noise.keys(seeds).repeat_interleave(positions)
    states = noise.stream(keys, torch.arange(positions).repeat(len(seeds)), vocabulary)
    return noise.gumbel(states, torch.arange(vocabulary)).view(len(seeds), positions, vocabulary)


def check_edge(model, options, graphs=None):
    """What options at the ends of their ranges sample: the likeliest codes of the whole pass, or any code alike."""
    seeds, options = [1, 2, 3], SamplingOptions(**options)
    found = sample_codes(model, TEXT[0], seeds, options, graphs=graphs)
    assert found.log_likelihood.isfinite().all()
    if options.temperature == 1e6:
        assert (found.codes != noise_of(seeds, 36, 20).argmax(-1)).sum() <= 2  # all but ties up to what logits add
    elif model.text_emb.weight.dtype != torch.bfloat16:
        logits = conditional_logits(random_model(**ALL), TEXT[0], found.codes, options.cond_scale)
        assert torch.equal(found.codes, logits.argmax(-1))
    assert len(found.codes.unique()) > 1


@functools.lru_cache(maxsize=None)
def _emulated(module, functions, *options):
    header = Path(__file__).with_name("amx_emulation.h")
    digest = hashlib.sha256(header.read_bytes()).hexdigest()[:16]  # part of the compiled file's name
    # -O2: a third of the compiler's time, and no slower to run.
    flags = [*build._FLAGS, "-O2", "-w", "-include", str(header), "-D__AMX_BF16__", "-DEMULATION=0x" + digest, *options]
    with mock.patch.object(build, "_FLAGS", flags), mock.patch.object(module, "library", build.library.__wrapped__):
        return functions.__wrapped__()


@contextlib.contextmanager
def matrix_units(kind):
    """Multiply by the "native" unit, or by an "emulated" one; skip where there is none."""
    functions = matmul._functions() if kind == "native" else _emulated(matmul, matmul._functions)
    if functions is None:
        pytest.skip("no AMX, no C compiler, or kernels are switched off")
    with mock.patch.object(matmul, "_functions", lambda: functions):
        assert matmul.suits(torch.ones(64, 64), torch.ones(64, 64))
        yield


@contextlib.contextmanager
def units_of_rows(kind):
    """Let the native decoder multiply by vectors ("none"), or by a matrix unit as above; skip where there is none."""
    functions = rows.functions() if kind != "emulated" else _emulated(rows, rows.functions, "-DONLY_TILES")
    if functions is None or (kind != "none" and not functions.multiplies()):
        pytest.skip("no AMX, no AVX-512 to emulate it, no C compiler, or kernels are switched off")
    multiplies = mock.patch.object(rows, "multiplies", lambda: kind != "none")
    with mock.patch.object(rows, "functions", lambda: functions), multiplies:
        yield
