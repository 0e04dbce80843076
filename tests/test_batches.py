"Batches while files vanish and processes end: workers, shares, and where they run."

import os
import pickle
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from image_files import is_same, load_lazily, write_images

from seqgan.config import Data
from seqgan.core import generator, to_float
from seqgan.data.batches import MAX_WORKERS, Batches, _StepDataset
from seqgan.data.images import cpu_cores, load


def lazy_batches(folder, **changes):
    train = load_lazily(folder)
    return Batches(train.images, train.labels, 8, **{"seed": 0, "crop": "random"} | changes)


def test_nothing_of_a_class_is_readable(tmp_path):
    write_images(tmp_path, 60, ("cat", "dog"))
    train = load_lazily(tmp_path)
    for path in (tmp_path / "dog").iterdir():
        path.write_bytes(b"")
    assert len(train.images[train.labels == 0]) > 20
    with pytest.raises(ValueError, match="Of [0-9]+ images of its class none can"):
        train.images[train.labels == 1]
    with pytest.raises(ValueError, match="of its class none can"):  # out of a worker, too
        reader = Batches(train.images, train.labels, len(train), 0, crop="random")
        reader(0)


def test_a_file_vanishes_while_workers_read(tmp_path, capfd):
    train = load_lazily(write_images(tmp_path, 64, ("cat", "dog")))
    before, all_labels = train.images[:], train.labels
    batches = Batches(train.images, train.labels, 8, seed=0, flip=False)
    for step in range(3):
        assert is_same(batches(step), batches[step])
    order = torch.randperm(len(train), generator=generator("order", 0, 2))  # of the third epoch
    gone = order[:3].tolist()
    for i in gone:
        os.remove(train.images.read(train.images.names[i]))
    third = range(2 * len(batches), 3 * len(batches))
    results = {step: batches(step) for step in range(3, third.stop)}
    assert all(is_same(results[step], batches[step]) for step in third)
    images = torch.cat([results[step][0] for step in third])
    labels = torch.cat([results[step][1] for step in third])
    assert torch.equal(labels, all_labels[order[: len(labels)]])
    for k, i in enumerate(order[: len(labels)].tolist()):
        while i in gone:  # the next one of its class
            following = [*range(i + 1, len(train)), *range(len(train))]
            i = next(j for j in following if all_labels[j] == all_labels[i])
        assert torch.equal(images[k], to_float(before[i]))
    lines = [line for line in capfd.readouterr().out.splitlines() if "stands in for it" in line]
    assert all("FileNotFoundError" in line for line in lines)
    assert len(lines) == len(set(lines)) == len(gone)  # once each, whichever worker met it first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_is_killed(tmp_path, capfd, number):
    "By a scheduler or for want of memory: the step is read anew, and the batches are the same."
    batches = lazy_batches(write_images(tmp_path, 40))
    for step in range(12):
        assert is_same(batches(step), batches[step])
        if step == 3:
            for worker in batches._ahead.stream._workers:
                os.kill(worker.pid, number)
    assert capfd.readouterr().out.count("is read anew") == 1


STREAM = """
import sys, time, torch
from seqgan.config import Data
from seqgan.data.batches import Batches
from seqgan.data.images import load
train = load(Data(sys.argv[1], size=12, crop="random"), "train")
batches = Batches(train.images, train.labels, 8, seed=0, crop="random")
for step in range(4):
    batches(step)
print("workers", *[p.pid for p in torch.multiprocessing.active_children()], flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
if sys.argv[2] == "fail":
    raise SystemExit(3)
"""


def is_running(pid):
    "Not so of one that has ended and was not collected by its new parent yet."
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("end", ["return", "fail", "wait"])
def test_workers_end_with_their_parent(child, tmp_path, end):
    folder = write_images(tmp_path / "images", 40)
    process = child(sys.executable, "-c", STREAM, str(folder), end, start=True)
    summary, line = process.stdout.readline(), process.stdout.readline()
    assert "for training" in summary, summary + line + process.stdout.read()
    assert line.startswith("workers "), line + process.stdout.read()
    pids = [int(pid) for pid in line.split()[1:]]
    assert len(pids) == min(cpu_cores(), MAX_WORKERS)
    if end == "wait":
        assert all(map(is_running, pids))
        process.send_signal(signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, pids))


def read_in_a_pool(folder):
    batches = lazy_batches(folder)
    return all(is_same(batches(step), batches[step]) for step in range(4))


def test_workers_of_a_forked_process(tmp_path):
    "nbdev_test runs notebooks so."
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(read_in_a_pool, write_images(tmp_path / "images", 40)).result(60)


def test_workers_that_are_not_forked(tmp_path):
    "Then the batches are sent to them as a pickle."
    batches = lazy_batches(write_images(tmp_path, 40))
    received = pickle.loads(pickle.dumps(_StepDataset(batches)))
    assert is_same(received[3][:2], batches.pixels(3))


def test_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    cores = cpu_cores()
    assert 1 <= cores <= os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cpu_cores() == max(1, cores // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert cpu_cores() == 1


def test_shares_in_turn_are_the_batch(tmp_path):
    processes = 4
    write_images(tmp_path, 50, ("cat", "dog"))
    held, lazy = load(Data(str(tmp_path), size=12), "train"), load_lazily(tmp_path)
    for train, crop in ((held, "centre"), (lazy, "centre"), (lazy, "random")):
        whole = Batches(train.images, train.labels, 16, seed=5, crop=crop)
        shares = [
            Batches(train.images, train.labels, 16, seed=5, crop=crop, share=(rank, processes))
            for rank in range(processes)
        ]
        for step in (0, 1, 7):
            parts = [share(step) for share in shares]
            assert len(parts[0][0]) == 16 // processes
            together = [torch.stack(part, 1).flatten(0, 1) for part in zip(*parts, strict=True)]
            assert is_same(together, whole[step])
    centres = [Batches(train.images, train.labels, 16, 5)(3) for train in (held, lazy)]
    assert is_same(*centres)  # held or not, the centre is the centre
