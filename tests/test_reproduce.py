"""The `seqgan` command and the notebooks of the tables, at preset `smoke`."""

import json
import signal
import sys
import time

import pytest
from conftest import ROOT

SEQGAN = (
    sys.executable,
    "-c",
    "import sys; from seqgan.__main__ import main; sys.exit(main())",
    "reproduce",
    "--preset",
    "smoke",
)


def test_dry_run(child, tmp_path):
    "Every row with its papermill command; nothing is computed or written."
    result = child(*SEQGAN, "--dry-run")
    assert result.returncode == 0, result.stdout
    rows = [line for line in result.stdout.splitlines() if "papermill nbs/" in line]
    assert len(rows) == 6 + 3 + 4 + 7 + 6 and "To do:" in result.stdout
    assert (
        not (tmp_path / "home" / "runs").exists() and not (tmp_path / "home" / "reports").exists()
    )


def test_stops_and_goes_on(child, tmp_path):
    "SIGTERM in the middle ends with status 0 and loses nothing; the same command finishes; a third time there is nothing to do."
    command, home = (*SEQGAN, "--tables", "figure8"), tmp_path / "home"
    process = child(*command, start=True)
    for _ in range(1800):
        if list((home / "runs").glob("tokenizer-*/log.jsonl")):
            break
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    kept = {p: p.stat().st_mtime_ns for p in (home / "runs").glob("*/metrics.json")}
    assert kept  # the feature networks at least

    result = child(*command)
    assert result.returncode == 0, result.stdout[-3000:]
    assert {
        p: p.stat().st_mtime_ns for p in kept
    } == kept  # what was finished was not computed again
    records = [json.loads(p.read_text()) for p in (home / "reports" / "results").rglob("*.json")]
    assert (
        len(records) == 12
        and {r["phase"] for r in records} == {1, 2}
        and {r["transformer"] for r in records} == {"ar", "nar"}
    )
    assert {"figure8.csv", "figure8.md", "figure8.png"} <= {
        p.name for p in (home / "reports").iterdir()
    }

    again = child(*command)
    assert (
        again.returncode == 0
        and "To do: 0 runs" in again.stdout
        and ": started" not in again.stdout
    )


def test_phases_share_their_codes(python):
    "Two phases of one study: the same encoder, codebook and drawn codes, to the last bit; another decoder."
    code = """
from safetensors.torch import load_file
from seqgan.presets import preset
from seqgan.study.study import Study
from seqgan.models.features import weights_digest
one, two = (Study(preset("smoke", {"phase": phase})) for phase in (1, 2))
assert one.codes_run == two.codes_run and one.generation_run != two.generation_run
for part in ("encoder", "quantizer"): assert weights_digest(getattr(one.tokenizer, part)) == weights_digest(getattr(two.tokenizer, part))
assert weights_digest(one.tokenizer.decoder) != weights_digest(two.tokenizer.decoder)
assert not (one.samples(8) == two.samples(8)).all()
"""
    result = python(code)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize(
    "notebook, parameter",
    [
        ("ablation_decoder", "decoder"),
        ("ablation_codebook", "codebook"),
        ("ablation_perceptual", "layers"),
        ("ablation_second_phase", "phase"),
    ],
)
def test_unknown_variants(child, tmp_path, notebook, parameter):
    "A row that does not exist stops at the first cell with a sentence; nothing is written."
    result = child(
        sys.executable,
        "-m",
        "papermill",
        f"nbs/{notebook}.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        parameter,
        "none-such",
        "-p",
        "preset",
        "smoke",
        cwd=ROOT,
    )
    assert result.returncode == 1
    last = result.stdout.strip().splitlines()[-1]
    assert parameter in last and "none-such" in last and "empty for all, or one of" in last, last
    assert not (tmp_path / "home" / "reports").exists()
