"""Models to try: what is committed is whole and belongs together, and it installs by name."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_pretrained import new_tokenizer, new_transformer

from seqgan import Tokenizer, Transformer

FILES = {"README.md", "config.json", "model.safetensors"}
MODELS = {"tokenizer": Tokenizer, "tokenizer-phase-2": Tokenizer}
MODELS |= {"ar": Transformer, "nar": Transformer}
COMMITTED = sorted(path for path in (ROOT / "data" / "pretrained").glob("*") if path.is_dir())


def check_model(folder):
    "Three files, each small enough to be committed; weights in float16; a card."
    assert {file.name for file in folder.iterdir()} == FILES
    for file in folder.iterdir():
        assert file.stat().st_size <= 5_000_000, file
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: ")
    name = f"{folder.parent.name}/{folder.name}"
    for part in ("\ntags:\n", f"from_pretrained('{name}')", "| stored | float16 |", "| float16: "):
        assert part in card, part
    for section in ("Use", "Data", "Training", "Metrics", "Made with"):
        assert f"\n## {section}\n" in card
    assert "Protocol of the metrics" in card


def check_publication(place):
    "Four models of one language: the same codes, and transformers of just these."
    assert {folder.name for folder in place.iterdir()} == MODELS.keys()
    for folder in place.iterdir():
        check_model(folder)
    models = {name: model.from_pretrained(place / name) for name, model in MODELS.items()}
    digest = models["tokenizer"].codes_digest()
    assert models["tokenizer-phase-2"].codes_digest() == digest
    for name, causal in (("ar", True), ("nar", False)):
        assert models[name].tokenizer == digest
        assert models[name].config.causal == causal


@pytest.mark.parametrize("place", COMMITTED, ids=lambda place: place.name)
def test_what_is_committed(place):
    check_publication(place)


CARD = """---
license: apache-2.0
tags:
- seqgan
---
{name}: from_pretrained('{name}')

## Use

## Data

## Training

## Metrics

| float16: val_loss | 1 |

Protocol of the metrics

## Made with

| stored | float16 |
"""


@pytest.fixture
def place(tmp_path):
    "A publication as it should be, of models that know nothing."
    place = tmp_path / "shapes-alpha-1"
    tokenizer = new_tokenizer()
    rounded = {n: value.half().float() for n, value in tokenizer.state_dict().items()}
    tokenizer.load_state_dict(rounded)
    models = {"tokenizer": tokenizer, "tokenizer-phase-2": tokenizer.enhance(1)}
    for name, causal in (("ar", True), ("nar", False)):
        changes = {"transformer.causal": causal}
        models[name] = new_transformer(changes, tokenizer.codes_digest())
    for name, model in models.items():
        card = CARD.format(name=f"shapes-alpha-1/{name}")
        model.save_pretrained(place / name, card, dtype=torch.float16)
    return place


def other_digest(place):
    config = json.loads((place / "ar" / "config.json").read_text())
    text = json.dumps(config | {"tokenizer": "0" * 64})
    (place / "ar" / "config.json").write_text(text)


def other_codes(place):
    card = (place / "tokenizer-phase-2" / "README.md").read_text()
    new_tokenizer().save_pretrained(place / "tokenizer-phase-2", card, dtype=torch.float16)


def in_float32(place):
    Tokenizer.from_pretrained(place / "tokenizer").save_pretrained(place / "tokenizer")


def without_numbers(place):
    card = place / "nar" / "README.md"
    card.write_text(card.read_text().replace("float16: val", "val"))


def grow(place):
    with open(place / "ar" / "README.md", "a") as card:
        card.write(" " * 5_000_000)


DAMAGES = {
    "a folder less": lambda place: shutil.rmtree(place / "ar"),
    "a card less": lambda place: (place / "ar" / "README.md").unlink(),
    "a file more": lambda place: (place / "ar" / ".README.md.17").touch(),
    "masked for causal": lambda place: shutil.copy(place / "nar/config.json", place / "ar"),
    "of another tokenizer": other_digest,
    "a decoder of other codes": other_codes,
    "in float32": in_float32,
    "a card without what rounding did": without_numbers,
    "a file that is too large": grow,
}


def test_a_good_publication_passes(place):
    check_publication(place)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_publication_is_noticed(place, damage):
    DAMAGES[damage](place)
    with pytest.raises((AssertionError, ValueError)):
        check_publication(place)


# From the installed package

TRY = """
import seqgan
from seqgan import Tokenizer, Transformer

print(seqgan.__file__)
tokenizer = Tokenizer.from_pretrained("shapes-alpha-1/tokenizer")
Transformer.from_pretrained("shapes-alpha-1/nar").expect_tokenizer(tokenizer.codes_digest())
try:
    Tokenizer.from_pretrained("shapes")
except FileNotFoundError as error:
    print(error)
"""


@pytest.fixture
def project(place, tmp_path):
    "A checkout of this project with these models and no others."
    project = tmp_path / "project"
    project.mkdir()
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "seqgan", project / "seqgan", ignore=ignored)
    shutil.move(place, project / "data" / "pretrained" / place.name)
    (project / "data" / "a dataset").mkdir()
    (project / "data" / "a dataset" / "1.png").touch()
    return project


def run_setup(project, *words):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *words], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def tried(python, where, cwd):
    "What the models are loaded from by their names, with `where` on the path."
    result = python(TRY, cwd=cwd, PYTHONPATH=str(where), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stdout[-3000:]
    package, names = result.stdout.splitlines()[-2:]
    assert all(f"shapes-alpha-1/{name}" in names for name in MODELS), names
    return package


def test_installed_models(project, python, tmp_path):
    "What is installed, also from a source distribution, has the models and no datasets."
    run_setup(project, "sdist", "--dist-dir", str(tmp_path / "sdist"))
    (archive,) = (tmp_path / "sdist").iterdir()
    shutil.unpack_archive(archive, tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    assert not (source / "data" / "a dataset").exists()
    for i, origin in enumerate((project, source)):
        site = tmp_path / f"site-{i}"
        run_setup(origin, "build", "--build-lib", str(site))
        assert [path.name for path in site.iterdir()] == ["seqgan"]
        assert tried(python, site, tmp_path) == f"{site}/seqgan/__init__.py"


def test_models_of_a_checkout(project, python, tmp_path):
    "Found from anywhere, as an editable install has it."
    assert tried(python, project, tmp_path) == f"{project}/seqgan/__init__.py"


def test_a_package_without_models(project, tmp_path):
    shutil.rmtree(project / "data" / "pretrained")
    run_setup(project, "build", "--build-lib", str(tmp_path / "site"))
    assert not (tmp_path / "site" / "seqgan" / "pretrained").exists()
    assert (tmp_path / "site" / "seqgan" / "weights" / "quarter-0.safetensors").exists()
