"""The study: `seqgan reproduce` and the notebooks of the tables, at preset `smoke`."""

import json
import re
import signal
import sys

import pytest
from conftest import ROOT
from faults import seqgan

WORDS = ("reproduce", "--preset", "smoke")


@pytest.fixture(scope="module")
def figure8(tmp_path_factory):
    "The home of the study of Figure 8."
    return tmp_path_factory.mktemp("figure8") / "home"


def rows(output):
    "The lines that list a row of a table."
    return [line for line in output.splitlines() if "papermill nbs/" in line]


def test_dry_run(forked, tmp_path):
    "Every row with its papermill command; nothing is computed or written."
    status, output = forked(seqgan, *WORDS, "--dry-run").wait()
    assert status == 0, output
    assert len(rows(output)) == 6 + 3 + 4 + 7 + 6 + 5 and "To do:" in output
    assert not (tmp_path / "home").exists()


def test_tables_may_be_named_one_by_one(forked):
    for words in (["--tables", "table1", "table5"], ["--tables", "table5", "--tables", "table1"]):
        _, output = forked(seqgan, *WORDS, "--dry-run", *words).wait()
        assert {line.split()[0] for line in rows(output)} == {"table1", "table5"}
        assert len(rows(output)) == 3 + 4


def test_no_time_at_all(forked, tmp_path):
    status, output = forked(seqgan, *WORDS, "--minutes", "0").wait()
    assert status == 0 and ": started" not in output, output[-3000:]
    assert not (tmp_path / "home" / "runs").exists()


def test_stops_and_resumes(forked, figure8):
    """SIGTERM in the middle ends with status 0 and loses nothing; the same command finishes; a
    third time there is nothing to do."""
    words, home = [*WORDS, "--tables", "figure8"], figure8

    def start():
        return forked(seqgan, *words, SEQGAN_HOME=str(home))

    process = start()
    process.wait_until(lambda: list(home.glob("runs/tokenizer-*/log.jsonl")))
    process.signal(signal.SIGTERM)
    status, output = process.wait()
    assert status == 0 and "stopped at step" in output, output[-3000:]
    kept = {p: p.stat().st_mtime_ns for p in (home / "runs").glob("*/metrics.json")}
    assert kept  # what the judge sees of real images, at least

    status, output = start().wait()
    assert status == 0, output[-3000:]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing was computed again
    check_records(home)
    status, again = start().wait()
    assert status == 0 and ": started" not in again, again[-3000:]
    assert "To do: 0 runs" in again


def check_records(home):
    "One record for each row and transformer of Figure 8, and the table that they make."
    files = sorted((home / "reports" / "results").rglob("*.json"))
    records = {file.stem: json.loads(file.read_text()) for file in files}
    assert len(records) == 12
    assert {(r["phase"], r["transformer"]) for r in records.values()} == {
        (phase, transformer) for phase in (1, 2) for transformer in ("ar", "nar")
    }
    record = records["figure8-phase-2-alpha-kept-NAR-seed-0"]
    (cell,) = record["cells"]
    assert cell["changes"].items() >= {"phase": 2, "second_phase.alpha": 1.0}.items()
    names = {file.name for file in (home / "reports").iterdir()}
    assert {"figure8.csv", "figure8.md", "figure8.png", "figure9.png"} <= names
    lines = (home / "reports" / "figure8.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if re.match(r"\| phase 2", line)] == [
        "| phase 2",
        "| phase 2, alpha kept",
        "| phase 2, no attention",
        "| phase 2, alpha 0",
    ] * 2


def compare_phases():
    "What two phases of one experiment have in common, and what not."
    from seqgan.models.features import weights_digest
    from seqgan.presets import preset
    from seqgan.study.study import Study

    one, two = (Study(preset("smoke", {"phase": phase})) for phase in (1, 2))
    assert one.run("samples") == two.run("samples")
    assert one.run("generation") != two.run("generation")
    for part in ("encoder", "quantizer"):
        first, second = (weights_digest(getattr(s.tokenizer, part)) for s in (one, two))
        assert first == second, part
    assert weights_digest(one.tokenizer.decoder) != weights_digest(two.tokenizer.decoder)
    assert not (one.samples(8) == two.samples(8)).all()


def test_phases_share_their_codes(forked, figure8):
    """Two phases of one experiment: the same encoder, codebook and samples, to the last bit;
    another decoder. The study of Figure 8 has both."""
    status, output = forked(compare_phases, SEQGAN_HOME=str(figure8)).wait()
    assert status == 0, output[-3000:]


def test_unknown_row(child, tmp_path):
    "A row that does not exist stops at the first cell with a sentence; nothing is written."
    command = (sys.executable, "-m", "papermill", "nbs/ablation_second_phase.ipynb")
    command += (str(tmp_path / "out.ipynb"), "-p", "phase", "none-such", "-p", "preset", "smoke")
    result = child(*command, cwd=ROOT)
    assert result.returncode == 1
    last = result.stdout.strip().splitlines()[-1]
    assert "phase must be empty for all, or one of" in last and "none-such" in last, last
    assert not (tmp_path / "home" / "reports").exists()
