"""Atomic downloads: resumed after interruptions, verified, renamed into place at the end.

    from utils.downloads import download
    download("https://example.org/model.ckpt", "model.ckpt", sha256="...")

While a download runs, its bytes are in `<path>.part` and the server's validator in `<path>.part.json`, so that a later
call, also in another process, resumes where this one stopped, if the server still has that file.
"""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import logging
import os
import shutil
import socket
import ssl
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Iterator, NoReturn

from utils.errors import UserError
from utils.files import PathLike, atomic_write
from utils.locks import wait_for_lock

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Attempts in a row without a byte received before a download is given up."""
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
TIMEOUT = 30.0
"""Seconds without an answer or a byte before an attempt counts as failed."""

_BLOCK = 1 << 20
_RETRY_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class _Retry(Exception):
    """A transient failure of an attempt."""


def download(
    url: str,
    path: PathLike,
    sha256: str | None = None,
    md5: str | None = None,
    size_limit: int | None = None,
    progress: bool = True,
) -> Path:
    """Download `url` to `path`, and return the path.

    An existing file is kept if it has the given checksum; without one it counts as complete, because files get their
    name only at the end. Transfers need https, a checksum or a server on this machine.

    sha256, md5: expected checksum in hexadecimal. size_limit: largest size to accept, in bytes.
    Raises UserError (which says what to download by hand and where to put it) when the download fails.
    """
    path = Path(path)
    checksums = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    _check_address(url, bool(checksums), url, path)
    if path.is_file():
        wrong = _mismatch(path, checksums)
        if not wrong:
            return path
        logger.warning("%s exists, but %s; downloading it again", path, wrong)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if path.is_file() and not _mismatch(path, checksums):
                return path  # another process downloaded it while this one waited
            resumed = _fetch(url, part, bool(checksums), size_limit, progress, path)
            wrong = _mismatch(part, checksums)
            if wrong and resumed:
                # The part may be from another version of the file: start over.
                forget_part(part)
                _fetch(url, part, bool(checksums), size_limit, progress, path)
                wrong = _mismatch(part, checksums)
            if wrong:
                forget_part(part)
                _give_up(url, path, wrong)
            os.replace(str(part), str(path))
            forget_part(part)
    except OSError as error:
        raise UserError(f"cannot save {url} as {path}: {error}") from error
    return path


# Attempts ------------------------------------------------------------------------------------------------------------


def _fetch(url: str, part: Path, verified: bool, size_limit: int | None, progress: bool, path: Path) -> bool:
    """Complete `part`; return whether a part existed before."""
    resumed = part.is_file() and part.stat().st_size > 0
    failures, most = 0, part.stat().st_size if resumed else 0
    while True:
        try:
            _attempt(url, part, verified, size_limit, progress, path)
            return resumed
        except _Retry as error:
            size = part.stat().st_size if part.is_file() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            if failures >= ATTEMPTS:
                _give_up(url, path, str(error))
            pause = FIRST_PAUSE * 2**failures
            logger.warning("%s: %s; trying again in %g seconds", url, error, pause)
            time.sleep(pause)


def _attempt(url: str, part: Path, verified: bool, size_limit: int | None, progress: bool, path: Path) -> None:
    """Request what `part` lacks and append it. Raises _Retry, or UserError when retrying cannot help."""
    start, validator = _resume_point(url, part, verified)
    request = urllib.request.Request(url, headers={"User-Agent": "mini-dalle", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        opener = urllib.request.build_opener(_Redirects(verified, url, path))
        with opener.open(request, timeout=TIMEOUT) as response:
            _receive(response, url, part, start, size_limit, progress, path)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # no further bytes: complete, or part of another file
            if _total_size(error.headers) == start:
                return
            forget_part(part)
            raise _Retry("the server has a different file now") from error
        reason = f"HTTP status {error.code} ({error.reason})"
        if error.code in _RETRY_STATUSES:
            raise _Retry(reason) from error
        _give_up(url, path, reason)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            _give_up(url, path, str(error.reason))
        raise _Retry(str(error.reason)) from error
    except (http.client.HTTPException, ConnectionError, socket.timeout, ssl.SSLError) as error:
        raise _Retry(str(error) or type(error).__name__) from error


def _receive(
    response: Any, url: str, part: Path, start: int, size_limit: int | None, progress: bool, path: Path
) -> None:
    """Write a response's body to `part`, after the first `start` bytes if the server sent that range."""
    if response.status != 206 or _range_start(response.headers) != start:
        start = 0
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isdigit() else None
    if response.headers.get_content_type() == "text/html" and path.suffix.lower() not in (".html", ".htm"):
        _give_up(url, path, "the server sent a web page instead of the file")
    if size_limit is not None and total is not None and total > size_limit:
        _give_up(url, path, f"it has {total} bytes, more than the {size_limit} expected")
    free = shutil.disk_usage(str(part.parent)).free
    if total is not None and total - start > free:
        message = "{} needs {:.1f} GB of space, but only {:.1f} GB are free at {}"
        raise UserError(message.format(url, (total - start) / 1e9, free / 1e9, part.parent))
    validator = _validator(response.headers)
    if not start:
        forget_part(part)
        with atomic_write(_notes(part)) as notes:
            json.dump({"url": url, "validator": validator}, notes)
    size = start
    with open(str(part), "ab" if start else "wb") as file, progress_bar(total, path.name, "B", progress) as bar:
        bar.update(start)
        for block in _blocks(response):
            size += len(block)
            if size_limit is not None and size > size_limit:
                forget_part(part)
                _give_up(url, path, f"it has more than the {size_limit} bytes expected")
            file.write(block)
            bar.update(len(block))
    if total is not None and size < total:
        raise _Retry(f"the connection ended after {size} of {total} bytes")


def _blocks(response: Any) -> Iterator[bytes]:
    """Yield a response's body. Network errors become _Retry, unlike disk errors."""
    while True:
        try:
            block = response.read(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(str(error) or type(error).__name__) from error
        if not block:
            return
        yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to allowed addresses."""

    def __init__(self, verified: bool, first_url: str, path: Path) -> None:
        self.verified, self.first_url, self.path = verified, first_url, path

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl, self.verified, self.first_url, self.path)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, verified: bool, first_url: str, path: Path) -> None:
    """Raise UserError if a third party could change what comes from `url` unnoticed."""
    try:
        parts = urllib.parse.urlsplit(url)
        safe = parts.scheme == "https" or (parts.scheme == "http" and (verified or parts.hostname in _LOCAL_HOSTS))
    except ValueError:
        safe = False
    if not safe:
        _give_up(first_url, path, f"{url} is not an https address")


class DownloadError(UserError):
    """A download failed, for `reason`."""

    def __init__(self, url: str, path: Path, reason: str) -> None:
        super().__init__(f"cannot download {url}: {reason}; download it by hand and save it as {path}")
        self.reason = reason


def _give_up(url: str, path: Path, reason: str) -> NoReturn:
    raise DownloadError(url, path, reason)


# Partial files -------------------------------------------------------------------------------------------------------


def _notes(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def forget_part(part: Path) -> None:
    """Delete a part and its notes, if they exist."""
    for file in (part, _notes(part)):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


def _resume_point(url: str, part: Path, verified: bool) -> tuple[int, str]:
    """Return (bytes that may be kept, validator of the server's file); (0, "") to start over.

    Without a validator, a part is resumed only if a checksum will verify the result.
    """
    if not part.is_file():
        return 0, ""
    notes: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        notes = json.loads(_notes(part).read_text(encoding="utf-8"))
    validator = notes.get("validator") if isinstance(notes, dict) and notes.get("url") == url else None
    if validator or verified:
        return part.stat().st_size, validator or ""
    return 0, ""


def _validator(headers: Any) -> str:
    """Return the value for If-Range: a strong ETag, else the date of the last change, else ""."""
    etag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag


def _range_start(headers: Any) -> int:
    """Return the first byte of a "Content-Range: bytes 100-199/200" header, -1 without one."""
    first = headers.get("Content-Range", "").replace("bytes", "").strip().split("-")[0]
    return int(first) if first.isdigit() else -1


def _total_size(headers: Any) -> int:
    """Return the size of the whole file from a "Content-Range: bytes */200" header, -1 without one."""
    total = headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else -1


def _mismatch(path: Path, checksums: dict[str, str]) -> str:
    """Return "" if the file has the expected checksums, else what differs."""
    if not checksums:
        return ""
    digests = {name: hashlib.new(name) for name in checksums}
    with open(str(path), "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            for digest in digests.values():
                digest.update(block)
    for name, expected in checksums.items():
        found = digests[name].hexdigest()
        if found != expected:
            return f"its {name} is {found}, not {expected}"
    return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes (the ranks of one training run, say) from downloading the same file at the same time."""
    with open(str(path.with_name("." + path.name + ".lock")), "w") as file:
        wait_for_lock(file)
        yield
        # Only after success: a process that waits for this file, or makes a new one, finds the complete download.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)


# Progress ------------------------------------------------------------------------------------------------------------


def progress_bar(total: int | None, name: str, unit: str, progress: bool) -> Any:
    """Return a progress bar on stderr, with `update`; it shows nothing without `progress` or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(types.SimpleNamespace(update=lambda amount: None))
    return tqdm(total=total, desc=name, unit=unit, unit_scale=unit == "B", unit_divisor=1000, disable=not progress)
