"""What test_faults and test_interruption share: processes in which faults are injected, and what is compared at the end.

`command` runs in a process of its own, a `Forked`. Before it changes a file it looks whether a fault is due: so one is injected at a place in the work,
whenever that comes."""

import hashlib
import importlib
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from contextlib import suppress

import pytest

FAULTS = Counter()  # what was done to processes and files, for the last line of the session
STUDY = [
    "--phase",
    "2",
    "--set",
    "transformer.dropout=0.1",
    "quantizer.kmeans_every=3",
    "quantizer.kmeans_last=12",
]
FULL = "here is no room", "GB free"  # what a full disk is called


class Forked:
    "A process that runs `function(*arguments)`: a fork of one that has imported everything, because starting takes longer than what is tested."

    def __init__(self, server, function, arguments, env):
        self.output, output = os.pipe()
        ends, theirs = os.pipe()
        socket.send_fds(
            server,
            [json.dumps([function.__module__, function.__name__, arguments, env]).encode()],
            [output, theirs],
        )
        os.close(output)
        os.close(theirs)
        self.ends, self.text, self.status = os.fdopen(ends), b"", None
        self.pid = int(self.ends.readline())

    def signal(self, number, group=False):
        FAULTS[signal.Signals(number).name] += 1
        (os.killpg if group else os.kill)(self.pid, number)

    def _read(self):
        while select.select([self.output], [], [], 0)[0] and (part := os.read(self.output, 2**16)):
            self.text += part

    def poll(self):
        "The exit status, negative for a signal; None while it runs. What it prints is read meanwhile."
        if self.status is None and select.select([self.ends], [], [], 0)[0]:
            self.status = int(self.ends.readline())
        self._read()
        return self.status

    def until(self, condition, limit=300):
        "Wait until `condition()` holds; fail with what the process printed if it ends before, or after `limit` seconds."
        begin = time.monotonic()
        while not (found := condition()):
            assert self.poll() is None or condition(), (
                f"ended with {self.status}:\n{self.text.decode()[-3000:]}"
            )
            if time.monotonic() - begin > limit:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"{limit} s passed:\n{self.text.decode()[-3000:]}")
            time.sleep(0.005)
        return found

    def wait(self, limit=300):
        "Exit status and output, when it has ended."
        self.until(lambda: self.poll() is not None, limit)
        return self.status, self.text.decode()


def serve(connection):
    "In the process that is forked: each message, with the ends of two pipes, is a function to run; one pipe takes its output, the other its pid and status."
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, ends, *_ = socket.recv_fds(connection, 2**16, 2)
        if not message:
            return
        if not os.fork():
            _fork(connection, *json.loads(message), *ends)
        for end in ends:
            os.close(end)


def _fork(connection, module, function, arguments, env, output, ends):
    connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():  # one process waits for the other
        os.close(output)
        os.write(ends, f"{pid}\n".encode())
        os.write(ends, f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
        os._exit(0)
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(ends)
    os.close(output)
    os.environ.update(env)
    try:
        status = getattr(importlib.import_module(module), function)(*arguments) or 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70  # no status of ours
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.truncate",
    "os.link",
}


def before_changes(home, act):
    "Call `act('operation kind/file')` before this process changes a file below `home`, as 'os.rename tokenizer/.part-N'."
    base, busy = f"{home}/", []

    def hook(event, arguments):
        if busy or event not in EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not (
            set(arguments[1] or "") & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        path = os.fspath(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] > 0:  # inside shutil.rmtree
            with suppress(OSError):
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if not path.startswith(base):
            return
        busy.append(1)
        try:
            act(
                f"{event} "
                + re.sub(
                    r"\d+",
                    "N",
                    re.sub(
                        r"\.part-\w+",
                        ".part-N",
                        re.sub("-[0-9a-f]{12}", "", path[len(base) :]).removeprefix("runs/"),
                    ),
                )
            )
        finally:
            busy.clear()

    sys.addaudithook(hook)


def kind_of(label):
    "Operations that are much the same have one name; empty for one that changes nothing that counts."
    event, path = label.split()
    if (
        event in ("os.mkdir", "os.rmdir")
        or path.endswith((".lock", "here"))
        or event in ("open", "os.remove")
        and re.search(r"/\.[^/]+(N|l)$", path)
    ):
        return ""
    path = re.sub(
        r"(part-N|checkpoint-N|end)/\.?(?!loop.json.N|model.safe|config)[a-z]+[\w.-]+",
        r"\1/*",
        path,
    ).replace("/val/", "/train/")
    folder, _, rest = path.partition("/")
    if rest == ".config.json.N":
        return f"{event} {rest}"
    if not re.search("metrics|end", rest) and (event, rest) != ("os.rename", "checkpoint-N"):
        folder = folder if folder in ("image_codes", "codes", "generation", "reports") else "*"
    return f"{event} {folder}/{rest}"


def acts(home, stop):
    "What can be done at a place: name -> function."
    ballast, limits = home / "ballast", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        "Leave no byte on the disk, and no room for a name."
        ballast.mkdir()
        with suppress(OSError):
            for i in range(10**6):
                (ballast / str(i)).touch()
        with open(next(ballast.iterdir()), "wb", buffering=0) as file:
            for size in (2**16, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def room():
        for file in ballast.iterdir():
            file.unlink()
        ballast.rmdir()

    def pause():
        "Say that this process waits, and wait until it may go on or is told to stop."
        (home / "here").touch()
        while not ((home / "go").exists() or stop.is_set()):
            time.sleep(0.01)

    return {
        "fill": fill,
        "room": room,
        "pause": pause,
        "nothing": lambda: None,
        "limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1])),
        "unlimit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        **{
            s.name: lambda s=s: os.kill(os.getpid(), s)
            for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        },
    }


def command(arguments, faults=(), nan=None):
    """`seqgan` at preset smoke with a checkpoint at every step. `faults`: [[pattern of an operation, what to do before it], ...], one after the other, or
    'each': SIGKILL before the first operation of each kind. `nan`, [kind of run, model, first, last]: the loss of the model is NaN at these steps."""
    from seqgan import __main__ as cli, codes
    from seqgan.core import home
    from seqgan.presets import preset
    from seqgan.models.features import weights_digest
    from seqgan.study.reproduce import StudyRow as Row
    from seqgan.training.processes import STOP
    from seqgan.training.loop import Loop

    files = {
        name: os.open(home().parent / f"{home().name}-{name}", os.O_RDWR | os.O_APPEND | os.O_CREAT)
        for name in ("steps", "kinds")
    }
    seen, todo, can = (
        set(os.read(files["kinds"], 2**20).decode().splitlines()),
        list(faults),
        acts(home(), STOP),
    )

    def act(label):
        if faults == "each":
            if (kind := kind_of(label)) and kind not in seen:
                os.write(files["kinds"], f"{kind}\n".encode())
                can["SIGKILL"]()
        elif todo and re.search(todo[0][0], label):
            can[todo.pop(0)[1]]()

    run, update = Loop.run, Loop.update

    def counted_run(self, step, *args, **kwargs):
        def counted(t):
            with suppress(OSError):
                os.write(
                    files["steps"], f"{self.folder.name} {t}\n".encode()
                )  # a limit for files is one for this too
            self.now = t
            return step(t)

        return run(self, counted, *args, save_seconds=0, **kwargs)

    def poisoned(self, name, *losses):
        if not (
            self.folder.name.startswith(nan[0]) and name == nan[1] and nan[2] <= self.now <= nan[3]
        ):
            return update(self, name, *losses)
        before = (
            weights_digest(self.plain(name)),
            weights_digest(self.averages[name]) if name in self.averages else None,
        )
        try:
            update(
                self,
                name,
                *(
                    lambda loss=loss: (loss() if callable(loss) else loss) * float("nan")
                    for loss in losses
                ),
            )
        finally:
            assert before == (
                weights_digest(self.plain(name)),
                weights_digest(self.averages[name]) if name in self.averages else None,
            )

    Loop.run, codes.CHUNK = counted_run, 64
    if nan:
        Loop.update = poisoned
    home().mkdir(exist_ok=True)
    before_changes(home(), act)
    if arguments[0] == "train":
        return cli.main(["train", "--preset", "smoke", *arguments[1:]])
    c = preset(
        "smoke", cli.settings(arguments[4:]) | {"phase": 2}
    )  # a study of one row, the one of `train`
    cli.whole_study = lambda *_: [Row("figure8", "2", 0, {"AR": c})]
    return cli.main(["reproduce", "--preset", "smoke"])


def content(file):
    "What must be the same in a file of two runs."
    if file.name == "metrics.json":
        found = json.loads(file.read_text())
        return found["metrics"], sorted(
            name for name in found["files"] if not name.startswith("damaged-")
        )
    if file.name == "log.jsonl":
        return [
            {k: v for k, v in json.loads(line).items() if k != "seconds_per_step"}
            for line in file.read_text().splitlines()
        ]
    if "reports" in file.parts:
        return {
            k: v
            for k, v in json.loads(file.read_text()).items()
            if k in ("metrics", "curves", "networks")
        }
    return hashlib.sha256(file.read_bytes()).hexdigest()


def results(home, kinds=r"[a-z_]+"):
    "All that a study left: {file: what must be the same}. Of a finished run nothing else is left."
    left = [
        p
        for p in (home / "runs").glob("*/**/.*")
        if p.name != ".lock"
        and (
            home / p.relative_to(home).parts[0] / p.relative_to(home).parts[1] / "metrics.json"
        ).exists()
    ]
    assert not left, left
    return {
        name: content(file)
        for file in home.rglob("*")
        if file.is_file()
        and file.suffix in (".json", ".jsonl", ".safetensors", ".npy", ".bin")
        and re.search(
            rf"^(runs/({kinds})-{'|reports/results' * (kinds == '[a-z_]+')})",
            name := file.relative_to(home).as_posix(),
        )
        and not re.search(r"/\.|damaged-|config\.json", name)
    }


def finished(home):
    "When the files of the finished runs were written, {file: time}; without the cards, which tell more when more is known."
    return {
        p: p.stat().st_mtime_ns
        for done in (home / "runs").glob("*/metrics.json")
        for p in done.parent.rglob("*")
        if p.is_file() and not re.search(r"/\.|/checkpoint-|\.md$", str(p))
    }


def kept(folder):
    "The steps of the checkpoints of a run."
    return {int(p.name[11:]) for p in folder.glob("checkpoint-*")}


def run_of(home, kind):
    (folder,) = (home / "runs").glob(f"{kind}-*")
    return folder
