"""Full disks, files that are damaged, foreign or gone, other settings and code, losses that are not finite: each study ends with the files of an undisturbed one, or with a sentence."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from faults import FAULTS, FULL, STUDY, Forked, command, finished, kept, results, run_of
from PIL import Image

AR, ALL = ["train", *STUDY, "--until", "ar"], ["train", *STUDY]
PLACES = [
    ".config.json",
    "open vgg/log",
    "warmup/model",
    "tokenizer/.log.jsonl",
    "rename tokenizer/.metrics",
    "image_codes/train/codes.npy",
    "decoder/model/.part",
    "rename ar/.part-N$",
    "rename codes/.part",
    "reports",
]


def fault(name):
    FAULTS[name] += 1


def sentence(process, words):
    "The process ends with status 1 and a sentence in which `words` are, and no traceback."
    status, output = process.wait()
    assert status == 1 and "Traceback" not in output, output
    assert output.strip().splitlines()[-1].startswith("seqgan: "), output
    for word in [words] if isinstance(words, str) else words:
        assert word in output, output
    return output


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request, home):
    "How a disk becomes full and empty again, and a home on which it can: a limit for the files of the process, or a small disk."
    if request.param == "limit":
        yield "limit", "unlimit"
        return
    home.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m,nr_inodes=4000", "seqgan-test", str(home)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"only root may mount a small disk: {made.stderr.strip()}")
    yield "fill", "room"
    subprocess.run(["umount", "-l", str(home)], check=True)


def test_full_disk(forked, home, whole, disk):
    "The disk is full from some place on, in every run (of each two, one by either kind of disk): status 1 and what to do; when there is room again, the same command goes on."
    full, _ = disk
    for place in PLACES[full == "fill" :: 2]:
        before = finished(home)
        status, output = forked(command, ALL, [[place, full]]).wait()
        fault("full disk")
        assert "Traceback" not in output and (
            status == 0 or status == 1 and any(words in output for words in FULL)
        ), (place, output)
        assert status == 1 or place == "reports", (place, output)
        assert before.items() <= finished(home).items(), place
        shutil.rmtree(home / "ballast", ignore_errors=True)
    status, output = forked(command, ALL).wait()
    assert status == 0, output
    assert results(home) == results(whole)


def test_full_for_a_while(forked, copied, home, whole, disk):
    "The disk is full for some steps: the training goes on, and its log has every line. Then it is full for the log alone, and the process is killed."
    full, room = disk
    for folder in whole.iterdir():
        shutil.copytree(folder, home / folder.name)
    for kind in ("ar", "codes", "generation"):
        shutil.rmtree(run_of(home, kind))
    log, save = "open ar/log", "os.mkdir ar/.part-N$"
    status, output = forked(
        command,
        AR,
        [
            [log, "nothing"],
            [log, full],
            [log, "nothing"],
            [log, room],
            [log, full],
            [f"{log}|{save}", room],
            [log, "SIGKILL"],
        ],
    ).wait()
    assert status == -signal.SIGKILL and "goes on meanwhile" in output, output
    FAULTS.update(
        ["disk full for a while", "disk full for the log", "SIGKILL before the log is written"]
    )
    status, output = forked(command, AR).wait()
    assert status == 0 and "going on from step" in output, output
    expected = {name: value for name, value in results(whole, "ar").items() if "/best/" not in name}
    assert {
        name: value for name, value in results(home, "ar").items() if "/best/" not in name
    } == expected  # the best may not have been saved


@pytest.fixture(scope="module")
def begun(server, whole, tmp_path_factory):
    "The home of a study that was killed when its transformer had been trained for 8 steps."
    home = tmp_path_factory.mktemp("begun") / "home"
    shutil.copytree(whole, home)
    for kind in ("ar", "codes", "generation"):
        shutil.rmtree(run_of(home, kind))
    status, output = Forked(
        server,
        command,
        [
            AR,
            [["rename ar/.part-9$|rename ar/.part-N$", "nothing"]] * 8
            + [["open ar/log", "SIGKILL"]],
        ],
        {"SEQGAN_HOME": str(home)},
    ).wait()
    assert (
        status == -signal.SIGKILL
        and {7, 8} <= kept(run_of(home, "ar"))
        and len(kept(run_of(home, "ar"))) <= 3
    ), output
    return home


def flip(file):
    "One bit of a file is another."
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_step(file):
    file.write_text(file.read_text().replace('"step": 8', '"step": 9'))


def half(file):
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "half": half,
    "empty": lambda f: os.truncate(f, 0),
    "gone": lambda f: f.unlink(),
    "flipped": flip,
}
GARBAGE = {
    text: lambda f, text=text: f.write_text(text)
    for text in ("null", '{"files": null, "run": "", "digest": ""}', "\x00")
}


@pytest.mark.parametrize(
    "name, how",
    [("model-transformer.safetensors", how) for how in DAMAGE]
    + [("optimizer-transformer.safetensors", "half")]
    + [("loop.json", how) for how in ("half", "gone", *GARBAGE, "other step")],
)
def test_damaged_checkpoint(forked, copied, whole, begun, name, how):
    "A file of the newest checkpoint is damaged: a line says so, and the training goes on from the one before it."
    home = copied("ar", begun)
    (DAMAGE | GARBAGE | {"other step": other_step})[how](run_of(home, "ar") / "checkpoint-8" / name)
    fault("damaged checkpoint")
    status, output = forked(command, AR).wait()
    assert (
        status == 0
        and "checkpoint-8 of" in output
        and "is damaged" in output
        and "going on from step 7" in output
    ), output
    assert results(home, "ar") == results(whole, "ar")


def test_all_checkpoints_damaged(forked, copied, whole, begun):
    "It says so of each, and starts anew."
    home = copied("ar", begun)
    files = list(run_of(home, "ar").glob("checkpoint-*/model-*"))
    for file in files:
        half(file)
        fault("damaged checkpoint")
    status, output = forked(command, AR).wait()
    assert status == 0 and output.count("is damaged:") == len(files) and "going on" not in output, (
        output
    )
    assert results(home, "ar") == results(whole, "ar")


class Evil:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def sealed(checkpoint):
    "Write loop.json anew, so that nothing but the content of the files tells what was done to them."
    code = (
        "import hashlib, json, sys; from pathlib import Path; from seqgan.config import digest; c = Path(sys.argv[1]); s = json.loads((c / 'loop.json').read_text()); s.pop('digest')\n"
        "s['files'] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in c.glob('*.safetensors')}; s['run'] = c.parent.name; (c / 'loop.json').write_text(json.dumps(s | {'digest': digest(s)}))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("seal", [False, True])
def test_pickle(forked, copied, whole, begun, tmp_path, seal):
    "A pickle that is called a safetensors file is not executed."
    home = copied("ar", begun)
    checkpoint = run_of(home, "ar") / "checkpoint-8"
    (checkpoint / "model-transformer.safetensors").write_bytes(
        pickle.dumps(Evil(tmp_path / "executed"))
    )
    if seal:
        sealed(checkpoint)
    fault("pickle as a checkpoint")
    if seal:
        sentence(forked(command, AR), "checkpoint-8")
        shutil.rmtree(checkpoint)  # what the sentence leaves to do
    status, output = forked(command, AR).wait()
    assert status == 0 and not (tmp_path / "executed").exists(), output
    assert results(home, "ar") == results(whole, "ar")


def test_foreign_checkpoint(forked, copied, begun):
    "A checkpoint of another run, or of other shapes, ends with a sentence, also when loop.json names this run; without it the run goes on."
    home = copied("ar", begun)
    source, other = run_of(home, "ar"), [*AR, "--set", *STUDY[3:], "transformer.dim=48"]
    assert (
        forked(
            command, other, [["rename ar/.part-N$", "nothing"], ["rename ar/.part-N$", "SIGKILL"]]
        ).wait()[0]
        == -signal.SIGKILL
    )
    (folder,) = set(home.glob("runs/ar-*")) - {source}
    shutil.copytree(source / "checkpoint-8", folder / "checkpoint-8")
    fault("foreign checkpoint")
    sentence(forked(command, other), [source.name, "Move it back to where it belongs"])
    sealed(folder / "checkpoint-8")
    fault("foreign checkpoint")
    sentence(forked(command, other), ["is of other models than this run's", "size mismatch"])
    shutil.rmtree(folder / "checkpoint-8")
    status, output = forked(command, other).wait()
    assert status == 0 and "going on from step 1" in output, output
    assert kept(source) >= {7, 8}  # and the other run was left alone


def test_other_settings(forked, copied, whole):
    "Other settings are another run beside the old one, which stays as it is."
    home = copied("ar")
    before = finished(home)
    fault("other settings")
    status, output = forked(
        command, [*AR, "--set", *STUDY[3:], "transformer_training.lr=0.001"]
    ).wait()
    assert (
        status == 0 and output.count(": started") == 1 and len(list(home.glob("runs/ar-*"))) == 2
    ), output
    assert before.items() <= finished(home).items()


def test_other_code(child, copied, tmp_path):
    "Other code is another run too, and a line names the one with these settings."
    home = copied("vgg")
    shutil.copytree(ROOT / "seqgan", tmp_path / "code" / "seqgan")
    with open(tmp_path / "code" / "seqgan" / "recipes.py", "a") as file:
        file.write("\nADDED = 1\n")
    before, old = finished(home), run_of(home, "vgg")
    fault("other code")
    result = child(
        sys.executable,
        "-m",
        "seqgan",
        "train",
        "--preset",
        "smoke",
        *STUDY,
        "--until",
        "vgg",
        cwd=tmp_path / "code",
        PYTHONPATH=str(tmp_path / "code"),
    )
    assert (
        result.returncode == 0
        and f"{old.name} has these settings but was made by other code" in result.stdout
    ), result.stdout
    assert len(list(home.glob("runs/vgg-*"))) == 2 and before.items() <= finished(home).items()


@pytest.mark.parametrize(
    "name, how",
    [
        ("model/model.safetensors", "gone"),
        ("model/model.safetensors", "half"),
        ("metrics.json", "half"),
        ("metrics.json", "empty"),
    ],
)
def test_finished_run_is_damaged(forked, copied, whole, name, how):
    "A finished run that lost a file says which, and to delete the folder; then it is computed again."
    home = copied("ar")
    folder = run_of(home, "ar")
    DAMAGE[how](folder / name)
    fault("damaged finished run")
    sentence(forked(command, AR), [str(folder), name, "elete the folder to compute it again"])
    shutil.rmtree(folder)
    assert forked(command, AR).wait()[0] == 0
    assert results(home, "ar") == results(whole, "ar")


@pytest.mark.parametrize("name", ["codes.npy", "labels.npy", "done.bin", "codes.json"])
@pytest.mark.parametrize("how", ["half", "gone"])
def test_damaged_codes(forked, copied, whole, name, how):
    "Codes that are damaged before their run is finished end with a sentence that names their folder, or are computed again."
    home = copied("tokenizer")
    assert (
        forked(
            command, [*ALL, "--until", "image_codes"], [["image_codes/.metrics", "SIGKILL"]]
        ).wait()[0]
        == -signal.SIGKILL
    )
    folder = run_of(home, "image_codes") / "train"
    DAMAGE[how](folder / name)
    fault("damaged codes")
    process = forked(command, [*ALL, "--until", "image_codes"])
    if process.wait()[0] != 0:
        sentence(process, [str(folder), "elete"])
        shutil.rmtree(folder)
        assert forked(command, [*ALL, "--until", "image_codes"]).wait()[0] == 0
    assert results(home, "image_codes") == results(whole, "image_codes")


@pytest.mark.parametrize(
    "kind, model",
    [
        ("vgg", "net"),
        ("tokenizer", "tokenizer"),
        ("tokenizer", "discriminator"),
        ("ar", "transformer"),
    ],
)
def test_not_finite(forked, copied, whole, kind, model):
    "A step with a NaN leaves the weights and is counted; after ten in a row a sentence, and the same command goes on from the last checkpoint."
    first = 4 if kind == "tokenizer" else 1  # it begins with the 4 steps of the warm-up
    home = copied({"vgg": "evaluator", "tokenizer": "warmup", "ar": "decoder"}[kind])
    if kind == "vgg":
        shutil.rmtree(run_of(home, "vgg"))
    more = ["--set", *STUDY[3:], "tokenizer_training.steps=16"] if kind == "tokenizer" else []
    what = ["train", *STUDY, *more, "--until", kind]
    fault("NaN")
    sentence(
        forked(command, what, [], [kind, model, first + 1, 99]),
        ["10 steps in a row had a gradient that is not finite", f"model {model!r}"],
    )
    status, output = forked(command, what).wait()
    assert status == 0 and "going on from step" in output, output
    fault("NaN")
    folder = max(home.glob(f"runs/{kind}-*"), key=lambda p: p.stat().st_mtime_ns)
    shutil.rmtree(folder)
    status, output = forked(command, what, [], [kind, model, first + 1, first + 2]).wait()
    assert (
        status == 0 and json.loads((folder / "metrics.json").read_text())["metrics"]["skipped"] == 2
    ), output


@pytest.fixture
def photos(tmp_path):
    "A folder of two classes of photographs, which are decoded while training."
    for i in range(120):
        (tmp_path / "photos" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)).save(
            tmp_path / "photos" / f"class{i % 2}" / f"{i}.jpg"
        )
    return tmp_path / "photos"


def lazily(photos):
    return ["train", "--data", str(photos), "--set", "data.crop=random", "--until", "vgg"]


@pytest.mark.parametrize("gone", ["one", "class"])
def test_image_vanishes(forked, home, photos, gone):
    "An image that vanishes while it is trained on is named, and another one stands in; without any image of its class the training ends with a sentence."
    process = forked(command, lazily(photos), [["open vgg/log", "pause"]])
    process.until((home / "here").exists)
    listed = sorted((photos / "class0").iterdir())
    if gone == "one":
        for image in listed[:20]:
            image.unlink()
            fault(
                "image that vanishes"
            )  # most of them are for training, where each is used in every epoch
    else:
        for image in listed:
            image.unlink()
        fault("class that vanishes")
    (home / "go").touch()
    if gone == "class":
        sentence(process, "class0")
        return
    status, output = process.wait()
    assert status == 0 and "stands in for it" in output and "Traceback" not in output, output
    status, output = forked(
        command, lazily(photos)
    ).wait()  # a folder with other images is another data set: a new run beside the old
    assert status == 0 and len(list(home.glob("runs/vgg-*"))) == 2, output


def test_all_processes_are_told_to_stop(forked, home, photos):
    "SIGTERM to the whole group, as job schedulers send it, while other processes read the images; then kill -9. The same command goes on at once."
    process = forked(command, lazily(photos), [["open vgg/log", "pause"]])
    process.until((home / "here").exists)
    process.signal(signal.SIGTERM, group=True)
    status, output = process.wait()
    assert status == 0 and "goes on from there" in output and "Traceback" not in output, output
    (home / "here").unlink()
    process = forked(command, lazily(photos), [["open vgg/log", "pause"]])
    process.until((home / "here").exists)
    process.signal(signal.SIGKILL)
    status, output = forked(command, lazily(photos)).wait()
    assert status == 0 and "going on from step" in output, output
    calm = forked(command, lazily(photos), home="calm")
    assert calm.wait()[0] == 0
    assert results(home) == results(home.parent / "calm")
