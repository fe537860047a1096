"""Kernels are compiled once; what others could have written is refused, what is damaged is compiled again."""
from __future__ import annotations

import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import give_away, run_script
from models_for_tests import needs_kernels

from ops import build

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
        assert (self.compiled > before) == compiles and not self.trap.exists()
        return [record.message for record in self.caplog.records]

    def file(self, folder=None):
        [found] = (folder or self.kept).glob("answer-*.so")
        return found

    def other_library(self, signed):
        source = "#include <fcntl.h>\n__attribute__((constructor)) static void f(void) { creat(\"%s\", 0600); }"
        (self.root / "other.c").write_text(source % self.trap)
        subprocess.run([build._compiler(), "-shared", "-fPIC", "other.c", "-o", "other.so"], cwd=self.root, check=True)
        content = (self.root / "other.so").read_bytes()
        return self.signed(content) if signed else content

    def signed(self, content):
        return content + build._checksum(self.file().name, content)


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


@pytest.mark.parametrize("script, message", [
    (None, "no C compiler"), ("echo 'cannot compile' >&2; exit 1", "PyTorch computes the same"),
    ("for last; do :; done; echo nonsense > $last", "PyTorch computes the same"),
], ids=["absent", "fails", "writes nonsense"])
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
    script = """
import re, torch
from ops.build import library
def loaded():
    return set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)[-.\\w]*", open("/proc/self/maps").read()))
before = loaded()
assert library("training") is not None
print(len(before), len(loaded() - before))
"""
    before, added = map(int, run_script("-c", script).stdout.split())
    assert before > 0 and added == 0


@pytest.mark.parametrize("kind", ["a file", "a folder"])
@pytest.mark.parametrize("mode, why", [
    (0o755, "belongs to another user (uid 65534)"), (0o777, "may be written by others"),
    (0o775, "may be written by others"),
], ids=["of another user", "that anybody may write", "that a group may write"])
def test_what_others_could_have_compiled_is_never_loaded(answer, kind, mode, why):
    assert answer.ask(compiles=True) == [] and answer.ask() == []
    answer.file().write_bytes(answer.other_library(signed=True))
    target = answer.file() if kind == "a file" else answer.kept
    target.chmod(mode)
    if mode == 0o755:
        give_away(target)
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


@pytest.mark.parametrize("damage", [
    lambda answer, content: content[:4096],
    lambda answer, content: content[: len(content) * 3 // 4],
    lambda answer, content: content[:4096] + bytes(4096) + content[8192:],
    lambda answer, content: b"",
    lambda answer, content: answer.other_library(signed=False),
    lambda answer, content: answer.signed(b"nonsense" * 1000),
], ids=["page", "three quarters", "zeros inside", "empty", "without our functions", "of another machine"])
def test_a_damaged_file_is_compiled_again(answer, damage):
    answer.ask(compiles=True)
    path = answer.file()
    path.write_bytes(damage(answer, path.read_bytes()))
    nonsense = path.read_bytes().startswith(b"nonsense")
    [line] = answer.ask(compiles=True)
    assert ("invalid ELF header" in line) if nonsense else (line == f"{path} is damaged (wrong checksum): rebuilding")
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
    folders, call = [], build._call
    monkeypatch.setattr(build, "_call", lambda command, folder: (folders.append(folder), call(command, folder)))
    for mode, expected in ((0o777, answer.kept), (0o1777, answer.root / "tmp")):
        (answer.root / "tmp").chmod(mode)
        answer.ask(compiles=True)
        answer.file().unlink()
        assert {Path(folder).parent for folder in folders} == {expected}
        folders.clear()


def test_processes_that_compile_at_the_same_time_agree(answer):
    """Each is a fork with its own state; the folder is what they share."""
    start = multiprocessing.get_context("fork")
    begin = start.Event()

    def build_it():
        begin.wait()
        sys.exit(build._built("answer").answer() != 42)

    children = [start.Process(target=build_it) for _ in range(4)]
    for child in children:
        child.start()
    begin.set()  # all at once
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert answer.ask() == [] and len(list(answer.kept.iterdir())) == 1
