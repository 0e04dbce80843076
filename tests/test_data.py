"""Datasets as strangers hand them over: hostile files and archives, files that vanish, workers, LMDB, CIFAR-10, FFHQ, and a fuzz of the image loader."""

import contextlib
import hashlib
import io
import os
import pickle
import random
import re
import resource
import signal
import stat
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT
from seqgan import data as D
from seqgan.config import Data
from seqgan.data.batches import Batches
from seqgan.data.images import LazyImages as Files, decode_image as decode, load, subset
from seqgan.data.folders import resolve_data as resolve, unpack

FORMATS = dict(
    JPEG=".jpg", PNG=".png", WEBP=".webp", GIF=".gif", BMP=".bmp", TIFF=".tif", PPM=".ppm"
)


def encoded(value, format="PNG", size=(24, 20), **how):
    "An image file: a colour that says which, with some structure."
    out, (w, h) = io.BytesIO(), size
    pixels = np.full((h, w, 3), value, np.uint8)
    pixels[: h // 3, :, 1] = np.arange(w) * 9 % 256
    Image.fromarray(pixels).save(out, format, **how)
    return out.getvalue()


def fill(folder, n, classes=("",)):
    "n images in a folder, image i grey of value i in its middle; paths in order."
    for i in range(n):
        at = folder / classes[i % len(classes)]
        at.mkdir(parents=True, exist_ok=True)
        (at / f"{i:03d}.png").write_bytes(encoded(i))
    return folder


def values(images):
    return images[:][:, 0, 6, 6].tolist()


def lazy(folder, split="train", size=12):
    return load(Data(str(folder), size=size, crop="random"), split)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def claims(width, height):
    "Small files that claim so many pixels: PNG, BMP, PPM, TIFF; GIF and JPEG as far as they can; WEBP, which can't go far."
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    bmp = bytearray(encoded(1, "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    tif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tif, "TIFF")
    tif = bytearray(tif.getvalue())
    ((at,),) = struct.iter_unpack("<I", tif[4:8])
    for i in range(struct.unpack("<H", tif[at : at + 2])[0]):
        entry = at + 2 + 12 * i
        for tag, value in ((256, width), (257, height)):
            if struct.unpack("<H", tif[entry : entry + 2])[0] == tag:
                tif[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, value)
    made = {
        "a.png": png,
        "b.bmp": bytes(bmp),
        "d.ppm": b"P6 %d %d 255\n" % (width, height) + bytes(1000),
        "e.tif": bytes(tif),
    }
    if max(width, height) < 2**16:
        gif, jpeg = bytearray(encoded(1, "GIF")), bytearray(encoded(1, "JPEG"))
        gif[6:10] = struct.pack("<HH", width, height)
        at = jpeg.index(b"\xff\xc0")
        jpeg[at + 5 : at + 9] = struct.pack(">HH", height, width)
        made |= {"c.gif": bytes(gif), "f.jpg": bytes(jpeg)}
    if max(width, height) < 2**14:
        webp = bytearray(encoded(1, "WEBP"))  # the frame of a VP8 stream
        at = webp.index(b"\x9d\x01\x2a")
        webp[at + 3 : at + 7] = struct.pack("<HH", width, height)
        made["g.webp"] = bytes(webp)
    return made


@pytest.mark.parametrize(
    "side", [100_000, 60_000, 11_000, 9_460]
)  # Pillow itself stops at twice its limit, and warns from 9,460
def test_bombs(side):
    for name, content in claims(side, side).items():
        for filter, error in (
            ("ignore", (ValueError, Image.DecompressionBombError)),
            ("error", (ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter(filter)
                with pytest.raises(error, match="pixels"):
                    decode(content, 8)


def hostile(folder):
    "A folder of 12 good images and of everything that is not one; returns how many of those there are."
    fill(folder, 12)
    jpeg, eps = encoded(3, "JPEG"), io.BytesIO()
    Image.new("RGB", (9, 9)).save(eps, "EPS")
    exif = (
        b"Exif\0\0MM\0*\0\0\0\x08"
        + b"\0\x03"
        + b"\x01\x12\0\x05\xff\xff\xff\xff\0\0\0\x08" * 3
        + b"\0\0\0\x08"
    )  # loops into itself
    bad = (
        {f"bomb-{name}": content for name, content in claims(100_000, 100_000).items()}
        | {f"large-{name}": content for name, content in claims(30_000, 30_000).items()}
        | {
            "truncated.jpg": jpeg[: len(jpeg) // 2],
            "postscript.jpg": eps.getvalue(),
            "empty.jpg": b"",
            "text.png": b"not an image",
            "line\nbreak.jpg": b"GIF89a",
            "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "zeros.bmp": bytes(5000),
        }
    )
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b"not-utf8-\xff.jpg")).write_bytes(b"")
    (folder / "nowhere.jpg").symlink_to("nothing")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "directory.jpg").mkdir()
    (folder / "wrong-suffix.jpg").write_bytes(encoded(200, "PNG"))  # an image all the same
    (folder / "exif.jpg").write_bytes(
        jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    )
    return len(bad) + 5


def test_hostile_folder(tmp_path, capfd):
    bad = hostile(tmp_path / "mixed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        held = [
            load(resolve(Data(str(tmp_path / "mixed"), size=12)), split)
            for split in ("train", "val")
        ]
    assert len([w for w in caught if "left out" in str(w.message)]) == sum(
        bool(part.skipped) for part in held
    )
    skipped = {name for part in held for name in part.skipped}
    assert len(skipped - {"exif.jpg"}) == bad and "wrong-suffix.jpg" not in skipped
    assert not any("\n" in name for name in skipped)

    files = load(Data(str(tmp_path / "mixed"), size=12, crop="random"), "train").images
    capfd.readouterr()
    first, again = files[:], files[:]
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    assert torch.equal(first, again) and len(lines) == len(
        held[0].skipped
    )  # one line for each file, once
    assert all("stands in for it" in line for line in lines)
    names = [os.fsdecode(files.names[i]) for i in range(len(files))]
    good = [k for k, name in enumerate(names) if D._shown(os.fsencode(name)) not in held[0].skipped]
    assert torch.equal(first[good], held[0].images)


def test_nothing_of_a_class_is_readable(tmp_path):
    fill(tmp_path, 60, ("cat", "dog"))
    train = lazy(tmp_path)
    for path in (tmp_path / "dog").iterdir():
        path.write_bytes(b"")
    assert len(train.images[train.labels == 0]) > 20
    with pytest.raises(ValueError, match="another one of its class; of [0-9]+ none can"):
        train.images[train.labels == 1]
    with pytest.raises(ValueError, match="another one of its class"):  # out of a worker, too
        reader = Batches(train.images, train.labels, len(train), 0, crop="random")
        reader(0)


def test_a_file_vanishes_while_workers_read(tmp_path, capfd):
    fill(tmp_path, 64, ("cat", "dog"))
    train = lazy(tmp_path)
    before, all_labels = train.images[:], train.labels
    batches = Batches(train.images, train.labels, 8, seed=0, flip=False)
    for t in range(3):
        assert same(batches(t), batches[t])
    order = torch.randperm(len(train), generator=D.generator("order", 0, 2))  # of the third epoch
    gone = order[:3].tolist()
    for i in gone:
        os.remove(train.images.read(train.images.names[i]))
    steps = range(3, 3 * len(batches))
    found = [batches(t) for t in steps]
    assert all(same(x, batches[t]) for t, x in zip(steps, found) if t >= 2 * len(batches))
    last = torch.cat([x for t, (x, _) in zip(steps, found) if t >= 2 * len(batches)])
    labels = torch.cat([y for t, (_, y) in zip(steps, found) if t >= 2 * len(batches)])
    assert torch.equal(labels, all_labels[order[: len(labels)]])
    for k, i in enumerate(order[: len(labels)].tolist()):
        while i in gone:
            i = next(
                j
                for j in [*range(i + 1, len(train)), *range(len(train))]
                if all_labels[j] == all_labels[i]
            )
        assert torch.equal(last[k], D.to_float(before[i]))
    lines = [line for line in capfd.readouterr().out.splitlines() if "stands in for it" in line]
    assert len(lines) == len(set(lines)) == len(gone) and all(
        "FileNotFoundError" in line for line in lines
    )  # once each, whichever worker met it first


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_is_killed(tmp_path, capfd, number):
    "By a scheduler's signal to all processes, or for want of memory: the step is read anew, and the batches are the same."
    fill(tmp_path / "images", 40)
    train = D.load(D.resolve(Data(name=str(tmp_path / "images"), size=16, crop="random")), "train")
    batches = D.Batches(train.images, train.labels, 8, seed=0, crop="random")
    for step in range(12):
        images, labels = batches(step)
        expected, same = batches[step]
        assert torch.equal(images, expected) and torch.equal(labels, same)
        if step == 3:
            for worker in batches.ahead._workers:
                os.kill(worker.pid, number)
    assert capfd.readouterr().out.count("is read anew") == 1


STREAM = """
import os, sys, time, torch
from seqgan.data import *
from seqgan.config import Data
train = load(Data(sys.argv[1], size=12, crop="random"), "train")
batches = Batches(train.images, train.labels, 8, seed=0, crop="random")
for t in range(4): batches(t)
print("workers", *[p.pid for p in torch.multiprocessing.active_children()], flush=True)
if sys.argv[2] == "wait": time.sleep(600)
if sys.argv[2] == "fail": raise SystemExit(3)
"""


def running(pid):
    "Whether a process runs; one that has ended and was not collected by its new parent yet does not."
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("how", ["end", "fail", "wait"])
def test_workers_end_with_their_parent(child, tmp_path, how):
    fill(tmp_path / "images", 40)
    process = child(sys.executable, "-c", STREAM, str(tmp_path / "images"), how, start=True)
    said, line = process.stdout.readline(), process.stdout.readline()
    assert "for training" in said and line.startswith("workers "), (
        said + line + process.stdout.read()
    )
    pids = [int(pid) for pid in line.split()[1:]]
    assert len(pids) == min(D._cores(), D.WORKERS)
    if how == "wait":
        assert all(map(running, pids))
        process.send_signal(signal.SIGKILL)
    process.wait(60)
    until = time.monotonic() + 30
    while any(map(running, pids)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(map(running, pids))


def stream_in_a_pool(folder):
    train = lazy(folder)
    batches = Batches(train.images, train.labels, 8, seed=0, crop="random")
    return all(same(batches(t), batches[t]) for t in range(4))


def test_stream_inside_a_forked_worker(tmp_path):
    "nbdev_test runs notebooks so."
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(stream_in_a_pool, fill(tmp_path / "images", 40)).result(60)


def test_stream_where_processes_are_not_forked(tmp_path):
    "Then the batches are sent to the workers as a pickle."
    train = lazy(fill(tmp_path / "images", 40))
    batches = Batches(train.images, train.labels, 8, seed=0, crop="random")
    sent = pickle.loads(pickle.dumps(D._Ahead(batches)))
    assert all(torch.equal(x, y) for x, y in zip(sent[3], batches.pixels(3)))


def test_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = D._cores()
    assert 1 <= alone <= os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert D._cores() == max(1, alone // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert D._cores() == 1


# archives


def zipped(path, *members, **kinds):
    with zipfile.ZipFile(path, "w") as archive:
        for name in members:
            archive.writestr(name, encoded(1))
        for name, mode in kinds.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
    return path


def tarred(path, *members, special=()):
    with tarfile.open(path, "w") as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = len(encoded(1))
            archive.addfile(info, io.BytesIO(encoded(1)))
        for name, kind, target in special:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


def test_negative_size_in_a_tar(tmp_path):
    "It would lead the reader back to the same header, for ever."
    path = tarred(tmp_path / "a.tar", "good.png", "bad.png")
    content, at = (
        bytearray(path.read_bytes()),
        512 * (1 + -(-len(encoded(1)) // 512)),
    )  # the second header
    content[at + 124 : at + 136] = (256**12 - 512).to_bytes(12, "big")
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'bad.png' does not, so nothing was unpacked"):
        unpack(path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_unpacking_without_locks(tmp_path, monkeypatch):
    "Where a disk has none, a process that finds the folder there when it has unpacked takes that."
    path = zipped(tmp_path / "a.zip", "cat/1.png", "dog/2.png")
    monkeypatch.setattr(D.fcntl, "flock", lambda *_: os.close(-1))
    extract = D._extract

    def slow(*how):
        extract(*how)
        if not (tmp_path / "a").exists():
            with monkeypatch.context() as other:  # a process, meanwhile
                other.setattr(os, "getpid", lambda: 1)
                other.setattr(D, "_extract", extract)
                unpack(path)

    monkeypatch.setattr(D, "_extract", slow)
    assert unpack(path) == tmp_path / "a" and sorted(p.name for p in tmp_path.iterdir()) == [
        "a",
        "a.zip",
    ]


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "/seqgan-evil.png", "a/../../evil.png", "..\\evil.png", "//evil.png", ".."],
)
@pytest.mark.parametrize("make", [zipped, tarred])
def test_members_outside(tmp_path, make, name):
    inside = tmp_path / "in"
    inside.mkdir()
    path = make(inside / ("a.zip" if make is zipped else "a.tar"), "good.png", name)
    with pytest.raises(ValueError, match="nothing was unpacked"):
        resolve(Data(str(path)))
    assert [p.name for p in inside.iterdir()] == [path.name] and [
        p.name for p in tmp_path.iterdir()
    ] == ["in"]
    assert not os.path.exists("/seqgan-evil.png")


@pytest.mark.parametrize(
    "special",
    [
        ("x.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("x.png", tarfile.SYMTYPE, "../../evil"),
        ("x.png", tarfile.LNKTYPE, "../evil"),
        ("good", tarfile.LNKTYPE, "good.png"),
        ("null.png", tarfile.CHRTYPE, ""),
        ("disk.png", tarfile.BLKTYPE, ""),
        ("pipe.png", tarfile.FIFOTYPE, ""),
    ],
)
def test_special_members_of_a_tar(tmp_path, special):
    path = tarred(tmp_path / "a.tar", "good.png", special=[special])
    with pytest.raises(ValueError, match="nothing was unpacked"):
        unpack(path)
    assert list(tmp_path.iterdir()) == [path]


def test_links_of_a_zip(tmp_path):
    path = zipped(tmp_path / "a.zip", "good.png", **{"link.png": stat.S_IFLNK | 0o777})
    with pytest.raises(ValueError, match="nothing was unpacked"):
        unpack(path)
    assert list(tmp_path.iterdir()) == [path]


def test_archive_larger_than_the_disk(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded(1))
        archive.getinfo("a.png").file_size = 10**15
    with pytest.raises(
        ValueError, match=r"unpacks to 1,000,000\.0 GB and [0-9.,]+ GB of the disk is free"
    ):
        unpack(tmp_path / "a.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("content", [b"", b"not an archive" * 100, "cut", "scribbled"])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz"])
def test_damaged_archive(tmp_path, name, content):
    good = (zipped if name == "a.zip" else tarred)(tmp_path / "good", "a.png", "b.png").read_bytes()
    if name == "a.tgz":
        import gzip

        good = gzip.compress(good)
    middle = len(good) // 3
    content = {
        "cut": good[:middle],
        "scribbled": good[:middle] + bytes(200) + good[middle + 200 :],
    }.get(content, content)
    (tmp_path / "good").unlink()
    (tmp_path / name).write_bytes(content)
    with contextlib.suppress(
        ValueError
    ):  # a plain tar has no sum of its contents: what is scribbled there is found by `decode`
        unpack(tmp_path / name)
        assert name == "a.tar" and content
    assert {p.name for p in tmp_path.iterdir()} <= {name, "a"}  # nothing half done
    if name != "a.tar":
        assert not (tmp_path / "a").exists()


def test_processes_that_start_together_unpack_once(child, tmp_path):
    zipped(tmp_path / "pets.zip", *[f"{c}/{i}.png" for c in ("cat", "dog") for i in range(300)])
    code = "import sys; from seqgan.data import *; from seqgan.config import Data; d = resolve(Data(sys.argv[1])); print(d.name, d.fingerprint, len(load(d, 'val')))"
    runs = [
        child(sys.executable, "-c", code, str(tmp_path / "pets.zip"), start=True) for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert len(set(outputs)) == 1 and outputs[0].startswith(str(tmp_path / "pets") + " "), outputs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets", "pets.zip"]


# datasets


def database(path, records):
    path.mkdir(parents=True)
    with (
        lmdb.open(str(path), map_size=2**24) as environment,
        environment.begin(write=True) as change,
    ):
        for key, value in records:
            change.put(key, value)
    return path


def test_lsun(tmp_path):
    rng = random.Random(0)
    keys = [rng.randbytes(20).hex().encode() for _ in range(60)]
    for name, chosen in (
        ("church_outdoor_train_lmdb", keys[:50]),
        ("church_outdoor_val_lmdb", keys[50:]),
    ):
        database(
            tmp_path / "lsun" / name,
            [(key, encoded(int(key[:2], 16), "WEBP", lossless=True)) for key in chosen],
        )
    data = resolve(Data(str(tmp_path / "lsun"), size=12, crop="random"))
    train, val = load(data, "train"), load(data, "val")
    expected = [int(key[:2], 16) for key in sorted(keys[:50])]
    assert type(train.images) is Files and type(val.images) is torch.Tensor
    assert values(train.images) == expected and values(val.images) == [
        int(key[:2], 16) for key in sorted(keys[50:])
    ]
    assert train.classes == val.classes == ("church_outdoor",)
    assert values(subset(train.images, [4, 2])) == [expected[4], expected[2]]
    batches = Batches(
        train.images, train.labels, 10, seed=0, crop="random"
    )  # the parent has it open, and forks
    assert all(same(batches(t), batches[t]) for t in range(7))

    alone = [
        load(resolve(Data(str(tmp_path / "lsun" / "church_outdoor_train_lmdb"), size=12)), split)
        for split in ("train", "val")
    ]
    assert (
        sorted(values(alone[0].images) + values(alone[1].images)) == sorted(expected)
        and 1 <= len(alone[1]) < 10
    )
    assert alone[0].classes == ("church_outdoor",)


def test_broken_records_and_databases(tmp_path, monkeypatch, capfd):
    at = database(
        tmp_path / "a_train_lmdb",
        [(b"%02d" % i, b"broken" if i == 7 else encoded(i)) for i in range(40)],
    )
    train = lazy(at)
    got = values(train.images)
    keys = [int(train.images.names[i].split(b"/")[1]) for i in range(len(train))]
    assert got == [i if i != 7 else keys[keys.index(7) + 1] for i in keys]
    assert len(capfd.readouterr().out.splitlines()) == 1

    cut = database(tmp_path / "b", [(b"%02d" % i, encoded(i, size=(200, 200))) for i in range(40)])
    os.truncate(cut / "data.mdb", 3 * 4096)
    with pytest.raises(ValueError, match="cut off"):
        lazy(cut)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(ValueError, match="an LMDB that can be opened"):
        lazy(tmp_path / "c")
    with pytest.raises(ValueError, match="images for 'train'"):
        lazy(database(tmp_path / "d", []))
    another = database(tmp_path / "e", [])
    monkeypatch.setitem(sys.modules, "lmdb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'seqgan\[lsun\]'"):
        lazy(another)


def cifar(folder, monkeypatch):
    "An archive of the format of CIFAR-10, and torchvision told that this is the original."
    from torchvision.datasets import CIFAR10

    names = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def batch(values):
        return dict(
            data=np.stack([np.full(3072, v, np.uint8) for v in values]),
            labels=[v % 10 for v in values],
        )

    contents = {f"data_batch_{k + 1}": batch(range(20 * k, 20 * k + 20)) for k in range(5)} | {
        "test_batch": batch(range(200, 220)),
        "batches.meta": dict(label_names=list(names)),
    }
    contents = {name: pickle.dumps(content) for name, content in contents.items()}
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(
        CIFAR10, "train_list", [[name, sums[name]] for name in contents if name.startswith("data")]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", dict(filename="batches.meta", key="label_names", md5=sums["batches.meta"])
    )
    return names


def test_cifar10(tmp_path, monkeypatch):
    names = cifar(tmp_path, monkeypatch)
    data = resolve(Data(str(tmp_path / "cifar-10-python.tar.gz"), size=16))
    folder = tmp_path / "cifar-10-python"
    assert data.name == str(folder / "cifar-10-batches-py")
    assert (
        data == resolve(Data(data.name, size=16))
        and resolve(Data(str(folder), size=16)).fingerprint != ""
    )
    train, val = load(data, "train"), load(data, "val")
    assert (values(train.images), values(val.images)) == (list(range(100)), list(range(200, 220)))
    assert train.classes == val.classes == names and train.labels.tolist() == [
        i % 10 for i in range(100)
    ]
    lazily = lazy(folder, size=16)
    assert type(lazily.images) is Files and torch.equal(lazily.images[:], train.images)
    batches = Batches(lazily.images, lazily.labels, 10, seed=0, crop="random")
    assert same(batches(0), batches[0])

    (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="CIFAR-10 as published; files are missing or differ"):
        load(Data(str(folder), size=16), "train")
    (folder / "cifar-10-batches-py" / "batches.meta").unlink()
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz"):
        load(Data(str(folder), size=8), "train")


@pytest.mark.parametrize("name", ["{:05d}.png", "{thousands:05d}/{:05d}.png"])
def test_ffhq(tmp_path, monkeypatch, name):
    monkeypatch.setattr(D, "FFHQ", (8, 12))
    for i in range(12):
        path = tmp_path / name.format(i, thousands=i // 1000 * 1000)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(i))
    train, val = (load(Data(str(tmp_path), size=12), split) for split in ("train", "val"))
    assert (values(train.images), values(val.images), len(train.classes)) == (
        list(range(8)),
        list(range(8, 12)),
        1,
    )


def test_what_a_folder_holds_is_said(tmp_path, capfd):
    "One level above the dataset, with images that belong to no class; all of them are there when all are asked for."
    fill(tmp_path / "in" / "pets", 40, ("cat", "dog"))
    for name in ("stray.png", "another.png"):
        (tmp_path / "in" / "pets" / name).write_bytes(encoded(9))
    train, val, every = (
        load(Data(str(tmp_path), size=12), split) for split in ("train", "val", "all")
    )
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "for training" in line]
    assert (
        line
        == f"{tmp_path.name}: {len(train)} images for training, {len(val)} for validation (a fixed twentieth), classes: 2; 2 others are left out"
    )
    assert train.classes == ("cat", "dog") and len(train) + len(val) == 40
    assert len(every) == 42 and every.labels.bincount().tolist() == [2, 20, 20]
    (tmp_path / "in" / "pets" / "train").mkdir()
    (tmp_path / "in" / "pets" / "train" / "cat").mkdir()
    for at in ("train/cat/1.png", "val.png"):
        (tmp_path / "in" / "pets" / at).write_bytes(encoded(1))
    for at in ("cat", "dog"):
        (tmp_path / "in" / "pets" / at).rename(tmp_path / at)
    (tmp_path / "in" / "pets" / "val").mkdir()
    (tmp_path / "in" / "pets" / "val" / "1.png").write_bytes(encoded(1))
    for split in ("train", "val"):
        with pytest.raises(
            ValueError, match="images in no folder. Sort the images of val/ into class folders"
        ):
            load(Data(str(tmp_path / "in" / "pets"), size=12), split)
    assert len(load(Data(str(tmp_path / "in" / "pets"), size=12), "all")) == 5


@pytest.mark.parametrize("processes", [2, 4])
def test_shares_interleaved_are_the_batch(tmp_path, processes):
    fill(tmp_path, 50, ("cat", "dog"))
    held, files = load(Data(str(tmp_path), size=12), "train"), lazy(tmp_path)
    for train, crop in ((held, "centre"), (files, "centre"), (files, "random")):
        whole = Batches(train.images, train.labels, 16, seed=5, crop=crop)
        shares = [
            Batches(train.images, train.labels, 16, seed=5, crop=crop, share=(rank, processes))
            for rank in range(processes)
        ]
        for step in (0, 1, 7):
            parts = [share(step) for share in shares]
            assert len(parts[0][0]) == 16 // processes
            assert same([torch.stack(part, 1).flatten(0, 1) for part in zip(*parts)], whole[step])
    assert same(
        Batches(held.images, held.labels, 16, 5)(3), Batches(files.images, files.labels, 16, 5)(3)
    )  # held or not, the centre is the centre


# fuzz


def mutated(rng, seeds):
    "One file of `seeds` with bytes flipped, cut, spliced with another, repeated, or numbers written over its head."
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, kind = rng.randrange(len(content) or 1), rng.randrange(6)
        if kind == 0:
            for _ in range(rng.choice((1, 3, 20))):
                if content:
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            other = rng.choice(seeds)
            content[at:] = other[rng.randrange(len(other)) :]
        elif kind == 3:
            content[at:at] = content[at : at + rng.randrange(1, 200)] * rng.randrange(1, 5)
        elif kind == 4:
            del content[at : at + rng.randrange(1, 100)]
        else:
            at = rng.randrange(min(len(content), 64) or 1)
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 3000))
            content[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
    return bytes(content)


def corpus():
    files = []
    for format in FORMATS:
        files += [encoded(90, format, size) for size in ((24, 20), (5, 41), (64, 64))]
    grey, clear = (
        Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)),
        Image.new("RGBA", (20, 20), (9, 200, 30, 90)),
    )
    for image, format, how in (
        (grey, "PNG", {}),
        (grey, "TIFF", dict(compression="tiff_lzw")),
        (grey, "TIFF", dict(compression="tiff_adobe_deflate")),
        (grey, "TIFF", dict(compression="jpeg")),
        (grey.convert("P"), "GIF", {}),
        (grey.convert("P"), "PNG", dict(transparency=3)),
        (clear, "PNG", {}),
        (clear, "WEBP", dict(lossless=True)),
        (grey.convert("1"), "TIFF", dict(compression="group4")),
        (grey.convert("CMYK"), "JPEG", {}),
        (grey, "JPEG", dict(progressive=True)),
        (grey.convert("1"), "PPM", {}),
        (grey.convert("P"), "BMP", {}),
        (grey.convert("I;16"), "PNG", {}),
    ):
        out = io.BytesIO()
        image.save(out, format, **how)
        files.append(out.getvalue())
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    grey.save(out, "JPEG", exif=exif)
    return [*files, out.getvalue()]


def fuzz(count, folder):
    """Decode `count` hostile files, a tenth of them random bytes; anything but an array or an Exception ends this process.

    Every twentieth is written into `folder`, for the loaders. Prints what happened."""
    rng, seeds, slowest = random.Random(0), corpus(), 0.0
    for content in seeds:
        decode(content, 16)
    outcomes = {}
    for i in range(count):
        content = rng.randbytes(rng.randrange(400)) if i % 10 == 0 else mutated(rng, seeds)
        start = time.perf_counter()
        try:
            image = decode(content, 16)
            assert image.shape == (16, 16, 3) and image.dtype == np.uint8
            outcome = "decoded"
        except AssertionError:
            os._exit(9)
        except Exception as error:
            outcome = type(error).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        slowest = max(slowest, time.perf_counter() - start)
        if i % 20 == 0:
            with open(f"{folder}/{i}{rng.choice(D.SUFFIXES)}", "wb") as file:
                file.write(content)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"\nfuzz: {count} files tried, {outcomes.get('decoded', 0)} decoded, the slowest in {slowest:.2f} s, memory at most {memory:.1f} GB; {outcomes}"
    )


def test_fuzz(child, tmp_path, capsys):
    count = 6000
    fill(tmp_path / "files", 10)
    code = "import sys; sys.path.insert(0, 'tests'); import test_data; test_data.fuzz(int(sys.argv[1]), sys.argv[2])"
    result = child(sys.executable, "-c", code, str(count), str(tmp_path / "files"), cwd=ROOT)
    assert result.returncode == 0 and f"fuzz: {count} files tried" in result.stdout, (
        result.returncode,
        result.stdout[-3000:],
    )
    assert (
        float(re.search("memory at most (.*) GB", result.stdout)[1]) < 3
    )  # and it came to its end, so nothing hung
    with capsys.disabled():
        print("\n" + next(line for line in result.stdout.splitlines() if line.startswith("fuzz:")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held, files = (
            load(Data(str(tmp_path / "files"), size=12), "train"),
            lazy(tmp_path / "files").images,
        )
    assert len(held) + len(held.skipped) == len(files) > 250
    kept = [i for i in range(len(files)) if D._shown(files.names[i]) not in held.skipped]
    assert torch.equal(files[:][kept], held.images)
