"""What a notebook cannot test about itself: the layout, the imports, the tags, the files that are committed."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUNTIME = {
    "torch",
    "torchvision",
    "torch_fidelity",
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


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def module_numbers():
    "Module name -> number of the notebook that exports it."
    numbers = {}
    for path in NOTEBOOKS:
        for cell in cells(path):
            if match := re.search(r"^#\| default_exp (\w+)", source(cell), re.M):
                numbers[match[1]] = int(path.name[:2])
    return numbers


def test_top_level():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    assert top == {
        "nbs",
        "seqgan",
        "data",
        "reports",
        "tests",
        "settings.ini",
        "setup.py",
        "README.md",
        "LICENSE",
        "constraints.txt",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    nb = json.loads(path.read_text())
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))
    assert (
        nb["metadata"]["kernelspec"]["language"] == "python"
    )  # papermill refuses parameters without it
    outputs = [o for c in cells(path) for o in c["outputs"]]
    assert outputs, "committed without outputs: nothing to read"
    assert all(o["output_type"] != "error" for o in outputs)
    assert all(len(json.dumps(o)) < 1_000_000 for o in outputs)
    assert source(nb["cells"][0]).startswith("# ")


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.name.startswith("ablation")], ids=lambda p: p.stem
)
def test_parameters_survive_cleaning(path, tmp_path):
    "nbdev_clean deletes tags unless settings.ini allows them; papermill's -p would then be ignored without an error."
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    copy = shutil.copy(path, tmp_path / "nbs")
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
        cwd=tmp_path,
        check=True,
    )
    tagged = [c for c in cells(type(path)(copy)) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = {t.id for n in ast.parse(source(tagged[0])).body for t in n.targets}
    assert {"preset", "data", "seed"} < names


def test_imports():
    "A module imports only modules of smaller notebooks and the packages it may; model modules know no data, plots or training."
    numbers = module_numbers()
    assert set(numbers) == {p.stem for p in (ROOT / "seqgan").glob("*.py")} - {
        "__init__",
        "_modidx",
    }
    for name, number in numbers.items():
        for node in ast.walk(ast.parse((ROOT / "seqgan" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (
                node.level == 1 or node.module.startswith("seqgan.")
            ):
                own = numbers[node.module.removeprefix("seqgan.")]
                assert own < number, f"{name} imports {node.module}"
                if 4 <= number <= 12:
                    assert own not in {1, 2, 13} and own < 13, f"{name} imports {node.module}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                tops = (
                    {a.name.split(".")[0] for a in node.names}
                    if isinstance(node, ast.Import)
                    else {node.module.split(".")[0]}
                )
                assert tops <= RUNTIME | set(sys.stdlib_module_names), f"{name} imports {tops}"


def test_no_batch_normalisation_in_the_discriminator():
    assert "BatchNorm" not in (ROOT / "seqgan" / "discriminator.py").read_text()


def test_records_and_tables_agree(python, tmp_path):
    "The committed tables are those that the committed records give."
    shutil.copytree(ROOT / "reports" / "results", tmp_path / "home" / "reports" / "results")
    tables = [
        p.stem
        for p in (ROOT / "reports").glob("*.csv")
        if p.stem not in ("benchmark", "paper_size")
    ]
    assert "figure6" in tables
    result = python(
        f"from seqgan.report import write_table; [write_table(name) for name in {tables}]"
    )
    assert result.returncode == 0, result.stdout[-3000:]
    for name in [f"{table}.{kind}" for table in tables for kind in ("csv", "md")]:
        assert (tmp_path / "home" / "reports" / name).read_text() == (
            ROOT / "reports" / name
        ).read_text(), name


def test_no_file_is_large():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not [name for name in tracked if (ROOT / name).stat().st_size > 5_000_000]


def test_digest_covers_what_functions_import(python, tmp_path):
    "A run is named by the code that computes it, also by what is imported only when it is needed."
    shutil.copytree(ROOT / "seqgan", tmp_path / "seqgan")

    def digest():
        result = python(
            "from seqgan.experiment import source_digest; print(source_digest('experiment'))",
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout.split()[-1]

    before = digest()
    with open(tmp_path / "seqgan" / "metrics.py", "a") as file:
        file.write("\nADDED = 1\n")
    assert digest() != before
