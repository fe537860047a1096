"""What is installed: the pinned versions of constraints/, by utils/setup_env.sh, once; the package and its commands, by
pip; and that warnings count then."""
from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
import venv
import warnings
from importlib import metadata
from pkgutil import resolve_name

import pins
import pytest
from helpers import refused
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pins.ROOT
ANEW = "run: bash utils/make_constraints.sh"


def requirements(python):
    """The requirements of one Python, PyTorch excluded, which the constraints leave alone."""
    names = ["requirements.txt", "requirements-serve.txt", "requirements-dev.txt"]
    names += ["requirements-ipu.txt"] if python == "3.8" else []
    for line in "\n".join((ROOT / name).read_text() for name in names).splitlines():
        if line and line[0] not in "#-":
            requirement = Requirement(line)
            applies = requirement.marker is None or requirement.marker.evaluate({"python_version": python})
            if applies and requirement.name != "torch":
                yield requirement


PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.8"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_to_a_version_that_it_allows(python):
    assert sorted(path.name for path in (ROOT / "constraints").iterdir()) == [f"py{name}.txt" for name in PYTHONS]
    assert "Python 3.10 to 3.13 (3.8 on IPUs)" in (ROOT / "README.md").read_text()
    versions = pins.read_pins(python)
    for requirement in requirements(python):
        pinned = versions.get(canonicalize_name(requirement.name))
        assert pinned is not None and requirement.specifier.contains(pinned), (str(requirement), pinned, ANEW)
    assert not [name for name in versions if name.startswith(("torch", "triton", "nvidia", "cuda"))]


@pytest.mark.skipif(bool(pins.other_versions()), reason="other versions may require other packages")
def test_what_requirements_require_is_pinned_too():
    names, seen = [canonicalize_name(requirement.name) for requirement in requirements(pins.PYTHON)], {"torch"}
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in pins.read_pins(), ANEW
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(canonicalize_name(requirement.name))


PYTHON = """#!/usr/bin/env bash
# Stands for python3 of the version $FAKE_PYTHON, with PyTorch of the version $FAKE_TORCH: notes what pip is asked for.
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        echo "$0 ${*:2}" | sed 's/ -c .*//' >> "$FAKE_LOG"
        while [ "$1" != -c ]; do shift; done
        sed 's/^/pinned /' "$2" >> "$FAKE_LOG"
        grep . >> "$FAKE_LOG" ;;
    *"import torch"*) [ -n "$FAKE_TORCH" ] && echo "$FAKE_TORCH" ;;
    *print*) echo "$FAKE_PYTHON" ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Run set_up in a small project; return what it printed and what pip was asked for, or None if it was not."""
    files = {
        "bin/python3": PYTHON, "requirements.txt": "torch==2.13.0\nnumpy>=1.22\n",
        "requirements-ipu.txt": "numpy<1.25\n", "requirements-dev.txt": "-r requirements.txt\npytest\n",
        "constraints/py3.8.txt": "numpy==1.24.4\n", "constraints/py3.11.txt": "numpy==2.4.6\npytest==9.2.0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bin" / "python3").chmod(0o755)
    script = '. "{}/utils/setup_env.sh"; set_up "{}" $1 "{}"/requirements.txt "{}"/requirements-dev.txt'
    log = tmp_path / "log"

    def run(word="", python="3.11", torch="", status=0, **environment):
        log.unlink() if log.exists() else None
        environment = dict(environment, PATH="{}:/usr/bin:/bin".format(tmp_path / "bin"), FAKE_PYTHON=python)
        environment.update(FAKE_TORCH=torch, FAKE_LOG=str(log))
        command = ["bash", "-euo", "pipefail", "-c", script.format(ROOT, *[tmp_path] * 3), "set_up", word]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        asked = log.read_text().replace(str(tmp_path), "").splitlines() if log.exists() else None
        return done.stdout + done.stderr, asked

    return run


def test_the_pinned_versions_are_installed_once(install, tmp_path):
    pip, pinned = "/.venv/bin/python pip install --quiet", ["pinned numpy==2.4.6", "pinned pytest==9.2.0"]
    asked = [pip, *pinned, "torch==2.13.0", "numpy>=1.22", "pytest"]
    printed, found = install()
    assert found == asked and "constraints/py3.11.txt" in printed and install() == ("", None)
    for changed in ("constraints/py3.11.txt", "requirements-dev.txt"):
        with (tmp_path / changed).open("a") as file:
            file.write("\n# other versions\n")
        assert install()[1] and install()[1] is None


SDK = {"python": "3.8", "torch": "2.0.1+cpu", "POPLAR_SDK_ENABLED": "/opt/sdk"}


@pytest.mark.parametrize("options, lines", [
    ({"torch": "1.13.1"}, ["pinned numpy==2.4.6", "pinned pytest==9.2.0", "torch==2.13.0", "numpy>=1.22", "pytest"]),
    ({"torch": "2.13.0+cpu"}, ["pinned numpy==2.4.6", "pinned pytest==9.2.0", "numpy>=1.22", "pytest"]),
    ({"torch": "2.2.1"}, ["pinned pytest==9.2.0", "numpy>=1.22", "pytest", "numpy<2"]),
    ({"python": "3.14"}, ["torch==2.13.0", "numpy>=1.22", "pytest"]),
    (SDK, ["pinned numpy==1.24.4", "numpy<1.25", "pytest", "numpy<2"]),
], ids=str)
def test_an_installed_pytorch_stays_and_other_pythons_get_what_the_requirements_allow(install, options, lines):
    printed, found = install(**options)
    assert found[1:] == lines and install(**options)[1] is None
    told = "no constraints for Python 3.14" in printed and "3.10 to 3.13" in printed
    assert told == (options.get("python") == "3.14")


def test_the_newest_versions_have_a_folder_of_their_own(install):
    """Asked for each time, also beside an active environment; and what was installed before stays installed."""
    install()
    for _ in range(2):
        printed, found = install("--latest", VIRTUAL_ENV="/nowhere")
        assert found[0] == "/.venv/latest/bin/python pip install --quiet --upgrade --upgrade-strategy eager"
        assert found[1:] == ["torch==2.13.0", "numpy>=1.22", "pytest"] and "newest" in printed
    assert install() == ("", None) and "--latest" in install("--latest", status=1, **SDK)[0]


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    return listed.stdout.split() or pytest.skip("no git repository: which files belong to the project is unknown")


def test_every_package_module_and_data_file_is_listed_for_pip(project):
    listed = project["tool"]["setuptools"]
    files = tracked()
    packages = {os.path.dirname(name).replace("/", ".") for name in files if name.endswith("/__init__.py")}
    assert set(listed["packages"]) == packages
    for name in (name for name in files if name.endswith(".py") and "/" in name):
        assert os.path.dirname(name).replace("/", ".") in {*packages, "docs", "tests", "tests.assets", "examples"}, name
    modules = {name[:-3] for name in files if name.endswith(".py") and "/" not in name}
    assert set(listed["py-modules"]) == modules - {"setup", "process_captions"}
    patterns = [f"{name}/{pattern}" for name, found in listed["package-data"].items() for pattern in found]
    for name in tracked("bpe", "models", "ops", "server"):
        if not name.endswith((".py", "bpe/SOURCE.md")):
            assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_every_console_command_has_its_help(project, monkeypatch, capsys):
    for name, target in project["project"]["scripts"].items():
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        assert refused("", resolve_name(target), kind=SystemExit) in ("", "0", "None")
        assert "--" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flag", [(), ("-e",)], ids=["copied", "editable"])
def test_pip_installs_commands_that_run_in_any_folder(tmp_path, flag):
    pytest.importorskip("setuptools")
    for name in tracked():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "elsewhere").mkdir()
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
    (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    def run(*words):
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
        done = subprocess.run(words, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *flag, tmp_path / "source")
    assert str(tmp_path) in run(python, "-c", "import ops; print(ops.__file__)")
    commands = python.parent
    run(commands / "mini-dalle-train", "--config", "unit_test", "--generated-data", "--max-steps", "1")
    run(commands / "mini-dalle-generate", "--dalle_path", "demo", "--text", "apple", "--num_images", "1")
    assert list((tmp_path / "elsewhere").glob("outputs/apple/*.jpg"))


@pytest.mark.skipif(bool(pins.other_versions()), reason="warnings are errors with the pinned versions only")
@pytest.mark.parametrize("kind", [FutureWarning, UserWarning, RuntimeWarning, DeprecationWarning])
def test_warnings_are_errors_here_and_in_programs(kind):
    with pytest.raises(kind):
        warnings.warn("ours", kind, stacklevel=1)
    warnings.warn_explicit("of others", DeprecationWarning, "logging/x.py", 1, module="logging.x")
    program = f"import warnings; warnings.warn('x', {kind.__name__})"
    done = subprocess.run([sys.executable, "-c", program], env=dict(os.environ), stderr=subprocess.PIPE)
    assert done.returncode == (kind is not DeprecationWarning)
