"""Shared helpers: every test writes its runs and reports below a temporary SEQGAN_HOME, never into the checkout."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def child(tmp_path):
    "Run a command in the project with its own SEQGAN_HOME; returns the finished process, output as text."
    def run(*command, home="home", cwd=ROOT, start=False):
        env = {**os.environ, "SEQGAN_HOME": str(tmp_path / home), "OMP_NUM_THREADS": "1"}
        env.pop("IN_TEST", None)
        how = dict(cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, **how) if start else subprocess.run(command, **how, timeout=900)
    return run


@pytest.fixture
def python(child):
    "Run Python code in a child process."
    return lambda code, **how: child(sys.executable, "-c", code, **how)
