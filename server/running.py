"""Run the application until a signal comes, and stop it gracefully."""
from __future__ import annotations

import asyncio
import functools
import logging
import signal
import socket
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from utils.errors import UserError

logger = logging.getLogger(__name__)

_CONNECTIONS = 1024
"""Beyond these, clients get 503 at once."""


HEADER_SECONDS = 10.0
"""That a client may take to send the headers of a request."""


def listen(host: str, port: int) -> socket.socket:
    """Take the port. Raises UserError naming the flag."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from error


class Connection(H11Protocol):
    """uvicorn's connection, closed if a client does not send the headers of a request, or read its answer, in time."""

    def __init__(self, *args: Any, unread_seconds: float, **settings: Any) -> None:
        """unread_seconds: for which an answer may stay unread."""
        super().__init__(*args, **settings)
        self.unread_seconds = unread_seconds
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def _expect(self, what: str, seconds: float) -> None:
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _arrived(self, what: str) -> None:
        if what in self._timers:
            self._timers.pop(what).cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect the headers of a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # whatever is unread counts
        self._expect("headers", HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect("headers", HEADER_SECONDS)  # a part of them does not prolong their time
        else:
            self._arrived("headers")

    def pause_writing(self) -> None:
        """A part of an answer is unread."""
        super().pause_writing()
        self._expect("reading", self.unread_seconds)

    def resume_writing(self) -> None:
        """All was read so far."""
        super().resume_writing()
        self._arrived("reading")

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        super().connection_lost(exc)
        for what in list(self._timers):
            self._arrived(what)


class Server(uvicorn.Server):
    """uvicorn's server, which at a signal first lets running requests end, and refuses new ones meanwhile."""

    def __init__(self, app: FastAPI, stop_timeout: float) -> None:
        """stop_timeout: seconds that running requests have."""
        connection = functools.partial(Connection, unread_seconds=app.state.api.options.request_timeout)
        settings = uvicorn.Config(
            app, http=connection, ws="none", log_config=None, access_log=False,  # type: ignore[arg-type]
            limit_concurrency=_CONNECTIONS, server_header=False,
            timeout_graceful_shutdown=10, lifespan="off",
        )  # fmt: skip
        super().__init__(settings)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # clients are told of their forms
        self.scheduler, self.stop_timeout = app.state.scheduler, stop_timeout
        self.stopped_by: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop gracefully at the first signal, at once at the second."""
        if self.stopped_by is not None:
            self.should_exit = self.force_exit = True
            return
        self.stopped_by = sig
        threading.Thread(target=self.drain, name="stop", daemon=True).start()

    def drain(self) -> None:
        """Refuse new requests, wait for running ones, and let the server end."""
        logger.info("stopping: running requests have %g s", self.stop_timeout)
        if not self.scheduler.stop(self.stop_timeout):
            logger.warning("some requests were not complete in time")
        self.should_exit = True


def serve(app: FastAPI, taken: socket.socket, stop_timeout: float) -> int:
    """Serve until a signal comes; returns the exit status."""
    server = Server(app, stop_timeout)
    server.run(sockets=[taken])
    if server.stopped_by is None:
        app.state.scheduler.stop()
    return 130 if server.stopped_by == signal.SIGINT else 0
