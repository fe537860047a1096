#!/usr/bin/env python3
"""The server under load: images/s with several clients, and a mixed load of which some clients leave.

    python benchmarks/serve_load.py                                  starts `serve.py` with the demo model
    python benchmarks/serve_load.py --clients 1 4 16 --seconds 20 --requests 0
    python benchmarks/serve_load.py --stress-clients 64 --requests 500

The mixed load has prompts, options, numbers of images, completions and streams of all kinds. Every eighth client closes
its connection in between. Each picture must be the one that `generate.py` makes for its seed.
"""
from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Callable, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.compare_peers import PeerOptions  # noqa: E402
from dalle.completion import completion_codes, transparent_mask  # noqa: E402
from dalle.generation import text_of, token_ids  # noqa: E402
from dalle.loading import DEMO, DEMO_PROMPTS, Loaded, load  # noqa: E402
from data.images import image_to_tensor  # noqa: E402
from sampling import Sampler, SamplingOptions, top_k_count  # noqa: E402
from utils.errors import UserError, run_main  # noqa: E402
from utils.options import Command, Options, again, option  # noqa: E402

_LEAVES_ONE_IN = 8
_TIMEOUT = 600.0


@dataclass(frozen=True)
class LoadOptions(Options):
    """The flags of this command."""

    clients: tuple[int, ...] = option((1, 4, 16), "numbers of clients whose images/s are measured", ge=1)
    seconds: float = option(10.0, "for which each number of clients is measured in each turn", gt=0)
    turns: int = again(PeerOptions, "turns", default=3, help="of the numbers of clients; medians are printed")
    stress_clients: int = option(64, "clients of the mixed load", ge=1)
    requests: int = option(500, "requests of the mixed load; 0: none", ge=0)
    slots: int = option(32, "as for serve.py", ge=1)
    seed: int = option(1, "of the mixed load")


COMMAND = Command("benchmarks/serve_load.py", "Put load on a server with the demo model.", LoadOptions)


class Ask(NamedTuple):
    """A request of the mixed load."""

    parameters: dict[str, Any]
    edited: int | None = None
    """Rows of codes of a picture to keep, for a completion."""
    leaves_after: float | None = None
    """Seconds after which the client closes its connection."""


class Connection:
    """An HTTP connection to a server."""

    def __init__(self, port: int) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)

    def send(self, ask: Ask) -> None:
        """Send a request."""
        if ask.edited is None:
            body, kind = json.dumps(ask.parameters).encode(), "application/json"
            self.http.request("POST", "/v1/images/generations", body, {"content-type": kind})
        else:
            body, kind = form(ask.parameters, {"image": edited_picture(ask.edited)})
            self.http.request("POST", "/v1/images/edits", body, {"content-type": kind})

    def receive(self) -> list[dict[str, Any]]:
        """The images of the answer. Raises RuntimeError for an error."""
        answer = self.http.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content[:200]!r}")
        if answer.getheader("content-type", "").startswith("text/event-stream"):
            events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: ")]
            return [event for event in events if event.get("type", "").endswith(".completed")]
        found: list[dict[str, Any]] = json.loads(content)["data"]
        return found


def form(fields: dict[str, Any], files: dict[str, bytes]) -> tuple[bytes, str]:
    """A form's body and content type."""
    boundary, parts = uuid.uuid4().hex, []
    for name, value in fields.items():
        text = json.dumps(value) if isinstance(value, bool) else str(value)
        parts.append(f'content-disposition: form-data; name="{name}"\r\n\r\n{text}'.encode())
    for name, content in files.items():
        head = f'content-disposition: form-data; name="{name}"; filename="x.png"\r\ncontent-type: image/png\r\n\r\n'
        parts.append(head.encode() + content)
    body = b"".join(b"--%s\r\n%s\r\n" % (boundary.encode(), part) for part in parts)
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def edited_picture(rows: int, size: int = 64, grid: int = 8) -> bytes:
    """A PNG of which the lower part, from a row of codes on, is transparent."""
    picture = Image.linear_gradient("L").resize((size, size)).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, rows * size // grid, size, size))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def mixed_load(count: int, seed: int, prompts: Sequence[str] = DEMO_PROMPTS) -> list[Ask]:
    """Requests of all kinds."""
    chance, asks = random.Random(seed), []
    for number in range(count):
        parameters: dict[str, Any] = {"prompt": chance.choice(prompts), "n": chance.choice([1, 1, 1, 2, 3])}
        parameters.update(seed=number, temperature=chance.choice([1.0, 0.7, 0, 1.3]), top_k=chance.choice([0.99, 64]))
        parameters.update(top_p=chance.choice([1.0, 0.9]), cond_scale=chance.choice([1.0, 1.0, 2.0]))
        if chance.random() < 0.25:
            parameters.update(stream=True, partial_images=chance.randrange(4))
        leaves = chance.random() / 2 if number % _LEAVES_ONE_IN == 3 else None
        asks.append(Ask(parameters, chance.choice([None, None, None, 2, 5]), leaves))
    return asks


def work(port: int, clients: int, asks: Sequence[Ask], tick: Callable[[], None] = lambda: None) -> list[Any]:
    """Let so many clients send requests, one after the other each. Returns the images of each request, None where the
    client left, or the error."""
    found: list[Any] = [RuntimeError("not sent")] * len(asks)
    todo, lock = iter(range(len(asks))), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            found[number] = one(asks[number])
            tick()

    def one(ask: Ask) -> Any:
        connection = Connection(port)
        try:
            connection.send(ask)
            if ask.leaves_after is not None:
                time.sleep(ask.leaves_after)
                return None
            return connection.receive()
        except Exception as error:
            return error
        finally:
            connection.http.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def expected(loaded: Loaded, ask: Ask) -> Tensor:
    """The pictures (n, 3, S, S) that `generate.py` makes for a request."""
    parameters, given = ask.parameters, None
    if ask.edited is not None:
        picture = Image.open(io.BytesIO(edited_picture(ask.edited, loaded.image_size, loaded.config.grid)))
        given = completion_codes(loaded, picture, transparent_mask(picture))
    text = text_of([token_ids(parameters["prompt"], loaded)[: loaded.config.text_seq_len]], loaded)
    top_p = parameters["top_p"] if parameters["top_p"] < 1 else None
    top_k = top_k_count(parameters["top_k"], loaded.config.num_image_tokens)
    options = SamplingOptions(top_k, top_p, parameters["temperature"], parameters["cond_scale"])
    batches = Sampler(loaded).images(text, parameters["n"], 4, parameters["seed"], options, given)
    return torch.cat([batch.pixels for batch in batches])


def check(loaded: Loaded, asks: Sequence[Ask], found: Sequence[Any]) -> Counter[str]:
    """Compare all pictures; returns numbers of requests by what became of them: right, wrong, lost or left."""
    became: Counter[str] = Counter()
    for ask, images in zip(asks, found):
        if images is None:
            became["left"] += 1
        elif isinstance(images, Exception) or len(images) != ask.parameters["n"]:
            became[f"lost: {images!r:.200}"] += 1
        else:
            pictures = {image["image_index"]: picture_of(image) for image in images}
            same = all(torch.equal(own, pictures[number]) for number, own in enumerate(expected(loaded, ask)))
            became["right" if same else "wrong"] += 1
    return became


def picture_of(image: dict[str, Any]) -> Tensor:
    """The pixels (3, S, S) of an image of an answer."""
    return image_to_tensor(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))


def counted(port: int) -> dict[str, float]:
    """What /metrics counts of passes and images."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {name: float(value) for name, value in re.findall(r"^(mini_dalle_[a-z_]+) ([\d.e+-]+)$", text, re.M)}


def mean_batch(before: dict[str, float], after: dict[str, float]) -> float:
    """Images in a pass, on average, between two counts."""
    images, passes = (after[f"mini_dalle_batch_images_{name}"] - before[f"mini_dalle_batch_images_{name}"]
                      for name in ("sum", "count"))  # fmt: skip
    return images / max(passes, 1)


def resident(process: int) -> float:
    """Megabytes of memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Served:
    """A server process with the demo model."""

    def __init__(self, slots: int) -> None:
        command = [sys.executable, str(ROOT / "serve.py"), "--dalle-path", DEMO, "--port", "0", "--slots", str(slots)]
        self.process = subprocess.Popen([*command, "--max-queue", "4096"], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(r"served at http://[\d.]+:(\d+)", line)
            if found:
                self.port = int(found[1])
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise UserError("the server did not start")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(60)


def measure(port: int, clients: int, seconds: float) -> tuple[float, float]:
    """Images/s and the mean batch with so many clients that ask for one image after the other."""
    asks = [Ask({"prompt": DEMO_PROMPTS[n % len(DEMO_PROMPTS)], "seed": n}) for n in range(100_000)]
    end, before, begin = time.monotonic() + seconds, counted(port), time.perf_counter()
    lock, done = threading.Lock(), 0

    def client(number: int) -> None:
        nonlocal done
        connection = Connection(port)
        for ask in asks[number::clients]:
            if time.monotonic() > end:
                break
            connection.send(ask)
            connection.receive()
            with lock:
                done += 1
        connection.http.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done / (time.perf_counter() - begin), mean_batch(before, counted(port))


def main() -> None:
    """Run it."""
    options = COMMAND.parse()
    with Served(options.slots) as served:
        work(served.port, 4, mixed_load(16, 0))  # warm up
        turns = [[measure(served.port, n, options.seconds) for n in options.clients] for _ in range(options.turns)]
        for clients, measured in zip(options.clients, zip(*turns)):
            speed, batch = map(median, zip(*measured))
            print(f"{clients:>3} clients: {speed:6.2f} images/s, {batch:5.2f} images in a pass", flush=True)  # noqa: T201
        if options.requests:
            stress(served, options)


def stress(served: Served, options: LoadOptions) -> None:
    """Put the mixed load on a server, check all pictures, and report its memory."""
    asks, sizes, lock = mixed_load(options.requests, options.seed), [], threading.Lock()

    def tick() -> None:
        with lock:
            sizes.append(resident(served.process.pid))

    before, begin = counted(served.port), time.perf_counter()
    found = work(served.port, options.stress_clients, asks, tick)
    seconds, batch = time.perf_counter() - begin, mean_batch(before, counted(served.port))
    quarter = max(len(sizes) // 4, 1)
    memory = [max(sizes[part : part + quarter]) for part in range(0, len(sizes), quarter)]
    became = check(load(DEMO), asks, found)
    print(f"{options.stress_clients} clients, {len(asks)} requests in {seconds:.0f} s, {batch:.2f} images in a pass: "  # noqa: T201
          f"{dict(became)}; MB after each quarter: {', '.join(f'{size:.0f}' for size in memory)}")
    if set(became) - {"right", "left"}:
        raise UserError("requests were lost or mixed up")


if __name__ == "__main__":
    run_main(main)
