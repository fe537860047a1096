"""Run the application until a signal comes, and stop it gracefully."""
from __future__ import annotations

import logging
import signal
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from utils.errors import UserError

logger = logging.getLogger(__name__)

_CONNECTIONS = 1024
"""Beyond these, clients get 503 at once."""


def listen(host: str, port: int) -> socket.socket:
    """Take the port. Raises UserError naming the flag."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from error


class Server(uvicorn.Server):
    """uvicorn's server, which at a signal first lets running requests end, and refuses new ones meanwhile."""

    def __init__(self, app: FastAPI, stop_timeout: float) -> None:
        """stop_timeout: seconds that running requests have."""
        settings = uvicorn.Config(
            app, log_config=None, access_log=False, limit_concurrency=_CONNECTIONS, server_header=False,
            timeout_graceful_shutdown=10, lifespan="off",
        )  # fmt: skip
        super().__init__(settings)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
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
