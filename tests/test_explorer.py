"""The explorer: what goes into the page, and the page in a real browser.

The browser tests need Chromium and playwright (`pip install -e '.[browser]'`,
`apt-get install chromium`). Where one is missing they are skipped and say so; with
SEQGAN_BROWSER=required, as a machine that must have both sets it, they fail.
"""

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from seqgan.core import to_float, to_uint8
from seqgan.evaluation.statistics import interval
from seqgan.models.sampling import sample
from seqgan.models.tokenizer import Tokenizer
from seqgan.models.transformer import Transformer
from seqgan.presets import preset
from seqgan.study.claims import measurements
from seqgan.study.explorer import COLUMNS, LIMIT, datasets_of, fill, gather, page
from seqgan.study.pictures import DRAWS, PARTS, publish_toys, published
from seqgan.study.tables import example_record
from seqgan.study.verdicts import judge

CONFIG = preset("smoke")
ALPHAS = (0.0, 0.4, 1.0)  # of the models
FACTORS = {"class": (0.2, 0.3), "mean colour": (0.8, -0.5)}  # at alpha 0, and what alpha adds


def made_up_records():
    "Records of Figures 6 and 8 at three seeds, none at alpha 0.4."
    found = []
    for changes in ({"perceptual.alpha": a, "phase": p} for a in (0.0, 0.2, 1.0) for p in (1, 2)):
        for column in ("AR", "NAR"):
            for seed in (1, 2, 3):
                record = example_record(changes, column, seed)
                alpha = record["alpha"]
                kept = {f"codes: {name}": a + b * alpha for name, (a, b) in FACTORS.items()}
                record["metrics"]["tokenizer"] |= kept
                found.append(record)
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder of two classes, 20 images of each for training and one for validation."
    folder = tmp_path_factory.mktemp("images") / "photos"
    for i in range(42):
        place = folder / ("train" if i < 40 else "val") / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (3 * i, 255 * (i % 2), 255 - 3 * i)).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Untrained models: all parts of shapes at three alphas, and a tokenizer of photos at one."
    folder = tmp_path_factory.mktemp("pretrained")
    publish_toys(folder, "shapes", ALPHAS, CONFIG)
    publish_toys(folder, "photos", (0.0,), CONFIG)
    for part in PARTS[1:]:
        shutil.rmtree(folder / "photos-alpha-0" / part)
    return folder


@pytest.fixture(scope="module")
def text(models, photos):
    "The page of both datasets."
    drawn, found = datasets_of("smoke", ["shapes", str(photos)])
    return page([gather(drawn, models, made_up_records()), gather(found, models, [])])


@pytest.fixture(scope="module")
def data(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def shapes(data):
    return data["datasets"][0]


def images_of(uri, count):
    "The first `count` images uint8 (B, 3, 16, 16) of a sheet."
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)
    places = [(16 * (i // COLUMNS), 16 * (i % COLUMNS)) for i in range(count)]
    return torch.stack([pixels[:, y : y + 16, x : x + 16] for y, x in places])


# What goes into the page


def test_each_alpha_has_its_own_models(shapes, models):
    inputs = images_of(shapes["input"], 40)
    for alpha, parts in published(models, "shapes").items():
        seen = shapes["looks"][f"{alpha:g}"]
        first, second = (Tokenizer.from_pretrained(parts[name]) for name in PARTS[:2])
        codes = first.encode(to_float(inputs))
        assert seen["codes"] == codes.flatten(1).tolist()
        for phase, tokenizer in (("1", first), ("2", second)):
            decoded = to_uint8(tokenizer.decode(codes))
            assert torch.equal(images_of(seen["phases"][phase], 40), decoded)
        transformer = Transformer.from_pretrained(parts["ar"])
        top1 = transformer(codes.flatten(1), torch.arange(40)).argmax(-1)
        assert seen["right"] == (top1 == codes.flatten(1)).int().tolist()
        expected = to_uint8(first.decode(top1.view_as(codes)))
        assert torch.equal(images_of(seen["prediction"], 40), expected)


def test_samples_are_those_of_the_ends(shapes, models):
    "The class of each fixed image, sampler settings of the preset, both decoders."
    assert [bool(seen["samples"]) for seen in shapes["looks"].values()] == [True, False, True]
    labels = torch.arange(40).repeat_interleave(DRAWS)
    for alpha in ("0", "1"):
        parts = published(models, "shapes")[float(alpha)]
        for name, sampler in (("AR", CONFIG.sampler), ("NAR", CONFIG.masked_sampler)):
            codes = sample(Transformer.from_pretrained(parts[name.lower()]), labels, sampler)
            found = shapes["looks"][alpha]["samples"][name]
            for phase, part in zip("12", PARTS[:2], strict=True):
                expected = Tokenizer.from_pretrained(parts[part]).decode(codes.view(-1, 4, 4))
                pictures = images_of(found["phases"][phase], len(labels))
                assert torch.equal(pictures, to_uint8(expected))
            last = 16 if name == "AR" else 12
            assert {step for row in found["steps"] for step in row} == set(range(1, last + 1))


def test_the_same_random_numbers_at_both_ends(models, tmp_path):
    "The same models at both ends draw the same images."
    for alpha in (0, 1):
        shutil.copytree(models / "shapes-alpha-0.4", tmp_path / f"shapes-alpha-{alpha}")
    looks = gather(CONFIG, tmp_path, []).looks
    for name in ("AR", "NAR"):
        first, second = (looks[alpha].samples[name] for alpha in (0.0, 1.0))
        assert torch.equal(first.steps, second.steps)
        assert torch.equal(first.phases[2], second.phases[2])
        draws = first.phases[1].unflatten(0, (-1, DRAWS))
        assert not torch.equal(draws[:, 0], draws[:, 1])


def test_intervals_are_those_of_the_statistics(shapes):
    tidy = measurements(made_up_records())
    values = tidy.groupby(["metric", "row", "column"]).value
    for curve in shapes["curves"] + shapes["factors"]:
        for column, points in curve["series"].items():
            for point in points:
                seeds = values.get_group((curve["metric"], f"alpha {point['at']:g}", column))
                found = [point["mean"], point["low"], point["high"]]
                assert found == [float(x) for x in interval(seeds.to_numpy())]
                assert point["seeds"] == 3
    assert [c["metric"] for c in shapes["curves"]][:2] == ["rFID-lite0", "KID-lite0"]
    assert [c["words"] for c in shapes["factors"]] == list(FACTORS)
    assert [c["verdict"] for c in shapes["claims"]] == judge(tidy).verdict.tolist()


def test_what_is_missing_is_said(data):
    shapes, photos = data["datasets"]
    assert shapes["alphas"] == [0, 0.2, 0.4, 1]
    assert shapes["missing"] == [
        *(f"no {model} at α = 0.2, 0.6, 0.8" for model in ("tokenizer", "decoder of phase two")),
        *(f"no {model} at α = 0.2, 0.6, 0.8" for model in ("AR transformer", "NAR transformer")),
        "no record at α = 0.4, 0.6, 0.8",
    ]
    assert photos["classes"] == ["cat", "dog"]
    assert photos["alphas"] == [0]
    assert photos["looks"]["0"]["prediction"] is None
    assert "no record at α = 0, 0.2, 0.4, 0.6, 0.8, 1" in photos["missing"]


def test_the_page_is_one_file(text):
    assert len(text.encode()) < LIMIT
    assert "://" not in text
    assert not re.search(r"<(img|iframe|object|embed)|@import|\bsrc=|fetch\(|XMLHttp", text)
    assert [uri[:4] for uri in re.findall(r'href="([^"]*)"', text)] == ["data"]
    assert "study/*.html" in (ROOT / "setup.py").read_text()


# In a browser


def missing(requirement):
    "Skip, or fail where a browser is required."
    if os.environ.get("SEQGAN_BROWSER") == "required":
        pytest.fail(f"{requirement}, and SEQGAN_BROWSER=required")
    pytest.skip(requirement)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("there is no playwright: pip install -e '.[browser]'")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if not executable:
        missing("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # without a sandbox, since it opens nothing but this project's own page, also as root
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def file(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    "Open the page; at the end of the test nothing may have been an error or come from elsewhere."
    contexts, wrong = [], []

    def look_at(request):
        if not request.url.startswith(("file:", "data:")):
            wrong.append(request.url)

    def start(width=1280, path=file, **how):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **how))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", look_at)
        tab.goto(path.as_uri())
        return tab

    yield start
    for context in contexts:
        context.close()
    assert not wrong


def background(tab, selector):
    "The sheet that an element shows."
    shown = tab.locator(selector).first.evaluate("e => getComputedStyle(e).backgroundImage")
    return shown.removeprefix('url("').removesuffix('")')


RECONSTRUCTION = "#film figure .tile:nth-child(2)"


def test_the_slider_and_the_keys_change_the_pictures(opened, shapes):
    tab = opened()
    assert tab.inner_text("#alpha-value") == "0"
    assert background(tab, RECONSTRUCTION) == shapes["looks"]["0"]["phases"]["1"]
    before = tab.locator(RECONSTRUCTION).first.screenshot()
    tab.keyboard.press("ArrowRight")  # the page has the focus
    assert tab.inner_text("#alpha-value") == "0.2"
    assert "no published models at α = 0.2" in tab.inner_text("#look-note")
    tab.keyboard.press("ArrowRight")
    assert background(tab, RECONSTRUCTION) == shapes["looks"]["0.4"]["phases"]["1"]
    assert "not measured at this α" in tab.inner_text("#charts")
    tab.focus("#alpha")
    tab.keyboard.press("End")  # the slider has it
    assert tab.get_attribute("#alpha", "aria-valuetext") == "alpha 1"
    assert background(tab, RECONSTRUCTION) == shapes["looks"]["1"]["phases"]["1"]
    assert tab.locator(RECONSTRUCTION).first.screenshot() != before
    wrong = sum(1 - right for right in shapes["looks"]["1"]["right"][0])
    assert tab.locator("#film figure .wrong").first.locator("rect").count() == wrong
    assert "3 seeds" in tab.inner_text("#charts")


def test_a_tile_shows_its_image(opened, shapes):
    "Pixel by pixel: the sheet is cut where the image lies."
    tab = opened()
    inputs = images_of(shapes["input"], 40)
    for i in (0, 1, 21):
        tile = tab.locator("#film figure").nth(i).locator(".tile").first
        picture = Image.open(io.BytesIO(tile.screenshot())).convert("RGB").resize((16, 16), 0)
        assert np.array_equal(np.array(picture), inputs[i].movedim(0, -1).numpy()), i


def test_samples_are_drawn_step_by_step(opened, shapes):
    tab = opened()
    tab.check("#transformers [value=NAR]")
    steps = shapes["looks"]["0"]["samples"]["NAR"]["steps"][0]
    first = tab.locator("#drawn .tile").first
    assert tab.locator("#drawn .tile").count() == 2 * DRAWS
    assert tab.inner_text("#drawn h3 >> nth=0") == "α = 0"
    tab.click("#next")
    assert tab.inner_text("#step-value") == "Step 12 of 12"
    assert first.locator("rect").count() == 0
    for step in (11, 10):
        tab.click("#back")
        assert first.locator("rect").count() == sum(s > step for s in steps)
    tab.focus("#step")
    tab.keyboard.press("Home")
    assert first.locator("rect").count() == 16
    tab.check("#sample-phases [value='2']")
    assert background(tab, "#drawn .tile") == shapes["looks"]["0"]["samples"]["NAR"]["phases"]["2"]
    tab.click("#play")
    for _ in range(100):
        tab.wait_for_timeout(100)
        if int(tab.input_value("#step")) >= 2:
            break
    tab.click("#play")
    stopped = tab.input_value("#step")
    assert 2 <= int(stopped) < 12
    tab.wait_for_timeout(700)
    assert tab.input_value("#step") == stopped


def test_the_ends_are_in_order(opened, data, shapes, tmp_path):
    "Also where one is no whole number: JavaScript puts the key 1 before 0.4."
    lower = shapes["looks"]["0.4"] | {"samples": shapes["looks"]["0"]["samples"]}
    looks = {"0.4": lower, "1": shapes["looks"]["1"]}
    template = (ROOT / "seqgan" / "study" / "explorer.html").read_text(encoding="utf-8")
    path = tmp_path / "page.html"
    path.write_text(fill(template, data | {"datasets": [shapes | {"looks": looks}]}), "utf-8")
    assert opened(path=path).locator("#drawn h3").all_inner_texts() == ["α = 0.4", "α = 1"]


def test_a_position_shows_where_else_its_code_is(opened, shapes):
    tab = opened()
    look = shapes["looks"]["0"]
    tab.click("#positions [data-position='5']")
    for position, key in ((5, None), (6, "ArrowRight"), (2, "ArrowUp")):
        if key:
            tab.keyboard.press(key)
        code = look["codes"][0][position]
        count = sum(codes.count(code) for codes in look["bank"])
        assert tab.inner_text("#code-words").startswith(f"Code {code} stands at {count} position")
        assert tab.locator("#patches figure").count() == min(count, 16)
        assert tab.evaluate("document.activeElement.dataset.position") == str(position)
        assert tab.locator("#positions [aria-pressed=true]").count() == 1


def test_the_other_dataset(opened):
    "Of which there is a tokenizer alone."
    tab = opened()
    tab.check("#datasets input >> nth=1")
    assert tab.locator("#film figure").count() == 2
    assert "no published AR transformer" in tab.inner_text("#look-note")
    assert "no records of this dataset" in tab.inner_text("#charts")
    assert "no published AR transformer" in tab.inner_text("#drawn")
    assert "no verdicts" in tab.inner_text("#claim-list")
    assert not tab.is_visible("#kept")
    assert "photos: no record at α = 0" in tab.inner_text("#missing-list")


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_no_horizontal_scroll(opened, width):
    tab = opened(width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => (d.open = true))")
    for other in (False, True):
        if other:
            tab.check("#datasets input >> nth=1")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_what_is_committed(opened):
    "Every alpha of every dataset of reports/explorer.html, on a phone, once it is there."
    for path in (ROOT / "reports").glob("explorer.html"):
        tab = opened(360, path)
        for i in range(tab.locator("#datasets input").count()):
            tab.check(f"#datasets input >> nth={i}")
            tab.focus("#alpha")
            tab.keyboard.press("Home")
            for value in range(int(tab.get_attribute("#alpha", "max")) + 1):
                assert tab.input_value("#alpha") == str(value)
                assert tab.locator("#film figure").count() > 0
                assert tab.evaluate("document.documentElement.scrollWidth") <= 360
                tab.keyboard.press("ArrowRight")


CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = (c) => [0.2126, 0.7152, 0.0722].reduce(
    (sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = channels(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
  };
  document.querySelectorAll("details").forEach((d) => (d.open = true));
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = channels(element instanceof SVGElement ? style.fill : style.color);
    const pair = [luminance(colour), luminance(behind(element))].sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), walker.currentNode.data.trim()]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    "Of all text, as WCAG 2 asks of level AA; and the two schemes differ."
    tab = opened(color_scheme=scheme)
    found = tab.evaluate(CONTRAST)
    assert len(found) > 200
    assert not [line for line in found if line[0] < 4.5]
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", paper)[0]) < 128) == (scheme == "dark")


NAMELESS = """() => [...document.querySelectorAll(`input, select, button, summary, section,
    [role=img], [role=region], [role=group]`)].filter((e) => {
  const named = document.getElementById(e.getAttribute("aria-labelledby"));
  const label = e.labels && e.labels[0];
  const words = [e.getAttribute("aria-label"), named, label, e].map(
    (x) => (typeof x === "string" ? x : x ? x.textContent : ""));
  return !words.some((text) => text.trim());
}).map((e) => e.outerHTML.slice(0, 100))"""


def test_everything_has_a_name(opened):
    "For screen readers; and headings do not skip a level."
    tab = opened()
    assert tab.evaluate(NAMELESS) == []
    assert tab.evaluate("document.documentElement.lang") == "en"
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_the_focus_is_seen(opened):
    tab = opened()
    seen = set()
    for _ in range(25):
        tab.keyboard.press("Tab")
        style, name = tab.evaluate(
            "(e => [getComputedStyle(e).outlineStyle, e.id || e.name || e.className])"
            "(document.activeElement)"
        )
        assert style != "none", name
        seen.add(name)
    assert {"alpha", "film", "sample-class", "step", "code-image"} <= seen


def test_reduced_motion(opened):
    "Nothing glides, and nothing plays."
    still, moving = opened(reduced_motion="reduce"), opened(reduced_motion="no-preference")
    duration = "e => getComputedStyle(e).transitionDuration"
    assert still.locator(".track span").first.evaluate(duration) == "0s"
    assert moving.locator(".track span").first.evaluate(duration) != "0s"
    assert not still.is_visible("#play") and moving.is_visible("#play")
