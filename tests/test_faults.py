"""Full disks, files that are damaged, foreign or gone, other settings and code, losses of NaN.

Each study ends with the files of an undisturbed one, or with a sentence.
"""

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
from faults import DISK_IS_FULL, FAULTS, SETTINGS, STUDY, command
from forking import Forked
from outcomes import checkpoint_steps, finished, results, results_but_best, run_of
from PIL import Image

ALL = ["train", *STUDY]
AR = [*ALL, "--until", "ar"]
CODES = [*ALL, "--until", "codes"]
PLACES = [
    ".config.json",
    "open vgg/log",
    "branch-point/model",
    "tokenizer/.log.jsonl",
    "rename tokenizer/.metrics",
    "codes/train/codes.npy",
    "decoder/model/.model",
    "rename ar/.part-N$",
    "rename samples/.part",
    "reports",
]
SAVES_AR = "rename ar/.part-N$"


def fault(name):
    FAULTS[name] += 1


def with_settings(*settings, until):
    "The study with more settings, as far as a run."
    return ["train", "--phase", "2", "--set", *SETTINGS, *settings, "--until", until]


def assert_sentence(process, *words):
    "The process ends with status 1 and a sentence in which `words` are, and without a traceback."
    status, output = process.wait()
    assert status == 1 and "Traceback" not in output, output
    assert output.strip().splitlines()[-1].startswith("seqgan: "), output
    for word in words:
        assert word in output, output


def assert_succeeds(process, *words):
    "The process ends with status 0 and has printed `words`. Returns its output."
    status, output = process.wait()
    assert status == 0, output
    for word in words:
        assert word in output, output
    return output


# Full disks


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request, home):
    """How a disk becomes full and empty again, and a home on which it can.

    A limit for the files of the process, or a small disk.
    """
    if request.param == "limit":
        yield "limit files", "unlimit files"
        return
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m,nr_inodes=4000", "seqgan-test", str(home)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"only root may mount a small disk: {mounted.stderr.strip()}")
    yield "fill disk", "empty disk"
    subprocess.run(["umount", "-l", str(home)], check=True)


def test_full_disk(forked, home, whole, disk):
    """The disk is full from some place on: status 1 and what to do. With room, it resumes.

    In every run; of each two places, one by either kind of full disk.
    """
    full, _ = disk
    for place in PLACES[full == "fill disk" :: 2]:
        before = finished(home)
        status, output = forked(command, ALL, [[place, full]]).wait()
        fault("full disk")
        assert "Traceback" not in output, (place, output)
        assert status == 1 or (status == 0 and place == "reports"), (place, output)
        assert status == 0 or any(words in output for words in DISK_IS_FULL), (place, output)
        assert before.items() <= finished(home).items(), place
        shutil.rmtree(home / "ballast", ignore_errors=True)
    assert_succeeds(forked(command, ALL))
    assert results(home) == results(whole)


def test_full_for_a_while(forked, home, whole, disk):
    """The disk is full for some steps: the training goes on, and its log has every line.

    Then it is full for the log alone, and the process is killed.
    """
    full, room = disk
    for folder in whole.iterdir():
        shutil.copytree(folder, home / folder.name)
    for kind in ("ar", "samples", "generation"):
        shutil.rmtree(run_of(home, kind))
    log, save = "open ar/log", "os.mkdir ar/.part-N$"
    faults = [
        [log, "nothing"],
        [log, full],
        [log, "nothing"],
        [log, room],
        [log, full],
        [f"{log}|{save}", room],
        [log, "SIGKILL"],
    ]
    status, output = forked(command, AR, faults).wait()
    assert status == -signal.SIGKILL and "without this checkpoint" in output, output
    fault("disk full for a while")
    fault("disk full for the log")
    fault("SIGKILL before the log is written")
    assert_succeeds(forked(command, AR), "resumes from step")
    assert results_but_best(home, "ar") == results_but_best(whole, "ar")


# Damaged checkpoints


@pytest.fixture(scope="module")
def begun(server, whole, tmp_path_factory):
    "The home of a study that was killed when its transformer had been trained for 8 steps."
    home = tmp_path_factory.mktemp("begun") / "home"
    shutil.copytree(whole, home)
    for kind in ("ar", "samples", "generation"):
        shutil.rmtree(run_of(home, kind))
    faults = [[SAVES_AR, "nothing"]] * 8 + [["open ar/log", "SIGKILL"]]
    status, output = Forked(server, command, [AR, faults], {"SEQGAN_HOME": str(home)}).wait()
    assert status == -signal.SIGKILL, output
    steps = checkpoint_steps(run_of(home, "ar"))
    assert {7, 8} <= steps and len(steps) <= 3
    return home


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_the_step(file):
    file.write_text(file.read_text().replace('"step": 8', '"step": 9'))


def remove(file):
    file.unlink()


def empty(file):
    os.truncate(file, 0)


def write_null(file):
    file.write_text("null")


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model-transformer.safetensors", halve),
        ("model-transformer.safetensors", remove),
        ("optimizer-transformer.safetensors", flip_a_bit),
        ("loop.json", empty),
        ("loop.json", write_null),
        ("loop.json", change_the_step),
    ],
)
def test_damaged_checkpoint(forked, copied, whole, begun, name, damage):
    "A file of the newest checkpoint is damaged: a line says so, and the one before it serves."
    home = copied("ar", begun)
    damage(run_of(home, "ar") / "checkpoint-8" / name)
    fault("damaged checkpoint")
    assert_succeeds(forked(command, AR), "checkpoint-8 of", "is damaged", "resumes from step 7")
    assert results(home, "ar") == results(whole, "ar")


def test_all_checkpoints_damaged(forked, copied, whole, begun):
    "It says so of each, and starts anew."
    home = copied("ar", begun)
    files = list(run_of(home, "ar").glob("checkpoint-*/model-*"))
    for file in files:
        halve(file)
        fault("damaged checkpoint")
    output = assert_succeeds(forked(command, AR))
    assert output.count("is damaged:") == len(files) and "resumes" not in output, output
    assert results(home, "ar") == results(whole, "ar")


class Evil:
    "Its pickle makes a file when it is read."

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def seal(checkpoint):
    "Write loop.json anew, so that only the content of the files tells what was done to them."
    from seqgan.core import digest, file_digest

    state = json.loads((checkpoint / "loop.json").read_text())
    del state["digest"]
    state["files"] = {file.name: file_digest(file) for file in checkpoint.glob("*.safetensors")}
    state["run"] = checkpoint.parent.name
    (checkpoint / "loop.json").write_text(json.dumps(state | {"digest": digest(state)}))


@pytest.mark.parametrize("sealed", [False, True])
def test_pickle(forked, copied, whole, begun, tmp_path, sealed):
    "A pickle that is called a safetensors file is not executed."
    home = copied("ar", begun)
    checkpoint = run_of(home, "ar") / "checkpoint-8"
    content = pickle.dumps(Evil(tmp_path / "executed"))
    (checkpoint / "model-transformer.safetensors").write_bytes(content)
    fault("pickle as a checkpoint")
    if sealed:
        seal(checkpoint)
        assert_sentence(forked(command, AR), "checkpoint-8")
        shutil.rmtree(checkpoint)  # what the sentence leaves to do
    assert_succeeds(forked(command, AR))
    assert not (tmp_path / "executed").exists()
    assert results(home, "ar") == results(whole, "ar")


def test_foreign_checkpoint(forked, copied, begun):
    """A checkpoint of another run, or of other shapes, ends with a sentence.

    Also when loop.json names this run. Without it the run resumes.
    """
    home = copied("ar", begun)
    source = run_of(home, "ar")
    wider = with_settings("transformer.dim=48", until="ar")
    status, output = forked(command, wider, [[SAVES_AR, "nothing"], [SAVES_AR, "SIGKILL"]]).wait()
    assert status == -signal.SIGKILL, output
    (folder,) = set(home.glob("runs/ar-*")) - {source}
    shutil.copytree(source / "checkpoint-8", folder / "checkpoint-8")
    fault("foreign checkpoint")
    assert_sentence(forked(command, wider), source.name, "Move it back to where it belongs")
    seal(folder / "checkpoint-8")
    fault("foreign checkpoint")
    assert_sentence(forked(command, wider), "is of other models than this run's", "size mismatch")
    shutil.rmtree(folder / "checkpoint-8")
    assert_succeeds(forked(command, wider), "resumes from step 1")
    assert checkpoint_steps(source) >= {7, 8}  # and the other run was left alone


# Other settings, other code


def test_other_settings(forked, copied):
    "Other settings are another run beside the old one, which stays as it is."
    home = copied("ar")
    before = finished(home)
    fault("other settings")
    other = with_settings("transformer_training.lr=0.001", until="ar")
    output = assert_succeeds(forked(command, other))
    assert output.count(": started") == 1 and len(list(home.glob("runs/ar-*"))) == 2, output
    assert before.items() <= finished(home).items()


def test_other_code(child, copied, tmp_path):
    "Other code is another run too, and a line names the one with these settings."
    home = copied("vgg")
    shutil.copytree(ROOT / "seqgan", tmp_path / "code" / "seqgan")
    with open(tmp_path / "code" / "seqgan" / "training" / "features.py", "a") as file:
        file.write("\nADDED = 1\n")
    before, old = finished(home), run_of(home, "vgg")
    fault("other code")
    words = ["-m", "seqgan", "train", "--preset", "smoke", *STUDY, "--until", "vgg"]
    code = tmp_path / "code"
    result = child(sys.executable, *words, cwd=code, PYTHONPATH=str(code))
    assert result.returncode == 0, result.stdout
    other_code = f"{old.name} has these settings but was made by different code"
    assert other_code in result.stdout, result.stdout
    assert len(list(home.glob("runs/vgg-*"))) == 2 and before.items() <= finished(home).items()


# Damaged results


@pytest.mark.parametrize(
    "name, damage",
    [
        ("model/model.safetensors", remove),
        ("model/model.safetensors", halve),
        ("metrics.json", halve),
        ("metrics.json", empty),
    ],
)
def test_finished_run_is_damaged(forked, copied, whole, name, damage):
    "A finished run that lost a file says which, and to delete the folder; then it is recomputed."
    home = copied("ar")
    folder = run_of(home, "ar")
    damage(folder / name)
    fault("damaged finished run")
    words = str(folder), name, "elete the folder to compute it again"
    assert_sentence(forked(command, AR), *words)
    shutil.rmtree(folder)
    assert_succeeds(forked(command, AR))
    assert results(home, "ar") == results(whole, "ar")


@pytest.fixture(scope="module")
def extracted(server, whole, tmp_path_factory):
    "The home of a study that was killed when its codes were extracted, but not finished."
    home = tmp_path_factory.mktemp("extracted") / "home"
    shutil.copytree(whole, home)
    shutil.rmtree(run_of(home, "codes"))
    faults = [["codes/.metrics", "SIGKILL"]]
    status, output = Forked(server, command, [CODES, faults], {"SEQGAN_HOME": str(home)}).wait()
    assert status == -signal.SIGKILL, output
    return home


@pytest.mark.parametrize(
    "name, damage",
    [
        ("codes.npy", halve),
        ("labels.npy", remove),
        ("done.bin", halve),
        ("codes.json", halve),
        ("codes.json", remove),
    ],
)
def test_damaged_codes(forked, copied, whole, extracted, name, damage):
    "Codes that are damaged before their run is finished end with a sentence, or are recomputed."
    home = copied("codes", extracted)
    folder = run_of(home, "codes") / "train"
    damage(folder / name)
    fault("damaged codes")
    process = forked(command, CODES)
    if process.wait()[0] != 0:
        assert_sentence(process, str(folder), "elete")
        shutil.rmtree(folder)
        assert_succeeds(forked(command, CODES))
    assert results(home, "codes") == results(whole, "codes")


# Losses that are not finite


@pytest.mark.parametrize(
    "kind, model, before",
    [
        ("vgg", "net", None),
        ("tokenizer", "tokenizer", "branch-point"),
        ("tokenizer", "discriminator", "branch-point"),
        ("ar", "transformer", "decoder"),
    ],
)
def test_not_finite(forked, copied, kind, model, before):
    """A step with a NaN leaves the weights, and is counted.

    After ten in a row a sentence; the same command resumes from the last checkpoint.
    """
    home = copied(before or "real")
    if before is None:
        shutil.rmtree(run_of(home, "vgg"))
    first = 5 if kind == "tokenizer" else 2  # the tokenizer begins at the branch point, step 4
    more = ["tokenizer_training.steps=16"] if kind == "tokenizer" else []
    words = with_settings(*more, until=kind)
    fault("NaN")
    assert_sentence(
        forked(command, words, [], [kind, model, first, 99]),
        "10 steps in a row had a gradient that is not finite",
        f"model {model!r}",
    )
    assert_succeeds(forked(command, words), "resumes from step")
    fault("NaN")
    folder = max(home.glob(f"runs/{kind}-*"), key=lambda path: path.stat().st_mtime_ns)
    shutil.rmtree(folder)
    assert_succeeds(forked(command, words, [], [kind, model, first, first + 1]))
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["skipped"] == 2


# Images that vanish


@pytest.fixture
def photos(tmp_path):
    "A folder of two classes of photographs, which are decoded while training."
    for i in range(120):
        folder = tmp_path / "photos" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "photos"


def training_on(photos):
    settings = ["vgg.weights=local", "data.crop=random"]
    return ["train", "--data", str(photos), "--set", *settings, "--until", "vgg"]


def paused(forked, home, photos):
    "A training that waits before the first line of its log."
    process = forked(command, training_on(photos), [["open vgg/log", "pause"]])
    process.wait_until((home / "here").exists)
    return process


def test_image_vanishes(forked, home, photos):
    "An image that vanishes while it is trained on is named, and another one stands in."
    process = paused(forked, home, photos)
    for image in sorted((photos / "class0").iterdir())[:20]:  # most of them are for training
        image.unlink()
        fault("image that vanishes")
    (home / "go").touch()
    output = assert_succeeds(process, "stands in for it")
    assert "Traceback" not in output, output
    # A folder with other images is another data set: a new run beside the old.
    assert_succeeds(forked(command, training_on(photos)))
    assert len(list(home.glob("runs/vgg-*"))) == 2


def test_class_vanishes(forked, home, photos):
    "Without any image of a class, the training ends with a sentence."
    process = paused(forked, home, photos)
    for image in (photos / "class0").iterdir():
        image.unlink()
    fault("class that vanishes")
    (home / "go").touch()
    assert_sentence(process, "class0")


def test_all_processes_are_told_to_stop(forked, home, photos):
    """SIGTERM to the whole group, as job schedulers send it, while others read the images.

    Then kill -9. The same command resumes at once.
    """
    process = paused(forked, home, photos)
    process.signal(signal.SIGTERM, group=True)
    fault("SIGTERM")
    output = assert_succeeds(process, "resumes from there")
    assert "Traceback" not in output, output
    (home / "here").unlink()
    process = paused(forked, home, photos)
    process.signal(signal.SIGKILL)
    fault("SIGKILL")
    process.wait()
    assert_succeeds(forked(command, training_on(photos)), "resumes from step")
    assert_succeeds(forked(command, training_on(photos), home="calm"))
    assert results(home) == results(home.parent / "calm")
