"""Kernels are compiled once; what others could have written is refused, what is damaged is compiled again."""
from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from models_for_tests import needs_kernels

from ops import build

ROOT = Path(__file__).resolve().parents[1]
pytestmark = needs_kernels


class Answer:
    """A source that compiles in a moment. `ask` is what a new process would do; it returns what was logged."""

    def __init__(self, root, monkeypatch, caplog):
        self.root, self.caplog, self.compiled = root, caplog, 0
        self.kept = root / "cache" / "dalle" / "kernels"
        self.temporary = root / "tmp" / f"dalle-{os.geteuid()}" / "kernels"
        self.trap = root / "trap"
        call = build._call
        for name in ("source", "cache", "run", "tmp"):
            (root / name).mkdir(mode=0o700)
        (root / "source" / "answer.c").write_text("int answer(void) { return 42; }")
        monkeypatch.setattr(build, "_FOLDER", root / "source")
        monkeypatch.setattr(build, "_call", lambda *given: (setattr(self, "compiled", self.compiled + 1), call(*given)))
        monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)

    def ask(self, compiles=False, fails=False):
        build.library.cache_clear()
        build._warn.cache_clear()
        self.caplog.clear()
        before = self.compiled
        with self.caplog.at_level(logging.INFO):
            library = build.library("answer")
            assert library is None if fails else library.answer() == 42
        assert (self.compiled > before) == compiles
        assert not self.trap.exists()
        return [record.message for record in self.caplog.records]

    def file(self, folder=None):
        [found] = (folder or self.kept).glob("answer-*.so")
        return found

    def other_library(self, signed):
        """A library without our function, which makes the trap when it is loaded."""
        source = "#include <fcntl.h>\n__attribute__((constructor)) static void f(void) { creat(\"%s\", 0600); }"
        (self.root / "other.c").write_text(source % self.trap)
        target = str(self.root / "other.so")
        subprocess.run([build._compiler(), "-shared", "-fPIC", str(self.root / "other.c"), "-o", target], check=True)
        content = Path(target).read_bytes()
        return content + (build._checksum(self.file().name, content) if signed else b"")


@pytest.fixture
def answer(tmp_path, monkeypatch, caplog):
    yield Answer(tmp_path, monkeypatch, caplog)
    build.library.cache_clear()
    build._warn.cache_clear()


@pytest.mark.parametrize("value", ["off", "0", "OFF"])
def test_kernels_can_be_switched_off(answer, monkeypatch, value):
    assert answer.ask(compiles=True) == [] and answer.ask() == []
    monkeypatch.setenv(build.SWITCH, value)
    answer.ask(fails=True)


@pytest.mark.parametrize(
    "script, message",
    [
        (None, "no C compiler"),
        ("echo 'cannot compile' >&2; exit 1", "PyTorch computes the same"),
        ("for last; do :; done; echo nonsense > $last", "PyTorch computes the same"),
    ],
    ids=["absent", "fails", "writes nonsense"],
)
def test_without_a_compiler_pytorch_computes(answer, monkeypatch, script, message):
    monkeypatch.delenv("CC", raising=False)
    if script is None:
        monkeypatch.setenv("PATH", str(answer.root))
    else:
        compiler = answer.root / "cc"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo 1\n' + script + "\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
    answer.ask(compiles=script is not None, fails=True)
    [record] = [record for record in answer.caplog.records if message in record.message]
    assert record.levelno == logging.INFO and "\n" not in record.message


def test_kernels_share_the_threads_of_pytorch():
    """A second OpenMP library would bring its own threads, which wait for work at the first one's cost."""
    script = (
        "import torch, re\n"
        "from ops.build import library\n"
        "def loaded():\n"
        "    return set(re.findall(r'\\S*/lib(?:gomp|iomp5|omp)[-.\\w]*', open('/proc/self/maps').read()))\n"
        "before = loaded()\n"
        "assert library('training') is not None\n"
        "print(len(before), len(loaded() - before))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True)
    before, added = map(int, result.stdout.split())
    assert before > 0 and added == 0


# ---- what lies on the disk


def give_away(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(str(path), 65534, 65534, follow_symlinks=False)


@pytest.mark.parametrize("kind", ["a file", "a folder"])
@pytest.mark.parametrize("what", ["of another user", "that anybody may write", "that a group may write"])
def test_what_others_could_have_compiled_is_never_loaded(answer, kind, what):
    assert answer.ask(compiles=True) == [] and answer.ask() == []
    answer.file().write_bytes(answer.other_library(signed=True))
    target = answer.file() if kind == "a file" else answer.kept
    mode = {"of another user": 0o755, "that anybody may write": 0o777, "that a group may write": 0o775}[what]
    target.chmod(mode)
    if what == "of another user":
        give_away(target)
    why = "belongs to another user (uid 65534)" if what == "of another user" else "may be written by others"
    [line] = answer.ask(compiles=True)
    assert f"refused: {target} {why}" in line
    if kind == "a file":  # a new one has replaced it
        assert answer.ask() == []
    else:  # nothing in there is touched
        assert answer.ask() == [line] and answer.file(answer.temporary).is_file()


def test_a_link_for_a_file_is_replaced_and_a_folder_below_a_foreign_one_refused(answer):
    answer.ask(compiles=True)
    path, good = answer.file(), answer.file().read_bytes()
    (answer.root / "elsewhere").write_bytes(answer.other_library(signed=True))
    path.unlink()
    path.symlink_to(answer.root / "elsewhere")
    [line] = answer.ask(compiles=True)
    assert str(path) in line and not path.is_symlink() and len(path.read_bytes()) == len(good)
    (answer.root / "cache").chmod(0o777)
    [line] = answer.ask(compiles=True)
    assert "refused: {} may be written".format(answer.root / "cache") in line


def signed(answer, content):
    return content + build._checksum(answer.file().name, content)


DAMAGES = {
    "cut to 4096 bytes": lambda answer, content: content[:4096],
    "cut to three quarters": lambda answer, content: content[: len(content) * 3 // 4],
    "zeros inside": lambda answer, content: content[:4096] + bytes(4096) + content[8192:],
    "empty": lambda answer, content: b"",
    "without our functions": lambda answer, content: answer.other_library(signed=False),
    "of another machine": lambda answer, content: signed(answer, b"nonsense" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(answer, damage):
    answer.ask(compiles=True)
    path = answer.file()
    path.write_bytes(DAMAGES[damage](answer, path.read_bytes()))
    [line] = answer.ask(compiles=True)
    if damage == "of another machine":
        assert "invalid ELF header" in line
    else:
        assert line == f"{path} is damaged (wrong checksum): rebuilding"
    assert answer.ask() == []


def test_a_file_that_changes_while_it_is_used_does_no_harm(answer):
    """It is mapped from a copy: reading a mapped file behind its end would be a SIGBUS."""
    answer.ask(compiles=True)
    build.library.cache_clear()
    loaded = build.library("answer")
    os.truncate(str(answer.file()), 0)
    assert loaded.answer() == 42


@pytest.mark.parametrize("missing", [AttributeError, OSError])
def test_without_a_copy_in_memory_the_open_file_is_loaded(answer, monkeypatch, missing):
    def refuse(name):
        raise missing

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    assert answer.ask(compiles=True) == [] and answer.ask() == []
    path = answer.file()
    half = path.read_bytes()[:4096]
    path.unlink()  # it is mapped: cut off in place, it would end this process
    path.write_bytes(half)
    [line] = answer.ask(compiles=True)
    assert "damaged" in line


@pytest.mark.parametrize("runtime", ["absent", "there", "relative", "of another user"])
def test_where_home_cannot_be_written_another_private_folder_keeps_the_file(answer, monkeypatch, runtime):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # where not even root can make a folder
    kept = answer.temporary
    if runtime != "absent":
        monkeypatch.chdir(answer.root)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "run" if runtime == "relative" else str(answer.root / "run"))
    if runtime == "there":
        kept = answer.root / "run" / "dalle" / "kernels"
    if runtime == "of another user":
        give_away(answer.root / "run")
    refused = answer.ask(compiles=True)
    assert refused == answer.ask() and len(refused) == (runtime == "of another user")
    assert answer.file(kept).is_file() and stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_where_nothing_keeps_files_each_run_says_so_once_and_compiles(answer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    answer.temporary.parent.write_text("in the way")
    for _ in range(2):
        [line] = answer.ask(compiles=True)
        assert "cannot be cached (/proc/none: " in line and "set XDG_CACHE_HOME" in line
    assert [path.name for path in (answer.root / "tmp").iterdir()] == [answer.temporary.parent.name]


def test_nothing_is_compiled_where_others_could_swap_files(answer, monkeypatch):
    folders = []
    call = build._call
    monkeypatch.setattr(build, "_call", lambda command, folder: (folders.append(folder), call(command, folder)))
    for mode, expected in ((0o777, answer.kept), (0o1777, answer.root / "tmp")):
        (answer.root / "tmp").chmod(mode)
        answer.ask(compiles=True)
        answer.file().unlink()
        assert {Path(folder).parent for folder in folders} == {expected}
        folders.clear()


def test_processes_that_compile_at_the_same_time_agree(answer):
    """Each is a fork with its own state; the folder is what they share."""
    begin, start = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(start)
                os.read(begin, 1)
                status = int(build._built("answer").answer() != 42)
            finally:
                os._exit(status)
        children.append(child)
    os.close(begin)
    os.close(start)  # all at once
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert answer.ask() == [] and len(list(answer.kept.iterdir())) == 1
