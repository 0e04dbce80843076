"""Shared helpers: every test writes its runs and reports below a temporary SEQGAN_HOME."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, STUDY, command
from forking import Forked
from outcomes import KINDS

ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SERVER = """
import socket
import sys
sys.path.insert(0, sys.argv[1])
import faults
import forking
import torchvision
import seqgan.__main__
import seqgan.evaluation.measurement
from seqgan.data.images import load
from seqgan.presets import preset
for split in ("train", "val"):
    load(preset("smoke").data, split)
forking.serve(socket.socket(fileno=int(sys.argv[2])))
"""


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        kinds = ", ".join(f"{count} {fault}" for fault, count in FAULTS.most_common())
        terminalreporter.write_line(f"{FAULTS.total()} faults injected: {kinds}")


def environment(**more):
    "Variables for a process that computes as a user's does, on one thread."
    found = {**os.environ, "OMP_NUM_THREADS": "1"} | more
    found.pop("IN_TEST", None)
    return found


@pytest.fixture
def child(tmp_path):
    """Run a command in the project with its own SEQGAN_HOME.

    Returns the finished process, output as text; with `start`, the running one.
    """

    def run(*words, home="home", cwd=ROOT, start=False, **more):
        env = environment(SEQGAN_HOME=str(tmp_path / home), **more)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if start:
            return subprocess.Popen(words, cwd=cwd, env=env, **pipes)
        return subprocess.run(words, cwd=cwd, env=env, timeout=900, **pipes)

    return run


@pytest.fixture
def python(child):
    "Run Python code in a child process."
    return lambda code, **named: child(sys.executable, "-c", code, **named)


@pytest.fixture(scope="session")
def server():
    "A socket to the process that is forked."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(ROOT / "tests"), str(theirs.fileno())],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"),
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    yield ours
    ours.close()
    process.wait(60)


@pytest.fixture
def forked(server, tmp_path):
    "Start `function(*arguments)` in a process of its own, with its own SEQGAN_HOME: a `Forked`."

    def start(function, *arguments, home="home", **more):
        env = {"SEQGAN_HOME": str(tmp_path / home)} | more
        return Forked(server, function, arguments, env)

    return start


@pytest.fixture(scope="session")
def whole(server, tmp_path_factory):
    "The home of a study that nothing disturbed."
    home = tmp_path_factory.mktemp("whole") / "home"
    status, output = Forked(server, command, [["train", *STUDY]], {"SEQGAN_HOME": str(home)}).wait()
    assert status == 0, output
    return home


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def copied(whole, home):
    "Make the home of this test a copy of a study as far as the run `until`."

    def copy(until, source=whole):
        shutil.copytree(source, home)
        for kind in KINDS[KINDS.index(until) + 1 :]:
            for folder in (home / "runs").glob(f"{kind}-*"):
                shutil.rmtree(folder)
        shutil.rmtree(home / "reports", ignore_errors=True)
        return home

    return copy
