"""Shared helpers: every test writes its runs and reports below a temporary SEQGAN_HOME, never into the checkout."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, STUDY, Forked, command

ROOT = Path(__file__).parents[1]


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        terminalreporter.write_line(
            f"{FAULTS.total()} faults injected: "
            + ", ".join(f"{n} {what}" for what, n in FAULTS.most_common())
        )


@pytest.fixture
def child(tmp_path):
    "Run a command in the project with its own SEQGAN_HOME; returns the finished process, output as text."

    def run(*command, home="home", cwd=ROOT, start=False, **more):
        env = {**os.environ, "SEQGAN_HOME": str(tmp_path / home), "OMP_NUM_THREADS": "1"} | more
        env.pop("IN_TEST", None)
        how = dict(cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return (
            subprocess.Popen(command, **how)
            if start
            else subprocess.run(command, **how, timeout=900)
        )

    return run


@pytest.fixture
def python(child):
    "Run Python code in a child process."
    return lambda code, **how: child(sys.executable, "-c", code, **how)


@pytest.fixture(scope="session")
def server():
    "The process that is forked."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        f"import socket, sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import faults, seqgan.__main__, seqgan.metrics, torchvision; from seqgan.config import preset; from seqgan.data import load; "
        f"[load(preset('smoke').data, split) for split in ('train', 'val')]; faults.serve(socket.socket(fileno={theirs.fileno()}))"
    )
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    env.pop("IN_TEST", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=env, pass_fds=[theirs.fileno()]
    )
    theirs.close()
    yield ours
    ours.close()
    process.wait(60)


@pytest.fixture
def forked(server, tmp_path):
    "Start `function(*arguments)` in a process of its own, with its own SEQGAN_HOME: a `Forked`."
    return lambda function, *arguments, home="home", **env: Forked(
        server, function, arguments, {"SEQGAN_HOME": str(tmp_path / home)} | env
    )


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
    "Make the home of this test a copy of the whole study as far as the run `until`, without those after it."

    def copy(until, source=whole):
        shutil.copytree(source, home)
        kinds = [
            "vgg",
            "evaluator",
            "warmup",
            "tokenizer",
            "image_codes",
            "decoder",
            "ar",
            "codes",
            "generation",
        ]
        for kind in kinds[kinds.index(until) + 1 :]:
            for folder in (home / "runs").glob(f"{kind}-*"):
                shutil.rmtree(folder)
        shutil.rmtree(home / "reports")
        return home

    return copy
