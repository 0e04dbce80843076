"""Faults on purpose: processes that are killed or told to stop anywhere, full disks, files that are damaged, foreign or gone, losses that are not finite.

Each ends with the results of an undisturbed run, to the last bit, or with a sentence. What runs here is `seqgan train` at preset `smoke`, in processes of
its own: `command`. Before it changes a file it looks whether a fault is due: so one is injected at a place in the work, whenever that comes."""
import json
import os
import re
import resource
import signal
import sys
import time
from contextlib import suppress

from seqgan import __main__ as cli
from seqgan import codes, experiment
from seqgan.config import home
from seqgan.training import STOP, Loop, full_disk

STUDY = ["--phase", "2", "--set", "transformer.dropout=0.1", "quantizer.kmeans_every=3", "quantizer.kmeans_last=12"]
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link"}


def before_changes(act):
    "Call `act('operation kind/file')` before this process changes a file of a run, as 'os.rename tokenizer/.part-N'."
    base, busy = f"{home()}/", []

    def hook(event, arguments):
        if busy or event not in EVENTS or not isinstance(arguments[0], (str, os.PathLike)): return
        if event == "open" and not (set(arguments[1] or "") & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR)): return
        path = os.fspath(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] > 0:                  # inside shutil.rmtree
            with suppress(OSError): path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if not path.startswith(base): return
        busy.append(1)
        try: act(f"{event} {re.sub('[0-9]+', 'N', re.sub('-[0-9a-f]{12}', '', path[len(base):]).removeprefix('runs/'))}")
        finally: busy.clear()
    sys.addaudithook(hook)


def fill():
    "Leave no byte on the disk."
    with open(home() / "ballast", "wb", buffering=0) as file:
        for size in (2 ** 16, 1):
            with suppress(OSError):
                while file.write(bytes(size)): pass


def pause():
    "Say that this process waits, and wait until it may go on or is told to stop."
    (home() / "here").touch()
    while not ((home() / "go").exists() or STOP.is_set()): time.sleep(0.01)


ACTS = {"fill": fill, "room": lambda: (home() / "ballast").unlink(), "pause": pause,
        "limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])),
        "unlimit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2),
        **{s.name: lambda s=s: os.kill(os.getpid(), s) for s in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}}


def command(arguments, faults=()):
    "`seqgan train`, a checkpoint at every step, with `faults`: [[pattern of an operation, what to do before it], ...], one after the other; 'each' kills at an operation of each kind."
    log = os.open(home().parent / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    kinds = os.open(home().parent / "kinds", os.O_RDWR | os.O_APPEND | os.O_CREAT)
    seen, todo = set(os.read(kinds, 2 ** 20).decode().splitlines()), list(faults)

    def act(label):
        if faults == "each":
            if "here" in label: return
            if label not in seen:
                os.write(kinds, f"{label}\n".encode())
                ACTS["SIGKILL"]()
        elif todo and re.search(todo[0][0], label): ACTS[todo.pop(0)[1]]()

    plain = Loop.run
    def run(self, step, *args, **kwargs):
        def counted(t):
            os.write(log, f"{self.folder.name} {t}\n".encode())
            return step(t)
        return plain(self, counted, *args, save_seconds=0, **kwargs)
    Loop.run, codes.CHUNK = run, 64
    before_changes(act)
    return cli.main(["train", "--preset", "smoke", *arguments])
