"""Drawing with recorded steps: all that a token asks of a GPU is recorded once, in CUDA graphs, and then replayed.

    graphs = Graphs(model)
    drawn = draw_codes(model, text, seeds, options, graphs=graphs)    # records; later batches of this shape do not

A recording does not touch the host: position, codes, random numbers and what is kept of a picture lie on the device,
and each replay moves the position on. Draws are those of `draw_codes` without graphs: the same numbers of the same
seeds, through the same functions.

Letters: B images, N image tokens, T text tokens, P positions of the text part.
"""

import logging
from collections import OrderedDict
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from models.dalle import DALLE
from models.sampling import Drawn, Request, SamplingOptions, draw, first_codes, guided, prefill
from models.static import StaticStepper, computed_in

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
    """Buffers, caches and recordings for batches of one shape."""

    def __init__(self, model: DALLE, shape: _Shape, capture: Capture) -> None:
        config, device = model.config, model.text_emb.weight.device
        prompts, images, options = shape
        self.model, self.options = model, options
        self.branches = 2 if options.cond_scale != 1 else 1
        batch, num_codes = prompts * images, config.image_seq_len
        self.codes = torch.zeros(batch, num_codes, dtype=torch.long, device=device)
        self.log_likelihood = torch.zeros(batch, device=device)
        self.noise = torch.zeros(batch, num_codes, dtype=torch.float64, device=device)
        self.kept = torch.full((num_codes,), -1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.images = images
        parts = min(_PARTS, config.grid)
        self.reaches = [-(-num_codes * part // parts) for part in range(1, parts + 1)]
        self.step = StaticStepper(model, batch * self.branches, self.reaches)
        self.caches = self.step.make_caches(prompts * self.branches, images)
        self.replays: Dict[int, Replay] = {}
        with torch.autocast(device.type, enabled=False):
            for reach in self.reaches if num_codes > 1 else ():  # nothing follows a single code
                self.replays[reach] = capture(lambda reach=reach: self.advance(reach))  # type: ignore[misc]
                self.position.zero_()  # running it beforehand moved it on

    def choose(self, logits: Tensor) -> None:
        """Draw the code at the position, or take the one that is kept there. Logits of all rows, (B or 2B, C)."""
        logits = guided(logits, self.options.cond_scale).float()
        noise = self.noise.index_select(1, self.position)[:, 0]
        token = draw(logits, noise, self.options)
        score = torch.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
        kept = self.kept.index_select(0, self.position)
        self.codes.index_copy_(1, self.position, torch.where(kept < 0, token, kept)[:, None])
        self.log_likelihood.add_(score.masked_fill(kept >= 0, 0.0))

    def advance(self, reach: int) -> None:
        """Feed the code at the position, which must lie below `reach`; go on to the next position and draw it."""
        token = self.codes.index_select(1, self.position)[:, 0].repeat(self.branches)
        hidden = self.step(token, self.position, self.caches, reach)
        self.position.add_(1)
        self.choose(self.step.logits(hidden))

    def _begin(self, request: Request) -> int:
        """Read the prompts and the codes that are given first, and draw the first other code: returns its position."""
        for cache in self.caches:
            cache.clear()
        self.noise.copy_(request.noise)
        self.kept.copy_(torch.tensor(request.kept))
        self.codes.zero_()
        self.log_likelihood.zero_()
        prefix = request.prefix
        self.position.fill_(min(prefix, len(request.kept) - 1))
        hidden, _ = prefill(self.model, request.prompts, self.images, self.caches)
        hidden = hidden.repeat_interleave(self.images, dim=0)
        if prefix:
            self.codes[:, :prefix] = self.kept[:prefix]
            if prefix < len(request.kept):
                hidden = first_codes(self.model, self.codes[:, :prefix].repeat(self.branches, 1), self.caches)
        with torch.autocast(self.codes.device.type, enabled=False):
            if prefix < len(request.kept):
                self.choose(self.step.logits(hidden))
        return prefix

    def run(self, request: Request) -> Drawn:
        """Draw all codes of a batch. The host runs ahead of the device, but for `on_token` by two rows at most."""
        num_codes, grid = len(request.kept), self.model.config.grid
        first = self._begin(request)
        pace = _Pace(self.codes.device, request.on_token)
        if first < num_codes:
            pace.count(1)
        for begin in range(first, num_codes - 1, grid):
            end = min(begin + grid, num_codes - 1)
            for position in range(begin, end):
                self.replays[next(reach for reach in self.reaches if position < reach)]()
            pace.count(end - begin)
        pace.finish()
        return Drawn(self.codes.clone(), self.log_likelihood.clone())


class _Pace:
    """Tells `on_token` about codes when they are there, and keeps the host from running further ahead than that."""

    def __init__(self, device: torch.device, on_token: Optional[Callable[[], None]]) -> None:
        self.device, self.on_token = device, on_token
        self.waiting: List[Tuple[Any, int]] = []

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
    drawn without, which the log says once.
    """

    def __init__(self, model: DALLE, capture: Optional[Capture] = None) -> None:
        self.model, self.capture = model, capture
        self.sessions: "OrderedDict[_Shape, Session]" = OrderedDict()
        self.state: Hashable = None
        self.failed = False

    def draw(self, request: Request) -> Optional[Drawn]:
        """Draw a batch; None when it has to be drawn without recordings. Raises OutOfMemoryError as drawing does."""
        device = self.model.text_emb.weight.device
        if self.failed or (self.capture is None and device.type != "cuda"):
            return None
        state = (device, computed_in(self.model), _weights(self.model))
        if state != self.state:  # trained on, moved or converted: recordings hold on to what was there
            self.clear()
            self.state = state
        prompts = len(request.prompts) // (2 if request.options.cond_scale != 1 else 1)
        shape = _Shape(prompts, len(request.noise) // prompts, request.options)
        try:
            return self._draw(request, shape)
        except torch.cuda.OutOfMemoryError:
            others = set(self.sessions) - {shape}
            self.clear()
            if not others:
                raise
        return self._draw(request, shape)  # without the others; not in the handler, which keeps memory alive

    def _draw(self, request: Request, shape: "_Shape") -> Optional[Drawn]:
        if shape not in self.sessions:
            while len(self.sessions) >= _KEPT:
                self.sessions.popitem(last=False)
            capture = self.capture or CudaCapture(self.model.text_emb.weight.device)
            try:
                self.sessions[shape] = Session(self.model, shape, capture)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.clear()
                self.failed = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("steps cannot be recorded, drawing goes on without CUDA graphs: %s", reason)
                return None
        self.sessions.move_to_end(shape)
        return self.sessions[shape].run(request)

    def __getstate__(self) -> Dict[str, Any]:
        """Copies and files get no recordings: those belong to this model's memory."""
        return dict(self.__dict__, sessions=OrderedDict(), state=None)

    def clear(self) -> None:
        """Forget all recordings, and free their memory."""
        self.sessions.clear()


def _weights(model: DALLE) -> Hashable:
    """What tells the weights from others: where they lie, and how often they were written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
