"""Runs that are killed, and runs that two processes want at once."""
import re
import signal
import time

import pytest

CHILD = """
from functools import partialmethod
from seqgan.training import Loop
Loop.run = partialmethod(Loop.run, save_seconds=0)      # a checkpoint at every tick
from seqgan.config import preset
from seqgan.experiment import Study
from seqgan.features import weights_digest
study = Study(preset("smoke", {"tokenizer_training.steps": 60, "transformer_training.steps": 60, "transformer.dropout": 0.1}))
print("tokenizer", weights_digest(study.tokenizer), flush=True)
print("transformer", weights_digest(study.transformer), flush=True)
"""


def digests(output):
    return dict(re.findall(r"^(tokenizer|transformer) ([0-9a-f]{64})$", output, re.M))


@pytest.fixture
def expected(python):
    result = python(CHILD, home="whole")
    assert result.returncode == 0, result.stdout[-3000:]
    return digests(result.stdout)


def test_kill_and_resume(python, tmp_path, expected):
    "kill -9 in the middle of the tokenizer and of the transformer; the third start ends with the same weights, bit for bit."
    for kind in ("tokenizer", "ar"):
        process = python(CHILD, start=True)
        for _ in range(1200):
            if len(list((tmp_path / "home" / "runs").glob(f"{kind}-*/checkpoint-*"))): break
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list((tmp_path / "home" / "runs").glob(f"{kind}-*/metrics.json"))  # it was killed before it had finished
    result = python(CHILD)
    assert "going on from step" in result.stdout
    assert digests(result.stdout) == expected and len(expected) == 2


def test_two_at_once(python, expected):
    "Two processes that start the same study: one waits for the other, both end with the same weights."
    processes = [python(CHILD, start=True) for _ in range(2)]
    outputs = [p.communicate(timeout=600)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert [digests(o) for o in outputs] == [expected, expected]
    assert sum(o.count(": started") for o in outputs) == 6  # the two feature networks, the warm-up, the tokenizer, its codes, the transformer: each computed once
