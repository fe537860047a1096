"""CUDA graphs: all that a pass asks of a GPU is recorded once, and then launched as one graph.

    graphs = Graphs(model)
    sampled = sample_codes(model, text, seeds, options, graphs=graphs)    # records; later batches of this shape do not

A GPU runs an operation of a pass in a few microseconds; Python needs longer to ask for it. A recording does not touch
the host: positions, codes, guesses, options and what is kept of an image lie on the device, and each replay moves the
positions on. The host learns later how far they are; replays behind the end change nothing. Samples are those of
`sample_codes` without graphs: the same noise of the same seeds, through the same functions.

Letters: B images, n codes of a window.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any, Callable, Hashable, NamedTuple

import torch
from torch import Tensor

from models.dalle import DalleModel
from sampling.canvas import Canvas, Request, Sampled
from sampling.decoders import Copies, Decoder, computed_in
from sampling.loop import Progress, read_request
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
    width: int
    """Of the window: codes of an image that a pass feeds."""


class Session:
    """Buffers, cache and recordings for batches of one shape."""

    def __init__(self, model: DalleModel, shape: _Shape, capture: Capture, copies: Copies) -> None:
        config, device = model.config, model.text_emb.weight.device
        prompts, images, options, self.width = shape
        branches, self.num_codes = 2 if options.guided else 1, config.image_seq_len
        self.canvas = Canvas(prompts * images, self.num_codes, options, device)
        self.passes = torch.zeros_like(self.canvas.fronts)
        """That each image took."""
        parts = min(_PARTS, config.grid)
        self.reaches = [-(-self.num_codes * part // parts) for part in range(1, parts + 1)]
        self.decoder = Decoder(model, prompts * branches, images, copies)
        self.replays: dict[int, Replay] = {}
        with self.decoder, torch.autocast(device.type, enabled=False):
            for reach in self.reaches if self.num_codes > 1 else ():  # nothing follows a single code
                self.replays[reach] = capture(lambda reach=reach: self.advance(reach))  # type: ignore[misc]
                self.canvas.fronts.zero_()  # running it beforehand moved them on

    def advance(self, reach: int) -> None:
        """Feed a window of each image, all before `reach` or behind the last code, and accept what it gives.

        Only codes before `reach` are read by dense layers: a recording for each part of the codes. Images that are
        complete stay as they are. Without windows all images are at the same position.
        """
        self.passes.add_(self.canvas.fronts < self.num_codes - 1)
        self.decoder.advance(self.canvas, self.width, reach=reach, together=self.width == 1)

    def _begin(self, request: Request) -> int:
        """Read the prompts and the codes that are given first, and sample the first other: returns its position."""
        self.decoder.cache.clear()
        self.canvas.begin(request)
        prefix = request.prefix
        self.passes.zero_()
        with self.decoder, torch.autocast(self.passes.device.type, enabled=False):  # casts were done once
            hidden = read_request(self.decoder, self.canvas, request)
            if prefix < self.num_codes:
                self.canvas.choose_first(self.decoder.logits(hidden), prefix)
        return prefix

    def run(self, request: Request) -> Sampled:
        """Sample all codes of a batch. The host runs ahead of the device, but by two rows of codes at most."""
        first, last, stride = self._begin(request), self.num_codes - 1, self.decoder.model.config.grid
        if first > last:  # all codes were given
            return self.canvas.result()
        progress = Progress(self.canvas, first, request.on_token)
        low = high = first  # the device is between these
        seen: list[tuple[Tensor, Any, int]] = []
        replays = 0
        while low < last:
            for _ in range(min(max(1, stride // self.width), last - low)):
                end = min(high + self.width, self.num_codes)
                self.replays[next(reach for reach in self.reaches if end <= reach)]()
                low, high, replays = low + 1, min(high + self.width, last), replays + 1
            seen.append((*_to_host(self.canvas.fronts), replays))
            if len(seen) > 1:  # the device always has something to work on
                fronts, then = _wait(*seen.pop(0))
                low = max(low, min(fronts) + replays - then)
                high = min(high, max(fronts) + (replays - then) * self.width)
                progress.tell(fronts)
        progress.tell([last])
        images = len(request.keys)
        request.windows.codes += (last - first) * images
        request.windows.passes += int(self.passes.sum())
        return self.canvas.result()


def _to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """Copy to the host without waiting: (copy, event after which it is there)."""
    if tensor.device.type != "cuda":
        return tensor.clone(), None
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return copied, event


def _wait(copied: Tensor, event: Any, replays: int) -> tuple[list[int], int]:
    if event is not None:
        event.synchronize()
    return copied.flatten().tolist(), replays


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
        prompts = len(request.keys) // request.images
        width = request.windows.fixed(len(request.keys) * (2 if request.options.guided else 1), on_gpu=True)
        shape = _Shape(prompts, request.images, request.options, width)
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
