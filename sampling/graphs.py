"""CUDA graphs: all that a token asks of a GPU is recorded once, and then launched as one graph.

    graphs = Graphs(model)
    sampled = sample_codes(model, text, seeds, options, graphs=graphs)    # records; later batches of this shape do not

A GPU runs an operation of a token in a few microseconds; Python needs longer to ask for it. A recording does not touch
the host: position, codes, random numbers, options and what is kept of a picture lie on the device, and each replay
moves the position on. Samples are those of `sample_codes` without graphs: the same numbers of the same seeds, through
the same functions.

Letters: B images, N image tokens.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any, Callable, Hashable, NamedTuple

import torch
from torch import Tensor

from models.dalle import DalleModel
from models.positions import Positions, device_position
from sampling.decoders import Copies, Decoder, computed_in
from sampling.loop import Canvas, Request, Sampled, read_request
from sampling.options import SamplingOptions

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Records what a function does on the device, and returns what does it again."""

#: Recordings of a token, each of which reads one part more of the codes: a token reads 5/8 of the room on average.
_PARTS = 4
#: Batches of other shapes whose recordings are kept beside the newest: the last batch of a prompt is often smaller.
_KEPT = 2


class CudaCapture:
    """Records into CUDA graphs that share their memory, which they may: nothing in it outlives a replay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None

    def __call__(self, function: Callable[[], None]) -> Replay:
        with torch.cuda.device(self.device):
            # Run once beforehand, on a stream of its own: libraries set themselves up, which cannot be recorded.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                function()
            self.pool = graph.pool()
        return graph.replay


class _Shape(NamedTuple):
    """What batches of the same recordings have in common."""

    prompts: int
    images: int
    """Of each prompt."""
    options: SamplingOptions


class Session:
    """Buffers, cache and recordings for batches of one shape."""

    def __init__(self, model: DalleModel, shape: _Shape, capture: Capture, copies: Copies) -> None:
        config, device = model.config, model.text_emb.weight.device
        prompts, images, options = shape
        branches, num_codes = 2 if options.guided else 1, config.image_seq_len
        self.canvas = Canvas(prompts * images, num_codes, options, device)
        self.position = device_position(device)
        parts = min(_PARTS, config.grid)
        self.reaches = [-(-num_codes * part // parts) for part in range(1, parts + 1)]
        self.decoder = Decoder(model, prompts * branches, images, copies)
        self.replays: dict[int, Replay] = {}
        with self.decoder, torch.autocast(device.type, enabled=False):
            for reach in self.reaches if num_codes > 1 else ():  # nothing follows a single code
                self.replays[reach] = capture(lambda reach=reach: self.advance(reach))  # type: ignore[misc]
                self.position.zero_()  # running it beforehand moved it on

    def choose(self, hidden: Tensor) -> None:
        """Sample the code at the position from what predicts it, (R, D)."""
        at = Positions.of(self.position, self.canvas.codes.shape[1])
        self.canvas.choose(self.decoder.logits(hidden), at)

    def advance(self, reach: int) -> None:
        """Feed the code at the position, which must lie below `reach`; go on to the next position and sample it.

        Only codes before `reach` are read by dense layers: a recording for each part of the codes.
        """
        at = Positions.of(self.position, reach)
        hidden = self.decoder.feed(self.canvas.rows(at), at)[:, 0]
        self.position.add_(1)
        self.choose(hidden)

    def _begin(self, request: Request) -> int:
        """Read the prompts and the codes that are given first, and sample the first other: returns its position."""
        self.decoder.cache.clear()
        self.canvas.begin(request)
        prefix, num_codes = request.prefix, len(request.kept)
        self.position.fill_(min(prefix, num_codes - 1))
        with self.decoder, torch.autocast(self.position.device.type, enabled=False):  # casts were done once
            hidden = read_request(self.decoder, self.canvas, request)
            if prefix < num_codes:
                self.choose(hidden)
        return prefix

    def run(self, request: Request) -> Sampled:
        """Sample all codes of a batch. The host runs ahead of the device, but for `on_token` by two rows at most."""
        num_codes, grid = len(request.kept), self.decoder.model.config.grid
        first = self._begin(request)
        pace = _Pace(self.position.device, request.on_token)
        if first < num_codes:
            pace.count(1)
        for begin in range(first, num_codes - 1, grid):
            end = min(begin + grid, num_codes - 1)
            for position in range(begin, end):
                self.replays[next(reach for reach in self.reaches if position < reach)]()
            pace.count(end - begin)
        pace.finish()
        return Sampled(*(tensor.clone() for tensor in self.canvas.result()))


class _Pace:
    """Tells `on_token` about codes when they are there, and keeps the host from running further ahead than that."""

    def __init__(self, device: torch.device, on_token: Callable[[], None] | None) -> None:
        self.device, self.on_token = device, on_token
        self.waiting: list[tuple[Any, int]] = []

    def count(self, codes: int) -> None:
        """So many codes more were asked for. Waits for those before: the device always has a row to work on."""
        if self.on_token is None:
            return
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        if event is not None:
            event.record(torch.cuda.current_stream(self.device))
        self.waiting.append((event, codes))
        if len(self.waiting) > 1:
            self._tell()

    def _tell(self) -> None:
        event, codes = self.waiting.pop(0)
        if event is not None:
            event.synchronize()
        for _ in range(codes):
            self.on_token()  # type: ignore[misc]

    def finish(self) -> None:
        """Wait for all that is left."""
        while self.waiting:
            self._tell()


class Graphs:
    """Recordings of a model's steps, made when a batch of their shape comes, for the newest shapes.

    capture: how to record; None: CUDA graphs on a CUDA device, and nothing anywhere else. What cannot be recorded is
    sampled without, which the log says once.
    """

    def __init__(self, model: DalleModel, capture: Capture | None = None) -> None:
        self.model, self.capture = model, capture
        self.sessions: OrderedDict[_Shape, Session] = OrderedDict()
        self.copies = Copies()
        self.state: Hashable = None
        self.failed = False

    def sample(self, request: Request) -> Sampled | None:
        """Sample a batch; None when that needs to go without recordings. Raises OutOfMemoryError."""
        device = self.model.text_emb.weight.device
        if self.failed or (self.capture is None and device.type != "cuda"):
            self.clear()  # of a model that was moved away
            return None
        state = (device, computed_in(self.model), _weights(self.model))
        if state != self.state:  # trained on, moved or converted: recordings hold on to what was there
            self.clear()
            self.state = state
        shape = _Shape(len(request.uniform) // request.images, request.images, request.options)
        try:
            return self._sample(request, shape)
        except torch.cuda.OutOfMemoryError:
            others = set(self.sessions) - {shape}
            self.clear()
            if not others:
                raise
        return self._sample(request, shape)  # without the others; not in the handler, which keeps memory alive

    def _sample(self, request: Request, shape: _Shape) -> Sampled | None:
        if shape not in self.sessions:
            while len(self.sessions) >= _KEPT:
                self.sessions.popitem(last=False)
            capture = self.capture or CudaCapture(self.model.text_emb.weight.device)
            try:
                self.sessions[shape] = Session(self.model, shape, capture, self.copies)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.clear()
                self.failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("steps cannot be recorded, sampling goes on without CUDA graphs: %s", reason)
                return None
        self.sessions.move_to_end(shape)
        return self.sessions[shape].run(request)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files get no recordings: those belong to this model's memory."""
        return dict(self.__dict__, sessions=OrderedDict(), state=None, copies=Copies())

    def clear(self) -> None:
        """Forget all recordings, and free their memory."""
        self.sessions.clear()
        self.copies = Copies()


def _weights(model: DalleModel) -> Hashable:
    """What tells the weights from others: where they lie, and how often they were written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
