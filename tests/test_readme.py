"""The front page: what it says to type in Python works as it stands."""

import re

import pytest
from conftest import ROOT
from PIL import Image

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
WRITTEN = ["decoded.png", "samples.png"]


def test_every_block_is_tested():
    assert len(BLOCKS) == len(WRITTEN)


@pytest.mark.parametrize("block, written", list(zip(BLOCKS, WRITTEN, strict=False)), ids=WRITTEN)
def test_block(python, tmp_path, block, written):
    "Ten lines: an image becomes codes and an image again; codes are sampled and decoded."
    Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 50).save(tmp_path / "image.png")
    result = python(block, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-2000:]
    assert len(Image.open(tmp_path / written).convert("RGB").getcolors(10**6)) > 10
    assert len(block.splitlines()) <= 10
