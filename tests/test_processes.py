"""Two processes at one training: the same parameters in both, and the losses of one process at the same batch. On CPUs, by gloo."""

import json
import sys

import pytest

CPU = {"CUDA_VISIBLE_DEVICES": ""}  # two processes need two GPUs, or none
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CHILD = """
import json
from pathlib import Path
from unittest.mock import patch
import numpy as np
import torch
from seqgan import codes as C
from seqgan.training.codes import Codes, extract_codes
from seqgan.core import home
from seqgan.presets import preset
from seqgan.data.images import ImageSet, load
from seqgan.core import to_float
from seqgan.models.features import VGG, weights_digest
from seqgan.training.features import train_classifier
from seqgan.training.tokenizer import train_decoder, train_tokenizer
from seqgan.training.transformer import train_transformer
from seqgan.models.tokenizer import Tokenizer
from seqgan.training.loop import Loop
from seqgan.training.processes import broadcast_object as agreed, rank_and_world_size as processes
rank, count = processes()
changes = {"tokenizer_training.steps": 8, "second_phase.steps": 4, "transformer_training.steps": 8, "perceptual.warmup": 2, "adversarial.train_start": 1, "adversarial.start": 2, "adversarial.ramp": 2,
           "quantizer.kmeans_every": 3, "quantizer.kmeans_last": 6, "transformer.dropout": 0.0, "memory.gradient_accumulation": PARTS, "memory.gradient_checkpointing": PARTS > 1}
c, out = preset("smoke", changes), home() / "out"
cut = lambda s, n: ImageSet(s.images[:n], s.labels[:n], s.classes)
train, val = cut(load(c.data, "train"), 250), cut(load(c.data, "val"), 63)   # neither divides by the batch nor by the processes
torch.manual_seed(0)
vgg = VGG(c.vgg, 40)
seen = {}
plain = Loop.update
def update(self, name, *losses):
    plain(self, name, *losses)
    seen.setdefault((self.folder.name, name), []).append(weights_digest(self.plain(name)))
# Adam divides a gradient by its size, so where it is 0 up to rounding one process and two part ways; plain descent shows whether the gradients are the same
descent = lambda params, lr, *_: torch.optim.SGD(params, 5 * lr)
with patch("seqgan.training.precision", return_value="no"), patch.object(Loop, "update", update), patch("torch.optim.Adam", descent), patch("torch.optim.AdamW", descent):
    print("classifier", train_classifier(vgg, c.classifier, train, val, out / "vgg", 0))
    train_tokenizer(c, train, vgg, out / "tokenizer", val)
    train_decoder(c, out / "tokenizer/model", train, vgg, out / "decoder", val)
    loud = {"tokenizer_training.steps": 2, "perceptual.warmup": 0, "adversarial.train_start": 0, "adversarial.start": 0, "adversarial.ramp": 0, "adversarial.weight": 1e3}
    train_tokenizer(preset("smoke", changes | loud), train, vgg, out / "bound")
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer/model")
    codes = [extract_codes(tokenizer, s.images, s.labels, out / name, flip=True) for name, s in (("train", train), ("val", val))]
    train_transformer(c, *codes, 40, out / "ar")
    train_transformer(preset("smoke", changes | {"transformer.causal": False}), *codes, 40, out / "nar")
C.CHUNK = 64                                    # four parts, which the processes share
torch.manual_seed(0)
fixed = Tokenizer(c.autoencoder, c.quantizer, c.data.size).freeze()
extract_codes(fixed, train.images, train.labels, out / "parts", flip=True)
agreed(None)
if rank == 0:                                   # as if they had been killed: two parts are missing
    with open(out / "parts/done.bin", "r+b") as file: file.write(bytes([1, 0, 1, 0]))
    mapped = np.load(out / "parts/codes.npy", "r+")
    mapped[:, 64:128] = mapped[:, 192:] = -1
    mapped.flush()
agreed(None)
again = extract_codes(fixed, train.images, train.labels, out / "parts", flip=True)
assert torch.equal(again.codes.long(), torch.cat([fixed.encode(to_float(x)) for x in (train.images, train.images.flip(-1))]))
(home() / f"weights-{rank}.json").write_text(json.dumps({"/".join(key): digests for key, digests in seen.items()}))
"""


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_are_one(child, python, tmp_path, parts):
    "Both phases with their discriminators, k-means, the entropy and the adversarial bound; the classifiers; codes; AR and NAR; sets that do not divide."
    code = CHILD.replace("PARTS", str(parts))
    (tmp_path / "child.py").write_text(code)
    one, two = (
        python(code, home="one", **CPU),
        child(*TORCHRUN, str(tmp_path / "child.py"), home="two", **CPU),
    )
    assert one.returncode == 0, one.stdout[-3000:]
    assert two.returncode == 0, two.stdout[-3000:]
    first, second = (
        json.loads((tmp_path / "two" / f"weights-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first.keys() == {
        "vgg/net",
        "tokenizer/tokenizer",
        "tokenizer/discriminator",
        "decoder/tokenizer",
        "decoder/discriminator",
        "bound/tokenizer",
        "bound/discriminator",
        "ar/transformer",
        "nar/transformer",
    }
    for run in first:
        assert first[run] == second[run] and len(set(first[run])) > 1, (
            run
        )  # after every step, to the last bit
    for run in ("vgg", "tokenizer", "bound", "decoder", "ar", "nar"):
        logs = [
            [
                json.loads(line)
                for line in (tmp_path / home / "out" / run / "log.jsonl").read_text().splitlines()
            ]
            for home in ("one", "two")
        ]
        assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
        if run == "bound":
            assert all(
                line["adversarial_scale"] < 1e3 for line in logs[0]
            )  # the weight: without the bound it would be that
        for a, b in zip(*logs):
            assert a.keys() == b.keys()
            for name in a.keys() - {"seconds_per_step"}:
                # rounding decides now and then which of two codes is nearest: one of 32 codes in use, or one image of 63
                rel, absolute = (
                    (2e-5, 1e-6)
                    if (run, a["step"]) in (("tokenizer", 1), ("bound", 1))
                    else (1e-2, 0.05)
                    if name.startswith("val_") or "usage" in name or name == "accuracy"
                    else (1e-3, 1e-4)
                )
                assert b[name] == pytest.approx(a[name], rel=rel, abs=absolute), (
                    run,
                    a["step"],
                    name,
                )
    for name in ("codes.npy", "labels.npy", "done.bin"):
        assert (tmp_path / "one/out/parts" / name).read_bytes() == (
            tmp_path / "two/out/parts" / name
        ).read_bytes()
    assert (
        two.stdout.count("classifier") == 2 and two.stdout.count("MB in") == 3
    )  # what is said, is said once


def test_command(child, tmp_path):
    "`seqgan train` under torchrun computes a study of drawn samples that no process's share divides; one process finds all of it there."
    what = (
        "train",
        "--preset",
        "smoke",
        "--transformer",
        "NAR",
        "--phase",
        "2",
        "--set",
        "evaluation.samples=61",
    )
    two = child(*TORCHRUN, "-m", "seqgan", *what, **CPU)
    assert two.returncode == 0, two.stdout[-3000:]
    (record,) = (tmp_path / "home" / "reports" / "results").rglob("*.json")
    assert json.loads(record.read_text())["metrics"]["generation"].keys() >= {
        "FID-local",
        "IS-local",
        "class_accuracy",
    }
    again = child(sys.executable, "-m", "seqgan", *what, **CPU)
    assert (
        again.returncode == 0 and ": started" not in again.stdout and "to do" not in again.stdout
    ), again.stdout[-3000:]


def test_accelerate_launch(child, tmp_path):
    "On processors it starts one process; on several GPUs it is torchrun."
    result = child(
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "-m",
        "seqgan",
        "train",
        "--preset",
        "smoke",
        "--until",
        "vgg",
        **CPU,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert list((tmp_path / "home" / "runs").glob("vgg-*/metrics.json"))
