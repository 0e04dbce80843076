"""Processes that are killed anywhere, told to stop, or want the same run at once: each study ends with the files of an undisturbed one, to the last bit."""

import fcntl
import os
import random
import shutil
import signal
import socket
import struct
import sys
import termios
import time
from contextlib import suppress

import pytest
from conftest import ROOT
from faults import FAULTS, FULL, STUDY, Forked, command, finished, kept, results, run_of

AR = ["train", *STUDY, "transformer_training.steps=104", "--until", "ar"]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STAGES = [
    "open vgg/log",
    "rename evaluator/.part-N$",
    "open branch-point/log",
    "rename tokenizer/.part-N/",
    "codes/train/.codes.json",
    "open decoder/log",
    "rename ar/.part-N$",
    "rename samples/.part",
]


def test_killed_everywhere(forked, home, whole):
    "kill -9 before a change of each kind to a file: in every run, inside checkpoints, models, codes, metrics, records. No step is computed again but the one that was not saved yet."
    done, before, lost, killed_at = [], {}, [], []
    while True:
        status, output = forked(command, ["train", *STUDY], "each").wait()
        steps, now = (home.parent / "home-steps").read_text().splitlines(), finished(home)
        assert before.items() <= now.items()  # what was finished is untouched
        for folder in (home / "runs").iterdir():
            assert len(list(folder.glob("checkpoint-*")) + list(folder.glob(".part-*"))) <= 4, (
                folder
            )
        if len(again := [step for step in steps[len(done) :] if step in done]) > 1:
            lost.append((killed_at[-1], again))
        if status == 0:
            break
        assert status == -signal.SIGKILL, output
        FAULTS["SIGKILL before a change of a file"] += 1
        before, done, killed_at = now, steps, (home.parent / "home-kinds").read_text().splitlines()
    assert len(killed_at) > 30 and not lost, lost
    assert results(home) == results(whole)


@pytest.fixture(scope="module")
def longer(server, whole, tmp_path_factory):
    "The home of a longer training of the transformer that nothing disturbed, after the runs of `whole`."
    home = tmp_path_factory.mktemp("longer") / "home"
    shutil.copytree(whole, home)
    shutil.rmtree(run_of(home, "ar"))
    status, output = Forked(server, command, [AR], {"SEQGAN_HOME": str(home)}).wait()
    assert status == 0, output
    return home


def test_killed_at_any_moment(forked, copied, longer):
    "kill -9 at random moments, every second one inside a save."
    home, random_, kills = copied("decoder"), random.Random(0), 0

    def saving():
        "When the checkpoints in the making last changed."
        with suppress(FileNotFoundError):
            return {part.stat().st_ctime_ns for part in home.glob("runs/ar-*/.part-*")}
        return set()

    while kills < 12:
        before, process = saving(), forked(command, AR)
        process.until(lambda: saving() - before or process.poll() is not None)
        if kills % 2:
            time.sleep(0.2 * random_.random())
        if process.poll() is not None:
            break
        process.signal(signal.SIGKILL)
        process.wait()
        assert len([*home.glob("runs/ar-*/checkpoint-*"), *home.glob("runs/ar-*/.part-*")]) <= 4
        kills += 1
    status, output = forked(command, AR).wait()
    assert status == 0, output
    assert results(home, "ar") == results(longer, "ar")


@pytest.mark.parametrize("how", ["train", "reproduce"])
def test_told_to_stop_in_every_run(forked, home, whole, how):
    "SIGTERM and Ctrl-C by turns: status 0, a sentence, the newest two checkpoints and the best. The same command goes on and ends with the same files."
    what = ["train", *STUDY] if how == "train" else ["reproduce", *STUDY]
    stages = (
        STAGES if how == "train" else [STAGES[i] for i in (0, 3, 4, 7)]
    )  # two signals, and codes of both kinds
    for stage, number in zip(stages, [signal.SIGTERM, signal.SIGINT] * 4):
        before = finished(home)
        status, output = forked(command, what, [[stage, number.name]]).wait()
        FAULTS[number.name] += 1
        assert (
            status == 0 and "stopping after this step" in output and "goes on from there" in output
        ), (stage, output)
        assert before.items() <= finished(home).items()
        for folder in home.glob("runs/*/log.jsonl"):
            steps = kept(folder.parent)
            if not (folder.parent / "metrics.json").exists():
                assert (
                    steps
                    and len(steps) <= 3
                    and len({max(steps), max(steps) - 1} & steps) == min(len(steps), 2)
                ), (stage, steps)
    status, output = forked(command, what).wait()
    assert status == 0, output
    assert results(home) == results(whole)


def test_the_real_command(child, home):
    "Ctrl-C to `python -m seqgan train`: what the tests above start by a function is what a user types."
    process = child(
        sys.executable,
        "-m",
        "seqgan",
        "train",
        "--preset",
        "smoke",
        "--until",
        "vgg",
        "--set",
        "classifier.steps=100000",
        start=True,
    )
    while not list(home.glob("runs/vgg-*/.lock")):
        assert process.poll() is None and not time.sleep(0.05), process.stdout.read()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    FAULTS["SIGINT"] += 1
    assert (
        process.returncode == 0
        and "stopping after this step" in output
        and "the same command goes on" in output
        and "Traceback" not in output
    ), output


def chatter():
    "A process that prints without end until it is told to stop."
    from seqgan.__main__ import stop_on_signals
    from seqgan.training.processes import STOP

    stop_on_signals()
    while not STOP.is_set():
        print("x" * 1000, flush=True)


def test_told_to_stop_while_it_prints(forked):
    "SIGTERM while the process waits for somebody to read what it prints."
    process, size = forked(chatter), [-1, -2]
    while size[-1] != size[-2] or size[-1] <= 0:
        time.sleep(0.3)
        size.append(struct.unpack("i", fcntl.ioctl(process.output, termios.FIONREAD, b"0000"))[0])
    process.signal(signal.SIGTERM)
    time.sleep(0.3)
    status, output = process.wait()
    assert status == 0 and "stopping after this step" in output, output[-2000:]


def test_two_at_once(forked, home, whole):
    "Two processes that start the same study: one waits for the other, both end, each run is computed once."
    processes = [forked(command, ["train", *STUDY]) for _ in range(2)]
    ended = [process.wait() for process in processes]
    assert [status for status, _ in ended] == [0, 0], ended
    assert sum(output.count(": started") for _, output in ended) == 9
    assert results(home) == results(whole)


def test_told_to_stop_while_waiting(forked, home):
    "Of two processes at one run, the one that waits for the other ends when it is told to."
    first = forked(command, ["train", *STUDY, "--until", "vgg"], [["open vgg/log", "pause"]])
    first.until((home / "here").exists)
    second = forked(command, ["train", *STUDY, "--until", "vgg"])
    second.until(lambda: second.poll() is not None or b"waiting" in second.text)
    second.signal(signal.SIGTERM)
    status, output = second.wait(60)
    assert status == 0 and "stopp" in output, output
    (home / "go").touch()
    assert first.wait()[0] == 0


def ranks(forked, *arguments):
    "Two processes as torchrun starts them."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        forked(
            *arguments,
            RANK=f"{rank}",
            LOCAL_RANK=f"{rank}",
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            CUDA_VISIBLE_DEVICES="",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=f"{port}",
        )
        for rank in range(2)
    ]


def test_what_goes_wrong_in_one_process(forked, copied, home, tmp_path):
    "The disk is full for the first of two processes, when it must save: both end with the sentence, and go on. So do NaNs end both."
    copied("decoder")
    for name in ("calm", "nan"):
        shutil.copytree(home, tmp_path / name)

    def both(name, *how):
        return [
            process.wait(120)
            for process in ranks(
                lambda *a, **env: forked(*a, home=name, **env),
                command,
                ["train", *STUDY, "--until", "ar"],
                *how,
            )
        ]

    for name, how, sentences in (
        ("home", [[["rename ar/.part-N$", "nothing"], ["rename ar/.part-N$", "limit"]]], FULL),
        ("nan", [(), ["ar", "transformer", 2, 99]], ["10 steps in a row had a gradient"]),
    ):
        for status, output in both(name, *how):
            assert (
                status == 1
                and any(words in output for words in sentences)
                and "Traceback" not in output
            ), output
    FAULTS.update(["full disk", "NaN"])
    for name in ("home", "calm"):
        assert [status for status, _ in both(name)] == [0, 0]
    expected = {
        name: value
        for name, value in results(tmp_path / "calm", "ar").items()
        if "/best/" not in name
    }
    assert {
        name: value for name, value in results(home, "ar").items() if "/best/" not in name
    } == expected  # the best may not have been saved


def test_several_processes(child, forked, copied, tmp_path, longer):
    "torchrun: a second one at the same run, kill -9 of one process and of all, SIGTERM; then two processes end with the weights of two that nobody disturbed, and one goes on too."
    home = copied("decoder")
    shutil.copytree(home, tmp_path / "calm")
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from pathlib import Path; from faults import command\n"
        f"Path({str(tmp_path)!r}, 'pid-' + os.environ['RANK']).write_text(str(os.getpid())); sys.exit(command({AR}, [['rename ar/.part-N$', 'pause']] if os.environ['RANK'] == '0' else ()))"
    )

    def wait(process):
        while not (home / "here").exists():
            assert process.poll() is None and not time.sleep(0.05), process.stdout.read()
        (home / "here").unlink()

    calm = ranks(lambda *a, **env: forked(*a, home="calm", **env), command, AR)
    assert [process.wait()[0] for process in calm] == [0, 0], calm[0].text.decode()

    first = child(*TORCHRUN, str(script), start=True, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    wait(first)  # inside a save
    second = ranks(forked, command, AR)
    for rank, process in enumerate(second):
        status, output = process.wait(120)
        assert (
            status == 1 and "Another command is computing" in output and "Traceback" not in output
        ), output
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    (home / "go").touch()
    output = first.communicate(timeout=300)[0]
    assert first.returncode == 1, output
    (home / "go").unlink()

    both = ranks(
        forked, command, AR, [["rename ar/.part-N$", "nothing"], ["rename ar/.part-N$", "pause"]]
    )
    both[0].until((home / "here").exists)
    (home / "here").unlink()
    for process in both:
        process.signal(signal.SIGKILL)
    for process in both:
        process.wait()
    shutil.copytree(home, tmp_path / "alone")

    third = child(*TORCHRUN, str(script), start=True, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    wait(third)
    third.send_signal(signal.SIGTERM)
    output = third.communicate(timeout=300)[0]
    assert "stopped at step" in output and kept(run_of(home, "ar")), output
    FAULTS.update(
        ["SIGKILL of one of two processes", "SIGTERM to torchrun", "two torchruns at one run"]
    )

    both = ranks(forked, command, AR)
    assert [process.wait()[0] for process in both] == [0, 0], both[0].text.decode()
    assert "going on from step" in both[0].text.decode()
    assert results(home, "ar") == results(tmp_path / "calm", "ar")
    status, output = forked(command, AR, home="alone").wait()
    assert status == 0 and "going on from step" in output, output
    assert results(tmp_path / "alone", "ar").keys() == results(home, "ar").keys()
