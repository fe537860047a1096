"""Where caches lie, and which folders and files count as this user's own."""
from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from helpers import NOBODY, give_away, refused

from checkpoints import vqgan
from dalle import published
from utils.caches import UntrustedError, cache_folder, open_trusted, trusted_folder
from utils.errors import UserError
from utils.files import atomic_write


def test_only_an_absolute_variable_moves_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("dalle", "codes") == tmp_path / ".cache" / "dalle" / "codes"
    for value in ("", "relative", "~/here", "./x"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder("dalle", "codes") == tmp_path / ".cache" / "dalle" / "codes"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder("dalle", "codes") == tmp_path / "x" / "dalle" / "codes"


def test_models_that_were_fetched_earlier_are_found(monkeypatch, tmp_path):
    """They used to lie in ~/.cache whatever XDG_CACHE_HOME said."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))

    def nothing(url, path, **_):
        raise UserError(f"would be {path}")

    monkeypatch.setattr("utils.downloads.download", nothing)
    monkeypatch.setattr(published, "download", nothing)
    refused(f"would be {tmp_path / 'x' / 'dalle'}", vqgan.default_vqgan)
    refused(f"would be {tmp_path / 'x' / 'minDALL-E'}", published.resolve, "minDALL-E/1.3B")
    old = tmp_path / ".cache"
    (old / "minDALL-E" / "1.3B").mkdir(parents=True)
    (old / "dalle").mkdir()
    names = vqgan.PUBLISHED["f16-1024"].weights_name, vqgan.PUBLISHED["f16-1024"].config_name
    for name in names:
        (old / "dalle" / name).write_text("")
    assert published.resolve("minDALL-E/1.3B") == old / "minDALL-E" / "1.3B"
    assert vqgan.default_vqgan() == tuple(old / "dalle" / name for name in names)


def test_missing_folders_are_made_for_their_owner_alone(tmp_path, monkeypatch):
    before = os.umask(0)
    try:
        path = trusted_folder(tmp_path / "a" / "b", 0o755)
        with atomic_write(path / "file", permissions=0o644) as file:
            file.write("x")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(os.lstat(path).st_mode) for path in (path.parent, path, path / "file")]
    assert modes == [0o755, 0o755, 0o644]
    with open_trusted(path / "file") as file:
        assert file.read() == b"x"
    with pytest.raises(FileNotFoundError):
        trusted_folder(tmp_path / "a" / "c")
    assert not (tmp_path / "a" / "c").exists()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert trusted_folder("/usr") == Path("/usr")


def untrusted(complaint, *given):
    refused(complaint, trusted_folder, *given, kind=UntrustedError)


@pytest.mark.parametrize("mode", [0o757, 0o775, 0o1777])
def test_a_folder_that_others_may_write_is_refused(mode, tmp_path):
    folder = trusted_folder(tmp_path / "a" / "b" / "c", 0o755)
    folder.chmod(mode)
    untrusted(f"may be written by others .mode {mode:o}", folder)
    folder.chmod(0o755)
    folder.parent.parent.chmod(mode)
    if mode & stat.S_ISVTX:  # as /tmp: nobody else may replace what lies there
        assert trusted_folder(folder) == folder and trusted_folder(folder.parent.parent, shared=True)
    else:
        untrusted(str(folder.parent.parent), folder)
        untrusted("", folder / "d", 0o755)  # and nothing is made there
        assert not (folder / "d").exists()


@pytest.mark.parametrize("name", ["a", "a/b", "a/b/c"])
def test_a_folder_of_another_user_is_refused_at_any_depth(name, tmp_path):
    folder = trusted_folder(tmp_path / "a" / "b" / "c", 0o755)
    give_away(tmp_path / name)
    untrusted(rf"belongs to another user \(uid {NOBODY}\)", folder)


def test_a_link_is_followed_as_far_as_nobody_else_could_turn_it(tmp_path):
    real, shared = trusted_folder(tmp_path / "real" / "inner", 0o755), tmp_path / "shared"
    (tmp_path / "link").symlink_to("real/../real")
    assert trusted_folder(tmp_path / "link" / "inner") == real
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link").symlink_to(real)
    (tmp_path / "second").symlink_to(shared / "link")
    for path in (shared / "link", tmp_path / "second"):
        untrusted("may be written by others", path)
    shared.chmod(0o1777)
    assert trusted_folder(tmp_path / "second") == real
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused("symbolic links", trusted_folder, tmp_path / "loop" / "x", 0o755, kind=OSError)
    give_away(shared / "link")
    untrusted("another user", tmp_path / "second")


@pytest.mark.parametrize("kind", ["written by others", "of another user", "a link", "a pipe", "a folder"])
def test_only_a_plain_file_of_ones_own_is_opened(kind, tmp_path):
    path = tmp_path / "file"
    if kind == "a pipe":
        os.mkfifo(str(path))
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link":
        (tmp_path / "target").write_text("x")
        path.symlink_to("target")
    else:
        path.write_text("x")
        path.chmod(0o664 if kind == "written by others" else 0o644)
    if kind == "of another user":
        give_away(path)
    with pytest.raises(OSError) as caught:
        open_trusted(path)
    assert isinstance(caught.value, UntrustedError) == (kind in ("written by others", "of another user"))
