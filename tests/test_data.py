"Datasets as strangers hand them over: hostile files, databases, layouts, what is said of them."

import hashlib
import io
import os
import pickle
import random
import shutil
import sys
import tarfile
import warnings

import lmdb
import numpy as np
import pytest
import torch
from image_files import (
    encode,
    is_same,
    load_lazily,
    values,
    write_hostile,
    write_images,
    write_paths,
)

from seqgan.config import Data
from seqgan.core import digest
from seqgan.data import layouts
from seqgan.data.batches import Batches, check_batch
from seqgan.data.classes import printable
from seqgan.data.folders import resolve_data
from seqgan.data.images import LazyImages, count_images, load, subset


def test_hostile_folder(tmp_path, capfd):
    folder = tmp_path / "mixed"
    count = write_hostile(folder)
    data = resolve_data(Data(str(folder), size=12))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train, val = (load(data, split) for split in ("train", "val"))
    about_files = [w for w in caught if "left out" in str(w.message)]
    assert len(about_files) == bool(train.skipped) + bool(val.skipped)
    skipped = {*train.skipped, *val.skipped}
    assert len(skipped - {"exif.jpg"}) == count and "wrong-suffix.jpg" not in skipped
    assert not any("\n" in name for name in skipped)

    lazy = load_lazily(folder).images
    capfd.readouterr()
    first, again = lazy[:], lazy[:]
    lines = [line for line in capfd.readouterr().out.splitlines() if line]
    assert torch.equal(first, again)
    assert len(lines) == len(train.skipped)  # one line for each file, once
    assert all("stands in for it" in line for line in lines)
    good = [i for i in range(len(lazy)) if printable(lazy.names[i]) not in train.skipped]
    assert torch.equal(first[good], train.images)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    "An error: without its images there would be a class fewer."
    write_images(tmp_path, 30, ("cat", "dog"))
    scandir = os.scandir

    def forbidding_scandir(path):  # root may read everything
        if str(path).endswith("dog/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding_scandir)
    for function in (resolve_data, lambda data: load(data, "val")):
        with pytest.raises(ValueError, match="can be read throughout.*dog.*Permission denied"):
            function(Data(str(tmp_path), size=12))


def test_too_few_images(tmp_path):
    "They can be counted before any is decoded, and what asks for more says so by its name."
    few = Data(str(write_images(tmp_path / "few", 4)), size=12)
    assert count_images(few) == {"train": 3, "val": 1}
    assert count_images(Data(train=50, val=9)) == {"train": 50, "val": 9}
    sentence = r"tokenizer_training\.batch must lie between 1 and .* for training, 3, got 8"
    with pytest.raises(ValueError, match=sentence):
        check_batch(8, count_images(few)["train"], "tokenizer_training.batch")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.png").write_bytes(encode(1))
    with pytest.raises(ValueError, match="images for 'train'"):
        count_images(Data(str(tmp_path / "one")))


# databases


def write_lmdb(path, records):
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in records:
                transaction.put(key, value)
    return path


def test_lsun(tmp_path):
    rng = random.Random(0)
    keys = sorted(rng.randbytes(20).hex().encode() for _ in range(60))
    value = {key: int(key[:2], 16) for key in keys}
    train_keys, val_keys = keys[:50], keys[50:]
    for split, some in (("train", train_keys), ("val", val_keys)):
        records = [(key, encode(value[key], "WEBP", lossless=True)) for key in some]
        write_lmdb(tmp_path / "lsun" / f"church_outdoor_{split}_lmdb", records)
    data = resolve_data(Data(str(tmp_path / "lsun"), size=12, crop="random"))
    train, val = load(data, "train"), load(data, "val")
    expected = [value[key] for key in train_keys]
    assert (type(train.images), type(val.images)) == (LazyImages, torch.Tensor)
    assert values(train.images) == expected
    assert values(val.images) == [value[key] for key in val_keys]
    assert train.classes == val.classes == ("church_outdoor",)
    assert values(subset(train.images, [4, 2])) == [expected[4], expected[2]]
    batches = Batches(train.images, train.labels, 10, seed=0, crop="random")
    assert all(is_same(batches(t), batches[t]) for t in range(7))  # it is open, and we fork

    one = resolve_data(Data(str(tmp_path / "lsun" / "church_outdoor_train_lmdb"), size=12))
    train, val = load(one, "train"), load(one, "val")
    assert sorted(values(train.images) + values(val.images)) == sorted(expected)
    assert 1 <= len(val) < 10 and train.classes == ("church_outdoor",)


def test_broken_records(tmp_path, capfd):
    records = [(b"%02d" % i, b"broken" if i == 7 else encode(i)) for i in range(40)]
    train = load_lazily(write_lmdb(tmp_path / "a_train_lmdb", records))
    shown = values(train.images)
    keys = [int(train.images.names[i].split(b"/")[1]) for i in range(len(train))]
    assert shown == [i if i != 7 else keys[keys.index(7) + 1] for i in keys]
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_broken_databases(tmp_path, monkeypatch):
    records = [(b"%02d" % i, encode(i, size=(200, 200))) for i in range(40)]
    cut = write_lmdb(tmp_path / "cut", records)
    os.truncate(cut / "data.mdb", 3 * 4096)
    with pytest.raises(ValueError, match="cut off"):
        load_lazily(cut)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(ValueError, match="an LMDB that can be opened"):
        load_lazily(tmp_path / "text")
    with pytest.raises(ValueError, match="images for 'train'"):
        load_lazily(write_lmdb(tmp_path / "empty", []))
    another = write_lmdb(tmp_path / "another", [])
    monkeypatch.setitem(sys.modules, "lmdb", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'seqgan\[lsun\]'"):
        load_lazily(another)


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def write_cifar10(folder, monkeypatch):
    "An archive of the format of CIFAR-10, and torchvision told that this is the original."
    from torchvision.datasets import CIFAR10

    def batch(numbers):
        data = np.stack([np.full(3072, i, np.uint8) for i in numbers])
        return {"data": data, "labels": [i % 10 for i in numbers]}

    files = {f"data_batch_{k + 1}": batch(range(20 * k, 20 * k + 20)) for k in range(5)}
    files |= {"test_batch": batch(range(200, 220))}
    files |= {"batches.meta": {"label_names": CIFAR10_CLASSES}}
    files = {name: pickle.dumps(content) for name, content in files.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    batches = [[name, md5[name]] for name in files if name.startswith("data")]
    monkeypatch.setattr(CIFAR10, "train_list", batches)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def test_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    data = resolve_data(Data(str(tmp_path / "cifar-10-python.tar.gz"), size=16))
    folder = tmp_path / "cifar-10-python"
    assert data.name == str(folder / "cifar-10-batches-py")
    assert data == resolve_data(Data(data.name, size=16))
    assert resolve_data(Data(str(folder), size=16)).fingerprint != ""
    train, val = load(data, "train"), load(data, "val")
    assert values(train.images) == list(range(100))
    assert values(val.images) == list(range(200, 220))
    assert train.classes == val.classes == tuple(CIFAR10_CLASSES)
    assert train.labels.tolist() == [i % 10 for i in range(100)]
    lazy = load_lazily(folder, size=16)
    assert type(lazy.images) is LazyImages and torch.equal(lazy.images[:], train.images)
    batches = Batches(lazy.images, lazy.labels, 10, seed=0, crop="random")
    assert is_same(batches(0), batches[0])

    inside = folder / "cifar-10-batches-py"
    (inside / "data_batch_3").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="CIFAR-10 as published; files are missing or differ"):
        load(Data(str(folder), size=16), "train")
    (inside / "batches.meta").unlink()
    with pytest.raises(ValueError, match="cifar-10-python.tar.gz"):
        load(Data(str(folder), size=8), "train")


# names


def test_a_folder_called_shapes(tmp_path, monkeypatch):
    "It is a question, and ./shapes is the folder; so is the folder of shapes.zip."
    monkeypatch.chdir(write_images(tmp_path, 30, ("shapes",)))
    for function in (resolve_data, lambda data: load(data, "val")):
        with pytest.raises(ValueError, match=r"There is also the folder .*Write \./shapes for"):
            function(Data("shapes", size=12, val=8))
    folder = resolve_data(Data("./shapes", size=12))
    assert (folder.name, len(load(folder, "all"))) == ("./shapes", 30)
    with pytest.raises(ValueError, match=r"fingerprint must be empty"):
        monkeypatch.chdir(tmp_path.parent)
        load(Data("shapes", size=12, val=8, fingerprint=folder.fingerprint), "val")


def test_the_current_folder(tmp_path, monkeypatch):
    "It has a name, and a relative path is that of the folder where we are."
    for name, count in (("a", 30), ("b", 40)):
        monkeypatch.chdir(write_images(tmp_path / name / "pets", count).parent)
        assert resolve_data(Data("pets")).name == "pets"
        assert len(load(Data("pets", size=12), "all")) == count
    monkeypatch.chdir("pets")
    assert resolve_data(Data(".")).name == str(tmp_path / "b" / "pets")
    assert resolve_data(Data("..")).name == str(tmp_path / "b")


def test_the_same_files_under_another_path(tmp_path, monkeypatch):
    "A dataset is what it holds: moved, linked or named otherwise, its results are found again."
    first = write_images(tmp_path / "a" / "pets", 30, ("cat", "dog"))
    shutil.copytree(first, tmp_path / "b" / "animals")
    (tmp_path / "linked").symlink_to(first)
    monkeypatch.chdir(tmp_path)
    names = ("a/pets", str(first), "b/animals", "linked", "a/../a/pets/")
    found = [resolve_data(Data(name, size=12)) for name in names]
    assert len({digest(data) for data in found}) == 1
    assert len({data.name for data in found}) > 1
    assert all(
        is_same([load(data, "val").images], [load(found[0], "val").images]) for data in found
    )
    (tmp_path / "b" / "animals" / "cat" / "000.png").unlink()
    assert digest(resolve_data(Data("b/animals", size=12))) != digest(found[0])
    assert digest(Data("a/pets")) != digest(Data("b/animals"))  # whose content is not known yet


# layouts


@pytest.mark.parametrize("name", ["{:05d}.png", "{thousands:05d}/{:05d}.png"])
def test_ffhq(tmp_path, monkeypatch, name):
    monkeypatch.setattr(layouts, "FFHQ", (8, 12))
    for i in range(12):
        path = tmp_path / name.format(i, thousands=i // 1000 * 1000)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(i))
    train, val = (load(Data(str(tmp_path), size=12), split) for split in ("train", "val"))
    assert (values(train.images), values(val.images)) == (list(range(8)), list(range(8, 12)))
    assert len(train.classes) == 1


def test_what_a_folder_holds_is_said(tmp_path, capfd):
    "One level above the dataset, with images of no class; all are there when all are asked for."
    pets = write_images(tmp_path / "in" / "pets", 40, ("cat", "dog"))
    write_paths(pets, "stray.png", "another.png")
    data = Data(str(tmp_path), size=12)
    train, val, every = (load(data, split) for split in ("train", "val", "all"))
    lines = [line for line in capfd.readouterr().out.splitlines() if "for training" in line]
    assert lines == [
        f"{tmp_path.name}: {len(train)} images for training, {len(val)} for validation "
        "(a fixed twentieth), classes: 2; left out: 2 images of no class or split"
    ]
    assert train.classes == ("cat", "dog") and len(train) + len(val) == 40
    assert len(every) == 42 and every.labels.bincount().tolist() == [2, 20, 20]


def test_files_with_other_suffixes(tmp_path, capfd):
    "A .jfif is a JPEG; what may be an image and has no suffix of one is counted."
    write_images(tmp_path, 40, ("cat", "dog"))
    (tmp_path / "cat" / "x.jfif").write_bytes(encode(7, "JPEG"))
    for name in ("cat/x", "dog/y", "dog/z.HEIC", "dog/.hidden"):
        (tmp_path / name).write_bytes(encode(8))
    train, every = (load(Data(str(tmp_path), size=12), split) for split in ("train", "all"))
    line = capfd.readouterr().out.splitlines()[0]
    assert line.endswith("left out: 3 other files (2 without a suffix, 1 .heic)"), line
    assert len(every) == 41 and b"cat/x.jfif" in [*every.names]
    (tmp_path / "heic").mkdir()
    (tmp_path / "heic" / "z.heic").write_bytes(encode(8))
    with pytest.raises(ValueError, match=r"at least one image .*1 other file \(1 \.heic\)"):
        load(Data(str(tmp_path / "heic"), size=12), "train")


HASHES = [hashlib.sha1(b"%d" % i).hexdigest() for i in range(40)]


@pytest.mark.parametrize(
    "paths, classes",
    [
        ([f"{'/'.join(name[:6])}/{name}.webp" for name in HASHES], 1),  # LSUN's export
        ([f"{name[:2]}/{name}.jpg" for name in HASHES], 1),
        ([f"{i // 1000 * 1000:05d}/{i:05d}.png" for i in range(0, 9000, 300)], 1),  # some of FFHQ
        ([f"{i // 1000 * 1000:06d}/{i:06d}.png" for i in range(0, 9000, 300)], 1),
        ([f"{i // 1000:02d}/{i:05d}.png" for i in range(1900)], 1),
        ([f"{i // 30}/{i:05d}.png" for i in range(300)], 10),  # digits
        (
            [
                f"{name[0]}/{name}/{i}.jpg"
                for name in ("airfield", "alley", "bar")
                for i in range(9)
            ],
            3,
        ),
        ([f"{name}/{name}_{i}.jpg" for name in ("a", "b", "n01440764") for i in range(9)], 3),
    ],
)
def test_folders_that_store(tmp_path, paths, classes):
    "Hashes, thousands and initials are no classes."
    write_paths(tmp_path, *paths)
    train, val = (load(Data(str(tmp_path), size=12), split) for split in ("train", "val"))
    assert (len(train.classes), len(train) + len(val)) == (classes, len(paths))


def test_folders_that_may_store_are_a_question(tmp_path):
    write_paths(tmp_path, *[f"{i // 5:02d}/{i // 5 * 1000 + i % 5:05d}.png" for i in range(40)])
    with pytest.raises(ValueError, match="clear what is a class, got '00/, 01/, 02/'"):
        load(Data(str(tmp_path), size=12), "train")


@pytest.mark.parametrize("annotations", ["annotations/trimaps", "ground_truth", "gt"])
def test_images_beside_their_annotations(tmp_path, annotations):
    "Oxford's pets, for one: a question, and no two classes."
    write_paths(tmp_path, "images/Abyssinian_1.jpg", f"{annotations}/Abyssinian_1.png")
    with pytest.raises(ValueError, match="name images itself"):
        load(Data(str(tmp_path), size=12), "train")
    assert load(Data(str(tmp_path / "images"), size=12), "all").classes == ("images",)


@pytest.mark.parametrize(
    "train, val",
    [
        ("Training", "Test"),
        ("Train", "Val"),
        ("train2017", "val2017"),
        ("train", "eval"),
        ("TrainingData", "ValidationData"),
        ("trn", "tst"),
        ("tr", "te"),
    ],
)
def test_splits_by_other_names(tmp_path, train, val):
    write_paths(tmp_path, f"{train}/cat/1.png", f"{train}/dog/2.png", f"{val}/dog/3.png")
    found = {split: load(Data(str(tmp_path), size=12), split) for split in ("train", "val")}
    assert found["train"].classes == found["val"].classes == ("cat", "dog")
    assert [found[split].labels.tolist() for split in found] == [[0, 1], [1]]


@pytest.mark.parametrize(
    "folders",
    [
        ("train2014", "train2017", "val2017"),
        ("car", "train"),
        ("val", "test"),
        ("trainA", "trainB", "testA", "testB"),
        ("bottle/train", "bottle/test", "cable"),
    ],
)
def test_splits_that_are_a_question(tmp_path, folders):
    write_paths(tmp_path, *[f"{folder}/{i}.png" for folder in folders for i in range(30)])
    for split in ("train", "val", "all"):
        with pytest.raises(ValueError, match="look like splits"):
            load(Data(str(tmp_path), size=12), split)


@pytest.mark.parametrize("val", ["val/images/v{}.png", "val/n{}/v{}.png", "val/n{}/images/v{}.png"])
def test_tiny_imagenet(tmp_path, val):
    "As published, and with images for validation sorted into class folders beside the annotations."
    write_paths(tmp_path, *[f"train/n{i % 2}/images/{i}.png" for i in range(8)])
    write_paths(tmp_path, *[val.replace("{}", str(i)) for i in range(2)], "test/images/t.png")
    annotations = "".join(f"v{i}.png\tn{i}\t0\t0\t9\t9\n" for i in range(2))
    (tmp_path / "val" / "val_annotations.txt").write_text(annotations)
    (tmp_path / "words.txt").write_text("n0\tgoldfish, Carassius auratus\n")
    found = {split: load(Data(str(tmp_path), size=12), split) for split in ("train", "val")}
    assert found["train"].classes == found["val"].classes == ("goldfish", "n1")
    assert [found[split].labels.tolist() for split in found] == [[0] * 4 + [1] * 4, [0, 1]]


def test_validation_images_without_class_folders(tmp_path):
    write_paths(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/3.png", "4.png")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="no folder. Sort the images of val/ into class"):
            load(Data(str(tmp_path), size=12), split)
    assert len(load(Data(str(tmp_path), size=12), "all")) == 4
