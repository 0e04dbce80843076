"Archives as strangers hand them over: members outside, links, devices, damage, several processes."

import contextlib
import gzip
import io
import os
import stat
import sys
import tarfile
import zipfile

import pytest
from image_files import encode

from seqgan.config import Data
from seqgan.data import archives
from seqgan.data.archives import unpack
from seqgan.data.folders import resolve_data
from seqgan.data.images import load


def write_zip(path, *names, special=()):
    "An archive of images; `special` are (name, mode) of other members."
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, encode(1))
        for name, mode in special:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
    return path


def write_tar(path, *names, special=()):
    "An archive of images; `special` are (name, type, target of a link) of other members."
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(encode(1))
            archive.addfile(info, io.BytesIO(encode(1)))
        for name, type, target in special:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, target
            archive.addfile(info)
    return path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


NAMES = ["../evil.png", "/seqgan-evil.png", "a/../../evil.png", "..\\evil.png", "//evil.png", ".."]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_members_outside(tmp_path, write, name):
    inside = tmp_path / "in"
    inside.mkdir()
    path = write(inside / ("a.zip" if write is write_zip else "a.tar"), "good.png", name)
    with pytest.raises(ValueError, match="nothing was unpacked"):
        resolve_data(Data(str(path)))
    assert (names_in(inside), names_in(tmp_path)) == ([path.name], ["in"])
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
    path = write_tar(tmp_path / "a.tar", "good.png", special=[special])
    with pytest.raises(ValueError, match="nothing was unpacked"):
        unpack(path)
    assert names_in(tmp_path) == ["a.tar"]


def test_links_of_a_zip(tmp_path):
    path = write_zip(tmp_path / "a.zip", "good.png", special=[("x.png", stat.S_IFLNK | 0o777)])
    with pytest.raises(ValueError, match="nothing was unpacked"):
        unpack(path)
    assert names_in(tmp_path) == ["a.zip"]


def test_backslashes_in_a_zip(tmp_path):
    "Windows programs that write them mean folders: classes and splits stay apart."
    names = [
        f"{split}\\{name}\\{split}.png" for split in ("train", "val") for name in ("cat", "dog")
    ]
    data = resolve_data(Data(str(write_zip(tmp_path / "a.zip", *names)), size=12))
    train, val = load(data, "train"), load(data, "val")
    assert train.classes == val.classes == ("cat", "dog")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [0, 1])


def test_a_folder_that_is_there_already(tmp_path, capfd):
    "It is not unpacked again, and not without a word."
    path = write_zip(tmp_path / "a.zip", "cat/1.png", "dog/2.png")
    unpack(path)
    (tmp_path / "a" / "cat" / "1.png").unlink()
    assert capfd.readouterr().out == ""
    assert names_in(unpack(path) / "cat") == []
    assert capfd.readouterr().out == "a.zip was unpacked before: a/ is used as it is\n"


def test_negative_size_in_a_tar(tmp_path):
    "It would lead the reader back to the same header, for ever."
    path = write_tar(tmp_path / "a.tar", "good.png", "bad.png")
    content = bytearray(path.read_bytes())
    at = 512 * (1 + -(-len(encode(1)) // 512))  # the second header
    content[at + 124 : at + 136] = (256**12 - 512).to_bytes(12, "big")
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'bad.png' is not one, so nothing was unpacked"):
        unpack(path)
    assert names_in(tmp_path) == ["a.tar"]


def test_larger_than_the_disk(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encode(1))
        archive.getinfo("a.png").file_size = 10**15
    sentence = r"unpacks to 1,000,000\.0 GB and [0-9.,]+ GB of the disk is free"
    with pytest.raises(ValueError, match=sentence):
        unpack(tmp_path / "a.zip")
    assert names_in(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "scribbled"])
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz"])
def test_damaged(tmp_path, name, damage):
    write = write_zip if name == "a.zip" else write_tar
    content = write(tmp_path / "good", "a.png", "b.png").read_bytes()
    (tmp_path / "good").unlink()
    if name == "a.tgz":
        content = gzip.compress(content)
    third = len(content) // 3
    content = {
        "empty": b"",
        "text": b"not an archive" * 100,
        "cut": content[:third],
        "scribbled": content[:third] + bytes(200) + content[third + 200 :],
    }[damage]
    (tmp_path / name).write_bytes(content)
    # a plain tar has no sum of its contents: what is scribbled there is found by the decoder
    with contextlib.suppress(ValueError):
        unpack(tmp_path / name)
        assert name == "a.tar" and content
    assert set(names_in(tmp_path)) <= {name, "a"}  # nothing half done
    if name != "a.tar":
        assert not (tmp_path / "a").exists()


def test_a_disk_without_locks(tmp_path, monkeypatch):
    "A process that finds the folder there when it has unpacked takes that one."
    path = write_zip(tmp_path / "a.zip", "cat/1.png", "dog/2.png")
    monkeypatch.setattr(archives.fcntl, "flock", lambda *_: os.close(-1))
    extract = archives._extract

    def slow_extract(*arguments):
        extract(*arguments)
        if not (tmp_path / "a").exists():
            with monkeypatch.context() as other:  # a process, meanwhile
                other.setattr(os, "getpid", lambda: 1)
                other.setattr(archives, "_extract", extract)
                unpack(path)

    monkeypatch.setattr(archives, "_extract", slow_extract)
    assert unpack(path) == tmp_path / "a"
    assert names_in(tmp_path) == ["a", "a.zip"]


RESOLVE = """
import sys
from seqgan.config import Data
from seqgan.data.folders import resolve_data
from seqgan.data.images import load
from seqgan.data.images import load
data = resolve_data(Data(sys.argv[1]))
print(data.name, data.fingerprint, len(load(data, 'val')))
"""


def test_processes_that_start_together_unpack_once(child, tmp_path):
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(300)]
    path = write_zip(tmp_path / "pets.zip", *names)
    runs = [child(sys.executable, "-c", RESOLVE, str(path), start=True) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[0].splitlines()[-1] for run in runs]
    assert outputs[0] == outputs[1], outputs
    assert outputs[0].startswith(f"{tmp_path / 'pets'} "), outputs
    assert names_in(tmp_path) == ["pets", "pets.zip"]
