"""One code of each image at a time by kernels of our own: what `models.stepping.Stepper` does, in one call.

Float32 on a CPU; weights of linear layers may be int8.

Drawing a few images reads all weights for each code, and their arithmetic hides behind that. So weights are laid out
once in the order in which they are read, by several places in turn (a core gets half as much again from memory that
way), and a whole token is one call: what happens between two products, attention to a row of codes say, takes less than
PyTorch needs to be asked for it.

What is drawn for an image does not depend on the number of images or threads: sums go in the same order for all.

Letters: R rows (images, twice as many with guidance), D width, H heads, K width of a head, P text positions, G side of
the code grid, N = G * G codes, C codebook size.
"""

import ctypes
import functools
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import JoinedCache, LayerCache
from models.dalle import DALLE
from models.patterns import allowed_codes
from models.quantization import Int8Linear
from models.transformer import Residual
from ops.build import library, pointer
from ops.dispatch import suits as natively

_LANES = 16
"""Floats in the widest vectors there are."""
_GRAIN = 1 << 18
"""Bytes of a layer's weights below which a further thread takes longer to wait for than it helps."""
_MOST_ROWS = 96
"""From there on arithmetic is all that counts, and a product that divides its work into blocks is as fast."""
_ACTIVATIONS = {"geglu": 0, "gelu": 1, "quick_gelu": 2}
_address, _whole = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [(name, _address) for name in ("weight", "bias", "scale")] + [("depth", _whole), ("panels", _whole)]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _address), ("bias", _address), ("eps", ctypes.c_float)]


class _Branch(ctypes.Structure):
    _fields_ = [
        ("before", _Norm),
        ("after", _Norm),
        ("first", _Linear),
        ("second", _Linear),
        ("scale", _address),
        ("history", _address),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("attention", _Branch), ("feed_forward", _Branch)] + [
        (name, _address) for name in ("text_key", "text_value", "image_key", "image_value")
    ]
    _fields_ += [("lane", _whole), ("slots", _address), ("starts", _address), ("seen", _address)]


_SIZES = "rows images codes dim heads width text_len grid hidden activation layers threads turned".split()
_POINTERS = "table positions cosines sines".split()


class _Model(ctypes.Structure):
    _fields_ = [(name, _whole) for name in _SIZES] + [(name, _address) for name in _POINTERS]
    _fields_ += [("last", _Norm), ("stack", ctypes.POINTER(_Layer)), ("scratch", _address)]


@functools.lru_cache(maxsize=None)
def _library() -> Optional[ctypes.CDLL]:
    found = library("rows")
    if found is not None:
        found.panel_width.restype = found.room_of.restype = _whole
        found.panel_width.argtypes, found.room_of.argtypes = [], [_address]
        for pack in (found.pack, found.pack_bytes):
            pack.argtypes, pack.restype = [_address, _whole, _whole, _whole, _address, _whole], None
        found.multiply_rows.argtypes = [_address, _address, _whole, _address, _address, _whole]
        found.multiply_rows.restype = None
        long, double = _whole, ctypes.c_double
        found.draw_rows.argtypes = [_address, long, long, long, _address, double, long, double, *[_address] * 3, long]
        found.draw_rows.restype = None
        found.step.argtypes, found.step.restype = [_address, _address, _whole, _address], ctypes.c_int
        found.read_all.argtypes, found.read_all.restype = [_address, _whole, _whole], ctypes.c_double
    return found


def read_all(x: Tensor) -> Optional[float]:
    """Return the sum of x (float32), read as fast as memory allows, or None where there are no kernels.

    One place at a time gives a core two thirds of what several in turn give it: this is the limit of what drawing one
    image can reach, and `torch.sum` is not.
    """
    if not natively(x) or not x.is_contiguous() or _library() is None:
        return None
    return _library().read_all(pointer(x), x.numel(), torch.get_num_threads())


def _threads(layer: int) -> int:
    """How many threads share the work of a layer of so many bytes."""
    return max(1, min(torch.get_num_threads(), layer // _GRAIN))


class Packed:
    """A linear layer whose weight (N, D) lies in panels. gated: its second half of outputs gates the first.

    int8 weights are scaled after the sum, as `Int8Linear` does: that is finite for inputs up to 1e34.
    """

    def __init__(self, module: Union[nn.Linear, Int8Linear], gated: bool = False) -> None:
        size = module.weight.numel() * module.weight.element_size()
        self.library, self.threads = _library(), _threads(size * 4)  # one product of some four
        self.outputs, depth = module.weight.shape
        panel = self.library.panel_width()
        width = panel // 2 if gated else panel  # outputs of each half, or of all, in a panel
        panels = -(-(self.outputs // 2 if gated else self.outputs) // width)

        def packed(values: Optional[Tensor], depth: int) -> Optional[Tensor]:
            if values is None:
                return None
            pack = self.library.pack_bytes if values.dtype == torch.int8 else self.library.pack
            values, result = values.detach().contiguous(), values.new_empty(panels * panel * depth)
            pack(pointer(values), self.outputs, depth, gated, pointer(result), self.threads)
            return result

        bias = module.weight.new_zeros(self.outputs, dtype=torch.float32) if module.bias is None else module.bias
        self.weight, self.bias = packed(module.weight, depth), packed(bias, 1)
        self.scale = packed(getattr(module, "scale", None), 1)
        self.bytes = self.weight.numel() * self.weight.element_size()
        self.struct = _Linear(_at(self.weight), _at(self.bias), _at(self.scale), depth, panels)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, D) -> (R, N), not for gated ones."""
        x = x.contiguous()
        rows, depth = x.shape
        out, room = x.new_empty(rows, len(self.bias)), x.new_empty(depth * rows)
        self.library.multiply_rows(
            ctypes.byref(self.struct), pointer(x), rows, pointer(out), pointer(room), self.threads
        )
        return out[:, : self.outputs]


class _Slots(NamedTuple):
    """Where a cache keeps the codes of a row and head, (N,), and which of these slots each position sees."""

    own: Tensor
    starts: Tensor
    """(N + 1,) position i sees seen[starts[i]] up to seen[starts[i + 1]]."""
    seen: Tensor


@functools.lru_cache(maxsize=16)
def _slots(pattern: str, grid: int, joined: int, room: int) -> _Slots:
    """joined: the text positions that lie in front of each lane of a `JoinedCache`, and room those behind; or 0, 0."""
    code = torch.arange(grid * grid)
    if joined and pattern == "full":
        own = joined + code
    elif joined and pattern == "axial_row":
        own = joined + code % grid
    elif joined and pattern == "axial_col":
        own = code % grid * (joined + room) + joined + code // grid
    else:
        own = code
    seen = [own[row.nonzero()[:, 0]] for row in allowed_codes(pattern, grid)]
    starts = torch.tensor([0] + [len(slots) for slots in seen]).cumsum(0)
    return _Slots(own.int(), starts.int(), torch.cat(seen).int())


def _image_keys(cache: LayerCache) -> Tuple[Tensor, Tensor, _Slots]:
    """Keys and values of codes (R, H, slots, K), and which slot is whose."""
    if not isinstance(cache, JoinedCache):
        keys, values = (tensor.flatten(2, 3) for tensor in (cache.image_key, cache.image_value))
        return keys, values, _slots(cache.pattern, cache.grid, 0, 0)
    if cache.pattern in ("full", "axial_row", "axial_col"):
        keys, values = (lanes.flatten(2, 3) for lanes in cache.lanes)
        return keys, values, _slots(cache.pattern, cache.grid, cache.text_len, cache.lanes.shape[4] - cache.text_len)
    return cache.codes[0], cache.codes[1], _slots(cache.pattern, cache.grid, 0, 0)


def _norm(module: Optional[nn.LayerNorm]) -> _Norm:
    return _Norm(None, None, 0.0) if module is None else _Norm(_at(module.weight), _at(module.bias), module.eps)


def _at(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


class RowStepper:
    """Feeds one code of each image at a time. Weights must not change while it lives; no gradient, no dropout."""

    copies = True
    """It makes a copy of all weights."""

    def __init__(self, model: DALLE, rows: int) -> None:
        config, self.model, self.rows, self.library = model.config, model, rows, _library()
        self._kept: List[Any] = []  # what a kernel is given the address of
        self._packed: Dict[nn.Module, Packed] = {}
        stable = config.stable  # then `DALLE.hidden` does more than a norm
        self._finish = model.hidden if stable else None
        angles = model.transformer.angles
        turned = [None, None] if angles is None else [angles[config.text_len :].cos(), angles[config.text_len :].sin()]
        positions = None if model.image_pos_emb is None else model.image_pos_emb.table().detach()
        tables = [tensor if tensor is None else self._keep(tensor) for tensor in (positions, *turned)]
        self._branches = [self._both(block) for block in model.transformer.layers]
        self._layers = (_Layer * config.depth)()
        self.struct = _Model(
            rows=rows,
            codes=config.num_image_tokens,
            dim=config.dim,
            heads=config.heads,
            width=config.dim_head,
            text_len=config.text_len,
            grid=config.grid,
            hidden=config.ff_mult * config.dim,
            activation=_ACTIVATIONS[config.activation],
            layers=config.depth,
            threads=_threads(sum(packed.bytes for packed in self._packed.values()) // config.depth),
            turned=0 if angles is None else angles.shape[1],
            table=_at(self._keep(model.image_emb.weight.detach())),
            positions=_at(tables[0]),
            cosines=_at(tables[1]),
            sines=_at(tables[2]),
            last=_norm(None if stable else model.norm),
            stack=ctypes.cast(self._layers, ctypes.POINTER(_Layer)),
        )
        room = self.library.room_of(ctypes.byref(self.struct))
        self.struct.scratch = _at(self._keep(torch.zeros(room)))
        self.logits = Packed(model.image_head)
        """Hidden states (R, D) -> logits of the codes (R, C)."""
        self._caches: Optional[Sequence[LayerCache]] = None

    def _keep(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor

    def _linear(self, module: Union[nn.Linear, Int8Linear], gated: bool = False) -> _Linear:
        if module not in self._packed:  # layers may share it
            self._packed[module] = Packed(module, gated)
        return self._packed[module].struct

    def _both(self, block: nn.Module) -> Tuple[_Branch, _Branch]:
        attention, feed_forward = block.attention.fn, block.feed_forward.fn
        return (
            self._branch(block.attention, self._linear(attention.qkv), self._linear(attention.out)),
            self._branch(
                block.feed_forward,
                self._linear(feed_forward.up, feed_forward.activation == "geglu"),
                self._linear(feed_forward.down),
            ),
        )

    def _branch(self, branch: Residual, first: _Linear, second: _Linear) -> _Branch:
        scale = None
        if branch.scale is not None:
            scale = self._keep(torch.zeros(second.panels * self.library.panel_width()))
            scale[: branch.scale.numel()] = branch.scale.detach().flatten()
        return _Branch(_norm(branch.norm), _norm(branch.norm_out), first, second, _at(scale), None)

    def _bind(self, caches: Sequence[LayerCache]) -> None:
        """Tell the kernel where these caches lie."""
        if caches[0].prompts * caches[0].images != self.rows:
            shape = (caches[0].prompts, caches[0].images, self.rows)
            raise ValueError("caches of {} x {} images, for {} rows".format(*shape))
        self.struct.images = caches[0].images
        for layer, cache, branches in zip(self._layers, caches, self._branches):
            keys, values, slots = _image_keys(cache)
            layer.attention, layer.feed_forward = branches
            layer.attention.history, layer.feed_forward.history = (_at(history) for history in cache.history)
            layer.text_key, layer.text_value = _at(cache.text_key), _at(cache.text_value)
            layer.image_key, layer.image_value, layer.lane = _at(keys), _at(values), keys.stride(1)
            layer.slots, layer.starts, layer.seen = (_at(table) for table in slots)
        self._caches = caches

    def __call__(self, codes: Tensor, position: int, caches: Sequence[LayerCache]) -> Tensor:
        """Feed the codes (R,) at an image position; return the hidden state after them (R, D)."""
        if caches is not self._caches:
            self._bind(caches)
        codes, out = codes.contiguous(), torch.empty(self.rows, self.struct.dim)
        if self.library.step(ctypes.byref(self.struct), pointer(codes), position, pointer(out)):
            raise IndexError("a code is not in the table of {}: {}".format(self.struct.codes, codes.tolist()))
        return out if self._finish is None else self._finish(out[:, None])[:, 0]


def suits(model: DALLE, rows: int) -> bool:
    """Whether a `RowStepper` can feed codes to this model, and it would be what PyTorch computes."""
    parameters = list(model.transformer.parameters()) + list(model.image_head.parameters())
    parameters += [model.norm.weight, model.norm.bias, model.image_emb.weight]
    like = model.image_emb.weight.detach()[:1, :1]
    if not natively(*parameters) or F.linear(like, like).dtype != torch.float32:  # under autocast it is another
        return False
    linears = [model.image_head]
    for block in model.transformer.layers:
        attention, feed_forward = block.attention.fn, block.feed_forward.fn
        linears += [attention.qkv, attention.out, feed_forward.up, feed_forward.down]
    if any(type(module) not in (nn.Linear, Int8Linear) or not module.weight.is_cpu for module in linears):
        return False
    return rows <= _MOST_ROWS and _library() is not None


def row_stepper(model: DALLE, rows: int) -> Optional[RowStepper]:
    """Return what feeds codes by kernels, or None where they do not suit."""
    return RowStepper(model, rows) if suits(model, rows) else None


def draw_rows(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: Optional[int], top_p: Optional[float]
) -> Optional[Tuple[Tensor, Tensor]]:
    """`models.sampling.draw` and the log-likelihoods (R,) of what it draws, or None where there are no kernels.

    Where the last of several equally likely tokens do not fit into top_p, those with the lowest numbers are kept.
    """
    if not natively(logits) or _library() is None:
        return None
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, count = logits.shape
    uniform, room = uniform.double().contiguous(), torch.empty(rows * -(-count // _LANES) * _LANES)
    tokens, scores = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    k, p = top_k or 0, 1.0 if top_p is None else top_p
    numbers = (pointer(logits), rows, logits.stride(0), count, pointer(uniform), temperature, k, p)
    _library().draw_rows(*numbers, pointer(tokens), pointer(scores), pointer(room), torch.get_num_threads())
    return tokens, scores
