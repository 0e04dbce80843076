"""One-line faults, applied one at a time: which of them does the suite not notice?

    python tests/mutants.py                 all of them, two at a time; writes tests/mutants.md
    python tests/mutants.py NAME [NAME ...] only these, and what the suite said

Each mutant is a patch by meaning: it says what it breaks, in which module, and which part of the
suite of `.ci/run` should notice (notebooks are tested as `nbdev_test` does, files of tests/ by
pytest). It is applied to a copy of the project, in the notebook and in the module made of it; the
checkout is never touched. A mutant whose line is no longer there is an error: it must be ported.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
LIMIT = (
    300  # seconds for one mutant; one that hangs is noticed, since the suite would not end either
)


@dataclass(frozen=True)
class Result:
    "What the suite said of a mutant."

    name: str
    caught_by: str  # the part of the suite that failed; empty: it survived
    seconds: float
    output: str


def notebook_of(project: Path, module: str) -> Path:
    "The notebook that exports a module."
    pattern = re.compile(rf"#\| default_exp {re.escape(module)}\b(?!\.)")
    return next(p for p in (project / "nbs").glob("*.ipynb") if pattern.search(p.read_text()))


def replace_once(text: str, mutant, where: str) -> str:
    found = text.count(mutant.line)
    if found != 1:
        raise SystemExit(f"{mutant.name}: {mutant.line!r} occurs {found} times in {where}")
    return text.replace(mutant.line, mutant.fault)


def apply(mutant, project: Path) -> None:
    "Patch the module and the exported cell of its notebook."
    module = project / "seqgan" / f"{mutant.module.replace('.', '/')}.py"
    module.write_text(replace_once(module.read_text(), mutant, module.name))
    path = notebook_of(project, mutant.module)
    notebook = json.loads(path.read_text())
    exported = [c for c in notebook["cells"] if "".join(c["source"]).startswith("#| export")]
    (cell,) = [c for c in exported if mutant.line in "".join(c["source"])]
    cell["source"] = replace_once("".join(cell["source"]), mutant, path.name)
    path.write_text(json.dumps(notebook))


def left_out(folder: str, names: list[str]) -> list[str]:
    "What no part of the suite needs, and what is large."
    if Path(folder) == ROOT / "data":
        return [name for name in names if name != "pretrained"]
    unneeded = {".git", "runs", "reports"} if Path(folder) == ROOT else {"__pycache__"}
    return [name for name in names if name in unneeded]


def run_part(part: str, module: str, project: Path, home: Path) -> subprocess.CompletedProcess:
    "One part of the suite: a notebook, or arguments of pytest."
    env = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    env |= {"SEQGAN_HOME": str(home), "MPLBACKEND": "agg"}
    if part == "notebook":
        part = str(notebook_of(project, module).relative_to(project))
        code = "import pathlib, sys; from nbdev.test import test_nb\n"
        code += "sys.exit(not test_nb(pathlib.Path(sys.argv[1]))[0])"
        command = [sys.executable, "-c", code, str(project / part)]
        env["IN_TEST"] = "1"
    else:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--numprocesses=0",
            *part.split(),
        ]
    return subprocess.run(
        command,
        cwd=project,
        env=env,
        text=True,
        timeout=LIMIT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test(mutant) -> Result:
    "Apply a mutant to a copy of the project and run its parts of the suite until one fails."
    started = time.monotonic()
    caught, output = "", ""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        project = Path(folder) / "project"
        shutil.copytree(ROOT, project, ignore=left_out)
        if mutant.line:
            apply(mutant, project)
        for part in mutant.suite:
            try:
                found = run_part(part, mutant.module, project, Path(folder) / "home")
            except subprocess.TimeoutExpired:
                caught = f"{part} (did not end)"
                break
            output += found.stdout
            if found.returncode:
                caught = part
                break
    return Result(mutant.name, caught, time.monotonic() - started, output)


def report(results: list[Result], seconds: float) -> str:
    "The Markdown of tests/mutants.md."
    faults = {m.name: m for m in MUTANTS}
    survivors = [r.name for r in results if not r.caught_by]
    lines = [
        "# Mutants",
        "",
        f"{len(results)} one-line faults, applied one at a time by `python tests/mutants.py`: "
        f"{len(results) - len(survivors)} noticed by the suite, {len(survivors)} not"
        + (f" ({', '.join(survivors)})." if survivors else "."),
        f"It took {seconds / 60:.0f} minutes on {os.cpu_count()} cores.",
        "",
        "| fault | what it breaks | module | noticed by | s |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        m = faults[r.name]
        noticed = f"`{r.caught_by}`" if r.caught_by else "**nothing**"
        lines.append(f"| {m.name} | {m.breaks} | `{m.module}` | {noticed} | {r.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def healthy(mutants: list[Mutant], jobs: int) -> None:
    "Without a fault every part of the suite passes; otherwise nothing below would mean anything."
    suites = {(part, m.module if part == "notebook" else "") for m in mutants for part in m.suite}
    parts = [
        Mutant(f"{part} {module}", "nothing", module, "", "", (part,))
        for part, module in sorted(suites)
    ]
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(test, parts):
            if result.caught_by:
                raise SystemExit(f"{result.name} fails without a fault:\n{result.output[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these mutants")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--skip-healthy", action="store_true", help="trust the unchanged suite")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {m.name for m in MUTANTS}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not arguments.names or m.name in arguments.names]
    started = time.monotonic()
    if not arguments.skip_healthy:
        healthy(chosen, arguments.jobs)
    results = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(test, chosen):
            results.append(result)
            verdict = result.caught_by or "SURVIVES"
            print(f"{result.name:40} {result.seconds:5.0f} s  {verdict}", flush=True)
            if arguments.names:
                print(result.output[-2000:])
    survivors = [r.name for r in results if not r.caught_by]
    if not arguments.names:
        text = report(results, time.monotonic() - started)
        (ROOT / "tests" / "mutants.md").write_text(text)
    print(f"{len(results)} mutants, {len(survivors)} survive: {', '.join(survivors) or 'none'}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
