"""docs/reliability.md: every promise names a proof that exists, and says so where only the slow suite runs it."""
from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rows():
    lines = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["promise", "how", "proof"]
    return [row for row in table[2:] if not row[0].startswith("**")]


def is_slow(test):
    return any("'slow'" in ast.dump(item) for item in test.decorator_list)


def test_every_promise_names_a_test_that_exists():
    tests = {}
    for promise, how, proof in rows():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`( \(slow\))?", proof)
        assert promise and how and named, promise
        for file, name, slow in named:
            if file not in tests:
                tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
                tests[file] = {node.name: is_slow(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name in tests[file], f"{promise}: no {name} in {file}"
            assert tests[file][name] == bool(slow), f"{promise}: is {name} slow?"
