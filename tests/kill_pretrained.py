"""Kills `save_pretrained` at each operation on files, at random times and by a full disk.

`python tests/kill_pretrained.py FOLDER`: the folder always holds one model, whole, or none.
"""

import errno
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

from test_pretrained import Tokenizer, equal, new_tokenizer

FOLDER = Path(sys.argv[1])
# the same shapes: a mixture of the two would load
MODELS = [new_tokenizer(), new_tokenizer({"quantizer.normalize": False})]


def held():
    "The model that the folder holds, 0 or 1, or None."
    try:
        loaded = Tokenizer.from_pretrained(FOLDER)
    except FileNotFoundError as error:
        assert "config.json is missing" in str(error), error
        return None
    same = [i for i, m in enumerate(MODELS) if equal(loaded, m) and loaded.config == m.config]
    assert same, "a mixture"
    return same[0]


def fork(work):
    "The process id of a child that runs `work` and ends with 0."
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def kill_at_operation(n):
    "Save model 1 over model 0 and kill it at its n-th operation on files; False if it has fewer."
    left = n

    def hook(event, arguments):
        nonlocal left
        if event.startswith(("os.", "open", "tempfile", "shutil")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def save():
        sys.addaudithook(hook)
        MODELS[1].save_pretrained(FOLDER, "# 1")

    MODELS[0].save_pretrained(FOLDER, "# 0")
    status = os.waitpid(fork(save), 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    return status != 0


def at_each_operation():
    outcomes = []
    while kill_at_operation(len(outcomes) + 1):
        outcomes.append(held())
    outcomes.append(held())
    print("killed at", len(outcomes) - 1, "operations:", outcomes)
    changes = [o for i, o in enumerate(outcomes) if not i or outcomes[i - 1] != o]
    assert changes == [0, None, 1], changes
    assert len(outcomes) > 8


def at_random_times(times=150):
    def save():
        while True:
            for model in MODELS:
                model.save_pretrained(FOLDER, "# card")

    random.seed(0)
    counts = {0: 0, 1: 0, None: 0}
    for _ in range(times):
        pid = fork(save)
        time.sleep(random.uniform(0.001, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        counts[held()] += 1
    print("killed", times, "times:", counts)


def by_a_full_disk():
    "A limit on the size of files, between that of the configuration and that of the weights."
    shutil.rmtree(FOLDER)
    MODELS[0].save_pretrained(FOLDER)
    before = sorted(FOLDER.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        MODELS[1].save_pretrained(FOLDER)
    except OSError as error:
        print(error)
        assert error.errno == errno.ENOSPC, error
        assert "no room for" in str(error), error
    else:
        raise AssertionError("written")
    assert sorted(FOLDER.iterdir()) == before
    assert held() == 0


if __name__ == "__main__":
    at_each_operation()
    at_random_times()
    by_a_full_disk()
