"""Downloads from a server in this process: resumed, verified, atomic, honest about failures; COCO's script too."""
from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, refused

from checkpoints import vqgan
from utils import archives, downloads
from utils.downloads import download

CONTENT = bytes(range(256)) * 1200  # 307,200 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` {path: bytes}; a test sets how well it behaves. `requests` are the (path, Range) it got."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/file.bin": CONTENT}
        self.requests = []
        self.ranges, self.etag, self.content_type = True, '"v1"', "application/octet-stream"
        self.cut_after = []  # bytes of each next body after which the connection ends
        self.statuses = []  # of the next answers, instead of a file
        self.redirect = None
        self.send_length = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if server.statuses:
            return self.send_error(server.statuses.pop(0))
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            return self.end_headers()
        if self.path not in server.files:
            return self.send_error(404)
        body, start = server.files[self.path], 0
        if asked and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(asked[len("bytes=") : -1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.send_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", server.content_type)
        self.end_headers()
        body = body[start:]
        self.wfile.write(body[: server.cut_after.pop(0)] if server.cut_after else body)


@contextlib.contextmanager
def serving():
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Do not sleep; return the pauses that were asked for."""
    pauses = []
    monkeypatch.setattr(downloads.time, "sleep", pauses.append)
    return pauses


def fetch(server, path, **options):
    return download(server.url + "/file.bin", path, progress=False, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_complete_and_leaves_nothing_else(server, tmp_path):
    path = tmp_path / "deep" / "model.ckpt"
    assert fetch(server, path, sha256=SHA256.upper(), md5=hashlib.md5(CONTENT).hexdigest()) == path
    assert path.read_bytes() == CONTENT and names(path.parent) == ["model.ckpt"]
    fetch(server, path)
    fetch(server, path, sha256=SHA256)
    assert len(server.requests) == 1  # what is there is not fetched again


def test_cut_connections_are_resumed(server, tmp_path, pauses):
    server.cut_after = [100000, 50000, 0, 1]
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT and names(tmp_path) == ["x"]
    assert [asked for _, asked in server.requests] == [None] + [f"bytes={n}-" for n in (100000, 150000, 150000, 150001)]
    assert pauses == [1, 1, 2, 1]  # longer when nothing was gained


def test_a_later_process_goes_on_from_the_part(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.cut_after = [100000, 0]
    refused("connection ended after 100000 of 307200 bytes", fetch, server, tmp_path / "x")
    assert (tmp_path / "x.part").stat().st_size == 100000 and not (tmp_path / "x").exists()
    fetch(server, tmp_path / "x")
    assert server.requests[-1][1] == "bytes=100000-" and (tmp_path / "x").read_bytes() == CONTENT


OWN_NOTES = {"url": "{url}/file.bin", "validator": '"v1"'}
# (what lies there as part, the notes beside it, whether a checksum is known, the ranges that are asked for)
PARTS = {
    "of another version": (b"old" * 1000, json.dumps(dict(OWN_NOTES, validator='"v0"')), False, ["bytes=3000-"]),
    "of another address": (b"?" * 1000, json.dumps(dict(OWN_NOTES, url="https://elsewhere/file.bin")), False, [None]),
    "with notes that are no JSON": (b"?" * 1000, "not json", False, [None]),
    "with notes of another kind": (b"?" * 1000, "[]", False, [None]),
    "without notes": (b"?" * 1000, None, False, [None]),
    "that is right, of a known sum": (CONTENT[:1000], None, True, ["bytes=1000-"]),
    "that is wrong, of a known sum": (b"?" * 1000, None, True, ["bytes=1000-", None]),
    "that is complete": (CONTENT, json.dumps(OWN_NOTES), False, ["bytes=307200-"]),
    "that is too long, of a known sum": (CONTENT + b"more", None, True, ["bytes=307204-", None]),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_is_continued_only_where_that_is_right(server, tmp_path, case):
    part, notes, known, ranges = PARTS[case]
    (tmp_path / "x.part").write_bytes(part)
    if notes is not None:
        (tmp_path / "x.part.json").write_text(notes.replace("{url}", server.url))
    fetch(server, tmp_path / "x", **({"sha256": SHA256} if known else {}))
    assert [asked for _, asked in server.requests] == ranges
    assert (tmp_path / "x").read_bytes() == CONTENT and names(tmp_path) == ["x"]


@pytest.mark.parametrize("behaviour, waits, then, complaint", [
    ({"ranges": False, "cut_after": [200000]}, [1], {"cut_after": [1000] * 50}, "ended after 1000 of 307200 bytes"),
    ({"statuses": [503, 429, 500]}, [2, 4, 8], {"statuses": [503] * 50}, "HTTP status 503"),
], ids=["without ranges", "busy"])
def test_servers_are_asked_again_up_to_a_limit(server, tmp_path, pauses, behaviour, waits, then, complaint):
    vars(server).update(behaviour)
    fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT and pauses == waits
    vars(server).update(then)
    asked = len(server.requests) + (1 if "cut_after" in then else 0)
    refused(complaint, fetch, server, tmp_path / "y")
    assert len(server.requests) == asked + downloads.ATTEMPTS and not (tmp_path / "y").exists()


def test_a_missing_file_says_what_to_do_by_hand(server, tmp_path, pauses, monkeypatch):
    gone = server.url + "/gone.zip"
    message = refused("HTTP status 404", download, gone, tmp_path / "gone.zip", progress=False)
    assert gone in message and "\n" not in message and pauses == [] and len(server.requests) == 1
    assert f"download it by hand and save it as {tmp_path / 'gone.zip'}" in message
    # A published VQGAN that cannot be had says its advice once.
    published = dataclasses.replace(vqgan.PUBLISHED["f16-1024"], config_url=gone)
    monkeypatch.setitem(vqgan.PUBLISHED, "f16-1024", published)
    message = refused("HTTP status 404", vqgan.default_vqgan, tmp_path)
    assert message.count("by hand") == 1 and published.weights_url in message
    # No server at all.
    refused("download it by hand", download, "http://127.0.0.1:9/file.bin", tmp_path / "x", progress=False)
    assert len(pauses) == downloads.ATTEMPTS - 1


def test_a_wrong_checksum_leaves_no_file(server, tmp_path):
    refused(f"its sha256 is {SHA256}, not 00", fetch, server, tmp_path / "x", sha256="00" * 32)
    refused("its md5 is", fetch, server, tmp_path / "x", sha256=SHA256, md5="00" * 16)
    assert not [name for name in names(tmp_path) if not name.endswith(".lock")]
    (tmp_path / "x").write_bytes(b"an old file")
    fetch(server, tmp_path / "x", sha256=SHA256, size_limit=len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT


LONG = {"size_limit": len(CONTENT) - 1}
REFUSED = [
    ({}, LONG, "x", "it has 307200 bytes, more than the 307199 expected"),
    ({"send_length": False}, LONG, "x", "it has more than the 307199 bytes expected"),
    ({"content_type": "text/html; charset=utf-8"}, {}, "x.ckpt", "a web page instead of the file"),
    ({"redirect": "http://example.org/file.bin"}, {}, "x", "http://example.org/file.bin is not an https address"),
    ({}, {}, "file/x", "cannot save"), ({"free": 1000}, {}, "x", "needs 0.0 GB of space.*free"),
]


@pytest.mark.parametrize("behaviour, options, name, message", REFUSED)
def test_what_is_refused(server, tmp_path, monkeypatch, behaviour, options, name, message):
    (tmp_path / "file").write_text("")
    if "free" in behaviour:
        monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    vars(server).update(behaviour)
    refused(message, fetch, server, tmp_path / name, **options)
    assert not (tmp_path / name).exists()


def test_only_https_without_a_checksum(tmp_path):
    for url in ("http://example.org/x", "ftp://example.org/x", "file:///etc/passwd", "x", "http://[bad/x"):
        for more in ({}, {"sha256": SHA256}) if not url.startswith("http://e") else ({},):
            refused("not an https address", download, url, tmp_path / "x", progress=False, **more)


def test_redirects_are_followed(server, tmp_path):
    with serving() as other:
        server.redirect = other.url + "/file.bin"
        other.cut_after = [1000]
        fetch(server, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT and other.requests[1] == ("/file.bin", "bytes=1000-")


def test_two_downloads_of_one_file_become_one(server, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        tasks = [executor.submit(fetch, server, tmp_path / "x") for _ in range(4)]
    assert [task.result() for task in tasks] == [tmp_path / "x"] * 4
    assert len(server.requests) == 1 and names(tmp_path) == ["x"]


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


FILES = {f"photos/{number:012d}.jpg": bytes([number]) * 20000 for number in range(30)}


def unpacked(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_unpack_adds_what_is_missing_and_deletes_the_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of(FILES))
    out = tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "000000000003.jpg").write_bytes(FILES["photos/000000000003.jpg"])
    (out / "photos" / "000000000004.jpg").write_bytes(b"cut off")
    assert archives.unpack(tmp_path / "a.zip", out, progress=False) == 29
    assert unpacked(out) == FILES and names(tmp_path) == ["out"]


def test_little_space_and_an_interruption(server, tmp_path, monkeypatch):
    """The archive shrinks while it is unpacked; after an interruption only what was cut off is fetched again."""
    content = zip_of(FILES)
    server.files["/file.bin"] = content
    digest = hashlib.sha256(content).hexdigest()
    out = tmp_path / "out"
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    monkeypatch.setattr(archives, "_space", lambda members: 10**7)
    monkeypatch.setattr(archives, "_CUT_BYTES", 50000)
    original, left = archives._unpack_member, [20]

    def interrupted(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(*arguments)

    monkeypatch.setattr(archives, "_unpack_member", interrupted)
    fetch(server, tmp_path / "a.zip", sha256=digest)
    refused("", archives.unpack, tmp_path / "a.zip", out, progress=False, kind=KeyboardInterrupt)
    rest = (tmp_path / "a.zip.part").stat().st_size
    assert rest < len(content) / 2 and len(unpacked(out)) == 20 and not (tmp_path / "a.zip").exists()
    monkeypatch.setattr(archives, "_unpack_member", original)
    fetch(server, tmp_path / "a.zip", sha256=digest)
    assert server.requests[-1][1] == f"bytes={rest}-"
    assert archives.unpack(tmp_path / "a.zip", out, progress=False) == 10
    assert unpacked(out) == FILES and names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:evil.txt"])
def test_unsafe_names_are_refused(tmp_path, name):
    (tmp_path / "a.zip").write_bytes(zip_of({"good.txt": b"", name: b""}))
    refused("unsafe name", archives.unpack, tmp_path / "a.zip", tmp_path / "in" / "out", progress=False)
    assert names(tmp_path) == ["a.zip"]


def test_damaged_archives(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of(FILES).replace(bytes([7]) * 5000, bytes([8]) * 5000))
    refused("damaged.*CRC", archives.unpack, tmp_path / "a.zip", tmp_path / "out", progress=False)
    assert "photos/000000000007.jpg" not in unpacked(tmp_path / "out") and (tmp_path / "a.zip").exists()
    (tmp_path / "a.zip").write_bytes(b"PK but no archive")
    refused("damaged", archives.unpack, tmp_path / "a.zip", tmp_path / "out", progress=False)
    refused("cannot unpack", archives.unpack, tmp_path / "none.zip", tmp_path / "out", progress=False)


COCO = {
    "annotations/annotations_trainval2017.zip": (
        {"annotations/captions_train2017.json": b"{}", "annotations/captions_val2017.json": b"{}"},
        ("annotations", "captions_*2017.json", 2),
    ),
    "zips/val2017.zip": ({f"val2017/{n:012d}.jpg": b"v" * 3000 for n in range(5)}, ("val2017", "*.jpg", 5)),
    "zips/train2017.zip": ({f"train2017/{n:012d}.jpg": b"t" * 3000 for n in range(9)}, ("train2017", "*.jpg", 9)),
}


@pytest.fixture
def coco(server, tmp_path):
    """Run the script against the server, with small archives in the place of COCO's."""
    lines = []
    for path, (files, (folder, pattern, number)) in COCO.items():
        content = server.files["/" + path] = zip_of(files)
        digest = hashlib.sha256(content).hexdigest()
        lines.append("|".join([folder, path, str(len(content)), digest, pattern, str(number), "0"]))
    (tmp_path / "archives").write_text("\n".join(lines) + "\n")
    own = dict(os.environ, COCO_URL=server.url, COCO_ARCHIVES=str(tmp_path / "archives"), PYTHON=sys.executable)
    command = ["bash", str(ROOT / "utils" / "download_coco_dataset.sh")]

    def run(*flags):
        return subprocess.run([*command, *flags], cwd=tmp_path, env=own, timeout=120, capture_output=True, text=True)

    return run


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
class TestCocoScript:
    def test_fetches_what_is_missing_and_names_the_next_command(self, server, tmp_path, coco):
        done = coco("--dir", "my disk/COCO", "--val-only")
        folder = tmp_path / "my disk" / "COCO"
        assert done.returncode == 0, done.stderr
        assert names(folder) == ["annotations", "val2017"] and len(names(folder / "val2017")) == 5
        assert "captions_val2017.json" in done.stdout.splitlines()[-1] and "my\\ disk" in done.stdout.splitlines()[-1]
        (folder / "val2017" / "000000000002.jpg").unlink()
        server.requests.clear()
        done = coco("--dir=my disk/COCO")
        assert done.returncode == 0, done.stderr
        assert [path for path, _ in server.requests] == ["/zips/val2017.zip", "/zips/train2017.zip"]
        assert unpacked(folder) == {name: content for files, _ in COCO.values() for name, content in files.items()}
        assert "annotations is complete" in done.stdout and "26 GB" in done.stdout
        server.requests.clear()
        assert coco("--dir", "my disk/COCO").returncode == 0 and server.requests == []

    def test_an_archive_fetched_by_hand_is_used(self, server, tmp_path, coco):
        (tmp_path / "COCO").mkdir()
        for path in COCO:
            (tmp_path / "COCO" / Path(path).name).write_bytes(server.files["/" + path])
        assert coco("--dir", "COCO").returncode == 0 and server.requests == []
        assert names(tmp_path / "COCO") == ["annotations", "train2017", "val2017"]

    def test_failures_are_one_line(self, server, tmp_path, coco):
        server.files["/zips/val2017.zip"] = b"x" * len(server.files["/zips/val2017.zip"])
        done = coco("--dir", "COCO", "--val-only")
        assert done.returncode == 1 and "its sha256 is" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "COCO" / "val2017").exists() and (tmp_path / "COCO" / "annotations").exists()
        assert coco("--what").returncode == 2 and coco("--dir").returncode == 2
        (tmp_path / "archives").write_text((tmp_path / "archives").read_text().replace("|0\n", "|999999999\n"))
        done = coco("--dir", "COCO")
        assert done.returncode == 1 and "not enough space" in done.stderr


def test_the_script_is_what_shellcheck_likes():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    script = str(ROOT / "utils" / "download_coco_dataset.sh")
    done = subprocess.run(["shellcheck", script], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
