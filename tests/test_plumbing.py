"""Which images, labels, networks, decoders and which alpha a number rests on.

One study at preset `smoke` is computed, then each of its numbers again, from what lies in
its run folders. The wrong choice (the other split, decoder, alpha or labels) is computed too,
and must give another number: so a wrong line in between cannot pass.
"""

from dataclasses import replace

import pytest
import torch

from seqgan.core import to_float, to_uint8
from seqgan.data.batches import map_batches
from seqgan.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    psnr,
    sliced_wasserstein,
)
from seqgan.evaluation.probes import class_accuracy, fit_classes
from seqgan.evaluation.protocol import balanced_labels, balanced_subset, content_digest
from seqgan.models.features import weights_digest
from seqgan.models.perceptual import PerceptualLoss
from seqgan.models.sampling import sample_many
from seqgan.models.tokenizer import Tokenizer
from seqgan.models.transformer import Transformer
from seqgan.presets import preset
from seqgan.study.records import record_study
from seqgan.study.study import Study
from seqgan.training.checkpoints import read_log
from seqgan.training.codes import read_codes
from seqgan.training.tokenizer import train_decoder, train_tokenizer
from seqgan.training.transformer import train_transformer

ALPHA = 0.75
CHANGES = {
    "vgg.weights": "local",
    "data.train": 128,
    "data.val": 32,
    "perceptual.alpha": ALPHA,
    "second_phase.alpha": 0.25,  # neither phase one's nor the default
    "phase": 2,
    "evaluation.samples": 60,  # not a multiple of the classes: labels are told apart
    "evaluation.reference": 100,
    "sampler.top_p": 0.9,
    "masked_sampler.temperature": 0.8,
}
NAR = {"transformer.causal": False}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    "AR and NAR, phase two, with their records: {transformer: (study, record)}."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQGAN_HOME", str(tmp_path_factory.mktemp("plumbing")))
        found = {}
        for name, changes in (("AR", {}), ("NAR", NAR)):
            study = Study(preset("smoke", CHANGES | changes))
            found[name] = study, record_study(study)
        yield found


def close(a, b):
    return a == pytest.approx(b, rel=1e-4, abs=1e-6)


SEEN = {}  # {digest of images: what the judge sees of them}


def see(judge, images):
    "What the judge sees of images, found once."
    key = content_digest(images)
    if key not in SEEN:
        SEEN[key] = judge.extract(images)
    return SEEN[key]


def reconstructions(tokenizer, images):
    return map_batches(lambda x: to_uint8(tokenizer.reconstruct(x)), images)


def phase_one(study):
    return Tokenizer.from_pretrained(study.run("tokenizer") / "model")


def test_networks(studies):
    "The loss is the VGG's, the metrics are the judge's: both are in the record."
    study, record = studies["AR"]
    vgg, judge = study.vgg, study.judge
    assert record["networks"]["vgg"]["weights"] == weights_digest(vgg)
    assert record["networks"]["tokenizer"]["weights"] == weights_digest(study.tokenizer)
    judged = record["protocol"]["generation"]["judge"]
    assert judged["sha256"] == weights_digest(judge.network) != weights_digest(vgg)


def fid(judge, images, reference):
    return frechet_distance(see(judge, images).features, see(judge, reference).features)


def probe_accuracy(study, images, labels):
    "A linear probe on the judge's features of the balanced training images, fitted here."
    rows = balanced_subset(study.train.labels, study.config.evaluation.reference)
    known = see(study.judge, study.train.images[rows]).features
    probe = fit_classes(known, study.train.labels[rows], len(study.classes))
    return class_accuracy(probe, see(study.judge, images).features, labels)


def test_reconstruction(studies):
    "Distances, PSNR and accuracy: phase two's decoder, the validation images and their labels."
    study, record = studies["AR"]
    judge, found = study.judge, record["metrics"]["tokenizer"]
    val, train = study.val.images, study.train.images[: len(study.val)]
    fake = reconstructions(study.tokenizer, val)
    seen, real = see(judge, fake).features, see(judge, val).features
    assert close(found["rFID-lite0"], frechet_distance(seen, real))
    assert close(found["rKID-lite0"], kernel_distance(seen, real)[0])
    assert close(found["rSWD"], sliced_wasserstein(fake, val))
    assert close(found["PSNR"], psnr(fake, val))
    wrong = {
        "training images": fid(judge, reconstructions(study.tokenizer, train), train),
        "other reference": fid(judge, fake, train),
        "phase one": fid(judge, reconstructions(phase_one(study), val), val),
    }
    for choice, value in wrong.items():
        assert not close(found["rFID-lite0"], value), choice
    assert close(found["class_accuracy"], probe_accuracy(study, fake, study.val.labels))


def test_diagnostics(studies):
    "L_low and L_sem are the perceptual network's, on validation images as phase two draws them."
    study, record = studies["AR"]
    found, x = record["metrics"]["tokenizer"], to_float(study.val.images)
    terms = PerceptualLoss(study.vgg, study.config.perceptual)(study.tokenizer.reconstruct(x), x)
    for name in ("low", "sem", "perceptual"):
        assert found[name] == pytest.approx(terms[name].item(), rel=1e-4), name
    codes = study.tokenizer.encode(x)
    assert found["usage"] == len(codes.unique()) / study.config.quantizer.codes


def test_each_phase_has_its_alpha(studies):
    "The logged loss is the mix that Equation 3 makes with the alpha of that phase, and no other."
    study, _ = studies["AR"]
    beginning = study.config.perceptual.warmup
    lines = {
        0.0: [line for line in read_log(study.run("tokenizer")) if line["step"] <= beginning],
        ALPHA: [line for line in read_log(study.run("tokenizer")) if line["step"] > beginning],
        0.25: read_log(study.run("decoder")),
    }
    for alpha, log in lines.items():
        assert log, alpha
        for line in log:
            mixed = alpha * line["sem"] + (1 - alpha) * line["low"]
            assert line["perceptual"] == pytest.approx(mixed, rel=1e-3), (alpha, line["step"])
            assert line["low"] != pytest.approx(line["sem"], rel=0.05)


def test_trainings(studies, tmp_path):
    "Trained again from what each stage should get: the same weights, to the last bit."
    study, _ = studies["AR"]
    c, steps = study.config, study.config.perceptual.warmup
    images = study.train, study.vgg
    beginning = replace(c, perceptual=replace(c.perceptual, alpha=0.0))
    train_tokenizer(beginning, *images, tmp_path / "beginning", study.val, until=steps)
    start = tmp_path / "beginning" / f"checkpoint-{steps}"
    train_tokenizer(c, *images, tmp_path / "tokenizer", study.val, start=start)
    first = tmp_path / "tokenizer" / "model"
    train_decoder(c, first, *images, tmp_path / "decoder", study.val)
    codes = [read_codes(study.run("codes") / split) for split in ("train", "val")]
    train_transformer(c, *codes, len(study.classes), tmp_path / "ar")
    found = {
        "phase one": (Tokenizer.from_pretrained(first), phase_one(study)),
        "phase two": (Tokenizer.from_pretrained(tmp_path / "decoder" / "model"), study.tokenizer),
        "AR": (Transformer.from_pretrained(tmp_path / "ar" / "model"), study.transformer),
    }
    for stage, (again, recorded) in found.items():
        assert weights_digest(again) == weights_digest(recorded), stage


def test_codes(studies):
    "Transformers learn the codes of phase one's tokenizer: of the training images, judged on val."
    study, _ = studies["AR"]
    tokenizer, folder = phase_one(study), study.run("codes")
    for split, images in (("train", study.train), ("val", study.val)):
        codes = read_codes(folder / split)
        n = len(images)
        assert torch.equal(codes.codes[:n].long(), map_batches(tokenizer.encode, images.images))
        assert torch.equal(codes.labels[:n], images.labels)
        assert codes.tokenizer == tokenizer.codes_digest()


def test_validation_loss(studies):
    "AR's val_loss is over the validation codes with their labels."
    study, record = studies["AR"]
    codes = read_codes(study.run("codes") / "val").codes.long().flatten(1)
    right = loss_of(study.transformer, codes, study.val.labels)
    assert record["metrics"]["transformer"]["val_loss"] == pytest.approx(right, rel=1e-4)
    train = read_codes(study.run("codes") / "train").codes.long().flatten(1)[: len(codes)]
    wrong = loss_of(study.transformer, train, study.train.labels[: len(codes)])
    assert right != pytest.approx(wrong, rel=1e-4)


def loss_of(transformer, codes, labels):
    logits = transformer(codes, labels)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()


@pytest.mark.parametrize("kind", ["AR", "NAR"])
def test_samples(studies, kind):
    "The sampled codes are those of balanced labels, this transformer's sampler and the seed."
    study, _ = studies[kind]
    c = study.config
    labels = balanced_labels(c.evaluation.samples, len(study.classes))
    assert labels.bincount(minlength=len(study.classes)).tolist() == [2] * 20 + [1] * 20
    sampler = c.sampler if kind == "AR" else c.masked_sampler
    codes = sample_many(study.transformer, labels, sampler, c.seed)
    pictures = study.decode(codes)
    assert torch.equal(study.samples(c.evaluation.samples), pictures)
    wrong = {
        "labels": sample_many(study.transformer, labels * 0, sampler, c.seed),
        "seed": sample_many(study.transformer, labels, sampler, c.seed + 1),
        "sampler": sample_many(study.transformer, labels, type(sampler)(temperature=1.5), c.seed),
    }
    for choice, other in wrong.items():
        assert not torch.equal(codes, other), choice
    grid = codes.view(len(codes), c.grid, c.grid)
    assert torch.equal(pictures, map_codes(study.tokenizer, grid))
    assert not torch.equal(pictures, map_codes(phase_one(study), grid))


def map_codes(tokenizer, codes):
    return torch.cat([to_uint8(tokenizer.decode(part)) for part in codes.split(64)])


@pytest.mark.parametrize("kind", ["AR", "NAR"])
def test_generation(studies, kind):
    "All samples, against the balanced training images; accuracy: the labels asked for."
    study, record = studies[kind]
    c, judge = study.config, study.judge
    fake, found = study.samples(c.evaluation.samples), record["metrics"]["generation"]
    assert len(fake) == c.evaluation.samples
    rows = balanced_subset(study.train.labels, c.evaluation.reference)
    reference = study.train.images[rows]
    assert len(reference) == c.evaluation.reference
    seen, real = see(judge, fake), see(judge, reference)
    assert close(found["FID-lite0"], frechet_distance(seen.features, real.features))
    assert close(found["KID-lite0"], kernel_distance(seen.features, real.features)[0])
    assert close(found["SWD"], sliced_wasserstein(fake, reference))
    assert close(found["IS-lite0"], inception_score(seen.logits))
    wrong = {
        "validation images": study.val.images,
        "all training images": study.train.images,
    }
    for choice, images in wrong.items():
        assert not close(found["FID-lite0"], fid(judge, fake, images)), choice
    labels = balanced_labels(len(fake), len(study.classes))
    assert close(found["class_accuracy"], probe_accuracy(study, fake, labels))
    nearest = [
        torch.cdist(features, real.features).min(1).values.median()
        for features in (seen.features, see(judge, study.val.images).features)
    ]
    assert close(found["memorisation"], (nearest[0] / nearest[1]).item())


def test_floors(studies):
    "The floors are those of validation images against the training images of generation."
    study, record = studies["AR"]
    judge, floors = study.judge, record["floors"]
    rows = balanced_subset(study.train.labels, study.config.evaluation.reference)
    assert close(floors["FID-lite0"], fid(judge, study.val.images, study.train.images[rows]))
    accuracy = probe_accuracy(study, study.val.images, study.val.labels)
    assert close(floors["class_accuracy"], accuracy)


def test_seed_reaches_all_but_the_perceptual_network(studies):
    "Another seed: another tokenizer, transformer and samples; the perceptual network is shared."
    study, _ = studies["AR"]
    other = Study(preset("smoke", CHANGES | {"seed": 1}))
    assert weights_digest(other.vgg) == weights_digest(study.vgg)
    for network in ("tokenizer", "transformer"):
        assert weights_digest(getattr(other, network)) != weights_digest(getattr(study, network))
    n = study.config.evaluation.samples
    assert not torch.equal(other.samples(n), study.samples(n))


def test_record_says_what_it_is(studies):
    "A record carries the configuration that was computed."
    for kind, (study, record) in studies.items():
        assert record["alpha"] == record["config"]["perceptual"]["alpha"] == ALPHA
        assert record["transformer"] == kind.lower()
        assert (record["phase"], record["seed"], record["preset"]) == (2, 0, "smoke")
        assert study.config.transformer.causal == (kind == "AR")
        judged = record["protocol"]["generation"]["judged"]
        assert judged["n"] == CHANGES["evaluation.samples"]
