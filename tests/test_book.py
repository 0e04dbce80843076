"""The notebooks as a book: links lead somewhere, chapters to one another, outputs are short."""

import ast
import json
import re
import subprocess

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if path.stem != "index"]
LINES = 40  # of the output of one cell
PROGRESS = re.compile(r": (started|finished in|resumes from step)|\bstep \d+ of \d+")
BAR = re.compile(r"\d%\|")  # tqdm's

# Cells whose committed output is too long, or a raw dict, JSON or log: to be mended when their
# notebooks are next executed, and then removed from here.
TO_MEND = {
    "benchmark": {"6a293592", "5c1b8de8", "3cd0adb1"},
    "paper_size": {"3c09624c"},
    "perceptual_networks": {"93dae85d"},
}


def cells(path, kind):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def prose(path):
    "The markdown of a notebook, without blocks and spans of code."
    text = "\n\n".join(source(cell) for cell in cells(path, "markdown"))
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def links(text):
    "Targets of all links that stay in the repository."
    found = re.findall(r"\]\(([^()\s]+)\)", text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path):
    "What JupyterLab and GitHub call the headings of a notebook: `A title` is #A-title or #a-title."
    text = "\n".join(source(cell) for cell in cells(path, "markdown"))
    titles = [title.strip().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)]
    return {*titles, *(re.sub(r"[^\w-]", "", title.lower()) for title in titles)}


def title(path):
    return source(cells(path, "markdown")[0]).split("\n")[0].removeprefix("# ")


def reading_order():
    """By name; the study, and the experiments without a number, as the front page lists them."""
    front = "".join(source(cell) for cell in cells(ROOT / "nbs/index.ipynb", "markdown"))
    tables = front[front.index("## Where to find what") :]
    tables = tables[: tables.index("## Good to know")]
    listed = re.findall(r"\]\(\.\./nbs/(\w+)\.ipynb\)", tables)
    first = [path.stem for path in CHAPTERS if path.stem < "49"]
    return first + [stem for stem in dict.fromkeys(listed) if stem not in first]


def files():
    "All files of the repository, committed or about to be."
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {(ROOT / name).resolve() for name in found.stdout.splitlines()}


FILES = files()
ORDER = reading_order()
RING = dict(zip(ORDER, zip(["index", *ORDER], [*ORDER[1:], "index"], strict=False), strict=False))


def test_every_notebook_is_in_the_order_of_reading():
    assert sorted(ORDER) == [path.stem for path in CHAPTERS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    for target in links(prose(path)):
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path.resolve()
        assert there.exists() and there in FILES, target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_neighbours(path):
    "Under its title a chapter names the one before and the one after; its last cell leads on."
    before, after = RING[path.stem]
    named = {stem: f"[{title(path.with_stem(stem))}]({stem}.ipynb)" for stem in (before, after)}
    first = source(cells(path, "markdown")[0]).split("\n\n")
    assert first[2] == f"*Before: {named[before]} · After: {named[after]}*"
    last = json.loads(path.read_text())["cells"][-1]
    assert last["cell_type"] == "markdown", "the last cell says where one goes next"
    assert f"]({after}.ipynb)" in source(last) and len(source(last)) < 400


def text_of(output):
    "What a reader sees of an output as text; a picture has none, a table a line for each row."
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output["data"]
    if "image/png" in data:
        return ""
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/html" in data:
        return "row\n" * "".join(data["text/html"]).count("<tr")
    return "".join(data.get("text/plain", ""))


def is_raw(text):
    "Whether a text is what Python or JSON writes of a dict, or of a list of dicts or lists."
    if re.match(r"\{['\"]\w+['\"]: ", text):
        return True
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError):
            continue
        inside = value if isinstance(value, list | tuple) else []
        return isinstance(value, dict) or any(isinstance(item, dict | list) for item in inside)
    return False


def what_is_wrong(cell):
    texts = [text_of(output) for output in cell["outputs"]]
    lines = [line for text in texts for line in text.splitlines()]
    if len(lines) > LINES:
        return f"{len(lines)} lines"
    if sum(bool(PROGRESS.search(line)) for line in lines) > 8:
        return "a log"
    if any(BAR.search(line) for line in lines):
        return "a progress bar"
    if sum(not text.strip() for text in texts if text) > 2:
        return "blank outputs, such as a progress bar leaves"
    if any(is_raw(part) for part in (*texts, *lines)):
        return "a raw dict or JSON"
    return ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_can_be_read(path):
    found = {cell["id"]: what_is_wrong(cell) for cell in cells(path, "code")}
    found = {cell: wrong for cell, wrong in found.items() if wrong}
    known = TO_MEND.get(path.stem, {})
    assert not found.keys() - known, "shorten these outputs, or show a table or a sentence"
    assert not known - found.keys(), "these are mended: remove them from TO_MEND"
