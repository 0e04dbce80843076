"Decoding of hostile files: images that claim to be huge, and a fuzz."

import io
import os
import random
import re
import resource
import struct
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from image_files import FORMATS, bombs, encode, load_lazily, write_images
from PIL import Image

from seqgan.config import Data
from seqgan.data.classes import printable
from seqgan.data.contents import SUFFIXES
from seqgan.data.decoding import decode_image
from seqgan.data.images import load


# Pillow itself stops at twice its limit, and warns from 9,460
@pytest.mark.parametrize("side", [100_000, 60_000, 11_000, 9_460])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_bombs(side, action):
    errors = (ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
    for content in bombs(side, side).values():
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(errors, match="pixels"):
                decode_image(content, 8)


def test_other_code_keeps_its_pillow(tmp_path):
    "Its limit and its filters of warnings are what they were, also while threads decode."
    odd = exif_that_warns()
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: decode_image(odd, 8), range(200)))
        assert not caught
        Image.open(io.BytesIO(odd))
        assert len(caught) == 1
    assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == before
    for _, _, category, module, _ in warnings.filters:  # nothing was left at import, either
        assert category is not Image.DecompressionBombWarning and "PIL" not in str(module)


def exif_that_warns() -> bytes:
    "A JPEG with metadata that Pillow warns of."
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x09"
    return encode(9, "JPEG", exif=exif)


def corpus() -> list[bytes]:
    "Sound files of all formats and of many of their modes."
    files = []
    for format in FORMATS:
        files += [encode(90, format, size) for size in ((24, 20), (5, 41), (64, 64))]
    grey = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    clear = Image.new("RGBA", (20, 20), (9, 200, 30, 90))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    for image, format, options in (
        (grey, "PNG", {}),
        (grey, "TIFF", {"compression": "tiff_lzw"}),
        (grey, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (grey, "TIFF", {"compression": "jpeg"}),
        (grey.convert("P"), "GIF", {}),
        (grey.convert("P"), "PNG", {"transparency": 3}),
        (clear, "PNG", {}),
        (clear, "WEBP", {"lossless": True}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
        (grey.convert("CMYK"), "JPEG", {}),
        (grey, "JPEG", {"progressive": True}),
        (grey.convert("1"), "PPM", {}),
        (grey.convert("P"), "BMP", {}),
        (grey.convert("I;16"), "PNG", {}),
        (grey, "JPEG", {"exif": exif}),
    ):
        file = io.BytesIO()
        image.save(file, format, **options)
        files.append(file.getvalue())
    return files


def flip_bits(rng, content, others):
    for _ in range(rng.choice((1, 3, 20))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def cut(rng, content, others):
    del content[rng.randrange(len(content) or 1) :]


def splice(rng, content, others):
    other = rng.choice(others)
    content[rng.randrange(len(content) or 1) :] = other[rng.randrange(len(other)) :]


def repeat(rng, content, others):
    at = rng.randrange(len(content) or 1)
    content[at:at] = content[at : at + rng.randrange(1, 200)] * rng.randrange(1, 5)


def remove(rng, content, others):
    at = rng.randrange(len(content) or 1)
    del content[at : at + rng.randrange(1, 100)]


def overwrite_header(rng, content, others):
    at = rng.randrange(min(len(content), 64) or 1)
    number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 3000))
    content[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)


MUTATIONS = (flip_bits, cut, splice, repeat, remove, overwrite_header)


def hostile_file(rng, i, files):
    "Every tenth is of random bytes, the others are files with one or several mutations."
    if i % 10 == 0:
        return rng.randbytes(rng.randrange(400))
    content = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(MUTATIONS)(rng, content, files)
    return bytes(content)


def fuzz(count, folder):
    """Decode `count` hostile files and print what happened.

    Anything but an array or an Exception ends this process. Every twentieth file is written into
    `folder`, for the loaders.
    """
    rng, files = random.Random(0), corpus()
    for content in files:
        decode_image(content, 16)
    outcomes, slowest = {}, 0.0
    for i in range(count):
        content = hostile_file(rng, i, files)
        start = time.perf_counter()
        try:
            image = decode_image(content, 16)
            outcome = "decoded"
            if image.shape != (16, 16, 3) or image.dtype != np.uint8:
                os._exit(9)
        except Exception as error:
            outcome = type(error).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        slowest = max(slowest, time.perf_counter() - start)
        if i % 20 == 0:
            with open(f"{folder}/{i}{rng.choice(SUFFIXES)}", "wb") as file:
                file.write(content)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"\nfuzz: {count} files tried, {outcomes.get('decoded', 0)} decoded, "
        f"the slowest in {slowest:.2f} s, memory at most {memory:.1f} GB; {outcomes}"
    )


def test_fuzz(child, tmp_path, capsys):
    count, folder = 6000, write_images(tmp_path / "files", 10)
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_decoding import fuzz; "
        "fuzz(int(sys.argv[1]), sys.argv[2])"
    )
    result = child(sys.executable, "-c", code, str(count), str(folder), cwd=ROOT)
    text = result.stdout[-3000:]
    assert result.returncode == 0, (result.returncode, text)
    assert f"fuzz: {count} files tried" in text  # it came to its end: nothing hung
    assert float(re.search("memory at most (.*) GB", text)[1]) < 3
    with capsys.disabled():
        print("\n" + next(line for line in text.splitlines() if line.startswith("fuzz:")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = load(Data(str(folder), size=12), "train")
        lazy = load_lazily(folder).images
    assert len(held) + len(held.skipped) == len(lazy) > 250
    kept = [i for i in range(len(lazy)) if printable(lazy.names[i]) not in held.skipped]
    assert torch.equal(lazy[:][kept], held.images)
