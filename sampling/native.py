"""The native decoder: a code or a window of each image through the whole transformer in one call of ops/csrc/rows.c.

Float32 on a CPU; weights may be bfloat16, and those of linear layers int8, which become float32 where they are read, or
are multiplied as exactly by a matrix unit. A whole pass is one call, because what happens between two matmuls,
attention to a row of codes say, takes less than PyTorch needs to be asked for it. What is sampled for an image depends
neither on windows nor on the number of images or threads: sums go in the same order for all, those of the prompt and of
given codes too.

Letters: R rows (images, twice as many with guidance), D width, P text positions, N codes of an image.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import time
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import transformer
from models.dalle import DalleModel, Operands
from models.patterns import allowed_codes
from models.positions import Positions
from models.quantization import Int8Linear, quantize_rows
from ops import Norm, activation, rows
from ops.attention_ops import HEAD_EPS
from ops.build import pointer
from ops.rows import Linear, Packed, address, at, threads_for, whole
from sampling.cache import LayerCache
from sampling.canvas import Canvas
from sampling.decoders import Copies, Decoder, computed_in, is_small, unknown_option

MOST_ROWS = 96
"""From there on arithmetic is all that counts, and a matmul that divides its work into blocks is as fast."""
_GUESSED_ROWS = 4
"""Rows of one code each up to which guesses are made one by one; with more the arithmetic of guesses counts too."""

_KNOWN = frozenset(
    "num_text_tokens num_image_tokens text_seq_len grid dim depth heads dim_head attn_types loss_img_weight "
    "attn_dropout ff_dropout sandwich_norm layer_scale activation ff_mult qkv_bias out_bias ff_bias head_bias bos "
    "unique_pads text_positions image_positions rotary shift_tokens stable tie_embeddings shared_attn_ids "
    "shared_ff_ids init_std z_loss label_smoothing base_width norm qk_norm rotary_2d value_residual".split()
)
"""The options of DalleConfig that this decoder implements, or that are nothing to it. Others it refuses by name."""


class _Norm(ctypes.Structure):
    _fields_ = [("weight", address), ("bias", address), ("eps", ctypes.c_float)]


class _Branch(ctypes.Structure):
    _fields_ = [
        ("before", _Norm),
        ("after", _Norm),
        ("first", Linear),
        ("second", Linear),
        ("scale", address),
        ("history", address),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("attention", _Branch), ("feed_forward", _Branch), ("query", _Norm), ("key", _Norm)]
    _fields_ += [("value_mix", address)]
    _fields_ += [(name, address) for name in ("text_key", "text_value", "image_key", "image_value")]
    _fields_ += [("text_lane", whole), ("lane", whole), ("starts", address), ("seen", address)]


_SIZES = "sequences rows images codes dim heads width text_len grid hidden activation layers threads turned".split()
_SIZES += ["stable", "turns_values"]
_POINTERS = "table positions cosines sines".split()


class _Model(ctypes.Structure):
    _fields_ = [(name, whole) for name in _SIZES] + [(name, address) for name in _POINTERS]
    _fields_ += [("last", _Norm), ("head", Linear), ("stack", ctypes.POINTER(_Layer)), ("scratch", address)]


class _Canvas(ctypes.Structure):
    _fields_ = [(name, whole) for name in "images num_codes stride".split()]
    _fields_ += [(name, address) for name in "codes fronts scores kept nulls keys".split()]
    _fields_ += [(name, address) for name in "temperature top_p scale top_k".split()]


class _Seen(NamedTuple):
    """Which codes each position sees."""

    starts: Tensor
    """(N + 1,) position i sees seen[starts[i]] up to seen[starts[i + 1]]."""
    seen: Tensor


@functools.lru_cache(maxsize=16)
def _seen(pattern: str, grid: int) -> _Seen:
    seen = [row.nonzero()[:, 0] for row in allowed_codes(pattern, grid)]
    starts = torch.tensor([0] + [len(codes) for codes in seen]).cumsum(0)
    return _Seen(starts.int(), torch.cat(seen).int())


def refusal(model: DalleModel, num_rows: int, copies: Copies | None = None) -> str | None:
    """Why the native decoder cannot decode so many rows of this model, or None where it can.

    copies: keeps what follows from the weights alone, as it keeps what is made of them.
    """
    passing = rows.refusal()
    if passing is not None:
        return _unfit(model) or passing
    unfit = {} if copies is None else copies.unfit
    if "native" not in unfit:
        unfit["native"] = _unfit(model)
    if unfit["native"] is None and computed_in(model) != model.text_emb.weight.dtype:
        return "under autocast"
    return unfit["native"] or (f"more than {MOST_ROWS} rows" if num_rows > MOST_ROWS else None)


def _unfit(model: DalleModel) -> str | None:
    """Why the native decoder cannot take this model, whatever is sampled, or None where it can."""
    unknown = unknown_option(model.config, _KNOWN)
    if unknown is not None:
        return f"the native decoder does not know the model option {unknown}"
    if activation(model.config.activation).number < 0:
        return f"the native decoder does not know the activation {model.config.activation}"
    parameters = list(model.transformer.parameters()) + list(model.image_head.parameters())
    parameters += [*model.norm.parameters(), *model.image_emb.parameters(), *model.text_emb.parameters()]
    refused = rows.refusal(*parameters, halves=True)
    if refused is not None:
        return refused
    for module in model.operands(lambda module: module).projections:
        if type(module) not in (nn.Linear, Int8Linear):
            return f"a layer of the kind {type(module).__name__}"
        if not module.weight.is_cpu:  # type: ignore[union-attr]
            return "weights on another device"
    return None if is_small(model) else "a second copy of the weights would not pay"


_ROUGH: weakref.WeakKeyDictionary[Any, tuple[Any, Packed]] = weakref.WeakKeyDictionary()


def _rough(module: Any, gated: bool = False) -> Packed:
    """An int8 copy of a layer for guesses, kept as long as the layer: one that is out of date only guesses worse."""
    weight = module.weight.detach()
    state = gated, weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.shape
    found = _ROUGH.get(module)
    if found is None or found[0] != state:
        rounded, scale = quantize_rows(weight)
        found = _ROUGH[module] = state, Packed.rough(rounded, module.bias, scale, gated)
    return found[1]


class NativeDecoder(Decoder):
    """Feeds prompts and codes natively."""

    most_rows, calculates_in = MOST_ROWS, torch.float32

    def __init__(self, model: DalleModel, prompts: int, images: int, copies: Copies | None = None) -> None:
        super().__init__(model, prompts, images, copies)
        config = model.config
        self._kept: list[Any] = []  # what is given to C by its address
        angles = model.transformer.angles
        turned = [None, None] if angles is None else [self._keep(angles).cos(), self._keep(angles).sin()]
        positions = copy.deepcopy(model.image_pos_emb)  # in bfloat16 rows and columns would be added in it
        tables = [x if x is None else self._keep(x) for x in (positions and positions.float().table(), *turned)]
        self._layers = (_Layer * config.depth)(*map(self._layer, self.operands.blocks, self.cache.layers))
        layers = {layer for block in self.operands.blocks for layer in block.projections}
        self.struct = _Model(
            sequences=self.rows,
            rows=0,
            images=images,
            codes=config.num_image_tokens,
            dim=config.dim,
            heads=config.heads,
            width=config.dim_head,
            text_len=config.text_len,
            grid=config.grid,
            hidden=config.hidden,
            activation=activation(config.activation).number,
            layers=config.depth,
            threads=threads_for(sum(self._pack(layer).bytes for layer in layers) // config.depth),
            turned=0 if angles is None else angles.shape[1],
            table=at(self._keep(model.image_emb.weight)),
            positions=at(tables[0]),
            cosines=at(tables[1], config.text_len),
            sines=at(tables[2], config.text_len),
            stable=config.stable,
            turns_values=config.rotary,
            last=self._norm(Norm(model.norm.weight, model.norm.bias, model.norm.eps)),
            head=self._pack(model.image_head).struct,
            stack=ctypes.cast(self._layers, ctypes.POINTER(_Layer)),
        )
        self._all = torch.arange(self.rows)
        self._canvas: Canvas | None = None
        self._guessed = False
        # With smaller weights a guess reads half as many bytes as a pass, or just as many, so guessing does not pay.
        large = all(self._pack(layer).struct.size == 4 for layer in (*layers, model.image_head))
        self._guesses = bool(rows.functions().guesses()) and large
        self._make_room(self.rows)

    def _operands(self) -> Operands:
        return self.model.operands(lambda module: module)  # weights are packed below

    def _keep(self, tensor: Tensor) -> Tensor:
        """The tensor as float32, one row after the other, for as long as C knows its address."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1]

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm(None, None, 0.0)
        scale, shift = (x if x is None else self._keep(x) for x in norm[:2])
        return _Norm(at(scale), at(shift), norm.eps)

    def _pack(self, module: Any, gated: bool = False) -> Packed:
        copies = self.copies.of("native")
        if module not in copies:  # layers may share it
            copies[module] = Packed(module.weight.detach(), module.bias, getattr(module, "scale", None), gated)
        return copies[module]

    def _projections(self, own: transformer.Operands, rough: bool = False) -> list[Linear]:
        """Queries, keys and values; out; up; down."""
        gated = self.model.config.up_width > self.model.config.hidden
        packs = [(_rough if rough else self._pack)(one, gated and one is own.up) for one in own.projections]
        self._kept.append(packs)  # or a newer copy of changed weights would free what C still reads
        return [packed.struct for packed in packs]

    def _layer(self, own: transformer.Operands, cache: LayerCache) -> _Layer:
        qkv, out, up, down = self._projections(own)
        branches = (
            self._branch(own.attention_norm, own.after_attention, qkv, out),
            self._branch(own.feed_forward_norm, own.after_feed_forward, up, down),
        )
        for branch, scale in zip(branches, (own.attention_scale, own.feed_forward_scale)):
            if scale is not None:
                padded = self._keep(torch.zeros(branch.second.panels * rows.functions().panel_width()))
                padded[: scale.numel()] = scale.detach().flatten()
                branch.scale = at(padded)
        for branch, shown in zip(branches, cache.shown):
            branch.history = at(shown)
        lanes, seen = (cache.text.stride(2), cache.codes.stride(2)), _seen(cache.pattern, cache.grid)
        self._kept.append(seen)
        scales = [None, None] if own.head_scales is None else [Norm(one, None, HEAD_EPS) for one in own.head_scales]
        heads = map(self._norm, scales)
        mix = None if own.value_mix is None else self._keep(own.value_mix)
        return _Layer(*branches, *heads, at(mix), *map(at, (*cache.text, *cache.codes)), *lanes, *map(at, seen))

    def _branch(self, before: Norm, after: Norm | None, first: Linear, second: Linear) -> _Branch:
        return _Branch(self._norm(before), self._norm(after), first, second)

    @functools.cached_property
    def _guesser(self) -> _Model:
        """The same model with rough matmuls, in the same memory."""
        guesser = _Model.from_buffer_copy(self.struct)
        layers = (_Layer * self.struct.layers).from_buffer_copy(self._layers)
        for layer, own in zip(layers, self.operands.blocks):
            attention, feed_forward = layer.attention, layer.feed_forward
            attention.first, attention.second, feed_forward.first, feed_forward.second = self._projections(own, True)
        head = _rough(self.model.image_head)
        self._kept += [layers, head]
        guesser.head, guesser.stack = head.struct, layers
        return guesser

    def _make_room(self, num_rows: int) -> None:
        """Let steps have so many rows."""
        if num_rows > self.struct.rows:
            self.struct.rows = num_rows
            self._scratch = torch.zeros(rows.functions().room_of(ctypes.byref(self.struct)))
            self._integers = torch.zeros(6 * num_rows, dtype=torch.long)
            self.struct.scratch = at(self._scratch)

    def prompt(self, text: Tensor) -> Tensor:
        ids = self.model.text_part(text)
        embedded = self.model.embed_text(ids, dtype=torch.float32).detach()  # (prompts, P, D)
        out, (count, text_len) = torch.empty_like(embedded), ids.shape
        together = min(max(1, MOST_ROWS // text_len), count)
        self._make_room(together * text_len)
        for first in range(0, count, together):
            some = slice(first, first + together)
            given = map(pointer, (embedded[some], self._integers, out[some]))
            rows.functions().read_text(ctypes.byref(self.struct), first, len(out[some]), *given)
        return out[:, -1]

    def feed(self, codes: Tensor, positions: Positions) -> Tensor:
        places = max(1, MOST_ROWS // self.rows)
        if positions.count > places and positions.index is None:  # codes that are given first
            parts = range(0, positions.count, places)
            steps = [Positions(min(places, positions.count - part), positions.start + part) for part in parts]
            return torch.cat([self.feed(codes[:, step.start : step.end], step) for step in steps], dim=1)
        if codes.shape != (self.rows, positions.count):
            raise ValueError(f"codes {tuple(codes.shape)} for {self.rows} rows")
        index = positions.index
        if index is None:
            index = torch.arange(positions.start, positions.end)[None]
        index, codes = index.expand(self.rows, -1).contiguous(), codes.contiguous()
        self._make_room(codes.numel())
        out = torch.empty(*codes.shape, self.struct.dim)
        failed = rows.functions().step(
            ctypes.byref(self.struct), codes.numel(), positions.count, *map(pointer, (self._all, codes, index, out))
        )
        if failed:
            what, given = (("code", codes), ("position", index))[failed - 1]
            raise IndexError(f"a {what} is not in the table: {given.flatten().tolist()}")
        return out

    def reader(self, prompts: int) -> NativeDecoder:
        return NativeDecoder(self.model, prompts, 1, self.copies)

    def part(self, first: int, end: int) -> NativeDecoder:
        self._make_room(MOST_ROWS)  # the part has the same
        part: Any = super().part(first, end)
        part._all = self._all[first:end]
        return part

    def release(self) -> None:
        if self.rows <= _GUESSED_ROWS:  # with more, building one takes little of a batch's time, its cache much memory
            copies, self.copies = self.copies, Copies()  # no cycle, or they would stay in memory
            copies.idle = self

    def guess(self, canvas: Canvas, width: int, num_rows: int) -> float:
        self._guessed = width > 1 and num_rows <= _GUESSED_ROWS and self._guesses
        if not self._guessed:
            return 0.0
        self._take(canvas, width)
        first, guesser = "_guesser" not in vars(self), self._guesser
        guesser.rows, guesser.scratch, begin = self.struct.rows, self.struct.scratch, time.perf_counter()
        self._call(rows.functions().guess, guesser, width)
        return 0.0 if first else time.perf_counter() - begin

    def _take(self, canvas: Canvas, width: int) -> None:
        """Let C know the canvas, and have room for such a window of each row."""
        self._make_room(min(self.rows * width, max(self.rows, MOST_ROWS)))
        if self._canvas is not canvas:
            choice = canvas.by
            self._canvas, self._canvas_struct = canvas, _Canvas(
                *canvas.codes.shape[:1], canvas.num_codes, canvas.codes.shape[1],
                *map(at, (canvas.codes, canvas.fronts, canvas.scores, canvas.kept, canvas.nulls, canvas.keys,
                          choice.temperature, choice.top_p, canvas.cond_scale, choice.top_k)),
            )  # fmt: skip

    def advance(
        self, canvas: Canvas, width: int, start: int | None = None, reach: int = 0, together: bool = False
    ) -> None:
        self._take(canvas, width)
        self._call(rows.functions().advance, self.struct, width, self._guessed)
        self._guessed = False

    def _call(self, function: Any, model: _Model, *numbers: int) -> None:
        if function(ctypes.byref(model), ctypes.byref(self._canvas_struct), *numbers, pointer(self._integers)):
            raise IndexError("a code or a position of a window is not in the table")

    def logits(self, hidden: Tensor) -> Tensor:
        return self._pack(self.model.image_head)(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


def best_decoder(
    model: DalleModel, prompts: int, images: int, copies: Copies | None = None
) -> tuple[Decoder, str | None]:
    """The fastest decoder that knows this model, and why it is not the native one.

    The idle one of `copies` if it is of as many prompts and images: a batch overwrites what it reads of the cache.
    """
    refused = refusal(model, prompts * images, copies)
    if copies is not None and copies.idle is not None:
        idle, copies.idle = copies.idle, None
        if refused is None and (idle.model, idle.rows, idle.struct.images) == (model, prompts * images, images):
            idle.copies = copies
            return idle, None
    return (NativeDecoder if refused is None else Decoder)(model, prompts, images, copies), refused
