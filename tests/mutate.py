"""A seeded mutator of bytes, and the loop that feeds a reader with what it makes. For tests/test_fuzz.py and by hand:

python tests/mutate.py 100000          # so many inputs over all readers of tests/test_fuzz.py; prints figures
"""
from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

MAGIC = [b"\0", b"\xff", b"\x7f", b"\x80", b"\r\n", b"[", b"{", b"}", b"]", b'"', b":", b"- ", b"&a ", b"*a", b"<<: "]
MAGIC += [b"!!python/object/apply:os.system [id]\n", b"PK\x03\x04", b"\x1f\x8b", b"..", b"\n", b"null", b"true", b"NaN"]
MAGIC += [b"-1", b"0", b"1e999", b"9" * 20, b"4294967295", b"2147483648", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800"]
NUMBERS = [str(number).encode() for number in (0, 1, 2, 7, 255, 65536, 10**9, 10**18, 10**30)]


def mutate(seeds, chance):
    """Return one of the seeds with some of its bytes changed, moved, repeated, cut off or taken from another one."""
    content = bytearray(chance.choice(seeds))
    for _ in range(1 << chance.randrange(5)):
        size = len(content)
        place = chance.randrange(size + 1)
        length = 1 << chance.randrange(8)
        kind = chance.randrange(9)
        if kind == 0 and size:
            content[place % size] ^= 1 << chance.randrange(8)
        elif kind == 1 and size:
            content[place % size] = chance.randrange(256)
        elif kind == 2:
            del content[place : place + length]
        elif kind == 3:
            content[place:place] = content[place : place + length]
        elif kind == 4:
            content[place:place] = chance.choice(MAGIC)
        elif kind == 5:
            content[place : place + 4] = chance.choice(MAGIC)
        elif kind == 6:
            other = chance.choice(seeds)
            start = chance.randrange(len(other) + 1)
            content[place : place + length] = other[start : start + length]
        elif kind == 7 and chance.random() < 0.2:
            del content[place:]
        elif kind == 8 and size:  # a number becomes another one: what sizes and ids are made of
            digits = [index for index in range(place, min(place + 200, size)) if content[index] in b"0123456789"]
            if digits:
                index = chance.choice(digits)
                content[index : index + 1] = chance.choice(NUMBERS)
    return bytes(content)


@dataclass
class Figures:
    """What came of a number of inputs."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list = field(default_factory=list)

    def __str__(self):
        counts = f"{self.accepted} accepted, {self.refused} refused, {len(self.failures)} failures"
        return f"{counts}, slowest {self.slowest:.2f} s"


def fuzz(read, seeds, refusals, count, seed, patience=5.0, most_failures=5):
    """Call `read(content)` with so many mutated inputs; what it raises that is none of `refusals` is a failure."""
    chance, figures = random.Random(seed), Figures()
    for number in range(count):
        content = mutate(seeds, chance)
        begin = time.process_time()
        try:
            read(content)
            figures.accepted += 1
        except refusals:
            figures.refused += 1
        except Exception as error:
            figures.failures.append((number, content, error))
        taken = time.process_time() - begin
        figures.slowest = max(figures.slowest, taken)
        if taken > patience:
            figures.failures.append((number, content, TimeoutError(f"{taken:.1f} s")))
        if len(figures.failures) >= most_failures:
            break
    return figures


if __name__ == "__main__":
    import sys
    import tempfile
    from pathlib import Path

    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
    import resource

    from test_fuzz import READERS, make_reader

    total = int(sys.argv[1])
    names = sys.argv[2:] or list(READERS)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            read, seeds, refusals = make_reader(name, Path(folder))
            count = int(total * READERS[name] / sum(READERS[n] for n in names))
            begin = time.time()
            figures = fuzz(read, seeds, refusals, count, seed=1)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            sys.stdout.write(f"{name}: {count} inputs in {time.time() - begin:.0f} s: {figures}; peak {peak:.0f} MB\n")
            for number, content, error in figures.failures:
                sys.stdout.write(f"  input {number}: {error!r}: {content[:300]!r}\n")
            sys.stdout.flush()
