"""Models as folders: what is loaded is what was saved, or a sentence; whoever wrote the folder, and whenever the writing ended."""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from seqgan.training.codes import encode_folder
from seqgan.presets import preset
from seqgan.models.features import weights_digest
from seqgan.models.pretrained import model_card
from seqgan.models.tokenizer import Tokenizer
from seqgan.models.transformer import Transformer


def new_tokenizer(changes=None, size=True):
    e = preset("smoke", changes)
    return Tokenizer(e.autoencoder, e.quantizer, e.data.size if size else None)


def new_transformer(changes=None, tokenizer=""):
    e = preset("smoke", {"masked_sampler.steps": 4} | (changes or {}))
    return Transformer(e.transformer, e.quantizer.codes, e.grid**2, classes=3, tokenizer=tokenizer)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    new_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(match, source, kind=Tokenizer, error=ValueError, **how):
    with pytest.raises(error) as found:
        kind.from_pretrained(source, **how)
    assert re.search(match, str(found.value)), str(found.value)
    assert len(str(found.value)) < 1500


def rewrite(folder, change):
    "Let `change` alter the values of config.json."
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"autoencoder.attention": 2, "autoencoder.extra_blocks": 1},
        {"quantizer.factors": 4},
        {"quantizer.normalize": False},
    ],
    ids=str,
)
def test_tokenizer_round_trip(tmp_path, changes):
    tokenizer, images = new_tokenizer(changes), torch.rand(2, 3, 16, 32) * 2 - 1
    tokenizer.save_pretrained(tmp_path, "# Card")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = Tokenizer.from_pretrained(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing
    assert equal(again, tokenizer) and (again.config, again.size) == (tokenizer.config, 16)
    assert torch.equal(again.encode(images), tokenizer.encode(images)) and torch.equal(
        again.reconstruct(images), tokenizer.reconstruct(images)
    )
    assert again.codes_digest() == tokenizer.codes_digest() and weights_digest(
        again
    ) == weights_digest(tokenizer)
    assert not again.train().training and not any(
        p.requires_grad or p.is_meta for p in again.parameters()
    )
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    umask = os.umask(0)
    os.umask(umask)
    assert all(
        p.stat().st_mode & 0o777 == 0o666 & ~umask for p in tmp_path.iterdir()
    )  # as any file: others may be meant to read it


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("conditional", [True, False])
def test_transformer_round_trip(tmp_path, causal, conditional):
    transformer = new_transformer(
        {"transformer.causal": causal, "transformer.conditional": conditional},
        tokenizer=new_tokenizer().codes_digest(),
    )
    transformer.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    codes, labels = torch.randint(32, (2, 16)), torch.tensor([2, 0])
    with torch.no_grad():
        assert torch.equal(again(codes, labels), transformer.eval()(codes, labels))
    assert (
        equal(again, transformer)
        and not again.training
        and not any(p.requires_grad or p.is_meta for p in again.parameters())
    )
    assert (again.config, again.codes, again.positions, again.classes, again.tokenizer) == (
        transformer.config,
        32,
        16,
        3 * conditional,
        transformer.tokenizer,
    )
    again.expect_tokenizer(transformer.tokenizer)
    with pytest.raises(ValueError, match="codes of another one mean nothing"):
        again.expect_tokenizer("0" * 64)
    new_transformer().expect_tokenizer("0" * 64)


def test_codes_digest():
    tokenizer = new_tokenizer()
    digest, enhanced = tokenizer.codes_digest(), tokenizer.enhance(1)
    torch.nn.init.normal_(enhanced.decoder.output[-1].weight)
    assert enhanced.codes_digest() == digest and enhanced.size == tokenizer.size == 16
    for changes in ({"quantizer.normalize": False}, {"autoencoder.attention": 1}):
        other = new_tokenizer(changes)
        other.load_state_dict(tokenizer.state_dict(), strict=False)
        assert (other.codes_digest() == digest) == ("autoencoder.attention" in changes)
    for part in (tokenizer.encoder, tokenizer.quantizer):
        next(part.parameters()).data.view(-1)[0] += 1e-3
        assert tokenizer.codes_digest() != digest
        digest = tokenizer.codes_digest()
    if torch.cuda.is_available():
        assert tokenizer.cuda().codes_digest() == digest


def test_loaded_model_outlives_its_file(folder):
    tokenizer, expected = Tokenizer.from_pretrained(folder), load_file(folder / "model.safetensors")
    expected = {name: value.clone() for name, value in expected.items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert all(torch.equal(value, expected[name]) for name, value in tokenizer.state_dict().items())


def test_where_a_model_is(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *a, **k: pytest.fail("asked the network")
    )
    for source in (
        tmp_path / "a" / "b",
        Path("user/name"),
        "./user/name",
        "../user/name",
        "user",
        "a/b/c",
        "/user/name",
        "~/name",
        "",
    ):
        if source != "":
            refused("is no folder.*'user/name'", source, error=FileNotFoundError)
    refused("missing", "", error=FileNotFoundError)  # the current folder
    refused("only repositories of the Hub have revisions", folder, revision="main")
    refused("is no folder", folder / "config.json", error=FileNotFoundError)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    shutil.copytree(folder, tmp_path / "user" / "name")
    assert isinstance(Tokenizer.from_pretrained("user/name"), Tokenizer)  # a folder is a folder
    for name in ("config.json", "model.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(f"{name} is missing", folder, error=FileNotFoundError)
        (folder / name).mkdir()
        refused(f"{name} is missing, or not a file", folder, error=FileNotFoundError)
        (folder / name).rmdir()
        os.mkfifo(folder / name)
        refused(f"{name} is missing, or not a file", folder, error=FileNotFoundError)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    Tokenizer.from_pretrained(folder)


CONFIGS = {
    "of another class": (
        lambda v: v.update(model="seqgan.Transformer"),
        "config.json.*'seqgan.Transformer'.*'seqgan.Tokenizer' for Tokenizer.from_pretrained",
    ),
    "of no class": (lambda v: v.pop("model"), "model = None"),
    "unknown group": (lambda v: v.update(training={}), "just autoencoder, quantizer, images"),
    "missing group": (lambda v: v.pop("quantizer"), "just autoencoder, quantizer, images"),
    "unknown setting": (
        lambda v: v["quantizer"].update(kodes=3),
        "'kodes'.*Quantizer has codes, beta",
    ),
    "missing setting": (lambda v: v["quantizer"].pop("codes"), "codes must be given too"),
    "group of another type": (lambda v: v.update(quantizer=[1]), "a dict of settings"),
    "setting of another type": (
        lambda v: v["quantizer"].update(codes="32"),
        "codes = '32'.*an integer",
    ),
    "true for 1": (lambda v: v["autoencoder"].update(blocks=True), "blocks = True.*an integer"),
    "impossible setting": (
        lambda v: v["quantizer"].update(distance="cosine"),
        "'cosine'.*'l2' or 'squared'",
    ),
    "too many codes": (
        lambda v: v["quantizer"].update(codes=10**12, kmeans_every=0),
        r"codebook is F32 \(32, 16\), not F32 \(1000000000000, 16\)",
    ),
    "too many blocks": (
        lambda v: v["autoencoder"].update(blocks=10**9),
        "more layers than there are weights",
    ),
    "too many attention blocks": (
        lambda v: v["autoencoder"].update(attention=10**9),
        "more layers than there are weights",
    ),
    "too many levels": (lambda v: v["autoencoder"].update(multipliers=[1] * 10**5), "config.json"),
    "too wide": (lambda v: v["autoencoder"].update(channels=2**62), "config.json"),
    "more than 64 bits": (lambda v: v["quantizer"].update(codes=10**30), "config.json"),
    "more than a float": (lambda v: v["quantizer"].update(beta=10**400), "config.json"),
    "of other weights": (
        lambda v: v["autoencoder"].update(attention=1),
        "decoder.attention.0.0.dilated.norm.bias is missing, not F32",
    ),
    "another range": (lambda v: v["images"].update(range=[0, 1]), r"\[0, 1\].*3 and \[-1, 1\]"),
    "another number of channels": (lambda v: v["images"].update(channels=1), r"3 and \[-1, 1\]"),
    "impossible size": (
        lambda v: v["images"].update(size=17),
        "size = 17.*multiple of the compression ratio 4",
    ),
    "size of another type": (lambda v: v["images"].update(size=16.0), "size = 16.0"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_refused(folder, case):
    change, sentence = CONFIGS[case]
    rewrite(folder, change)
    refused(sentence, folder)


def test_transformer_configuration_refused(tmp_path):
    new_transformer().save_pretrained(tmp_path)
    good = (tmp_path / "config.json").read_text()
    refused("'seqgan.Transformer' is not possible: 'seqgan.Tokenizer'", tmp_path)
    for changes, sentence in (
        ({"codes": 33}, "head.weight is .*not F32"),
        ({"positions": 10**12}, "position_embedding.weight is"),
        ({"classes": "3"}, "classes = '3'.*an integer"),
        ({"codes": 32.0}, "codes = 32.0.*an integer"),
        ({"classes": -1}, "classes = -1"),
        ({"tokenizer": None}, "tokenizer = None.*codes_digest"),
        ({"positions": True}, "positions = True"),
        ({"sampler": 1}, "just transformer, codes"),
    ):
        rewrite(tmp_path, lambda v: v.update(changes))
        refused(sentence, tmp_path, Transformer)
        (tmp_path / "config.json").write_text(good)
    for changes, sentence in (
        ({"heads": -2}, "heads, dim, hidden = .*-2.*all at least 1"),
        ({"heads": 0}, "config.json"),
        ({"blocks": 10**9}, "more layers than there are weights"),
        ({"blocks": -1}, r"transformer.blocks, .* = \(-1.*all at least 1"),
        ({"dropout": 2}, "config.json.*dropout"),
        ({"causal": False}, "code_embedding.weight is"),
    ):
        rewrite(tmp_path, lambda v: v["transformer"].update(changes))
        refused(sentence, tmp_path, Transformer)
        (tmp_path / "config.json").write_text(good)
    Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text,sentence",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "config.json"),
        (b"[]", "a JSON object"),
        (b'{"model": NaN}', "number = 'NaN'"),
        (b'{"a": -Infinity}', "'-Infinity'"),
        (b'{"model": 1, "model": 2}', "each one once"),
        (b"[" * 200_000, "config.json"),
        (b'{"a":' * 150_000, "config.json"),
        (b" " * (2**20 + 1), "at most 1 MB"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json"),
    ],
    ids=lambda v: str(v)[:12],
)
def test_text_refused(folder, text, sentence):
    (folder / "config.json").write_bytes(text)
    refused(sentence + ".*the config.json that save_pretrained wrote", folder)


def test_weights_refused(folder):
    path, weights = folder / "model.safetensors", load_file(folder / "model.safetensors")
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:5],
        whole[:500],
        whole[:-1],
        whole + b"0",
        b"{}",
        os.urandom(1000),
        (2**62).to_bytes(8, "little") + whole[8:],
    ):
        path.write_bytes(content)
        refused("model.safetensors can't be used.*fetch or copy it again", folder)
    name = "quantizer.codebook"
    for change, sentence in (
        ({name: weights[name][:-1].clone()}, r"codebook is F32 \(31, 16\), not F32 \(32, 16\)"),
        ({name: weights[name].double()}, r"codebook is F64 \(32, 16\), not F32"),
        ({"other": torch.zeros(2)}, r"other is F32 \(2,\), not known"),
        ({f"other{i}": torch.zeros(2) for i in range(9)}, "and 6 more differ"),
    ):
        save_file(weights | change, path)
        refused(
            "model.safetensors can't be used.*"
            + sentence
            + ".*weights of the configuration in .*config.json",
            folder,
        )
    save_file({n: w for n, w in weights.items() if n != name}, path)
    refused("codebook is missing, not F32", folder)
    save_file(weights | {"\x1b]0;title\x07": torch.zeros(2)}, path)  # what a terminal would obey
    refused(r"\?]0;title\? is F32 \(2,\), not known", folder)


def test_codes_are_computed_where_the_tokenizer_is(folder, tmp_path, monkeypatch):
    "As it is loaded, that is the CPU, whatever else the machine has."
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (90 * i, 0, 200)).save(images / f"{i}.png")
    tokenizer = Tokenizer.from_pretrained(folder)
    expected = encode_folder(tokenizer, images, tmp_path / "codes", size=16).codes
    monkeypatch.setattr("seqgan.codes.device", lambda: torch.device("meta"))
    assert torch.equal(
        encode_folder(tokenizer, images, tmp_path / "again", size=16).codes, expected
    )


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_not_executed(folder, tmp_path):
    path, sprung = folder / "model.safetensors", tmp_path / "sprung"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Trap(sprung))),
        lambda: torch.save({"a": Trap(sprung)}, path),
        lambda: torch.save({"a": Trap(sprung)}, path, _use_new_zipfile_serialization=False),
    ):
        write()
        refused("model.safetensors can't be used", folder)
        shutil.copy(path, folder / "pytorch_model.bin")
    path.unlink()
    refused(
        "model.safetensors is missing", folder, error=FileNotFoundError
    )  # and nothing else is looked for
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works


def test_saving_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="float32"):
        new_tokenizer().half().save_pretrained(folder)
    with pytest.raises(UnicodeEncodeError):
        new_tokenizer().save_pretrained(folder, "\ud800")
    assert Tokenizer.from_pretrained(folder) and len(list(folder.iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        new_tokenizer().save_pretrained(tmp_path / "file")


KILL = """
import errno, os, random, resource, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from test_pretrained import Tokenizer, equal, new_tokenizer
folder = Path(sys.argv[1])
models = [new_tokenizer(), new_tokenizer({"quantizer.normalize": False})]       # the same shapes: a mixture would load

def check():
    "The model that the folder holds, 0 or 1, or None."
    try: loaded = Tokenizer.from_pretrained(folder)
    except FileNotFoundError as error: assert "config.json is missing" in str(error), error; return None
    which = [i for i, m in enumerate(models) if equal(loaded, m) and loaded.config == m.config]
    assert which, "a mixture"
    return which[0]

def forked(work):
    pid = os.fork()
    if not pid:
        try: work()
        finally: os._exit(1)
    return pid

# at each operation on files in turn
outcomes, at, ended = [], 0, False
while not ended:
    models[0].save_pretrained(folder, "# 0")
    at += 1
    def work():
        left = at
        def hook(event, arguments):
            nonlocal left
            if event.startswith(("os.", "open", "tempfile", "shutil")):
                left -= 1
                if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        models[1].save_pretrained(folder, "# 1")
        os._exit(0)
    status = os.waitpid(forked(work), 0)[1]
    ended = status == 0
    assert ended or os.WTERMSIG(status) == signal.SIGKILL, status
    outcomes.append(check())
changes = [o for i, o in enumerate(outcomes) if not i or outcomes[i - 1] != o]
assert changes == [0, None, 1] and len(outcomes) > 8, outcomes
print("killed at", at - 1, "operations:", outcomes)

# at random times
random.seed(0)
counts = {0: 0, 1: 0, None: 0}
for _ in range(150):
    def work():
        while True:
            for model in models: model.save_pretrained(folder, "# card")
    pid = forked(work)
    time.sleep(random.uniform(0.001, 0.02)); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    counts[check()] += 1
print("killed 150 times:", counts)

# a disk that is full, as a limit on the size of files
import shutil
shutil.rmtree(folder); models[0].save_pretrained(folder)
before = sorted(folder.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try: models[1].save_pretrained(folder)
except OSError as error: assert error.errno == errno.EFBIG, error; print(error)
else: raise AssertionError("written")
assert sorted(folder.iterdir()) == before and check() == 0
"""


def test_killed_while_saving(python, tmp_path, child):
    result = child(sys.executable, "-c", KILL, str(tmp_path / "model"))
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-3000:]


FUZZ = r"""
import collections, copy, json, random, resource, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from test_pretrained import Tokenizer, Transformer, new_tokenizer, new_transformer
folder, r = Path(sys.argv[1]), random.Random(0)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 30, resource.RLIM_INFINITY))    # a gigabyte more than now, or MemoryError
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024    # MB

NUMBERS = [0, 1, 2, 3, 4, 8, 16, 32, 64, -1, -2, 2 ** 31, 2 ** 63 - 1, 2 ** 63, 10 ** 9, 10 ** 12, 10 ** 30, 10 ** 400, -10 ** 12, 0.5, 1e308, -1e-308, float("nan"), float("inf"), True, False]
def deep(n): return "[" * n + "]" * n
def value(depth=0):
    "A random JSON value."
    kind = r.randrange(8 if depth < 3 else 5)
    if kind < 3: return r.choice(NUMBERS)
    if kind == 3: return r.choice([None, "", "x", "l2", "squared", "\ud800", "a" * 10000, "seqgan.Tokenizer", "seqgan.Transformer"])
    if kind == 4: return r.choice([[], {}, [1, 2, 4], [1] * 10000, [10 ** 9] * 3, [[1]], [1, "2", 4], {"codes": 1}, [0, 1], [-1, 1]])
    if kind < 7: return [value(depth + 1) for _ in range(r.randrange(5))]
    return {r.choice(["codes", "heads", "a", "", "model"]): value(depth + 1) for _ in range(r.randrange(4))}

def dicts(v): return [v] + [d for x in v.values() if isinstance(x, dict) for d in dicts(x)]
def mutated_config(good):
    v = copy.deepcopy(good)
    kind = r.randrange(12)
    if kind == 0: return json.dumps(value()).encode()
    if kind <= 7:
        for _ in range(r.choice([1, 1, 1, 2, 3])):
            d = r.choice(dicts(v))
            if not d: continue
            key = r.choice(list(d))
            if kind == 1: del d[key]
            elif kind == 2: d[r.choice(["x", "", "codes", "heads", "size", key + "s"])] = value()
            elif kind == 3 and isinstance(d[key], (int, float)): d[key] = d[key] + r.choice([-1, 1, 0.5, 10 ** 9]) if r.random() < 0.7 else -d[key]
            else: d[key] = value()
        return json.dumps(v, indent=r.choice([None, 1])).encode()
    text = json.dumps(v)
    if kind == 8:                                                             # a name twice
        d = r.choice(dicts(v)); key = r.choice(list(d))
        return text.replace(f'"{key}":', f'"{key}": {json.dumps(value())}, "{key}":', 1).encode()
    if kind == 9: return text.replace(json.dumps(r.choice(list(v.values()))), deep(r.choice([10, 900, 5000, 100000])), 1).encode()
    text = bytearray(text.encode())
    for _ in range(r.choice([1, 1, 2, 8])):
        i = r.randrange(len(text))
        if kind == 10: text[i] ^= 1 << r.randrange(8)
        else: text[i:i + r.randrange(10)] = bytes(r.randrange(256) for _ in range(r.randrange(4)))
    return bytes(text[:r.randrange(len(text))] if r.random() < 0.1 else text)

def mutated_weights(good):
    n = int.from_bytes(good[:8], "little")
    header, data = good[8:8 + n], good[8 + n:]
    kind = r.randrange(7)
    if kind == 0: return good[:r.randrange(len(good))]
    if kind == 1: return good + bytes(r.randrange(1, 100))
    if kind == 2: return r.choice([0, 1, n - 1, n + 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1, r.randrange(len(good))]).to_bytes(8, "little") + good[8:]
    if kind == 3:                                                             # bits of the header
        header = bytearray(header)
        for _ in range(r.choice([1, 1, 2, 8])): header[r.randrange(n)] ^= 1 << r.randrange(8)
        return good[:8] + bytes(header) + data
    if kind == 4:                                                             # of the data: other weights, nothing else
        data = bytearray(data); data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        return good[:8 + n] + bytes(data)
    v = json.loads(header)
    for _ in range(r.choice([1, 1, 2])):
        name = r.choice(list(v))
        if kind == 5: v[name] = value()
        elif name == "__metadata__": v[name] = value()
        else: v[name] = v[name] | {r.choice(["dtype", "shape", "data_offsets", "x"]): r.choice([value(), [2 ** 40, 2 ** 40], [2 ** 62, 4], [0, 4], [-1, 3], "F16", "I64", "F32", [10 ** 9] * 9])}
        if r.random() < 0.2: v[r.choice(["x", "quantizer.codebook", "head.weight"])] = v.pop(name)
    header = json.dumps(v).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data

def hang(*_): raise BaseException("it hangs")
signal.signal(signal.SIGALRM, hang)

def attempt(kind):
    start = time.time()
    signal.alarm(20)
    try: model = kind.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith(str(folder)) and len(str(error)) < 2000, str(error)[:2000]
        return type(error).__name__, time.time() - start
    finally: signal.alarm(0)
    assert type(model) is kind and not any(p.is_meta or p.requires_grad for p in model.parameters())
    if kind is Tokenizer: assert model.encode(torch.zeros(1, 3, 16, 16)).shape[0] == 1
    else: model(torch.zeros(1, model.positions, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return "loaded", time.time() - start

counts, slowest = collections.Counter(), 0
for model in (new_tokenizer({"autoencoder.attention": 1}), new_transformer()): model.save_pretrained(folder); attempt(type(model))   # what PyTorch loads at first use
before = peak()
for kind, model in ((Tokenizer, new_tokenizer({"autoencoder.attention": 1})), (Transformer, new_transformer())):
    model.save_pretrained(folder)
    config, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").read_bytes()
    for file, n, good, mutated in (("config.json", 1200, json.loads(config), mutated_config), ("model.safetensors", 400, weights, mutated_weights)):
        for i in range(n):
            content = mutated(good)
            (folder / file).write_bytes(content)
            try: outcome, seconds = attempt(kind)
            except BaseException as error: sys.exit(f"{kind.__name__}, {file}, number {i}: {error!r:.1000}: {content[:1000]!r}")
            counts[kind.__name__, file, outcome] += 1; slowest = max(slowest, seconds)
        (folder / file).write_bytes(config if file == "config.json" else weights)
    assert attempt(kind)[0] == "loaded"
for (kind, file, outcome), n in sorted(counts.items()): print(f"{kind:12} {file:18} {outcome:18} {n}")
grown = peak() - before
print(f"slowest {slowest:.2f} s, memory grew by {grown:.0f} MB")
assert grown < 100
for kind in ("Tokenizer", "Transformer"):                                     # the fuzz reaches both sides
    for file in ("config.json", "model.safetensors"): assert min(counts[kind, file, "loaded"], counts[kind, file, "ValueError"]) >= 10
"""


def test_fuzz(child, tmp_path):
    "Mutated configurations and weights: a model of the right type that works, or an error of ours. No hang, no large allocation."
    result = child(sys.executable, "-c", FUZZ, str(tmp_path / "model"))
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-5000:]


def test_threads(tmp_path):
    "The bound on what is built is a thread's own."
    new_transformer().save_pretrained(tmp_path)
    failures = []

    def work():
        try:
            for _ in range(10):
                Transformer.from_pretrained(tmp_path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for _ in range(5):
        new_tokenizer()
    for t in threads:
        t.join()
    assert not failures


class Hub(ThreadingHTTPServer):
    "The part of the Hugging Face Hub that a download asks: repositories as {revision: commit} and {(commit, name): content}."

    def __init__(self):
        self.revisions, self.files, self.asked, self.moves = {}, {}, [], None
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def commit(self, folder, revision="main"):
        commit = hashlib.sha1(str(len(self.files)).encode()).hexdigest()
        self.files |= {(commit, p.name): p.read_bytes() for p in folder.iterdir()}
        self.revisions[revision] = commit
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        hub = self.server
        found = re.fullmatch(r"/user/seqgan/resolve/([^/]+)/([^/?]+)(\?.*)?", self.path)
        if not found:
            return self.answer(
                401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        revision, name = found[1], found[2]
        commit = (
            revision if any(revision == c for c, _ in hub.files) else hub.revisions.get(revision)
        )
        if self.command == "GET":
            hub.asked.append((commit, name))
        if commit is None:
            return self.answer(
                404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id"
            )
        content = hub.files.get((commit, name))
        if content is None:
            return self.answer(
                404,
                X_Error_Code="EntryNotFound",
                X_Error_Message="Entry not found",
                X_Repo_Commit=commit,
            )
        self.answer(
            200, content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"'
        )
        if self.command == "GET" and name == "config.json" and hub.moves:
            hub.moves()

    do_HEAD = do_GET


LOAD = """
import sys, time
time.sleep = lambda seconds: None                                             # no pause before the network is tried again
from seqgan.models.features import weights_digest
from seqgan.models.tokenizer import Tokenizer
from seqgan.models.transformer import Transformer
for line in sys.argv[1:]:
    kind, source, revision = line.split(",")
    try: model = {"Tokenizer": Tokenizer, "Transformer": Transformer}[kind].from_pretrained(source, revision=revision or None)
    except (ValueError, FileNotFoundError) as error: print(type(error).__name__, error)
    else: print("loaded", weights_digest(model))
"""


def test_hub(child, tmp_path, monkeypatch):
    "Downloads, from a small Hub on this machine."
    hub, models = Hub(), [new_tokenizer(), new_tokenizer({"quantizer.normalize": False})]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i), "# Card")
    for name, value in dict(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HOME=str(tmp_path / "hub"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    ).items():
        monkeypatch.setenv(name, value)
    for name in (
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)

    def load(*lines):
        result = child(sys.executable, "-c", LOAD, *lines, cwd=tmp_path)
        assert result.returncode == 0, result.stdout[-3000:]
        return [
            line
            for line in result.stdout.splitlines()
            if line.startswith(("loaded", "ValueError", "FileNotFoundError"))
        ]

    first = hub.commit(tmp_path / "0")
    hub.moves = lambda: (
        hub.commit(tmp_path / "1") if hub.revisions["main"] == first else None
    )  # between the two files
    digests = [f"loaded {weights_digest(m)}" for m in models]
    found = load(
        "Tokenizer,user/seqgan,",
        "Tokenizer,user/seqgan,main",
        f"Tokenizer,user/seqgan,{first}",
        "Transformer,user/seqgan,",
        "Tokenizer,user/seqgan,v9",
        "Tokenizer,user/other,",
        "Tokenizer,user/x--y,",
    )
    assert found[:3] == [digests[0], digests[1], digests[0]]
    assert (first, "model.safetensors") in hub.asked[:2] and {name for _, name in hub.asked} == {
        "config.json",
        "model.safetensors",
    }
    assert re.match(
        "ValueError .*config.json can't be used: model = 'seqgan.Tokenizer' is not possible: 'seqgan.Transformer'",
        found[3],
    )
    for line, name in zip(found[4:], ("user/seqgan", "user/other", "user/x--y")):
        assert re.match(
            f"FileNotFoundError {re.escape(name)} is no folder here, and the Hugging Face Hub gave no model of this name: .+ Check the name, the revision and the network",
            line,
        ), line

    (tmp_path / "1" / "model.safetensors").unlink()  # a repository without weights
    hub.commit(tmp_path / "1", "partial")
    (line,) = load("Tokenizer,user/seqgan,partial")
    assert line.startswith("FileNotFoundError user/seqgan is no folder here"), line

    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = load("Tokenizer,user/seqgan,main", "Tokenizer,user/another,")
    assert (
        found[0] == digests[1]
        and found[1].startswith("FileNotFoundError user/another is no folder here")
        and len(hub.asked) == asked
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.shutdown()
    hub.server_close()  # no network
    found = load("Tokenizer,user/seqgan,main", "Tokenizer,user/another,")
    assert found[0] == digests[1] and found[1].startswith(
        "FileNotFoundError user/another is no folder here"
    ), found


@pytest.mark.parametrize(
    "name",
    [
        "a|b",
        "x\n---\nlicense: mit",
        "`x` <script>",
        "\\|",
        "a\u2028b\u202ec",
        "| | |\r\n|",
        "[a](b) ![c](d) $x$",
        "</details>\n\n# T",
        "```\n# T",
    ],
)
def test_card_is_not_broken_by_names(name):
    card = model_card(
        "tokenizer",
        f"user/{name}",
        data={name: name},
        preset=name,
        settings={name: {name: 1}},
        metrics={name: 1.0},
        protocol={name: name},
        made={name: name},
    )
    plain = model_card(
        "tokenizer",
        "user/a",
        data={"a": "a"},
        preset="a",
        settings={"a": {"a": 1}},
        metrics={"a": 1.0},
        protocol={"a": "a"},
        made={"a": "a"},
    )
    shape = lambda text: [
        re.match(r"---|#+ .*|```\w*|</?details>|license.*|\||\s*$|", line)[0]
        for line in text.split("\n")
    ]
    assert shape(card) == shape(plain) and len(card.splitlines()) == len(plain.splitlines())
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)
    assert not any(re.search(r"(?<!\\)<", row) for row in rows)
    assert json.loads(re.search(r"```json\n(.*?)\n```", card, re.S)[1]) == {name: name}
