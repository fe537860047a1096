"""The HTTP interface: routes of the OpenAI images API, pictures by URL, health, metrics, and the page.

    app = make_app(loaded, options)        # an ASGI application; app.state.scheduler computes
"""
from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import time
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from dalle.generation import token_ids
from dalle.loading import Loaded, knows_guidance
from dalle.reranking import ClipRanker
from sampling import SamplingOptions, encode, top_k_count
from server import results, schemas
from server.guard import Guard, answer
from server.metrics import CONTENT_TYPE, Metrics
from server.options import ServeOptions
from server.scheduler import Busy, Done, Ended, Event, Failed, Job, Partial, Scheduler, Stopping
from server.schemas import ApiError, ImageRequest, read_request
from server.store import Store
from server.uploads import read_edit
from utils.errors import UserError

logger = logging.getLogger(__name__)

STUDIO = Path(__file__).resolve().parent / "studio"
"""Static files of the page."""

_UPLOADS_AT_ONCE = 2
_MAX_FIELDS = 64
_MAX_JSON = 2**20
"""Bytes: twice those of the longest prompt, as parsing may take 20 times as much memory."""


def model_name(options: ServeOptions) -> str:
    """The model's id."""
    path = options.dalle_path
    return options.model_name or (path if not Path(path).exists() else Path(path).stem)


class Api:
    """What the routes share."""

    def __init__(self, loaded: Loaded, options: ServeOptions, ranker: ClipRanker | None) -> None:
        self.loaded, self.options, self.ranker = loaded, options, ranker
        self.name, self.created, self.examples = model_name(options), int(time.time()), options.prompts()
        self.size = f"{loaded.image_size}x{loaded.image_size}"
        self.defaults = {name: getattr(options, name) for name in schemas.SAMPLING}
        self.scheduler = Scheduler(loaded, options.slots, options.parallel, options.max_queue, ranker, self)
        self.metrics = Metrics(lambda: self.scheduler.waiting, lambda: self.scheduler.running)
        self.store = Store(options.url_ttl, options.url_megabytes * 2**20)
        self.uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)

    # ---- what the scheduler tells

    def passed(self, images: int) -> None:
        """Count a pass of so many images."""
        self.metrics.batch.observe(images)

    def completed(self) -> None:
        """Count an image."""
        self.metrics.images.inc()

    def ended(self, images: int) -> None:
        """Count images that were not completed."""
        self.metrics.ended.inc(images)

    def told(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)

    # ---- what it serves

    def model(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        config, options = self.loaded.config, self.options
        capabilities = {
            "image_size": self.loaded.image_size, "grid": config.grid, "max_n": options.max_images,
            "clip": self.ranker is not None, "guidance": knows_guidance(self.loaded) and options.slots > 1,
            "max_prompt_tokens": config.text_seq_len, "num_codes": config.num_image_tokens,
            "output_formats": list(schemas.FORMATS), "defaults": self.defaults,
            "examples": self.examples,
        }  # fmt: skip
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "mini-dalle"}
        return dict(about, capabilities=capabilities)

    def check(self, request: ImageRequest) -> None:
        """Raise ApiError for what this model or this server cannot do."""
        if request.model not in (None, self.name):
            message = f"The model '{request.model[:80]}' does not exist: this server has '{self.name}'"  # type: ignore[index]
            raise ApiError(message, "model", "model_not_found", 404)
        if request.size not in ("auto", self.size):
            message = f"size must be one of 'auto', '{self.size}', got {request.size[:80]!r}"
            raise ApiError(message, "size", "invalid_value")
        if request.sampled > self.options.max_images:
            name = "n" if request.num_candidates is None else "num_candidates"
            message = f"{name} must be at most {self.options.max_images}, got {request.sampled}"
            raise ApiError(message, name, "invalid_value")
        if request.rank == "clip" and self.ranker is None:
            raise ApiError("rank 'clip': this server has no CLIP model (--clip-path)", "rank", "invalid_value")

    def job(self, request: ImageRequest, given: Any, deliver: Callable[[Event], None]) -> Job:
        """What the scheduler is asked for."""
        config = self.loaded.config
        top_p = request.top_p if request.top_p < 1 else None
        top_k = top_k_count(request.top_k, config.num_image_tokens)
        rank = request.rank
        if rank is None and request.sampled > request.n:
            rank = "likelihood" if self.ranker is None else "clip"
        return Job(
            token_ids(request.prompt, self.loaded)[: config.text_seq_len],
            SamplingOptions(top_k, top_p, request.temperature, request.cond_scale),
            secrets.randbelow(2**31) if request.seed is None else request.seed,
            request.sampled,
            deliver,
            request.prompt,
            keep=request.n if rank in ("likelihood", "clip") else 0,
            clip=rank == "clip",
            first=request.first_image,
            partials=request.partial_images,
            given=given,
            deadline=time.monotonic() + self.options.request_timeout,
        )

    def start(self, request: ImageRequest, given: Any = None) -> tuple[Job, asyncio.Queue[Event]]:
        """Let a request wait for its turn; its events come through the queue. Raises ApiError."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()  # type: ignore[var-annotated]

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.job(request, given, deliver)
        try:
            self.scheduler.add(job)
        except Exception as error:
            raise self.error(error) from error
        return job, events

    def error(self, error: Exception) -> ApiError:
        """What a client is told of a job that came to nothing."""
        if isinstance(error, Busy):
            return ApiError(f"The server is busy: {error}", None, "queue_full", 429, retry=error.seconds)
        if isinstance(error, Stopping):
            return ApiError("The server is being stopped", None, "stopping", 503, retry=10)
        if isinstance(error, TimeoutError):
            seconds = f"{self.options.request_timeout:g} s"
            return ApiError(f"The request was not complete after {seconds} and was given up", None, "timeout", 503)
        if isinstance(error, UserError):
            return ApiError(str(error), str(error).split()[0], "invalid_value")
        return ApiError("The server failed at this request; its log says why", None, "internal_error", 500)


class Events(StreamingResponse):
    """An answer of events, whose request ends with it, even if it was not begun."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


async def generate(api: Api, request: ImageRequest, kind: str, client: Request, given: Any = None) -> Response:
    """Answer a request for images. kind: of its events."""
    api.check(request)
    job, events = api.start(request, given)
    if request.stream:
        return Events(stream(api, request, kind, job, events), lambda: api.scheduler.cancel(job))
    try:
        return JSONResponse(await complete(api, request, job, events, client))
    finally:
        api.scheduler.cancel(job)


async def complete(
    api: Api, request: ImageRequest, job: Job, events: asyncio.Queue[Event], client: Request
) -> dict[str, Any]:
    """Wait for all images; raises ApiError, and CancelledError when the client has left."""
    data: list[tuple[int, dict[str, Any]]] = []
    gone = asyncio.ensure_future(client.receive())
    try:
        while True:
            waiting = asyncio.ensure_future(events.get())
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                waiting.cancel()
                raise ApiError("The client has left", status=499)
            event = waiting.result()
            if isinstance(event, Failed):
                raise api.error(event.error)
            if isinstance(event, Done):
                content, about = await picture_of(api, request, job, event)
                if request.response_format == "url":
                    name = api.store.put(content, request.output_format)
                    data.append((event.picture.number, {"url": f"{client.base_url}images/{name}", **about}))
                else:
                    data.append((event.picture.number, {"b64_json": results.base64_of(content), **about}))
            elif isinstance(event, Ended):
                ordered = data if job.keep else sorted(data, key=lambda entry: entry[0])
                used = schemas.usage(len(job.ids), event.given, event.sampled)
                common = schemas.about_format(request, api.size)
                return {"created": int(time.time()), "data": [found for _, found in ordered], "usage": used, **common}
    finally:
        gone.cancel()


async def picture_of(api: Api, request: ImageRequest, job: Job, event: Done) -> tuple[bytes, dict[str, Any]]:
    """An image's file, and what an answer says of it."""
    picture = event.picture
    about = results.settings(request, api.name, job.seed, picture.number)
    content = await run_in_threadpool(results.complete_file, picture, request, about)
    return content, results.item(picture, job.seed, event.clip_score)


async def stream(
    api: Api, request: ImageRequest, kind: str, job: Job, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """Server-sent events of a request."""
    codes = api.loaded.config.image_seq_len
    while True:
        event = await events.get()
        if isinstance(event, Partial):
            content = await run_in_threadpool(results.partial_file, event, request)
            fields = {"partial_image_index": event.stage, "image_index": event.number, "seed": job.seed,
                      "progress": event.progress}  # fmt: skip
            told = schemas.event(f"{kind}.partial_image", request, api.size, **fields)
        elif isinstance(event, Done):
            content, about = await picture_of(api, request, job, event)
            used = schemas.usage(len(job.ids), job.num_given, codes - job.num_given)
            told = schemas.event(f"{kind}.completed", request, api.size, usage=used, **about)
        elif isinstance(event, Failed):
            yield sse("error", api.error(event.error).body())
            return
        else:
            return
        yield sse(told["type"], dict(told, b64_json=results.base64_of(content)))


def sse(name: str, body: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object that a request brings. Raises ApiError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("The content type must be application/json", status=415)
    content = await request.body()
    if len(content) > _MAX_JSON:
        raise ApiError("The JSON of the request is too large: 1 MB at most is accepted", status=413)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise ApiError("The body of the request is not valid JSON") from None
    if not isinstance(body, dict):
        raise ApiError("The body of the request must be a JSON object")
    return body


async def read_form(request: Request, max_bytes: int) -> tuple[dict[str, str], dict[str, bytes]]:
    """The fields and files of a form, which has at most max_bytes. Raises ApiError."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError("The content type must be multipart/form-data", status=415)
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        parser = MultiPartParser(request.headers, request.stream(), max_files=4, max_fields=_MAX_FIELDS)
        parser.spool_max_size = max_bytes  # in memory, and never on a disk
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise ApiError(f"The body of the request is not a valid form: {getattr(error, 'message', error)}") from error
    for name, value in form.multi_items():
        name = "image" if name == "image[]" else name
        if name in fields or name in files:
            raise ApiError(f"{name[:80]} is given twice: one is supported", name[:80], "invalid_value")
        if isinstance(value, UploadFile):
            files[name] = await value.read()
        else:
            fields[name] = value
    return fields, files


async def edit(api: Api, request: Request) -> Response:
    """Answer a request to complete a picture."""
    fields, files = await read_form(request, api.options.max_body * 2**20)
    for name in files:
        if name not in ("image", "mask"):
            raise ApiError(f"'{name[:80]}' must not be a file", name[:80], "invalid_value")
    for name in ("image", "mask"):
        if name in fields:
            raise ApiError(f"{name} must be a file", name, "invalid_value")
    asked = read_request(fields, api.defaults, is_text=True)
    if "image" not in files:
        raise ApiError("image is missing: give a picture as a file", "image", "missing_required_parameter")
    api.check(asked)
    loaded, limit = api.loaded, api.options.max_pixels * 10**6
    read = functools.partial(read_edit, files["image"], files.get("mask"), limit, loaded.config.grid, loaded.image_size)
    async with api.uploads:
        pixels, cells = await run_in_threadpool(read)
    return await generate(
        api, asked, "image_edit", request, lambda: encode(loaded, pixels[None])[0].masked_fill(cells, -1)
    )


def make_app(loaded: Loaded, options: ServeOptions, ranker: ClipRanker | None = None) -> FastAPI:
    """The application. Its scheduler's thread ends with `app.state.scheduler.stop()`."""
    app, api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Api(loaded, options, ranker)
    app.state.api, app.state.scheduler = api, api.scheduler
    app.add_middleware(Guard, key=options.key, max_bytes=options.max_body * 2**20, seconds=options.request_timeout,
                       told=api.told, host=options.host)
    add_routes(app, api)
    app.mount("/studio", StaticFiles(directory=STUDIO))
    return app


def add_routes(app: FastAPI, api: Api) -> None:
    """Add all routes but the page's."""

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await generate(api, read_request(await read_json(request), api.defaults), "image_generation", request)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        return await edit(api, request)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [api.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != api.name:
            raise ApiError(f"The model '{name[:80]}' does not exist", "model", "model_not_found", 404)
        return api.model()

    @app.get("/images/{name}")
    async def image(name: str) -> Response:
        found = api.store.get(name)
        if found is None:
            raise ApiError("There is no such picture, or it has expired", code="not_found", status=404)
        return Response(found.content, media_type=found.media_type, headers={"cache-control": "private"})

    @app.get("/")
    async def studio() -> Response:
        return FileResponse(STUDIO / "index.html")

    @app.get("/healthz")
    async def health() -> Response:
        return JSONResponse({"status": "stopping" if api.scheduler.stopping else "ok"},
                            503 if api.scheduler.stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(api.metrics.text(), media_type=CONTENT_TYPE)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return answer(ApiError("The client has left", status=499))

    @app.exception_handler(HTTPException)
    async def not_found(_: Request, error: HTTPException) -> Response:
        return answer(ApiError(str(error.detail), status=error.status_code))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answer(ApiError("The server failed at this request; its log says why", status=500))
