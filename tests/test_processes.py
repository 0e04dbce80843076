"""Two processes at one training, on CPUs by gloo.

They end with the same parameters, and log the losses of one process at the same batch.
"""

import json
import sys

import pytest
from all_trainings import train_all
from conftest import TORCHRUN, wait_for_both
from faults import seqgan
from outcomes import run_of

CPU = {"CUDA_VISIBLE_DEVICES": ""}  # two processes need two GPUs, or none
TRAINED = {
    "vgg": ["net"],
    "tokenizer": ["tokenizer", "discriminator", "alignment"],
    "decoder": ["tokenizer", "discriminator"],
    "bound": ["tokenizer", "discriminator", "alignment"],
    "ar": ["transformer"],
    "nar": ["transformer"],
}


def tolerance(run, step, name):
    "How near a logged number of two processes must come to that of one: relative and absolute."
    if (run, step) in (("tokenizer", 1), ("bound", 1)):
        return {"rel": 2e-5, "abs": 1e-6}
    if name.startswith("val_") or "usage" in name or name == "accuracy":
        # Rounding decides now and then which code is nearest: 1 of 32 codes, or 1 image of 63.
        return {"rel": 1e-2, "abs": 0.05}
    return {"rel": 1e-3, "abs": 1e-4}


def log_of(home, run):
    lines = (home / "out" / run / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_are_one(forked, two_ranks, tmp_path, micro_batches):
    """Both phases with their discriminators, k-means, the entropy, the adversarial bound and
    alignment. The classifiers, codes, AR and NAR too, on sets that do not divide.
    """
    status, output = forked(train_all, micro_batches, home="one", **CPU).wait()
    assert status == 0, output[-3000:]
    both = wait_for_both(two_ranks(train_all, micro_batches, home="two"))
    assert [status for status, _ in both] == [0, 0], both
    printed = "".join(output for _, output in both)

    first, second = (
        json.loads((tmp_path / "two" / f"weights-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first.keys() == {f"{run}/{model}" for run in TRAINED for model in TRAINED[run]}
    for name in first:  # after every step, to the last bit
        assert first[name] == second[name] and len(set(first[name])) > 1, name

    for run in TRAINED:
        logs = log_of(tmp_path / "one", run), log_of(tmp_path / "two", run)
        assert len(logs[0]) == len(logs[1])
        for of_one, of_two in zip(*logs, strict=True):
            assert of_one.keys() == of_two.keys()
            for name in of_one.keys() - {"seconds_per_step"}:
                near = pytest.approx(of_one[name], **tolerance(run, of_one["step"], name))
                assert of_two[name] == near, (run, of_one["step"], name)
    assert all(line["adversarial_scale"] < 1e3 for line in log_of(tmp_path / "one", "bound"))

    for name in ("codes.npy", "labels.npy", "done.bin"):
        files = [tmp_path / home / "out/chunks" / name for home in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert printed.count("classifier") == 2  # printed by `train_all`, in both processes
    assert printed.count("MB in") == 3  # printed by the package, once


def test_command(child, forked, tmp_path):
    "`seqgan train` under torchrun, with samples that do not divide; one process finds all of it."
    settings = ["data.train=128", "data.val=16", "evaluation.reference=40", "evaluation.samples=21"]
    words = ["train", "--preset", "smoke", "--transformer", "NAR", "--phase", "2"]
    words += ["--set", *settings]
    two = child(*TORCHRUN, "-m", "seqgan", *words, **CPU)
    assert two.returncode == 0, two.stdout[-3000:]
    (record,) = (tmp_path / "home" / "reports" / "results").rglob("*.json")
    measured = json.loads(record.read_text())["metrics"]["generation"]
    assert measured.keys() >= {"FID-lite0", "IS-lite0", "class_accuracy"}
    status, again = forked(seqgan, *words, **CPU).wait()
    assert status == 0, again[-3000:]
    assert ": started" not in again and "to do" not in again, again[-3000:]


def test_accelerate_launch(child, tmp_path):
    "On processors it starts one process; on several GPUs it is torchrun."
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m"]
    words = "seqgan train --preset smoke --until vgg --set vgg.weights=local".split()
    result = child(*launch, *words, **CPU)
    assert result.returncode == 0, result.stdout[-3000:]
    assert (run_of(tmp_path / "home", "vgg") / "metrics.json").exists()
