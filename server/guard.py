"""What every request passes first: who may ask, how much it may send, and headers of the answer."""
from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from typing import Any, Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from server.schemas import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine. Other names that lead here may be those of another site's pages (DNS rebinding)."""

POLICY = ("default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; object-src 'none'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {
    "content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}  # fmt: skip


def answer(error: ApiError) -> Response:
    """An error as an answer."""
    headers = {"retry-after": str(error.retry)} if error.retry else None
    content = json.dumps(error.body())  # escaped: a name may hold lone surrogates, which UTF-8 lacks
    return Response(content, error.status, headers, media_type="application/json")


BODIES = 16
"""Of the largest size, that all requests together may hold."""


class Guard:
    """ASGI middleware."""

    def __init__(
        self,
        app: Any,
        key: str | None,
        max_bytes: int,
        seconds: float,
        told: Callable[[str, int, float], None],
        host: str = "",
    ) -> None:
        """seconds: that a client may take to send a request.

        told: called with route, status and seconds of each. host: the address where the server listens.
        """
        self.held = 0  # bytes that the requests at present have sent
        self.hosts = tuple(dict.fromkeys((*LOOPBACK, host))) if host in LOOPBACK or host.startswith("127.") else None
        self.app, self.key, self.max_bytes, self.seconds, self.told = app, key, max_bytes, seconds, told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = [0]  # bytes
        begin, status, told = time.perf_counter(), 500, secrets.token_hex(8)

        async def send_with_headers(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update({**HEADERS, "x-request-id": told})
                headers.setdefault("cache-control", "no-cache")  # the page's parts belong together
            await send(message)

        try:
            error = self.refusal(scope)
            if error is not None:
                await answer(error)(scope, receive, send_with_headers)
            else:
                await self.app(scope, self.limited(receive, received), send_with_headers)
        finally:
            self.held -= received[0]
            route = getattr(scope.get("route"), "path", "") or "other"
            self.told(route, status, time.perf_counter() - begin)

    def refusal(self, scope: Any) -> ApiError | None:
        """Why a request is refused by its headers, if it is."""
        headers = Headers(scope=scope)
        if self.hosts and re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower() not in self.hosts:
            return ApiError(f"This server answers only to the names {', '.join(self.hosts)}", code="unknown_host")
        origin, host = headers.get("origin"), headers.get("host", "")
        own = origin is None or origin.partition("://")[2] == host  # over plain HTTP browsers say no more than this
        site = headers.get("sec-fetch-site", "none" if own else "cross-site")
        if scope["method"] not in ("GET", "HEAD") and site not in ("none", "same-origin"):
            return ApiError("pages of other sites may not use this server", code="cross_site", status=403)
        if self.key is not None and scope["path"].startswith("/v1"):
            given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given[2].strip().encode("latin-1"), self.key.encode(errors="surrogateescape"))
            if given[0].lower() != "bearer" or not right:
                return ApiError("Incorrect API key provided: send 'Authorization: Bearer KEY'", code="invalid_api_key",
                                status=401)
        length = headers.get("content-length", "0")
        return self.too_large() if length.isdigit() and int(length) > self.max_bytes else None

    def too_large(self) -> ApiError:
        """The error of a request that is too large."""
        limit = f"{self.max_bytes / 2**20:g} MB"
        return ApiError(f"The request is too large: {limit} at most are accepted", code="request_too_large", status=413)

    def limited(self, receive: Any, received: list[int]) -> Any:
        """Receive no more than is allowed, and not for ever. received: [bytes so far]."""
        deadline, complete = time.monotonic() + self.seconds, False

        async def receive_some() -> Any:
            nonlocal complete
            if complete:  # only the end of the connection is awaited
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0))
            except asyncio.TimeoutError:
                raise ApiError("The request took too long to arrive", code="timeout", status=408) from None
            size = len(message.get("body", b""))
            received[0] += size
            self.held += size
            if received[0] > self.max_bytes:
                raise self.too_large()
            if self.held > BODIES * self.max_bytes:
                raise ApiError("The server is busy: it is being sent too much", code="busy", status=503, retry=5)
            complete = not message.get("more_body", False)
            return message

        return receive_some
