"""Every training once, by plain descent in float32: in one process or two, see `test_processes`.

    python tests/all_trainings.py MICRO_BATCHES

Writes below $SEQGAN_HOME: the trainings in out/, and weights-RANK.json with the digests of all
weights after every step.
"""

import json
import sys
from unittest.mock import patch

import numpy as np
import torch

from seqgan.config import Experiment
from seqgan.core import home, to_float
from seqgan.data.images import ImageSet, load
from seqgan.models.features import VGG, weights_digest
from seqgan.models.tokenizer import Tokenizer
from seqgan.presets import preset
from seqgan.training import codes as codes_module
from seqgan.training.codes import extract_codes
from seqgan.training.features import train_classifier
from seqgan.training.loop import Loop
from seqgan.training.processes import barrier, rank_and_world_size
from seqgan.training.tokenizer import train_decoder, train_tokenizer
from seqgan.training.transformer import train_transformer

MICRO_BATCHES = int(sys.argv[1])
OUT = home() / "out"
CHANGES = {
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
    "memory.gradient_accumulation": MICRO_BATCHES,
    "memory.gradient_checkpointing": MICRO_BATCHES > 1,
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


def first(images: ImageSet, n: int) -> ImageSet:
    return ImageSet(images.images[:n], images.labels[:n], images.classes)


def train_everything(config: Experiment, train: ImageSet, val: ImageSet) -> None:
    torch.manual_seed(0)
    vgg = VGG(config.vgg, 40)
    print("classifier", train_classifier(vgg, config.classifier, train, val, OUT / "vgg", 0))
    train_tokenizer(config, train, vgg, OUT / "tokenizer", val)
    train_decoder(config, OUT / "tokenizer/model", train, vgg, OUT / "decoder", val)
    train_tokenizer(preset("smoke", CHANGES | BOUND_HOLDS), train, vgg, OUT / "bound")
    tokenizer = Tokenizer.from_pretrained(OUT / "tokenizer/model")
    codes = [
        extract_codes(tokenizer, part.images, part.labels, OUT / name, flip=True)
        for name, part in (("train", train), ("val", val))
    ]
    train_transformer(config, *codes, 40, OUT / "ar")
    masked = preset("smoke", CHANGES | {"transformer.causal": False})
    train_transformer(masked, *codes, 40, OUT / "nar")


def extract_again(config: Experiment, train: ImageSet) -> None:
    "Codes of four chunks that the processes share, two of which are computed a second time."
    codes_module.CHUNK = 64
    torch.manual_seed(0)
    tokenizer = Tokenizer(config.autoencoder, config.quantizer, config.data.size).freeze()
    folder = OUT / "chunks"
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


def main() -> None:
    rank, _ = rank_and_world_size()
    config = preset("smoke", CHANGES)
    # Neither number divides by the batch or by the processes.
    train, val = first(load(config.data, "train"), 250), first(load(config.data, "val"), 63)
    digests, update = {}, Loop.update

    def recorded_update(self, name, *losses, **named):
        update(self, name, *losses, **named)
        digests.setdefault(f"{self.folder.name}/{name}", []).append(
            weights_digest(self.unwrap(name))
        )

    with (
        patch("seqgan.training.state.precision", return_value="no"),
        patch.object(Loop, "update", recorded_update),
        patch("torch.optim.Adam", descent),
        patch("torch.optim.AdamW", descent),
    ):
        train_everything(config, train, val)
    extract_again(config, train)
    (home() / f"weights-{rank}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    main()
