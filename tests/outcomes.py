"""What a study left behind, and which of it must be the same however often it was disturbed."""

import hashlib
import json
import re

KINDS = "vgg real branch-point tokenizer codes decoder reconstruction ar samples generation".split()


def run_of(home, kind):
    "The folder of the only run of a kind."
    (folder,) = (home / "runs").glob(f"{kind}-*")
    return folder


def checkpoint_steps(folder):
    "The steps of the checkpoints of a run."
    return {int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")}


def content(file):
    "What must be the same in a file of two studies: everything but times, revisions and hardware."
    if file.name == "metrics.json":
        found = json.loads(file.read_text())
        files = sorted(name for name in found["files"] if not name.startswith("damaged-"))
        return found["metrics"], files
    if file.name == "log.jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in lines]
    if "reports" in file.parts:
        record = json.loads(file.read_text())
        return {name: record[name] for name in ("metrics", "curves", "networks") if name in record}
    return hashlib.sha256(file.read_bytes()).hexdigest()


def results(home, kind=""):
    """All that a study left, or a kind of run: {file: what must be the same}.

    A finished run must have left nothing else: no hidden file but its lock.
    """
    for done in (home / "runs").glob("*/metrics.json"):
        left = [path for path in done.parent.rglob(".*") if path.name != ".lock"]
        assert not left, left
    found, prefix = {}, f"runs/{kind}-" if kind else "runs/"
    for file in home.rglob("*"):
        name = file.relative_to(home).as_posix()
        is_result = file.suffix in (".json", ".jsonl", ".safetensors", ".npy", ".bin")
        if not is_result or re.search(r"/\.|damaged-|config\.json", name):
            continue
        if name.startswith(prefix) or (not kind and name.startswith("reports/results")):
            found[name] = content(file)
    return found


def results_but_best(home, kind):
    "`results` without best/, which a full disk may have kept from being saved."
    return {name: value for name, value in results(home, kind).items() if "/best/" not in name}


def finished(home):
    "When the files of the finished runs were written; without cards, which tell more later."
    times = {}
    for done in (home / "runs").glob("*/metrics.json"):
        for path in done.parent.rglob("*"):
            if path.is_file() and not re.search(r"/\.|/checkpoint-|\.md$", str(path)):
                times[path] = path.stat().st_mtime_ns
    return times
