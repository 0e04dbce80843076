"""`seqgan reproduce --jobs`: several experiments at once, at preset `smoke`.

What a schedule does with processes that fail is tested in nbs/3a_jobs.ipynb, with quick ones.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults import FAULTS
from forking import Forked
from outcomes import results

ROWS = [("figure8", "phase 1", "AR"), ("table6", "sem", "NAR"), ("figure8", "phase 2", "AR")]
TWO = ["--jobs", "2"]


class ForkedJob:
    """What of `subprocess.Popen` a job needs, with a fork in the place of a new Python.

    Starting Python and its imports would take most of the time of these tests.
    """

    def __init__(self, command, bufsize, stdin, stdout, stderr, env):
        reading, writing = os.pipe()
        sys.stdout.flush()
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            self._run(command[-1], reading, stdout.fileno(), env)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb", 0)

    def _run(self, code, reading, output, env):
        "In the child: the code of `python -c`, with nothing open but the three standard files."
        status = 1
        try:
            for i, file in enumerate((reading, output, output)):
                os.dup2(file, i)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.environ.update(env)
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


def reproduce(words, steps=None, forks=True):
    "`seqgan reproduce` of three experiments that share a tokenizer."
    from dataclasses import replace

    from seqgan import __main__ as cli
    from seqgan.config import Data
    from seqgan.settings import update
    from seqgan.study.reproduce import table_rows
    from seqgan.training import jobs

    if forks:
        pipes = {name: getattr(subprocess, name) for name in ("PIPE", "STDOUT")}
        jobs.subprocess = SimpleNamespace(Popen=ForkedJob, **pipes)

    def row_of(table, name, column):
        (row,) = [row for row in table_rows(table, "smoke", Data()) if row.name == name]
        changes = {"transformer_training.steps": steps} if steps else {}
        return replace(row, experiments={column: update(row.experiments[column], changes)})

    cli.whole_study = lambda *_: [row_of(*place) for place in ROWS]
    return cli.main(["reproduce", "--preset", "smoke", *words])


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory):
    "The home of a study that one process computed."
    home = tmp_path_factory.mktemp("alone") / "home"
    status, output = Forked(server, reproduce, [[]], {"SEQGAN_HOME": str(home)}).wait()
    assert status == 0, output
    return home


@pytest.fixture
def tokenized(alone, home):
    "The home of a study that has its tokenizer and its codes, and nothing that needs them."
    shutil.copytree(alone, home)
    for kind in ("ar", "nar", "samples", "decoder", "generation"):
        for folder in (home / "runs").glob(f"{kind}-*"):
            shutil.rmtree(folder)
    shutil.rmtree(home / "reports")
    return home


def begun(home, *kinds):
    "Whether a run of each of these kinds has begun."
    return all(list(home.glob(f"runs/{kind}-*/config.json")) for kind in kinds)


def state_of(pid):
    "The state of a process and its parent, as in /proc; none for one that is not there."
    with suppress(FileNotFoundError, ProcessLookupError):
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return state, int(parent)
    return "", 0


def is_running(pid):
    return state_of(pid)[0] not in ("", "Z")


def workers_of(process):
    "The processes of the jobs, by the names of their logs."
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    children = [pid for pid in numbers if state_of(pid)[1] == process.pid and is_running(pid)]
    return {Path(os.readlink(f"/proc/{pid}/fd/1")).stem: pid for pid in children}


@pytest.mark.parametrize(
    "jobs, variables, words",
    [
        ("0", {}, "jobs must be at least 1, got 0"),
        ("-1", {}, "jobs must be at least 1, got -1"),
        ("2", {"WORLD_SIZE": "2"}, "jobs must be 1 under torchrun or accelerate launch, got 2"),
    ],
)
def test_impossible_jobs(forked, home, jobs, variables, words):
    "One sentence, before anything is computed."
    status, output = forked(reproduce, ["--jobs", jobs], **variables).wait()
    assert status == 2 and words in output.splitlines()[-1], output
    assert not home.exists()


def check_files(home, outputs):
    "Tables and pictures; a log for each record, with all that was printed; each run once."
    reports = {path.name for path in (home / "reports").iterdir()}
    assert {"figure8.md", "figure8.csv", "figure8.png", "figure9.png", "table6.md"} <= reports
    logs = sorted(path.relative_to(home / "runs/logs") for path in home.glob("runs/logs/*/*/*"))
    records = home.glob("reports/results/*/*/*")
    names = [path.relative_to(home / "reports/results").with_suffix(".log") for path in records]
    assert logs == sorted(names) and len(logs) == 3
    folders = sorted(path.parent.name for path in home.glob("runs/*/metrics.json"))
    for text in (outputs, "".join((home / "runs/logs" / log).read_text() for log in logs)):
        assert sorted(re.findall(r"(\S+): finished in", text)) == folders


def test_two_jobs(forked, home, alone):
    """The results of one process, to the last bit, whatever happens to the jobs.

    kill -9 of one fails its experiment alone. Then Ctrl-C, as a terminal sends it to all
    processes: they stop, the listing says what is missing, and the same command computes it."""
    process = forked(reproduce, TWO)
    process.wait_until(lambda: begun(home, "nar"))
    (pid,) = [pid for name, pid in workers_of(process).items() if "NAR" in name]
    os.kill(pid, signal.SIGKILL)
    process.wait_until(lambda: begun(home, "decoder"))  # of the third, which needs the first
    process.signal(signal.SIGINT, group=True)
    FAULTS["SIGKILL of a job"] += 1
    FAULTS["SIGINT"] += 1
    status, output = process.wait()
    assert status == 1 and "Traceback" not in output, output
    assert "table6, sem, NAR, seed 0: failed with SIGKILL" in output
    assert output.count(": failed with") == 1 and output.count("seed 0: done") == 1, output
    assert re.search("^job .: decoder-.* stopped at step", output, re.M), output
    assert output.splitlines()[-1] == "seqgan: failed: table6, sem, NAR, seed 0"
    missing = [line for line in output.split("To do:")[-2].splitlines() if "papermill" in line]
    assert [line.split()[0] for line in missing] == ["table6", "figure8"], output

    status, again = forked(reproduce, TWO).wait()
    assert status == 0 and "resumes from step" in again, again
    assert results(home) == results(alone)
    assert not re.search(r"[\r\x1b]", output + again)  # no progress bars outside a terminal
    check_files(home, output + again)


def test_told_to_stop(forked, home):
    "SIGTERM to the command alone: the process at work stops after its step, with status 0."
    process = forked(reproduce, TWO)
    process.wait_until(lambda: begun(home, "branch-point"))
    process.signal(signal.SIGTERM)
    FAULTS["SIGTERM"] += 1
    status, output = process.wait()
    assert status == 0 and re.search("^job 1: .*stopped ", output, re.M), output
    assert re.match("To do: [1-9]", output.splitlines()[-1]), output


def test_no_orphans(forked, tokenized):
    "When the command is killed, its processes end, too."
    process = forked(reproduce, TWO, 10**6, False)
    process.wait_until(lambda: begun(tokenized, "ar"))
    workers = workers_of(process).values()
    process.signal(signal.SIGKILL)
    FAULTS["SIGKILL of a command with jobs"] += 1
    try:
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline, "they go on"
            time.sleep(0.05)
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)
