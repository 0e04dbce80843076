"""Every training once, by plain descent in float32: in one process or two, see `test_processes`."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from seqgan.config import Experiment
from seqgan.core import home, to_float
from seqgan.data.images import ImageSet, load
from seqgan.models.features import VGG, weights_digest
from seqgan.models.tokenizer import Tokenizer
from seqgan.presets import preset
from seqgan.settings import update
from seqgan.training import codes as codes_module
from seqgan.training.codes import extract_codes
from seqgan.training.features import train_classifier
from seqgan.training.loop import Loop
from seqgan.training.processes import barrier, rank_and_world_size
from seqgan.training.tokenizer import train_decoder, train_tokenizer
from seqgan.training.transformer import train_transformer

CHANGES = {
    "data.train": 250,  # neither number divides by the batch or by the processes
    "data.val": 63,
    "tokenizer_training.steps": 8,
    "second_phase.steps": 4,
    "transformer_training.steps": 8,
    "perceptual.warmup": 2,
    "adversarial.train_start": 1,
    "adversarial.start": 2,
    "adversarial.ramp": 2,
    "quantizer.kmeans_every": 3,
    "quantizer.kmeans_last": 6,
    "transformer.dropout": 0.0,
    "perceptual.align": 0.5,
}
BOUND_HOLDS = {  # at once, a discriminator that is far too loud
    "tokenizer_training.steps": 2,
    "perceptual.warmup": 0,
    "adversarial.train_start": 0,
    "adversarial.start": 0,
    "adversarial.ramp": 0,
    "adversarial.weight": 1e3,
}


def descent(parameters, lr, *_):
    """Plain descent instead of Adam, which divides a gradient by its size.

    Where a gradient is 0 up to rounding, one process and two would part ways.
    """
    return torch.optim.SGD(parameters, 5 * lr)


def train_everything(config: Experiment, train: ImageSet, val: ImageSet, out: Path) -> None:
    torch.manual_seed(0)
    vgg = VGG(config.vgg, 40)
    print("classifier", train_classifier(vgg, config.classifier, train, val, out / "vgg", 0))
    train_tokenizer(config, train, vgg, out / "tokenizer", val)
    train_decoder(config, out / "tokenizer/model", train, vgg, out / "decoder", val)
    train_tokenizer(update(config, BOUND_HOLDS), train, vgg, out / "bound")
    tokenizer = Tokenizer.from_pretrained(out / "tokenizer/model")
    codes = [
        extract_codes(tokenizer, part.images, part.labels, out / name, flip=True)
        for name, part in (("train", train), ("val", val))
    ]
    train_transformer(config, *codes, 40, out / "ar")
    masked = update(config, {"transformer.causal": False})
    train_transformer(masked, *codes, 40, out / "nar")


def extract_again(config: Experiment, train: ImageSet, folder: Path) -> None:
    "Codes of four chunks that the processes share, two of which are computed a second time."
    codes_module.CHUNK = 64
    torch.manual_seed(0)
    tokenizer = Tokenizer(config.autoencoder, config.quantizer, config.data.size).freeze()
    extract_codes(tokenizer, train.images, train.labels, folder, flip=True)
    barrier()
    if rank_and_world_size()[0] == 0:  # as if the processes had been killed
        with open(folder / "done.bin", "r+b") as file:
            file.write(bytes([1, 0, 1, 0]))
        mapped = np.load(folder / "codes.npy", "r+")
        mapped[:, 64:128] = mapped[:, 192:] = -1
        mapped.flush()
    barrier()
    again = extract_codes(tokenizer, train.images, train.labels, folder, flip=True)
    images = torch.cat([train.images, train.images.flip(-1)])
    assert torch.equal(again.codes.long(), tokenizer.encode(to_float(images)))


def train_all(micro_batches: int) -> None:
    """Write below $SEQGAN_HOME: the trainings in out/, and weights-RANK.json with the digests of
    all weights after every step."""
    (rank, _), out = rank_and_world_size(), home() / "out"
    parts = {
        "memory.gradient_accumulation": micro_batches,
        "memory.gradient_checkpointing": micro_batches > 1,
    }
    config = preset("smoke", CHANGES | parts)
    train, val = load(config.data, "train"), load(config.data, "val")
    digests, update_model = {}, Loop.update

    def recorded_update(self, name, *losses, **named):
        update_model(self, name, *losses, **named)
        digests.setdefault(f"{self.folder.name}/{name}", []).append(
            weights_digest(self.unwrap(name))
        )

    with (
        patch("seqgan.training.state.precision", return_value="no"),
        patch.object(Loop, "update", recorded_update),
        patch("torch.optim.Adam", descent),
        patch("torch.optim.AdamW", descent),
    ):
        train_everything(config, train, val, out)
    extract_again(config, train, out / "chunks")
    (home() / f"weights-{rank}.json").write_text(json.dumps(digests))
