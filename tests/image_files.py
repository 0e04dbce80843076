"Image files and folders of them for the tests of the data room, sound ones and hostile ones."

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seqgan.config import Data
from seqgan.data.images import ImageSet, load

FORMATS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
}


def encode(value: int, format: str = "PNG", size=(24, 20), **options) -> bytes:
    "An image file: a grey that says which, with some structure."
    width, height = size
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[: height // 3, :, 1] = np.arange(width) * 9 % 256
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def write_images(folder: Path, count: int, classes=("",)) -> Path:
    "`count` images, image i of value i in its middle, the classes in turn."
    for i in range(count):
        path = folder / classes[i % len(classes)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i))
    return folder


def write_paths(folder: Path, *paths: str) -> Path:
    "One and the same image at each of the paths."
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(encode(1))
    return folder


def values(images) -> list[int]:
    "The value in the middle of each image."
    return images[:][:, 0, 6, 6].tolist()


def load_lazily(folder: Path, split: str = "train", size: int = 12) -> ImageSet:
    return load(Data(str(folder), size=size, crop="random"), split)


def is_same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# hostile files


def _png(width, height):
    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def _bmp(width, height):
    file = bytearray(encode(1, "BMP"))
    file[18:26] = struct.pack("<ii", width, height)
    return bytes(file)


def _tiff(width, height):
    file = bytearray(encode(1, "TIFF"))
    (at,) = struct.unpack("<I", file[4:8])
    (count,) = struct.unpack("<H", file[at : at + 2])
    for i in range(count):
        entry = at + 2 + 12 * i
        (tag,) = struct.unpack("<H", file[entry : entry + 2])
        if tag in (256, 257):
            value = width if tag == 256 else height
            file[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(file)


def _gif(width, height):
    file = bytearray(encode(1, "GIF"))
    file[6:10] = struct.pack("<HH", width, height)
    return bytes(file)


def _jpeg(width, height):
    file = bytearray(encode(1, "JPEG"))
    at = file.index(b"\xff\xc0")
    file[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(file)


def _webp(width, height):
    file = bytearray(encode(1, "WEBP"))
    at = file.index(b"\x9d\x01\x2a")  # the frame of a VP8 stream
    file[at + 3 : at + 7] = struct.pack("<HH", width, height)
    return bytes(file)


def bombs(width: int, height: int) -> dict[str, bytes]:
    "Small files, by name, that claim so many pixels, in the formats that can."
    files = {
        "a.png": _png(width, height),
        "b.bmp": _bmp(width, height),
        "d.ppm": b"P6 %d %d 255\n" % (width, height) + bytes(1000),
        "e.tif": _tiff(width, height),
    }
    if max(width, height) < 2**16:
        files |= {"c.gif": _gif(width, height), "f.jpg": _jpeg(width, height)}
    if max(width, height) < 2**14:
        files["g.webp"] = _webp(width, height)
    return files


def write_hostile(folder: Path) -> int:
    "A folder of 12 good images and of all that is none; returns how many of the latter there are."
    write_images(folder, 12)
    jpeg, postscript = encode(3, "JPEG"), io.BytesIO()
    Image.new("RGB", (9, 9)).save(postscript, "EPS")
    files = {f"bomb-{name}": content for name, content in bombs(100_000, 100_000).items()}
    files |= {f"large-{name}": content for name, content in bombs(30_000, 30_000).items()}
    files |= {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "postscript.jpg": postscript.getvalue(),
        "empty.jpg": b"",
        "text.png": b"not an image",
        "line\nbreak.jpg": b"GIF89a",
        "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "zeros.bmp": bytes(5000),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b"not-utf8-\xff.jpg")).write_bytes(b"")
    (folder / "nowhere.jpg").symlink_to("nothing")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "directory.jpg").mkdir()

    (folder / "wrong-suffix.jpg").write_bytes(encode(200, "PNG"))  # an image all the same
    tag = b"\x01\x12\0\x05\xff\xff\xff\xff\0\0\0\x08"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x03" + tag * 3 + b"\0\0\0\x08"  # loops into itself
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (folder / "exif.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    return len(files) + 5
