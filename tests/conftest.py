"""What all tests share: --slow, single-threaded PyTorch, warnings as errors, and the real photos where they are."""
from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pins
import pytest
import torch

import log
from ops import build
from utils.caches import cache_folder

#: Warnings are errors where everything is installed as pinned, in the tests and in the programs they start. With other
#: versions one may be no fault of ours: pytest lists it. A DeprecationWarning is meant for the module that it names.
#: What Pillow and PyTorch say of a file that is damaged on purpose is meant for its owner.
STRICT = [f"error::{kind}Warning" for kind in ("Future", "Runtime", "User")]
STRICT += ["ignore:Corrupt EXIF data:UserWarning", "ignore:Detected pickle protocol:UserWarning"]
OURS = r"(test_\w+|args|benchmarks|bpe|dalle|data|engines|evaluate|examples_utils|generate|log"
OURS += r"|models|ops|train\w*|utils)\b"

#: The tests that look at loss.png. All others that train in this process would spend half of their time on drawing it.
CURVES = ("test_log.py", "test_disks.py::test_folders_that_vanish", "test_train.py::test_training_lowers_the_loss")
plot_losses = log.plot_losses


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config):
    log.plot_losses = lambda *_: False
    # The models are tiny: one thread is faster than sharing them out, and results do not depend on the machine's cores.
    torch.set_num_threads(1)
    # Image codes go to a folder of this session, with copies of compiled kernels; matplotlib's slow font cache stays.
    os.environ.setdefault("MPLCONFIGDIR", str(cache_folder("matplotlib")))
    kernels = cache_folder("dalle", "kernels")
    config.own_cache = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="test_cache_")
    if kernels.is_dir():
        shutil.copytree(kernels, Path(config.own_cache, "dalle", "kernels"))
    if config.getoption("numprocesses", None):  # by pytest-xdist's parent: compiled once, for its workers to copy
        for source in (Path(__file__).parents[1] / "ops" / "csrc").glob("*.c"):
            build.library(source.stem)
    if not pins.other_versions():
        os.environ["PYTHONWARNINGS"] = ",".join(STRICT)
        for line in [*STRICT, "error::DeprecationWarning:" + OURS]:
            config.addinivalue_line("filterwarnings", line)


def pytest_terminal_summary(terminalreporter):
    if pins.other_versions():
        terminalreporter.write_line("warnings are no errors, because of " + ", ".join(pins.other_versions()))


def pytest_unconfigure(config):
    shutil.rmtree(getattr(config, "own_cache", ""), ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    """Escape lone surrogates in what a test logged: pytest-xdist cannot send them."""
    report = (yield).get_result()
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """Programs that run within a test set up logging: undone, or what a later test logs depends on the order."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)  # Python's; a fixture of the module may have set up logging before this one
    handlers = list(root.handlers)
    yield
    root.setLevel(logging.WARNING)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(autouse=True)
def curves(request, monkeypatch):
    """Draw loss.png where a test looks at it."""
    if request.node.nodeid.rpartition("/")[2].startswith(CURVES):
        monkeypatch.setattr(log, "plot_losses", plot_losses)


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real COCO photos and captions; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data (real COCO photos and captions) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def mindalle_folder(tmp_path_factory):
    """A tiny model in minDALL-E's published layout, to read and not to change."""
    from mindalle_folder import make_folder
    return make_folder(tmp_path_factory.mktemp("mindalle") / "tiny")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """24 pairs with two captions each and a tiny VQGAN, for `helpers.flags` and `helpers.run`; not to be changed."""
    from helpers import fill
    return fill(tmp_path_factory.mktemp("training"), 24)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file in torch-fidelity's layout: random weights whose norms fit data, and a head that tells images apart."""
    from helpers import random_images

    from metrics.inception import Inception
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    _, logits = network(random_images(8, 64, 3))
    network.fc.weight.data *= 40 / logits.std()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), str(path))
    return path


@pytest.fixture(scope="session")
def server():
    """Runs the programs as processes of their own, each in milliseconds (see fork_server.py)."""
    from fork_server import ForkServer
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def clean_modules():
    """Forget dalle-pytorch afterwards, and what stands in for its imports."""
    before = set(sys.modules)
    yield
    from benchmarks.contestants import STUBS
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"dalle_pytorch", *(stub.split(".")[0] for stub in STUBS)}:
            del sys.modules[name]


@pytest.fixture
def products():
    """Sets the precision of float32 products; the former one comes back after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads, likewise."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poptorch(monkeypatch):
    """The stand-in for PopTorch, as `import poptorch` finds it."""
    from poptorch_stand_in import install
    return install(monkeypatch)


@pytest.fixture(params=["native", "emulated"])
def unit(request):
    """The matrix unit of the processor, where it has one, or one in portable C."""
    from models_for_tests import matrix_units
    with matrix_units(request.param):
        yield request.param


@pytest.fixture(params=["none", "native", "emulated"])
def unit_of_rows(request):
    """The same for the native decoder's bfloat16 and int8 weights, and without one."""
    from models_for_tests import units_of_rows
    with units_of_rows(request.param):
        yield request.param


@pytest.fixture(scope="session")
def undisturbed(server, folder, tmp_path_factory):
    """Results of runs of test_crash that nothing happened to, for so many processes, and the CPU time they took."""
    from test_crash import run_undisturbed
    make = functools.partial(tmp_path_factory.mktemp, "whole")
    return functools.lru_cache(None)(lambda processes: run_undisturbed(server, folder, make(), processes))
