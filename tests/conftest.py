"""Shared helpers: every test writes its runs and reports below a temporary SEQGAN_HOME."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import FAULTS, STUDY, command
from forking import Forked
from outcomes import KINDS

torch.set_num_threads(1)  # several workers share the cores
ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SERVER = """
import socket
import sys
sys.path.insert(0, sys.argv[1])
import faults
import forking
import torchvision
import seqgan.evaluation.predictors
faults.prepare()
forking.serve(socket.socket(fileno=int(sys.argv[2])))
"""


LONGEST = """
test_interruption test_reproduce test_faults test_commands test_jobs test_processes test_recipes
test_plumbing test_project test_pretrained
""".split()


def pytest_collection_modifyitems(items):
    "The files that take longest come first, so that no process is left with one of them."

    def place(item):
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=place)


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


@pytest.fixture
def two_ranks(forked):
    "Start `function(*arguments)` in two processes, connected as torchrun connects them."

    def start(function, *arguments, **named):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
        }
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [forked(function, *arguments, **named, **together, **ranks) for ranks in own]

    return start


def wait_for_both(processes):
    "Their exit statuses and outputs."
    return [process.wait() for process in processes]


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
