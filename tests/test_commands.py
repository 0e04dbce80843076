"""The commands of the README as a user types them, at preset `smoke`."""

import json
import re
import shutil
import sys

import pytest
from conftest import ROOT
from faults import seqgan, seqgan_in
from PIL import Image

PAPERMILL = (sys.executable, "-m", "papermill")


def written(home):
    "The files below reports/, by name."
    files = [file for file in (home / "reports").rglob("*") if file.is_file()]
    return sorted(file.relative_to(home).as_posix() for file in files)


def times(home):
    "When the weights of all runs were written."
    return {file: file.stat().st_mtime_ns for file in (home / "runs").rglob("*.safetensors")}


@pytest.fixture
def pets(tmp_path):
    "A folder of two classes, 60 images each: six of them are for validation."
    for i in range(120):
        folder = tmp_path / "pets" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        colour = (2 * i, 255 * (i % 2), 255 - 2 * i)
        Image.new("RGB", (24, 20), colour).save(folder / f"{i}.png")
    return tmp_path / "pets"


# The first command of the README


def check_record(record, dataset):
    names = ("preset", "alpha", "seed", "phase")
    assert [record[name] for name in names] == ["smoke", 1.0, 0, 1]
    assert record["dataset"]["name"] == dataset
    places = [(c["table"], c["row"]) for c in record["cells"]]
    assert places == [("figure6", "alpha 1"), ("table6", "sem"), ("figure8", "phase 1")]
    assert {c["column"] for c in record["cells"]} == {record["transformer"].upper()}
    expected = {"rFID-lite0", "PSNR", "usage", "perplexity", "low", "sem", "class_accuracy"}
    assert expected <= set(record["metrics"]["tokenizer"])
    names = {name for metrics in record["metrics"].values() for name in metrics}
    assert not names & {"FID", "rFID", "IS"}  # those names belong to Inception


def run_again(parameters):
    "The cells of the first command's notebook with other parameters, without papermill."
    cells = json.loads((ROOT / "nbs" / "ablation_alpha.ipynb").read_text())["cells"]
    names = {"display": print}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            names |= parameters if "parameters" in cell["metadata"].get("tags", []) else {}


def test_papermill(child, forked, tmp_path):
    "In the project's folder, on drawn images; a second time everything is found."
    command = (*PAPERMILL, "nbs/ablation_alpha.ipynb", str(tmp_path / "out.ipynb"))
    command += ("-p", "preset", "smoke", "-p", "alpha", "1")
    home = tmp_path / "home"
    result = child(*command, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:]
    files = written(home)
    figures = {"figure6b.png", "figure6.csv", "figure6.md", "figure10.png"}
    assert {f"reports/{name}" for name in figures} <= set(files)
    records = [file for file in files if file.startswith("reports/results/")]
    assert records == [
        f"reports/results/shapes/smoke/figure6-alpha-1-{t}-seed-0.json" for t in ("AR", "NAR")
    ]
    for record in records:
        check_record(json.loads((home / record).read_text()), "shapes")
    before = times(home)
    parameters = {"preset": "smoke", "alpha": 1}
    status, output = forked(run_again, parameters, MPLBACKEND="agg").wait()
    assert status == 0 and ": started" not in output, output[-3000:]
    assert "40 classes" in output and times(home) == before


def test_papermill_on_a_folder(child, tmp_path, pets):
    "In nbs/, on few images in a folder, of which six are for validation."
    command = (*PAPERMILL, "ablation_alpha.ipynb", str(tmp_path / "out.ipynb"))
    command += ("-p", "preset", "smoke", "-p", "alpha", "1", "-p", "data", str(pets))
    result = child(*command, cwd=ROOT / "nbs")
    assert result.returncode == 0, result.stdout[-3000:]
    home = tmp_path / "home"
    records = [file for file in written(home) if file.startswith("reports/results/")]
    assert len(records) == 2
    record = json.loads((home / records[0]).read_text())
    check_record(record, "pets")
    assert record["dataset"]["label"] == "pets, 2 classes"
    assert (record["dataset"]["training"], record["dataset"]["validation"]) == (114, 6)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("alpha", "1.5", "alpha must lie in [0, 1], got 1.5"),  # others: notebook 52_graph
        ("data", "00000", "-r data 00000 names the folder"),
    ],
)
def test_impossible_parameters(child, tmp_path, name, value, words):
    "One sentence with the parameter's name, in the first cell that uses them; nothing is written."
    out = tmp_path / "out.ipynb"
    result = child(*PAPERMILL, "nbs/ablation_alpha.ipynb", str(out), "-p", name, value)
    assert result.returncode == 1
    last = result.stdout.strip().splitlines()[-1]
    assert name in last and words in last, last
    cells = json.loads(out.read_text())["cells"]
    # the defaults, the injected parameters, and the first cell that uses them
    assert sum(bool(cell.get("execution_count")) for cell in cells) <= 4
    assert written(tmp_path / "home") == []


# seqgan train


def folders(output):
    "The folders of runs that a dry run lists."
    return re.findall(r"^(?:done|to do) +(\S+)$", output, re.M)


def dry_run(forked, *words):
    status, output = forked(seqgan, "train", "--preset", "smoke", "--dry-run", *words).wait()
    assert status == 0, output
    return folders(output)


def test_settings_may_be_set_one_by_one(forked):
    together = dry_run(forked, "--set", "perceptual.alpha=0", "quantizer.codes=16")
    apart = dry_run(forked, "--set", "perceptual.alpha=.0", "--set", "quantizer.codes=16")
    last = dry_run(forked, "--set", "quantizer.codes=16")
    assert together == apart
    assert together[-1] != last[-1]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--set", "data.val=1"], "must have at least 2 images for validation"),
        (["--set", "data.train=15"], "tokenizer_training.batch must lie between 1 and"),
        (["--set", "memory.gradient_accumulation=3"], "memory.gradient_accumulation must divide"),
        (["--set", "seed=1", "seed=2"], "a setting must be given once, got 'seed'"),
        (["--set", "quantizer.codes=many"], "quantizer.codes must be an integer, got 'many'"),
        (["--set", "quantizer.codez=8"], "codez"),
        (["--until", "decoder"], "--until must be one of real, branch-point"),
        (["--set", "preset=tiny"], "preset must be given as --preset"),
        (
            ["--set", "transformer.causal=False"],
            "transformer.causal must be given as --transformer",
        ),
        (["--phase", "1", "--phase", "2"], "--phase must be given once"),
        (["--set", "data.size=8"], "data.size must be a multiple of"),
        (["--set", "autoencoder.channels=5"], "autoencoder.channels must be a positive multiple"),
        (["--phase", "2", "--set", "autoencoder.attention_heads=3"], "attention_heads must divide"),
        (["--set", "evaluation.reference=2"], "evaluation.reference must be at least 10"),
        (["--set", "vgg.weights=local", "classifier.batch=9999"], "classifier.batch must lie"),
        (
            ["--set", "vgg.weights=local", "perceptual.scale_taps=True"],
            "perceptual.scale_taps must",
        ),
    ],
)
def test_what_cannot_work_is_said_first(forked, tmp_path, words, sentence):
    status, output = forked(seqgan, "train", "--preset", "smoke", *words).wait()
    assert status == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("seqgan") and " error: " in last and sentence in last, last
    assert not (tmp_path / "home").exists()


def test_images_may_move(forked, tmp_path, pets):
    "The same files under another path are the same dataset."

    def train(data, cwd=ROOT):
        words = ["--until", "vgg", "--data", str(data), "--set", "vgg.weights=local"]
        status, output = forked(seqgan_in, str(cwd), "train", "--preset", "smoke", *words).wait()
        assert status == 0, output
        return output

    assert ": started" in train(pets)
    assert ": started" not in train("pets", cwd=tmp_path)
    shutil.move(pets, tmp_path / "scratch")
    assert ": started" not in train(tmp_path / "scratch")


def test_a_branch_point_before_the_first_line_of_the_log(forked, tmp_path):
    settings = ["tokenizer_training.steps=100", "perceptual.warmup=1"]  # a line every two steps
    settings += ["tokenizer_training.batch=4", "data.val=16", "evaluation.reference=40"]
    words = ["--until", "tokenizer", "--set", *settings]
    status, output = forked(seqgan, "train", "--preset", "smoke", *words).wait()
    assert status == 0, output
    runs = tmp_path / "home" / "runs"
    (branch,), (tokenizer,) = (runs.glob(f"{kind}-*") for kind in ("branch-point", "tokenizer"))
    assert json.loads((branch / "metrics.json").read_text())["metrics"] == {"skipped": 0}
    assert json.loads((tokenizer / "log.jsonl").read_text().splitlines()[-1])["step"] == 100
