"""One thread computes for all requests: their images take turns in the slots of `sampling.continuous`.

    scheduler = Scheduler(loaded, slots=32)
    job = Job(ids, options, seed=1, count=2, deliver=print)     # calls deliver(event) from the thread
    scheduler.add(job)                                          # raises Busy or Stopping
    scheduler.cancel(job)                                       # nobody waits for it any more
    scheduler.stop(seconds)

Requests take turns, an image each, so that a large one does not keep small ones waiting.
"""
from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Protocol, Sequence, Union

from torch import Tensor

from dalle.generation import text_of
from dalle.loading import Loaded
from dalle.pictures import to_pil
from dalle.reranking import ClipRanker, ranked
from sampling import SamplingOptions, decode, decode_partial, image_seed
from sampling.continuous import Continuous, Image
from utils.errors import UserError
from utils.memory import keep_freed_memory
from utils.threads import share_cores

logger = logging.getLogger(__name__)


class Busy(Exception):
    """Too many images wait."""

    def __init__(self, waiting: int, seconds: int) -> None:
        """seconds: until the queue is expected to be shorter."""
        super().__init__(f"{waiting} images are waiting already")
        self.seconds = seconds


class Stopping(Exception):
    """The server is being stopped."""


class Partial(NamedTuple):
    """An image of which some codes are there."""

    number: int
    """Of the image in its request."""
    stage: int
    """Number of the partial picture."""
    pixels: Tensor
    """(4, S, S) uint8, see `decode_partial`."""
    progress: float
    """Share of the codes that are there."""


class Candidate(NamedTuple):
    """An image of a request, on the CPU."""

    number: int
    """Among the images of the request."""
    seed: int
    log_likelihood: float
    pixels: Tensor
    """(3, S, S) uint8"""


class Done(NamedTuple):
    """An image that is complete."""

    picture: Candidate
    clip_score: float | None


class Failed(NamedTuple):
    """A request that came to nothing."""

    error: Exception


class Ended(NamedTuple):
    """A request all of whose images were delivered."""

    given: int
    """Codes of each image that were kept."""
    sampled: int
    """Codes that were sampled, of all images."""


Event = Union[Partial, Done, Failed, Ended]


class Watcher(Protocol):
    """What takes note of passes and images."""

    def passed(self, images: int) -> None: ...

    def completed(self) -> None: ...

    def ended(self, images: int) -> None: ...


@dataclass(eq=False)
class Job:
    """A request while it waits and runs."""

    ids: Sequence[int]
    """Token ids of the prompt, at most T."""
    options: SamplingOptions
    seed: int
    count: int
    """Images to sample."""
    deliver: Callable[[Event], None]
    """Takes events, in the scheduler's thread."""
    prompt: str = ""
    """For CLIP."""
    keep: int = 0
    """The best so many are delivered, at the end and the best first; 0: all, each when it is complete."""
    clip: bool = False
    """Whether CLIP decides which are the best, instead of the likelihood."""
    first: int = 0
    """Number of the first image."""
    partials: int = 0
    """Partial pictures of each image."""
    given: Callable[[], Tensor] | None = None
    """Computes the codes (N,) to keep, -1 where the model samples."""
    deadline: float = float("inf")
    """When it is given up, by time.monotonic()."""
    started: int = 0
    """Images that have or had slots."""
    over: Exception | None = None
    """Why it is to be ended."""
    kept: Tensor | None = None
    done: list[Candidate] = field(default_factory=list)
    delivered: int = 0

    @property
    def waiting(self) -> int:
        """Images that have had no slot."""
        return 0 if self.over else self.count - self.started

    @property
    def num_given(self) -> int:
        """Codes of each image that are kept."""
        return 0 if self.kept is None else int((self.kept >= 0).sum())


class _Cancelled(Exception):
    """Nobody waits for it any more."""


@dataclass
class _Slot:
    """An image that is being sampled."""

    job: Job
    number: int
    """In its request."""
    seed: int
    marks: list[int]
    """Positions from which on a partial picture is due."""
    told: int = 0


class Scheduler:
    """The thread, and what waits for it."""

    def __init__(
        self,
        loaded: Loaded,
        slots: int = 32,
        parallel: str = "auto",
        max_queue: int = 256,
        ranker: ClipRanker | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        keep_freed_memory()
        share_cores()
        self.loaded, self.ranker, self.max_queue, self.watcher = loaded, ranker, max_queue, watcher
        self._make = lambda: Continuous(loaded.dalle, slots, parallel)
        self.images = self._make()
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()  # those with images that have had no slot
        self._jobs: set[Job] = set()  # all that are not over
        self._slots: dict[int, _Slot] = {}
        self._seconds_of_image, self._since = 0.1, time.monotonic()  # of the whole machine, lately
        self._stopping, self._closed = False, False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)
        self._thread.start()

    # ---- from other threads

    @property
    def waiting(self) -> int:
        """Images that wait for a slot."""
        with self._lock:
            return sum(job.waiting for job in self._waiting)

    @property
    def running(self) -> int:
        """Images that have one."""
        return len(self._slots)

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._stopping

    def add(self, job: Job) -> None:
        """Let a job wait for its turn. Raises Busy, Stopping, or UserError for guidance where there is one slot."""
        if job.options.guided and self.images.slots < 2:
            raise UserError("cond_scale must be 1: this server has one slot, and an image with guidance takes two")
        with self._lock:
            if self._stopping:
                raise Stopping
            waiting = sum(other.waiting for other in self._waiting)
            if waiting >= self.max_queue:
                raise Busy(waiting, max(1, round(waiting * self._seconds_of_image)))
            self._jobs.add(job)
            self._waiting.append(job)
            self._lock.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job that nobody waits for any more, if it is not over."""
        with self._lock:
            job.over = job.over or _Cancelled()
            self._lock.notify_all()

    def refuse(self) -> None:
        """Take no new jobs."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()

    def stop(self, seconds: float = 0.0) -> bool:
        """Take no new jobs, give the others so much time, and end the thread. Returns whether all were completed."""
        self.refuse()
        with self._lock:
            completed = self._lock.wait_for(lambda: not self._jobs, seconds)
            for job in self._jobs:
                job.over = job.over or Stopping()
            self._closed = True
            self._lock.notify_all()
        self._thread.join(60)
        return completed

    # ---- the thread

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._jobs or self._closed):
                    self._lock.wait()
                    self._since = time.monotonic()
                if self._closed and not self._jobs:
                    return
            try:
                self._turn()
            except Exception as error:  # a bug, or memory: no request may bring the server down
                logger.exception("a pass failed; its requests are ended")
                self._recover(error)

    def _turn(self) -> None:
        """End what is over, let images join, and make one pass."""
        self._end_jobs()
        self._fill()
        complete = self.images.advance()
        if self.watcher is not None and self._slots:
            self.watcher.passed(len(self._slots))
        for number, slot in list(self._slots.items()):
            try:
                if number in complete:
                    self._complete(number, slot)
                elif slot.marks:
                    self._show(number, slot)
            except Exception as error:  # this request's own
                logger.exception("a request failed")
                slot.job.over = error

    def _end_jobs(self) -> None:
        """Free what belongs to jobs that are over."""
        now = time.monotonic()
        with self._lock:
            for job in self._jobs:
                if now > job.deadline and job.over is None:
                    job.over = TimeoutError()
            over = [job for job in self._jobs if job.over is not None]
        for job in over:
            self._end(job)

    def _end(self, job: Job) -> None:
        """Free the slots of a job that came to nothing, and say so."""
        for number in [number for number, slot in self._slots.items() if slot.job is job]:
            del self._slots[number]
            self.images.finish(number)
        if self.watcher is not None:
            self.watcher.ended(job.count - len(job.done))
        self._over(job, Failed(job.over or _Cancelled()))

    def _over(self, job: Job, event: Event) -> None:
        job.deliver(event)
        with self._lock:
            self._jobs.discard(job)
            if job in self._waiting:
                self._waiting.remove(job)
            self._lock.notify_all()

    def _recover(self, error: Exception) -> None:
        """Begin anew after an error that may have left anything behind."""
        for job in {slot.job for slot in self._slots.values()}:
            job.over = error
        numbers, self._slots = list(self._slots), {}
        try:
            for number in numbers:
                self.images.finish(number)
        except Exception:  # the slots themselves are broken
            self.images = self._make()

    def _fill(self) -> None:
        """Give slots to images that wait, an image of each request in turn."""
        while True:
            with self._lock:
                job = self._waiting[0] if self._waiting else None
                if job is None or job.over is not None:
                    return  # over since `_end_jobs`: the next turn ends it
            try:
                if not self._start(job):
                    return
            except Exception as error:  # this request's own
                if not isinstance(error, UserError):
                    logger.exception("a request failed")
                job.over = error
                self._end(job)
                continue
            with self._lock:
                self._waiting.popleft()
                if job.waiting:
                    self._waiting.append(job)

    def _start(self, job: Job) -> bool:
        """Start the next image of a job, if there is room."""
        if job.given is not None and job.kept is None:
            job.kept = job.given()
        number = job.first + job.started
        text = text_of([job.ids], self.loaded)[0]
        image = Image(text, image_seed(job.seed, number), job.options, job.kept)
        if not self.images.fits(image):
            return False
        total = self.loaded.config.image_seq_len
        sampled = [place for place in range(total) if job.kept is None or job.kept[place] < 0]
        parts = range(1, job.partials + 1)
        marks = [sampled[len(sampled) * part // (job.partials + 1)] for part in parts if len(sampled) > job.partials]
        self._slots[self.images.start(image)] = _Slot(job, number, image.seed, marks)
        job.started += 1
        return True

    def _show(self, number: int, slot: _Slot) -> None:
        """Deliver a partial picture, if one is due."""
        due = [mark for mark in slot.marks if mark <= self.images.fronts[number]]
        if not due:
            return
        slot.marks = slot.marks[len(due) :]
        codes = self.images.codes(number)
        pixels = decode_partial(self.loaded, codes[None])[0]
        slot.job.deliver(Partial(slot.number, slot.told, pixels, float((codes >= 0).float().mean())))
        slot.told += 1

    def _complete(self, number: int, slot: _Slot) -> None:
        """Decode an image and deliver it, or let it wait for its rivals."""
        job = slot.job
        codes, log_likelihood = self.images.finish(number)
        del self._slots[number]
        pixels = decode(self.loaded, codes[None])[0]  # by itself: the batch must not matter
        picture = Candidate(slot.number, slot.seed, float(log_likelihood), pixels)
        job.done.append(picture)
        now = time.monotonic()
        self._seconds_of_image += 0.1 * (now - self._since - self._seconds_of_image)
        self._since = now
        if self.watcher is not None:
            self.watcher.completed()
        if not job.keep:
            job.deliver(Done(picture, None))
        if len(job.done) == job.count:
            self._finish(job)

    def _finish(self, job: Job) -> None:
        """Deliver what waited for the last image."""
        if job.keep:
            scores = [picture.log_likelihood for picture in job.done]
            if job.clip and self.ranker is not None:
                pictures = [to_pil(picture.pixels) for picture in job.done]
                scores = self.ranker.similarity(job.prompt, pictures).tolist()
            rivals = sorted(zip(scores, job.done), key=lambda rival: ranked(rival[0], rival[1].number))
            for score, picture in rivals[: job.keep]:
                job.deliver(Done(picture, score if job.clip else None))
        self._over(job, Ended(job.num_given, (self.loaded.config.image_seq_len - job.num_given) * job.count))
