"""docs/reliability.md: every promise names a proof that exists, and says so where only the slow suite runs it."""
from __future__ import annotations

import re

from helpers import ROOT


def test_every_promise_names_a_test_that_exists():
    lines = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["promise", "how", "proof"]
    for promise, how, proof in (row for row in table[2:] if not row[0].startswith("**")):
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`( \(slow\))?", proof)
        assert promise and how and named, promise
        for file, name, slow in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            found = re.search(rf"^((?:[@ #)\]].*\n)*)def {name}\(", text, flags=re.M)  # and what decorates it
            assert found, f"{promise}: no {name} in {file}"
            assert ("@pytest.mark.slow\n" in found[1]) == bool(slow), f"{promise}: is {name} slow?"
