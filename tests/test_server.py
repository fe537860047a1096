"""The server: answers of the images API to OpenAI's client, what it refuses, and clients that come and go."""
from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import get_args

import openai
import pytest
import torch
from fastapi import Response
from helpers import ROOT, Brightness, as_bytes, bomb, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import ImageEditStreamEvent, ImageGenStreamEvent, ImagesResponse
from PIL import Image, ImageOps
from test_crash import wait_for

import generate as generate_script
import serve
from benchmarks import serve_load
from dalle.generation import token_ids
from dalle.loading import DEMO_PROMPTS, load
from data.images import image_to_tensor
from sampling import SamplingOptions
from server import scheduler
from server.app import make_app
from server.guard import LOOPBACK, Guard
from server.options import API_KEY_VARIABLE, COMMAND
from server.running import Server, listen
from server.scheduler import Done, Job
from server.schemas import NEUTRAL, SPECS, ApiError, read_request
from server.store import Store

PLAIN = {"model": "demo", "prompt": "red apple"}
HEAD = ("POST /v1/images/generations HTTP/1.1", "host: localhost", "content-type: application/json")


class Served:
    """A server in threads of this process."""

    def __init__(self, *flags, ranker=None):
        self.options = COMMAND.parse(["--dalle-path", "demo", "--port", "0", *flags])
        self.app = make_app(loaded(), self.options, ranker)
        self.scheduler, taken = self.app.state.scheduler, listen(self.options.host, 0)
        self.port = taken.getsockname()[1]
        self.server = Server(self.app, 10)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [taken]}, daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.scheduler.stop()
        self.server.should_exit = True
        self.thread.join(30)

    def pictures(self, **parameters):
        """The pixels of the images of a request, and the answer."""
        answer = self.client.images.generate(**{**PLAIN, **parameters})
        return [pixels(image) for image in answer.data], answer

    def raw(self, method, path, body=None, **headers):
        """Status, headers and content of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def post(self, parameters, path="/v1/images/generations", **headers):
        """Status and JSON of an answer to a JSON body."""
        body = parameters if isinstance(parameters, bytes) else json.dumps(parameters).encode()
        status, headers, content = self.raw("POST", path, body, content_type="application/json", **headers)
        return status, headers, json.loads(content)

    def connect(self, *head):
        """A connection of its own, on which a request begins with these lines."""
        connection = socket.create_connection(("127.0.0.1", self.port), 60)
        if head:
            connection.sendall("".join(f"{line}\r\n" for line in (*head, "")).encode())
        return connection

    @contextlib.contextmanager
    def held(self):
        """Passes wait until the context ends. (The next pass, that is; images may have joined before.)"""
        advance, gate = self.scheduler.images.advance, threading.Event()

        def wait():
            gate.wait(60)
            return advance()

        self.scheduler.images.advance = wait
        try:
            yield
        finally:
            self.scheduler.images.advance = advance
            gate.set()

    def until(self, condition):
        deadline = time.monotonic() + 60
        while not condition(self.scheduler):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@functools.lru_cache(maxsize=None)
def loaded():
    return load("demo")


@pytest.fixture(scope="module")
def served():
    with Served(ranker=Brightness()) as served:
        yield served


def pixels(image):
    return serve_load.picture_of({"b64_json": image.b64_json})


def opened(image):
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def generated(tmp_path, *flags):
    """What generate.py writes: the pixels of all images, and their likelihoods."""
    generate_script.main(["--dalle-path", "demo", "--format", "png", "--outputs-dir", str(tmp_path), *map(str, flags)])
    (about,) = tmp_path.glob("*/generation.json")
    folder, about = about.parent, json.loads(about.read_text())["images"]
    found = [image_to_tensor(Image.open(folder / image["file"]).convert("RGB")) for image in about]
    return found, [image["log_likelihood"] for image in about], [image["seed"] for image in about]


# ---- pictures


def test_pictures_are_those_of_generate(served, tmp_path):
    """Bit for bit, with options, and one of them again by itself."""
    flags = "--text|red apple|--num-images|3|--seed|11|--top-k|64|--temperature|0.8|--cond-scale|1.5".split("|")
    expected, likelihoods, seeds = generated(tmp_path, *flags, "--batch-size", "2")
    options = {"seed": 11, "top_k": 64, "temperature": 0.8, "cond_scale": 1.5}
    found, answer = served.pictures(n=3, extra_body=options)
    assert all(map(torch.equal, found, expected)) and len(found) == 3
    assert [image.log_likelihood for image in answer.data] == likelihoods
    assert [image.image_seed for image in answer.data] == seeds
    (third,), again = served.pictures(extra_body=dict(options, first_image=2))
    assert torch.equal(third, expected[2]) and again.data[0].image_index == 2
    ImagesResponse.model_validate(answer.model_dump(), strict=True)
    assert answer.size == "64x64" and answer.output_format == "png" and answer.usage.output_tokens == 3 * 64


def test_edits_are_completions_of_generate(served, tmp_path):
    """The mask is transparent where the picture is painted, given apart or as the picture's own transparency."""
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 24, 64, 64))
    for name, image in (("picture", picture), ("mask", mask)):
        image.save(tmp_path / f"{name}.png")
    files = ["--image", tmp_path / "picture.png", "--mask", tmp_path / "mask.png"]
    expected = generated(tmp_path / "out", "--text", "octopus", "--num-images", 2, "--seed", 4, *files)[0]
    hole, open_picture = Image.new("RGBA", (64, 64), "white"), picture.convert("RGBA")
    for image in (hole, open_picture):
        image.putalpha(mask.point(lambda value: 255 - value))
    body = {"prompt": "octopus", "n": 2, "extra_body": {"seed": 4}}
    apart = served.client.images.edit(image=("p.png", as_bytes(picture)), mask=("m.png", as_bytes(hole)), **body)
    assert all(torch.equal(pixels(image), own) for image, own in zip(apart.data, expected))
    assert apart.usage.input_tokens_details.image_tokens == 64 - 6 * 5 and apart.usage.output_tokens == 2 * 30
    own = served.client.images.edit(image=[("p.png", as_bytes(open_picture))], **body)
    assert len(own.data) == 2 and own.usage == apart.usage  # transparent parts are white before they are encoded


def test_a_random_seed_is_told_and_a_png_holds_what_makes_it_again(served):
    (first,), answer = served.pictures()
    texts = opened(answer.data[0]).text
    settings = json.loads(texts["Comment"])
    assert settings["seed"] == answer.data[0].seed and texts["Description"] == "red apple"
    assert texts["Software"].startswith("mini-dalle ")
    assert torch.equal(served.pictures(extra_body=settings)[0][0], first)
    assert served.pictures()[1].data[0].seed != answer.data[0].seed


def test_formats(served):
    sizes = {}
    for form, quality in (("jpeg", 5), ("jpeg", 100), ("webp", 5), ("webp", None), ("png", None)):
        more = {} if quality is None else {"output_compression": quality}
        _, answer = served.pictures(output_format=form, **more, extra_body={"seed": 1})
        assert opened(answer.data[0]).format == form.upper() and answer.output_format == form
        sizes[form, quality] = len(answer.data[0].b64_json)
    assert sizes["jpeg", 5] < sizes["jpeg", 100] and sizes["webp", 5] < sizes["webp", None]


def test_pictures_by_url(served):
    answer = served.client.images.generate(**PLAIN, n=2, response_format="url", extra_body={"seed": 3})
    assert answer.data[0].b64_json is None and answer.data[0].url != answer.data[1].url
    status, headers, content = served.raw("GET", answer.data[0].url.partition(f":{served.port}")[2])
    assert status == 200 and headers["content-type"] == "image/png"
    assert torch.equal(image_to_tensor(Image.open(io.BytesIO(content))), served.pictures(extra_body={"seed": 3})[0][0])
    assert served.raw("GET", "/images/unknown.png")[0] == 404


def test_the_store_forgets():
    now = [0.0]
    store = Store(10, 100, lambda: now[0])
    first, second = store.put(b"x" * 60, "png"), store.put(b"y" * 60, "jpeg")
    assert store.get(first) is None and store.get(second).media_type == "image/jpeg" and store.size == 60
    now[0] = 11.0
    assert store.get(second) is None
    store.put(b"z", "png")
    assert store.size == 1 and store.get(store.put(b"z" * 101, "png")) is None and store.size == 0


def test_the_best_of_several_candidates(served):
    all_six, answer = served.pictures(n=6, extra_body={"seed": 2})
    likelihoods = [image.log_likelihood for image in answer.data]
    bright = [float(picture.float().mean()) for picture in all_six]
    for rank, scores in (("likelihood", likelihoods), ("clip", bright), (None, bright)):
        best, found = served.pictures(n=2, extra_body={"seed": 2, "num_candidates": 6, "rank": rank})
        order = sorted(range(6), key=lambda place: -scores[place])[:2]
        assert [image.image_index for image in found.data] == order
        assert all(torch.equal(own, all_six[place]) for own, place in zip(best, order))
        assert hasattr(found.data[0], "clip_score") == (rank != "likelihood")
    assert served.app.state.scheduler.ranker.prompt == "red apple"
    ranked = served.client.images.generate(**PLAIN, n=3, stream=True, extra_body={"seed": 2, "rank": "likelihood"})
    assert [event.image_index for event in ranked] == sorted(range(3), key=lambda place: -likelihoods[place])


# ---- streams


def check_event(event, union):
    """Against all the types' fields, which OpenAI's client does not do by itself."""
    (kind,) = [kind for kind in get_args(get_args(union)[0]) if event.type in get_args(kind.__annotations__["type"])
               or event.type in str(kind.__annotations__["type"])]  # fmt: skip
    kind.model_validate(event.model_dump(), strict=True)


def difference(picture, final):
    """Between a partial picture on grey and the complete one."""
    whole = Image.new("RGBA", picture.size, (128, 128, 128, 255))
    whole.alpha_composite(picture.convert("RGBA"))
    return float((image_to_tensor(whole.convert("RGB")).float() - final.float()).abs().mean())


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_partial_pictures_approach_the_complete_one(served, form):
    stream = served.client.images.generate(
        **PLAIN, n=2, stream=True, partial_images=3, output_format=form, extra_body={"seed": 5}
    )
    events = list(stream)
    for event in events:
        check_event(event, ImageGenStreamEvent)
    expected = served.pictures(n=2, output_format=form, extra_body={"seed": 5})[0]
    for number in range(2):
        *partial, final = [event for event in events if event.image_index == number]
        assert torch.equal(pixels(final), expected[number]) and final.type == "image_generation.completed"
        assert [event.partial_image_index for event in partial] == list(range(len(partial))) and len(partial) > 1
        pictures = [opened(event) for event in partial]
        distances = [difference(picture, expected[number]) for picture in pictures]
        assert distances == sorted(distances, reverse=True) and len(set(distances)) == len(distances)
        if form == "png":
            shares = [event.progress for event in partial]
            assert [float(picture.getchannel("A").histogram()[255] / 64**2) for picture in pictures] == shares
            assert shares == sorted(shares) and shares[0] >= 0.25


def test_a_stream_of_edits(served):
    picture = Image.new("RGBA", (64, 64), "white")
    picture.paste((0, 0, 0, 0), (0, 32, 64, 64))
    stream = served.client.images.edit(
        image=("p.png", as_bytes(picture)), prompt="pizza", stream=True, partial_images=1, extra_body={"seed": 5}
    )
    first, final = stream
    check_event(first, ImageEditStreamEvent)
    check_event(final, ImageEditStreamEvent)
    assert opened(first).getchannel("A").crop((0, 0, 64, 32)).getextrema() == (255, 255)
    assert final.usage.output_tokens == 32


# ---- what is refused

#: Changes to a good request, the last of which is complained about.
REFUSED = [
    ({"sede": 1}, "Unknown parameter: 'sede'. Did you mean 'seed'?"), ({"\ud800": 1}, "Unknown parameter: '\ud800'"),
    ({"prompt": None}, "prompt is missing"), ({"prompt": "  "}, "prompt: must be a text"),
    ({"prompt": "a\0b"}, "prompt: must be a text"), ({"prompt": 7}, "prompt: expected text, got 7"),
    ({"prompt": "x" * 32001}, "prompt: must be at most 32000 characters"),
    ({"model": "dall-e-3"}, "The model 'dall-e-3' does not exist: this server has 'demo'"),
    ({"size": "1024x1024"}, "size must be one of 'auto', '64x64', got '1024x1024'"),
    ({"n": 0}, "n: must be at least 1, got 0"), ({"n": True}, "n: expected a whole number, got True"),
    ({"n": 65}, "n must be at most 64, got 65"), ({"num_candidates": 65}, "num_candidates must be at most 64"),
    ({"n": 3, "num_candidates": 2}, "num_candidates must be at least n 3, got 2"),
    ({"n": 1, "num_candidates": 2, "rank": "none"}, "rank none: with num_candidates above n"),
    ({"rank": "best"}, "rank: expected one of none, likelihood, clip"),
    ({"stream": True, "partial_images": 4}, "partial_images: must be at least 0 and at most 3"),
    ({"partial_images": 1}, "partial_images needs stream"),
    ({"stream": True, "response_format": "url"}, "response_format url: events"),
    ({"output_compression": 5}, "output_compression needs output_format jpeg or webp"),
    ({"output_format": "gif"}, "output_format: expected one of png, jpeg, webp"),
    ({"quality": "hd"}, "quality is not supported by this server: only 'auto' is accepted"),
    ({"style": "vivid"}, "style is not supported by this server: leave it out"),
    ({"background": "transparent"}, "background is not supported"), ({"seed": -1}, "seed: must be at least 0"),
    ({"seed": 2**63}, "seed: must be"), ({"temperature": -1}, "temperature: must be"),
    ({"temperature": float("nan")}, "temperature: expected a number"),
    ({"top_k": 1.5}, "top_k: must be a share below 1 or a whole number"),
    ({"top_p": 0}, "top_p: must be above 0 and at most 1"), ({"cond_scale": []}, "cond_scale: expected a number"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda value: str(value)[:40])
def test_bad_parameters_are_named(served, change, message):
    status, _, body = served.post({**PLAIN, **change})
    assert status == (404 if "model" in change else 400) and message in body["error"]["message"]
    assert body["error"]["param"] == [*change][-1] and body["error"]["type"] == "invalid_request_error"


PLAIN_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUES = PLAIN_VALUES | st.lists(PLAIN_VALUES, max_size=2)
NAMES = st.sampled_from([*SPECS, *NEUTRAL]) | st.text(max_size=5)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.booleans())
def test_any_values_of_parameters_are_read_or_refused(given, is_text):
    if is_text:
        given = {name: str(value) for name, value in given.items()}
    try:
        request = read_request({"prompt": "a cat", **given}, {}, is_text)
    except ApiError as error:
        assert error.status == 400 and (error.param in given or error.param in SPECS)
        assert "--" in str(given) or "--" not in str(error)  # no flag is named
    else:
        assert request.sampled >= request.n >= 1
        SamplingOptions(None, request.top_p, request.temperature, request.cond_scale).check()


def test_neutral_parameters_are_accepted_and_lone_surrogates_replaced(served):
    neutral = {"quality": "auto", "background": "auto", "moderation": "auto", "size": "64x64", "user": "me", "n": 1}
    (image,) = served.post({**neutral, "prompt": "red \ud800 apple"})[2]["data"]
    assert opened(SimpleNamespace(**image)).text["Description"] == "red \ufffd apple"


#: What is no request, and the status of it at both addresses.
BODIES = [
    (b"{", "application/json", 400, 415), (b"[1]", "application/json", 400, 415), (b"{}", "text/plain", 415, 415),
    (b"[" * 100_000, "application/json", 400, 415), (b"\xff", "application/json", 400, 415),
    (b"", "multipart/form-data", 415, 400), (b"--y\r\n", "multipart/form-data; boundary=x", 415, 400),
]


@pytest.mark.parametrize("body, kind, generation, edit", BODIES, ids=lambda value: str(value)[:40])
def test_bodies_that_are_no_requests(served, body, kind, generation, edit):
    for path, status in (("generations", generation), ("edits", edit)):
        found, _, content = served.raw("POST", f"/v1/images/{path}", body, content_type=kind)
        assert found == status and json.loads(content)["error"]["type"] == "invalid_request_error"


SQUARE = Image.new("RGBA", (64, 64), "white")
BESIDE = as_bytes(ImageOps.expand(SQUARE, (32, 0), (0, 0, 0, 0)))  # transparent only outside the square
SQUARE = as_bytes(SQUARE)
EDITS = [
    ({}, {}, "image", "image is missing"),
    ({"image": "https://example.org/x.png"}, {}, "image", "image must be a file"),
    ({}, {"image": b"not a picture"}, "image", "image cannot be read as one of PNG, JPEG"),
    ({}, {"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "image", "image cannot be read"),
    ({}, {"image": bomb(5_000)}, "image", "image has too many pixels: 16 megapixels at most are accepted"),
    ({}, {"image": bomb(10_000)}, "image", "image has too many pixels"),
    ({}, {"image": bomb(30_000)}, "image", "image has too many pixels"),
    ({}, {"image": bomb(64)}, "image", "image cannot be read"),
    ({}, {"image": BESIDE}, "mask", "nothing in the image's centre square is transparent"),
    ({}, {"image": SQUARE}, "mask", "image is nowhere transparent: give a mask"),
    ({}, {"image": SQUARE, "mask": SQUARE}, "mask", "mask is nowhere transparent"),
    ({}, {"image": SQUARE, "mask": as_bytes(Image.new("RGBA", (8, 8)))}, "mask", "mask must be as large as image"),
    ({}, {"image": SQUARE, "prompt": b"x"}, "prompt", "'prompt' must not be a file"),
    ({"n": "two"}, {"image": SQUARE}, "n", "n: expected a whole number"),
    ({"input_fidelity": "high"}, {"image": SQUARE}, "input_fidelity", "input_fidelity is not supported"),
]


@pytest.mark.filterwarnings("ignore:Image size .* decompression bomb")
@pytest.mark.parametrize("fields, files, param, message", EDITS, ids=lambda value: str(value)[:40])
def test_bad_edits_are_named(served, fields, files, param, message):
    body, kind = serve_load.form({"prompt": "a cat", **fields} if "prompt" not in files else fields, files)
    status, _, content = served.raw("POST", "/v1/images/edits", body, content_type=kind)
    error = json.loads(content)["error"]
    assert status == 400 and message in error["message"] and error["param"] == param


def test_requests_that_are_too_large_or_come_from_elsewhere(served):
    assert served.post(b'{"prompt": "' + b"x" * (17 << 20) + b'"}')[0] == served.post(b" " * (2 << 20))[0] == 413
    with served.connect(*HEAD, "transfer-encoding: chunked") as connection:  # without saying how large
        with contextlib.suppress(OSError):  # closed by the server
            for _ in range(20):
                connection.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert b" 413 " in connection.recv(100)
    for site in ("cross-site", "same-site"):
        assert served.post(PLAIN, sec_fetch_site=site)[0] == 403
    for origin in ("http://evil.example", "null"):  # without the other header: not a page of https or this machine
        assert served.post(PLAIN, origin=origin)[0] == 403
    assert served.post(PLAIN, origin=f"http://127.0.0.1:{served.port}")[0] == 200
    status, headers, _ = served.post(PLAIN, sec_fetch_site="same-origin", origin="http://evil.example")
    assert status == 200 and not [name for name in headers if name.lower().startswith("access-control")]
    for host in ("LOCALHOST", "localhost:1", "127.0.0.1", "[::1]:8000", "[::1]"):
        assert served.raw("GET", "/v1/models", host=host)[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
        status, _, content = served.raw("GET", "/v1/models", host=host)
        assert status == 400 and json.loads(content)["error"]["code"] == "unknown_host"
    hosts = {host: Guard(None, None, 1, 1, print, host).hosts for host in ("127.0.0.2", "::1", "0.0.0.0", "")}
    assert hosts["::1"] == LOOPBACK and hosts["127.0.0.2"] == (*LOOPBACK, "127.0.0.2")
    assert hosts["0.0.0.0"] is hosts[""] is None


def test_requests_together_hold_no_more_than_a_few(served, monkeypatch):
    monkeypatch.setattr("server.guard.BODIES", 0)
    status, headers, body = served.post(PLAIN)
    assert status == 503 and headers["retry-after"] and body["error"]["code"] == "busy"
    monkeypatch.undo()
    assert served.post(PLAIN)[0] == 200  # nothing is held any more


@pytest.mark.parametrize("part", [b"", b"POST /v1/images/generations HTTP/1.1\r\nhost: loc"])
def test_connections_without_a_request_are_closed(monkeypatch, part):
    monkeypatch.setattr("server.running.HEADER_SECONDS", 0.2)
    with Served() as served, served.connect() as connection:
        connection.sendall(part)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""


def test_a_client_that_does_not_read_is_given_up():
    with Served("--request-timeout", "0.5") as served:
        served.app.get("/large")(lambda: Response(b"x" * (32 << 20)))
        with served.connect("GET /large HTTP/1.1", "host: localhost"):
            served.until(lambda _: served.server.server_state.connections)
            served.until(lambda _: not served.server.server_state.connections)


def test_routes_that_do_not_exist(served):
    for method, path, status in (("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/v1/images", 404),
                                 ("GET", "/v1/images/generations", 405), ("GET", "/../../etc/passwd", 404)):
        found, headers, content = served.raw(method, path)
        assert found == status and json.loads(content)["error"]["message"]
        assert "default-src 'self'" in headers["content-security-policy"]


def test_models(served):
    (model,) = served.client.models.list().data
    assert model == served.client.models.retrieve("demo") and model.id == "demo"
    about = model.capabilities
    assert about["image_size"] == 64 and about["grid"] == 8 and about["max_n"] == 64 and about["clip"]
    assert about["examples"] == list(DEMO_PROMPTS) and about["defaults"]["temperature"] == 1.0
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client.models.retrieve("dall-e-3")


# ---- clients that come and go


@pytest.mark.parametrize("count, clients, seed, left", [
    (24, 12, 3, 3), pytest.param(500, 64, 4, 63, marks=pytest.mark.slow),
])
def test_a_mixed_load_loses_and_mixes_up_nothing(served, count, clients, seed, left):
    """Some clients leave; images share passes."""
    before, asks = serve_load.counted(served.port), serve_load.mixed_load(count, seed)
    became = serve_load.check(loaded(), asks, serve_load.work(served.port, clients, asks))
    assert became == {"left": left, "right": count - left}
    assert serve_load.mean_batch(before, serve_load.counted(served.port)) > 2
    served.until(lambda scheduler: not scheduler.running and not scheduler.waiting)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(served, stream):
    ended = served.app.state.api.metrics.ended._value
    before = ended.get()
    with served.held():
        connection = serve_load.Connection(served.port)
        connection.send(serve_load.Ask({"prompt": "wolf", "n": 40, "stream": stream}))
        served.until(lambda scheduler: scheduler.running == 32 and scheduler.waiting == 8)
        connection.http.sock.shutdown(socket.SHUT_RDWR)
        connection.http.close()
        served.until(lambda scheduler: scheduler.waiting == 0)
    served.until(lambda scheduler: scheduler.running == 0)
    assert ended.get() - before == 40


def test_a_full_queue_is_refused_for_now():
    with Served("--slots", "1", "--max-queue", "2") as served:
        with served.held():
            connection = serve_load.Connection(served.port)
            connection.send(serve_load.Ask({"prompt": "wolf", "n": 3}))
            served.until(lambda scheduler: scheduler.waiting == 2)
            status, headers, body = served.post(PLAIN)
            assert status == 429 and int(headers["retry-after"]) >= 1
            assert body["error"]["type"] == "rate_limit_error" and "2 images are waiting" in body["error"]["message"]
        assert len(connection.receive()) == 3
        status, _, body = served.post({**PLAIN, "cond_scale": 2})
        assert status == 400 and body["error"]["message"].startswith("cond_scale must be 1")
        assert served.post(PLAIN)[0] == 200


def test_requests_take_turns():
    """A large request does not keep a small one waiting."""
    with Served("--slots", "1") as served:
        order = []
        with served.held():
            for name, count in (("large", 4), ("small", 1)):
                ids = token_ids("wolf", loaded())
                deliver = functools.partial(lambda name, event: order.append((name, type(event))), name)
                served.scheduler.add(Job(ids, SamplingOptions(), 1, count, deliver))
        served.until(lambda scheduler: len(order) == 7)
    done = [name for name, kind in order if kind is Done]
    assert done.index("small") <= 2 and done.count("large") == 4


def test_requests_end_in_time_and_the_server_in_order():
    with Served("--request-timeout", "1") as served:
        with served.held():
            found = []
            waiting = threading.Thread(target=lambda: found.append(served.post(PLAIN)))
            waiting.start()
            served.until(lambda scheduler: scheduler.running == 1)
            time.sleep(1.1)
        waiting.join()
        assert found[0][0] == 503 and found[0][2]["error"]["code"] == "timeout"
        with served.connect(*HEAD, "content-length: 99") as slow:
            assert b" 408 " in slow.recv(100)
        assert json.loads(served.raw("GET", "/healthz")[2]) == {"status": "ok"}
        served.scheduler.refuse()
        status, headers, body = served.post(PLAIN)
        assert status == 503 and "being stopped" in body["error"]["message"] and headers["retry-after"]
        assert served.raw("GET", "/healthz")[0] == 503


@pytest.mark.parametrize("part", ["a pass", "decoding"])
def test_what_fails_ends_its_requests_and_no_others(served, monkeypatch, caplog, part):
    def fail(*_):
        monkeypatch.undo()
        raise RuntimeError("no such luck")

    owner, name = (served.scheduler.images, "advance") if part == "a pass" else (scheduler, "decode")
    monkeypatch.setattr(owner, name, fail)
    status, _, body = served.post(PLAIN)
    assert status == 500 and body["error"]["type"] == "server_error" and "no such luck" in caplog.text
    assert served.post({**PLAIN, "n": 33})[0] == 200  # all slots are free


def test_a_client_that_leaves_while_it_sends_is_no_error(served, caplog):
    served.connect(*HEAD, "content-length: 9").close()
    served.until(lambda _: b'generations",status="499"' in served.raw("GET", "/metrics")[2])
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_the_api_key(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    with Served() as served:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            status, _, body = served.post(PLAIN, **headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
        assert served.raw("GET", "/v1/models")[0] == 401 and served.raw("GET", "/healthz")[0] == 200
        assert len(served.client.with_options(api_key="secret").images.generate(**PLAIN).data) == 1


def test_metrics(served):
    served.pictures()
    _, headers, content = served.raw("GET", "/metrics")
    text = content.decode()
    assert headers["content-type"].startswith("text/plain")
    assert 'mini_dalle_requests_total{route="/v1/images/generations",status="200"}' in text
    for name in ("images_total", "batch_images_bucket", "waiting_images", "running_images", "request_seconds_sum"):
        assert f"mini_dalle_{name}" in text


# ---- the command, and what its document says

DOCUMENT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")


def test_code_in_the_document_runs(served, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.S)
    exec(code.replace(":8000", f":{served.port}"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("7 0 -") and "image_generation.completed" in printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("command", re.findall(r"^curl .*", DOCUMENT, flags=re.M))
def test_curl_in_the_document_gets_images(served, tmp_path, command):
    for name, colour in (("face", "white"), ("mask", (0, 0, 0, 0))):
        Image.new("RGBA", (64, 64), colour).save(tmp_path / f"{name}.png")
    words = shlex.split(command.replace(":8000", f":{served.port}"))
    answer = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout
    assert len(json.loads(answer)["data"]) == 2


def test_the_command_serves_until_a_signal_and_completes_what_runs(server, tmp_path):
    log = tmp_path / "stderr.log"
    pid = server.start("--dalle-path demo --port 0 --threads 1".split(), log, script="serve")
    wait_for(tmp_path, "is served at")
    port = int(re.findall(r"is served at .*:(\d+)", log.read_text())[0])
    connection = serve_load.Connection(port)
    connection.send(serve_load.Ask({"prompt": "pizza", "n": 30}))
    while serve_load.counted(port)["mini_dalle_running_images"] == 0:
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert len(connection.receive()) == 30 and server.wait(pid, 60) == 0 and "stopping" in log.read_text()


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_missing_packages_are_named(package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    refused(f"{package}.*: python -m pip install -r requirements-serve.txt", serve.main, ["--dalle-path", "missing"])


def test_prompts_to_try_come_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text(" a cat\n\na dog \n", encoding="utf-8")
    options = COMMAND.parse(["--dalle-path", "demo", "--examples", str(tmp_path / "prompts.txt")])
    assert options.prompts() == ["a cat", "a dog"] and not COMMAND.parse(["--dalle-path", "other"]).prompts()
    words = ["--dalle-path", "missing", "--examples", "missing.txt", "--port", "0"]
    refused("--examples missing.txt: no such file", serve.main, words)


def test_a_port_that_is_taken_is_named_before_anything_is_loaded():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        message = f"--host 127.0.0.1 --port {port}: cannot listen there"
        refused(message, serve.main, ["--dalle-path", "missing", "--port", str(port)])
    refused("--host nowhere.invalid --port 1234: cannot listen there", listen, "nowhere.invalid", 1234)
