"""Processes that are killed anywhere, told to stop, or want the same run at once.

Each study ends with the files of an undisturbed one, to the last bit.
"""

import fcntl
import os
import random
import shutil
import signal
import struct
import sys
import termios
import time
from contextlib import suppress

import pytest
from conftest import ROOT, TORCHRUN, wait_for_both
from faults import DISK_IS_FULL, FAULTS, SETTINGS, STUDY, command
from forking import Forked
from outcomes import checkpoint_steps, finished, results, results_but_best, run_of

ALL = ["train", *STUDY]
AR = [*ALL, "--until", "ar"]
LONGER = "transformer_training.steps=104"
LONG_AR = ["train", "--phase", "2", "--set", *SETTINGS, LONGER, "--until", "ar"]
SAVES_AR = "rename ar/.part-N$"
STAGES = [
    "open vgg/log",
    "open branch-point/log",
    "rename tokenizer/.part-N/",
    "codes/train/.codes.json",
    "open decoder/log",
    SAVES_AR,
    "rename samples/.part",
]


# Killed


def checkpoints_in(folder):
    "Checkpoints, finished or not."
    return [*folder.glob("checkpoint-*"), *folder.glob(".part-*")]


def test_killed_everywhere(forked, home, whole):
    """kill -9 before a change of each kind to a file: inside checkpoints, models, codes, records.

    In every run. No step is computed again but the one that was not saved yet.
    """
    done, before, kills = [], {}, 0
    while True:
        status, output = forked(command, ALL, "each").wait()
        steps = (home.parent / "home-steps").read_text().splitlines()
        repeated = [step for step in steps[len(done) :] if step in done]
        assert len(repeated) <= 1, repeated
        assert before.items() <= finished(home).items()  # what was finished is untouched
        for folder in (home / "runs").iterdir():
            assert len(checkpoints_in(folder)) <= 4, folder
        if status == 0:
            break
        assert status == -signal.SIGKILL, output
        FAULTS["SIGKILL before a change of a file"] += 1
        kills += 1
        before, done = finished(home), steps
    assert kills > 30
    assert results(home) == results(whole)


@pytest.fixture(scope="module")
def longer(server, whole, tmp_path_factory):
    "The home of a longer training of the transformer that nothing disturbed."
    home = tmp_path_factory.mktemp("longer") / "home"
    shutil.copytree(whole, home)
    shutil.rmtree(run_of(home, "ar"))
    status, output = Forked(server, command, [LONG_AR], {"SEQGAN_HOME": str(home)}).wait()
    assert status == 0, output
    return home


def test_killed_at_any_moment(forked, copied, longer):
    "kill -9 at random moments, every second one inside a save."
    home, moments = copied("decoder"), random.Random(0)

    def saving():
        "When the unfinished checkpoints last changed."
        with suppress(FileNotFoundError):
            return {part.stat().st_ctime_ns for part in home.glob("runs/ar-*/.part-*")}
        return set()

    for i in range(12):
        before, process = saving(), forked(command, LONG_AR)
        while process.poll() is None and not saving() - before:
            time.sleep(0.005)
        if i % 2:
            time.sleep(0.2 * moments.random())
        if process.poll() is not None:
            break
        process.signal(signal.SIGKILL)
        FAULTS["SIGKILL at any moment"] += 1
        process.wait()
        assert len(checkpoints_in(run_of(home, "ar"))) <= 4
    status, output = forked(command, LONG_AR).wait()
    assert status == 0, output
    assert results(home, "ar") == results(longer, "ar")


# Told to stop


def assert_checkpoints_kept(home, stage):
    "Each unfinished training has its newest two checkpoints, and the best."
    for log in home.glob("runs/*/log.jsonl"):
        if (log.parent / "metrics.json").exists():
            continue
        steps = checkpoint_steps(log.parent)
        newest = {max(steps), max(steps) - 1} & steps
        assert len(steps) <= 3 and len(newest) == min(len(steps), 2), (stage, steps)


@pytest.mark.parametrize(
    "verb, stages",
    [
        ("train", STAGES),
        ("reproduce", [STAGES[i] for i in (0, 2, 3, 6)]),  # two signals, and codes of both kinds
    ],
)
def test_told_to_stop_in_every_run(forked, home, whole, verb, stages):
    "SIGTERM and Ctrl-C by turns: status 0, a sentence, checkpoints. The same command resumes."
    words = [verb, *STUDY]
    for i, stage in enumerate(stages):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        before = finished(home)
        status, output = forked(command, words, [[stage, number.name]]).wait()
        FAULTS[number.name] += 1
        assert status == 0, (stage, output)
        assert "stopping after this step" in output and "resumes from there" in output, output
        assert before.items() <= finished(home).items()
        assert_checkpoints_kept(home, stage)
    status, output = forked(command, words).wait()
    assert status == 0, output
    assert results(home) == results(whole)


def test_the_real_command(child, home):
    "Ctrl-C to `python -m seqgan train`, which a user types instead of calling `command`."
    words = "train --preset smoke --until vgg --set vgg.weights=local classifier.steps=100000"
    process = child(sys.executable, "-m", "seqgan", *words.split(), start=True)
    while not list(home.glob("runs/vgg-*/.lock")):
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    FAULTS["SIGINT"] += 1
    assert process.returncode == 0 and "Traceback" not in output, output
    assert "stopping after this step" in output, output
    assert "the same command resumes" in output, output


def chatter():
    "A process that prints without end until it is told to stop."
    from seqgan.training.processes import STOP, stop_on_signals

    stop_on_signals()
    while not STOP.is_set():
        print("x" * 1000, flush=True)


def test_told_to_stop_while_it_prints(forked):
    "SIGTERM while the process waits for somebody to read what it prints."

    def waiting_bytes():
        return struct.unpack("i", fcntl.ioctl(process.output, termios.FIONREAD, b"0000"))[0]

    process, before = forked(chatter), -1
    while before <= 0 or waiting_bytes() != before:  # until the pipe is full
        before = waiting_bytes()
        time.sleep(0.3)
    process.signal(signal.SIGTERM)
    FAULTS["SIGTERM"] += 1
    time.sleep(0.3)
    status, output = process.wait()
    assert status == 0 and "stopping after this step" in output, output[-2000:]


# Several commands at one run


def test_two_at_once(forked, home, whole):
    "Two processes that start the same study: one waits for the other, each run is computed once."
    processes = [forked(command, ALL) for _ in range(2)]
    ended = [process.wait() for process in processes]
    assert [status for status, _ in ended] == [0, 0], ended
    assert sum(output.count(": started") for _, output in ended) == 10
    assert results(home) == results(whole)


def test_told_to_stop_while_waiting(forked, home):
    "Of two processes at one run, the one that waits for the other ends when it is told to."
    words = [*ALL, "--until", "vgg"]
    first = forked(command, words, [["open vgg/log", "pause"]])
    first.wait_until((home / "here").exists)
    second = forked(command, words)
    second.wait_until(lambda: second.poll() is not None or b"waiting" in second.text)
    second.signal(signal.SIGTERM)
    FAULTS["SIGTERM"] += 1
    status, output = second.wait(60)
    assert status == 0 and "stopped waiting" in output, output
    (home / "go").touch()
    assert first.wait()[0] == 0


# Several processes of one command


def test_what_goes_wrong_in_one_process(two_ranks, copied, home, tmp_path):
    """The disk is full for the main of two processes when it must save: both end with a sentence.

    They resume. NaNs end both, too.
    """
    copied("decoder")
    for name in ("calm", "nan"):
        shutil.copytree(home, tmp_path / name)

    full = [[SAVES_AR, "nothing"], [SAVES_AR, "limit files"]]
    for status, output in wait_for_both(two_ranks(command, AR, full)):
        assert status == 1 and "Traceback" not in output, output
        assert any(words in output for words in DISK_IS_FULL), output
    FAULTS["full disk"] += 1

    nan = [(), ["ar", "transformer", 2, 99]]
    for status, output in wait_for_both(two_ranks(command, AR, *nan, home="nan")):
        assert status == 1 and "Traceback" not in output, output
        assert "10 steps in a row had a gradient" in output, output
    FAULTS["NaN"] += 1

    for name in ("home", "calm"):
        ended = wait_for_both(two_ranks(command, AR, home=name))
        assert [status for status, _ in ended] == [0, 0], ended
    assert results_but_best(home, "ar") == results_but_best(tmp_path / "calm", "ar")


TORCHRUN_PROGRAM = f"""
import os
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
from faults import command
rank = os.environ["RANK"]
Path(sys.argv[1], f"pid-{{rank}}").write_text(str(os.getpid()))
faults = [[{SAVES_AR!r}, "pause"]] if rank == "0" else []
sys.exit(command({LONG_AR}, faults))
"""


class Torchrun:
    "The longer training under torchrun; the main process waits inside its first save."

    def __init__(self, child, home, folder):
        (folder / "program.py").write_text(TORCHRUN_PROGRAM)
        words = [*TORCHRUN, str(folder / "program.py"), str(folder)]
        variables = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        self.folder = folder
        self.process = child(*words, start=True, **variables)
        while not (home / "here").exists():
            time.sleep(0.05)
            assert self.process.poll() is None, self.process.stdout.read()
        (home / "here").unlink()

    def pid(self, rank):
        return int((self.folder / f"pid-{rank}").read_text())

    def output(self):
        "What it printed, when it has ended."
        return self.process.communicate(timeout=300)[0]


def assert_as_calm(found, calm):
    """The same files to the last bit, but for rounding in the means that are logged.

    What two processes have summed up between two lines is saved as one sum, and so rounded.
    """
    (log,) = [name for name in calm if name.endswith("log.jsonl")]
    assert found.pop(log) == [pytest.approx(line, rel=1e-6) for line in calm.pop(log)]
    assert found == calm


def test_several_processes(child, forked, two_ranks, copied, tmp_path):
    """torchrun: a second one at the same run, kill -9 of one process and of all, SIGTERM.

    Then two processes end with the weights of two that nobody disturbed, and one resumes too.
    """
    home = copied("decoder")
    shutil.copytree(home, tmp_path / "calm")
    calm = wait_for_both(two_ranks(command, LONG_AR, home="calm"))
    assert [status for status, _ in calm] == [0, 0], calm

    first = Torchrun(child, home, tmp_path)
    for status, output in wait_for_both(two_ranks(command, LONG_AR)):
        assert status == 1 and "Traceback" not in output, output
        assert "Another command is computing" in output, output
    os.kill(first.pid(rank=1), signal.SIGKILL)
    (home / "go").touch()
    output = first.output()
    assert first.process.returncode == 1, output
    (home / "go").unlink()
    FAULTS["two torchruns at one run"] += 1
    FAULTS["SIGKILL of one of two processes"] += 1

    faults = [[SAVES_AR, "nothing"], [SAVES_AR, "pause"]]
    both = two_ranks(command, LONG_AR, faults)
    both[0].wait_until((home / "here").exists)
    (home / "here").unlink()
    for process in both:
        process.signal(signal.SIGKILL)
    wait_for_both(both)
    FAULTS["SIGKILL of two of two processes"] += 1
    shutil.copytree(home, tmp_path / "alone")

    third = Torchrun(child, home, tmp_path)
    third.process.send_signal(signal.SIGTERM)
    output = third.output()
    assert "stopped at step" in output and checkpoint_steps(run_of(home, "ar")), output
    FAULTS["SIGTERM to torchrun"] += 1

    both = wait_for_both(two_ranks(command, LONG_AR))
    assert [status for status, _ in both] == [0, 0], both
    assert "resumes from step" in both[0][1]
    assert_as_calm(results(home, "ar"), results(tmp_path / "calm", "ar"))
    status, output = forked(command, LONG_AR, home="alone").wait()
    assert status == 0 and "resumes from step" in output, output
    assert results(tmp_path / "alone", "ar").keys() == results(home, "ar").keys()
