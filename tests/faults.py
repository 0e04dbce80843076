"""Faults that are injected into the `seqgan` command, each at a place in its work.

`command` runs in a process of its own (`forking.Forked`). Before that process changes a file it
looks whether a fault is due. So a fault comes at a place, whenever the process gets there, and the
same fault can be tried again.
"""

import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import suppress

FAULTS = Counter()  # what was done to processes and files, for the last line of the session
SETTINGS = [
    "vgg.weights=local",  # one training more that can be disturbed
    "transformer.dropout=0.1",
    "quantizer.kmeans_every=3",
    "quantizer.kmeans_last=12",
    "data.train=128",
    "data.val=16",
    "evaluation.samples=20",
    "evaluation.reference=40",
]
STUDY = ["--phase", "2", "--set", *SETTINGS]
DISK_IS_FULL = "here is no room", "GB free"  # words of the sentences that say so
CHANGES = {  # what Python calls the operations that change files
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.truncate",
    "os.link",
}


def changed_path(event, arguments):
    "The path that an audit event is about to change, or ''."
    if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
        return ""
    path = os.fspath(arguments[0])
    if event == "open":
        _, mode, flags = arguments
        writes = set(mode or "") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)
        return path if writes else ""
    if event in ("os.remove", "os.rmdir") and arguments[1] > 0:  # inside shutil.rmtree
        with suppress(OSError):
            return os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
    return path


def label_of(event, path):
    "A change of a file below the home as one of its kind: 'os.rename tokenizer/.part-N'."
    path = re.sub("-[0-9a-f]{12}", "", path).removeprefix("runs/")
    path = re.sub(r"\.part-\w+", ".part-N", path)
    return f"{event} " + re.sub(r"\d+", "N", path)


def before_changes(home, act):
    "Call `act(label)` before this process changes a file below `home`."
    busy = []

    def hook(event, arguments):
        if busy:
            return
        path = changed_path(event, arguments)
        if not path.startswith(f"{home}/"):
            return
        busy.append(event)
        try:
            act(label_of(event, path.removeprefix(f"{home}/")))
        finally:
            busy.clear()

    sys.addaudithook(hook)


def kind_of(label):
    "Changes that are much the same have one kind; '' for one that a kill cannot leave half done."
    event, path = label.split()
    if event in ("os.mkdir", "os.rmdir") or path.endswith((".lock", "here")):
        return ""
    if event in ("open", "os.remove") and re.search(r"/\.[^/]+(N|l)$", path):
        return ""  # a file under a temporary name, which nobody would read
    path = path.replace("/val/", "/train/")
    # The files of a checkpoint, but for a few of them.
    others = r"(part-N|checkpoint-N|end)/\.?(?!loop.json.N|model.safe|config)[a-z]+[\w.-]+"
    path = re.sub(others, r"\1/*", path)
    folder, _, rest = path.partition("/")
    if rest == ".config.json.N":
        return f"{event} {rest}"
    # Trainings write the same files, so one of them stands for all but where runs end.
    in_every_run = re.search("metrics|end", rest) or (event, rest) == ("os.rename", "checkpoint-N")
    if not in_every_run and folder not in ("codes", "samples", "generation", "reports"):
        folder = "*"
    return f"{event} {folder}/{rest}"


def actions(home, stop):
    "What can be done at a place: name -> function."
    ballast, limits = home / "ballast", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk():
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

    def empty_disk():
        for file in ballast.iterdir():
            file.unlink()
        ballast.rmdir()

    def pause():
        "Say that this process waits, and wait until it may go on or is told to stop."
        (home / "here").touch()
        while not ((home / "go").exists() or stop.is_set()):
            time.sleep(0.01)

    def kill(number):
        return lambda: os.kill(os.getpid(), number)

    return {
        "nothing": lambda: None,
        "pause": pause,
        "fill disk": fill_disk,
        "empty disk": empty_disk,
        "limit files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1])),
        "unlimit files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        "SIGKILL": kill(signal.SIGKILL),
        "SIGTERM": kill(signal.SIGTERM),
        "SIGINT": kill(signal.SIGINT),
    }


def record_steps(file):
    "Let every loop save a checkpoint at every step, and write 'run step' into a file before it."
    from seqgan.training.loop import Loop

    run = Loop.run

    def recorded_run(self, step, *arguments, **named):
        def recorded_step(t):
            with suppress(OSError):  # a limit for files is one for this file, too
                os.write(file, f"{self.folder.name} {t}\n".encode())
            self.present_step = t
            return step(t)

        return run(self, recorded_step, *arguments, **named | {"save_seconds": 0})

    Loop.run = recorded_run


def poison(kind, model, first, last):
    "Let the loss of a model be NaN from step `first` to `last` of the runs of a kind."
    from seqgan.models.features import weights_digest
    from seqgan.training.loop import Loop

    update = Loop.update

    def digests(loop):
        averages = [weights_digest(loop.ema[model])] if model in loop.ema else []
        return [weights_digest(loop.unwrap(model)), *averages]

    def poisoned_update(self, name, *losses, **named):
        poisoned = self.folder.name.startswith(f"{kind}-") and name == model
        if not poisoned or not first <= self.present_step <= last:
            return update(self, name, *losses, **named)

        def nan_of(loss):
            return lambda: (loss() if callable(loss) else loss) * float("nan")

        before = digests(self)
        try:
            update(self, name, *map(nan_of, losses), **named)
        finally:
            assert digests(self) == before

    Loop.update = poisoned_update


def command(arguments, faults=(), nan=None):
    """`seqgan` at preset smoke, with a checkpoint at every step.

    `faults` is [[pattern of an operation, what to do before it], ...], one after the other, or
    "each": SIGKILL before the first operation of each kind. `nan` are the arguments of `poison`.
    """
    from seqgan import __main__ as cli
    from seqgan.core import home
    from seqgan.presets import preset
    from seqgan.study.graph import resolve_config
    from seqgan.study.reproduce import StudyRow
    from seqgan.training import codes
    from seqgan.training.processes import STOP

    def beside_home(name):
        path = home().parent / f"{home().name}-{name}"
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)

    kinds = beside_home("kinds")
    seen = set(os.read(kinds, 2**20).decode().splitlines())
    due, can = list(faults), actions(home(), STOP)

    def act(label):
        if faults == "each":
            kind = kind_of(label)
            if kind and kind not in seen:
                os.write(kinds, f"{kind}\n".encode())
                can["SIGKILL"]()
        elif due and re.search(due[0][0], label):
            can[due.pop(0)[1]]()

    record_steps(beside_home("steps"))
    if nan:
        poison(*nan)
    codes.CHUNK = 32
    home().mkdir(exist_ok=True)
    before_changes(home(), act)
    words = ["--preset", "smoke", *arguments[1:]]
    if arguments[0] == "reproduce":  # of one row, the study of `train`
        config = resolve_config(preset("smoke", cli.parse_settings(SETTINGS) | {"phase": 2}))
        cli.whole_study = lambda *_: [StudyRow("figure8", "phase 2", 0, {"AR": config})]
        words = ["--preset", "smoke"]
    return cli.main([arguments[0], *words])


def prepare():
    """What each process would find out first, for the process that is forked.

    The digests of the code, the revision and the paper's grid take longer than most of what is
    tested; the functions remember them.
    """
    from seqgan import __main__ as cli
    from seqgan.data.images import load
    from seqgan.presets import preset
    from seqgan.study.graph import STAGES
    from seqgan.study.paper import cells_of
    from seqgan.study.provenance import revision, source_digest

    for settings in ([], SETTINGS):
        for split in ("train", "val"):
            load(preset("smoke", cli.parse_settings(settings)).data, split)
    for stage in STAGES.values():
        source_digest(stage.module)
    source_digest()
    cells_of(preset("smoke"))
    revision()


def seqgan(*words):
    "The command as it is, where Python and all imports are there already; returns its status."
    from seqgan.__main__ import main

    try:
        return main(words)
    except SystemExit as error:
        return error.code


def seqgan_in(folder, *words):
    "`seqgan` in another working directory."
    os.chdir(folder)
    return seqgan(*words)
