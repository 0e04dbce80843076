"""The commands of the README as a user types them, at preset `smoke`."""

import json
import sys

import pytest
from conftest import ROOT

PAPERMILL = (sys.executable, "-m", "papermill")


def written(home):
    return (
        sorted(p.relative_to(home).as_posix() for p in (home / "reports").rglob("*") if p.is_file())
        if (home / "reports").exists()
        else []
    )


@pytest.mark.parametrize(
    "cwd, notebook",
    [(ROOT, "nbs/ablation_alpha.ipynb"), (ROOT / "nbs", "ablation_alpha.ipynb")],
    ids=["root", "nbs"],
)
def test_papermill(child, tmp_path, cwd, notebook):
    command = (
        *PAPERMILL,
        notebook,
        str(tmp_path / "out.ipynb"),
        "-p",
        "preset",
        "smoke",
        "-p",
        "alpha",
        "1",
    )
    result = child(*command, cwd=cwd)
    assert result.returncode == 0, result.stdout[-3000:]
    files = written(tmp_path / "home")
    records = [f for f in files if f.startswith("reports/results/")]
    assert {
        "reports/figure6.png",
        "reports/figure6.csv",
        "reports/figure6.md",
        "reports/figure10.png",
    } <= set(files)
    records = [json.loads((tmp_path / "home" / record).read_text()) for record in records]
    assert sorted(r["transformer"] for r in records) == ["ar", "nar"]
    for record in records:
        assert (
            record["preset"],
            record["alpha"],
            record["seed"],
            record["data"],
            record["phase"],
        ) == ("smoke", 1.0, 0, "shapes", 1)
        assert {"rFID-local", "PSNR", "usage", "perplexity", "low", "sem", "class_accuracy"} <= set(
            record["metrics"]["tokenizer"]
        )
        assert not [
            k for m in record["metrics"].values() for k in m if k in ("FID", "rFID", "IS")
        ]  # those names belong to Inception

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "home" / "runs").rglob("*.safetensors")}
    assert child(*command, cwd=cwd).returncode == 0
    assert {
        p: p.stat().st_mtime_ns for p in (tmp_path / "home" / "runs").rglob("*.safetensors")
    } == before  # all of it reused


@pytest.mark.parametrize(
    "name, value, allowed",
    [("alpha", "1.5", "[0, 1]"), ("preset", "huge", "smoke"), ("data", "no/such/folder", "shapes")],
)
def test_impossible_parameters(child, tmp_path, name, value, allowed):
    out = tmp_path / "out.ipynb"
    result = child(*PAPERMILL, "nbs/ablation_alpha.ipynb", str(out), "-p", name, value)
    assert result.returncode == 1
    last = result.stdout.strip().splitlines()[-1]
    assert name in last and value in last and allowed in last, last
    ran = [
        c
        for c in json.loads(out.read_text())["cells"]
        if c["cell_type"] == "code" and c.get("execution_count")
    ]
    assert len(ran) <= 3  # the defaults, the injected parameters, and the first cell that uses them
    assert written(tmp_path / "home") == []


def test_a_warm_up_shorter_than_a_tick(child, tmp_path):
    result = child(
        sys.executable,
        "-m",
        "seqgan",
        "train",
        "--preset",
        "smoke",
        "--until",
        "tokenizer",
        "--set",
        "tokenizer_training.steps=200",
        "perceptual.warmup=2",
    )
    assert result.returncode == 0, result.stdout[-3000:]
    (warmup,), (tokenizer,) = (
        (tmp_path / "home" / "runs").glob(f"{kind}-*") for kind in ("warmup", "tokenizer")
    )
    assert json.loads((warmup / "metrics.json").read_text())["metrics"] == {"skipped": 0}
    assert json.loads((tokenizer / "log.jsonl").read_text().splitlines()[-1])["step"] == 200
