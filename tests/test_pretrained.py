"""Models as folders: what is loaded is what was saved, or a sentence that says what is wrong."""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from seqgan.models.cards import model_card
from seqgan.models.features import weights_digest
from seqgan.models.tokenizer import Tokenizer
from seqgan.models.transformer import Transformer
from seqgan.presets import preset
from seqgan.training.codes import encode_folder


def new_tokenizer(changes=None):
    e = preset("smoke", changes)
    return Tokenizer(e.autoencoder, e.quantizer, e.data.size)


def new_transformer(changes=None, tokenizer=""):
    e = preset("smoke", {"masked_sampler.steps": 4} | (changes or {}))
    return Transformer(e.transformer, e.quantizer.codes, e.grid**2, classes=3, tokenizer=tokenizer)


def equal(a, b):
    "Whether two models hold the same weights, in names, types and bits."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


@pytest.fixture
def folder(tmp_path):
    "A folder that holds a tokenizer."
    torch.manual_seed(0)
    new_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(pattern, source, model=Tokenizer, error=ValueError, **named):
    "`from_pretrained` raises `error`, in a sentence of reasonable length that matches `pattern`."
    with pytest.raises(error) as found:
        model.from_pretrained(source, **named)
    assert re.search(pattern, str(found.value)), str(found.value)
    assert len(str(found.value)) < 1500


VARIANTS = [
    {},
    {"autoencoder.attention": 2, "autoencoder.extra_blocks": 1},
    {"quantizer.factors": 4},
    {"quantizer.normalize": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_tokenizer_round_trip(tmp_path, changes):
    tokenizer, images = new_tokenizer(changes), torch.rand(2, 3, 16, 32) * 2 - 1
    tokenizer.save_pretrained(tmp_path, "# Card")
    before = torch.get_rng_state()
    loaded = Tokenizer.from_pretrained(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), before)  # loading draws nothing
    assert equal(loaded, tokenizer)
    assert (loaded.config, loaded.size) == (tokenizer.config, 16)
    assert torch.equal(loaded.reconstruct(images), tokenizer.reconstruct(images))
    assert loaded.codes_digest() == tokenizer.codes_digest()
    assert not loaded.train().training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


TYPES = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}  # with their tolerance


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loaded_tokenizer_in_another_type(tmp_path, changes, dtype):
    "What the error of `save_pretrained` recommends: load, then `.to(...)`."
    torch.manual_seed(0)
    new_tokenizer(changes).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    other = Tokenizer.from_pretrained(tmp_path).to(dtype)
    images = torch.rand(2, 3, 16, 32) * 2 - 1
    codes, expected = tokenizer.encode(images), tokenizer.reconstruct(images)
    found = other.encode(images)
    assert found.dtype == torch.int64
    assert (found == codes).float().mean() > 0.8
    decoded = other.decode(codes)
    assert decoded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (decoded - expected).abs().max() < TYPES[dtype]
    assert torch.equal(other.reconstruct(images), other.decode(found))
    reconstruction = other(images.to(dtype))[0]
    assert reconstruction.isfinite().all()
    assert reconstruction.dtype == decoded.dtype


def test_files_of_a_model(tmp_path):
    "Three files and no others, with the permissions of any file: others may be meant to read them."
    new_tokenizer().save_pretrained(tmp_path, "# Card")
    names = {"config.json", "model.safetensors", "README.md"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert (tmp_path / "README.md").read_text() == "# Card"
    umask = os.umask(0)
    os.umask(umask)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o666 & ~umask}


def types(folder):
    "The types of the weights in a folder."
    return {value.dtype for value in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize(
    "new", [*map(lambda c: lambda: new_tokenizer(c), VARIANTS), new_transformer]
)
def test_stored_as_float16(tmp_path, new):
    "Rounded once: what is loaded, in float32, is stored and loaded again without a change."
    model = new()
    expected = {name: value.half().float() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", "# Card", dtype=torch.float16)
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert types(tmp_path / "a") == {torch.float16}
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    assert not equal(loaded, model)
    loaded.save_pretrained(tmp_path / "b", "# Card", dtype=torch.float16)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded.save_pretrained(tmp_path / "b")
    assert types(tmp_path / "b") == {torch.float32}
    assert equal(type(model).from_pretrained(tmp_path / "b"), loaded)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("conditional", [True, False])
def test_transformer_round_trip(tmp_path, causal, conditional):
    changes = {"transformer.causal": causal, "transformer.conditional": conditional}
    transformer = new_transformer(changes, new_tokenizer().codes_digest()).eval()
    transformer.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert equal(loaded, transformer)
    assert not loaded.training
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    assert (loaded.config, loaded.tokenizer) == (transformer.config, transformer.tokenizer)
    assert (loaded.codes, loaded.positions, loaded.classes) == (32, 16, 3 * conditional)
    codes, labels = torch.randint(32, (2, 16)), torch.tensor([2, 0])
    with torch.no_grad():
        assert torch.equal(loaded(codes, labels), transformer(codes, labels))


def test_transformer_of_another_tokenizer():
    digest = new_tokenizer().codes_digest()
    transformer = new_transformer(tokenizer=digest)
    transformer.expect_tokenizer(digest)
    with pytest.raises(ValueError, match="Codes of another one mean nothing"):
        transformer.expect_tokenizer("0" * 64)
    new_transformer().expect_tokenizer("0" * 64)  # its tokenizer is not known


def test_codes_digest():
    "It changes with what codes depend on, and with nothing else."
    tokenizer = new_tokenizer()
    digest, enhanced = tokenizer.codes_digest(), tokenizer.enhance(1)
    torch.nn.init.normal_(enhanced.decoder.output[-1].weight)
    assert enhanced.codes_digest() == digest
    assert enhanced.size == tokenizer.size == 16
    for changes, same in (
        ({"quantizer.normalize": False}, False),
        ({"autoencoder.attention": 1}, True),
    ):
        other = new_tokenizer(changes)
        other.load_state_dict(tokenizer.state_dict(), strict=False)
        assert (other.codes_digest() == digest) == same
    for module in (tokenizer.encoder, tokenizer.quantizer):
        before = tokenizer.codes_digest()
        next(module.parameters()).data.view(-1)[0] += 1e-3
        assert tokenizer.codes_digest() != before
    if torch.cuda.is_available():
        digest = tokenizer.codes_digest()
        assert tokenizer.cuda().codes_digest() == digest


def test_loaded_model_outlives_its_file(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    expected = {name: value.clone() for name, value in saved.items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.fixture
def no_hub(monkeypatch):
    def download(*arguments, **named):
        pytest.fail("asked the network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def test_only_a_repository_is_asked_for(no_hub, folder, tmp_path, monkeypatch):
    sources = ["./user/name", "../user/name", "user", "a/b/c", "/user/name", "~/name"]
    for source in [*sources, tmp_path / "a" / "b", Path("user/name"), folder / "config.json"]:
        refused("is not a folder.*'user/name'", source, error=FileNotFoundError)
    refused("missing", "", error=FileNotFoundError)  # the current folder
    refused("Only repositories of the Hub have revisions", folder, revision="main")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "user" / "name")
    assert isinstance(Tokenizer.from_pretrained("user/name"), Tokenizer)  # a folder is a folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A folder of two models that come with the package."
    for name in ("shapes-alpha-0/tokenizer", "shapes-alpha-1/tokenizer"):
        new_tokenizer().save_pretrained(tmp_path / "shipped" / name, dtype=torch.float16)
    monkeypatch.setattr("seqgan.models.pretrained.shipped_folder", lambda: tmp_path / "shipped")
    return tmp_path / "shipped"


def test_models_of_the_package(no_hub, shipped, tmp_path, monkeypatch):
    "By their names, unless there is a folder of that name; a path is no name."
    monkeypatch.chdir(tmp_path)
    name = "shapes-alpha-0/tokenizer"
    assert equal(Tokenizer.from_pretrained(name), Tokenizer.from_pretrained(shipped / name))
    refused("must be 'seqgan.Transformer' for", name, Transformer)
    refused("Only repositories of the Hub have revisions", name, revision="main")
    expected = f"The package comes with {name}, shapes-alpha-1/tokenizer.$"
    for source in (Path(name), f"./{name}", "shapes-alpha-0", f"{name}/../tokenizer", f"{name}/"):
        refused(expected, source, error=FileNotFoundError)
    new_tokenizer({"quantizer.normalize": False}).save_pretrained(tmp_path / name)
    assert not Tokenizer.from_pretrained(name).config["quantizer"].normalize  # a folder is a folder
    (tmp_path / name / "config.json").unlink()
    refused("config.json is missing", name, error=FileNotFoundError)  # and nothing else


def test_another_name_is_the_hubs(shipped, tmp_path, monkeypatch):
    "What is no folder and no model of the package; its error says which models that has."
    asked = []

    def download(repository, name, revision):
        asked.append((repository, name, revision))
        raise RuntimeError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    name = "shapes-alpha-0.5/tokenizer"
    expected = f"{name} is not a folder here.* no network.* with shapes-alpha-0/tokenizer, shapes-a"
    refused(expected, name, error=FileNotFoundError, revision="v1")
    assert asked == [(name, "config.json", "v1")]
    shutil.rmtree(shipped)
    refused("The package comes with no models.$", "shapes-alpha-0", error=FileNotFoundError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    path = folder / name
    path.unlink()
    refused(f"{name} is missing", folder, error=FileNotFoundError)
    path.mkdir()
    refused(f"{name} is missing, or not a file", folder, error=FileNotFoundError)
    path.rmdir()
    os.mkfifo(path)  # to open it would wait for ever
    refused(f"{name} is missing, or not a file", folder, error=FileNotFoundError)


# group of config.json ('' for all of it), changes (... removes a setting), the sentence
CONFIGS = {
    "of another class": ("", {"model": "seqgan.Transformer"}, "must be 'seqgan.Tokenizer' for"),
    "of no class": ("", {"model": ...}, "must be 'seqgan.Tokenizer' .* got None"),
    "unknown group": ("", {"training": {}}, "just autoencoder, quantizer, images"),
    "missing group": ("", {"quantizer": ...}, "just autoencoder, quantizer, images"),
    "group of another type": ("", {"quantizer": [1]}, "must be a dict of settings"),
    "unknown setting": ("quantizer", {"kodes": 3}, "kodes.*Quantizer has codes, beta"),
    "missing setting": ("quantizer", {"codes": ...}, "'codes'"),
    "text for a number": ("quantizer", {"codes": "32"}, "codes must be an integer, got '32'"),
    "true for 1": ("autoencoder", {"blocks": True}, "blocks must be an integer, got True"),
    "impossible setting": ("quantizer", {"distance": "cosine"}, "'l2' or 'squared', got 'cosine'"),
    "too many codes": (
        "quantizer",
        {"codes": 10**12, "kmeans_every": 0},
        r"codebook is F32 \(32, 16\), not F32 \(1000000000000, 16\)",
    ),
    "too many blocks": ("autoencoder", {"blocks": 10**9}, "more layers than there are weights"),
    "much attention": ("autoencoder", {"attention": 10**9}, "more layers than there are weights"),
    "too many levels": ("autoencoder", {"multipliers": [1] * 10**5}, "config.json"),
    "too wide": ("autoencoder", {"channels": 2**62}, "config.json"),
    "more than 64 bits": ("quantizer", {"codes": 10**30}, "config.json"),
    "more than a float": ("quantizer", {"beta": 10**400}, "config.json"),
    "of other weights": (
        "autoencoder",
        {"attention": 1},
        "decoder.attention.0.0.dilated.norm.bias is missing, not F32",
    ),
    "another range": ("images", {"range": [0, 1]}, r"the range \[-1, 1\], got \(3, \[0, 1\]\)"),
    "another number of channels": ("images", {"channels": 1}, r"got \(1, \[-1, 1\]\)"),
    "impossible size": ("images", {"size": 17}, "multiple of the compression ratio 4, got 17"),
    "size of another type": ("images", {"size": 16.0}, "compression ratio 4, got 16.0"),
}


def rewrite(folder, group, changes):
    "Change settings of a group of config.json; those that are `...` are removed."
    values = json.loads((folder / "config.json").read_text())
    settings = values[group] if group else values
    settings |= changes
    for name in [name for name, value in changes.items() if value is ...]:
        del settings[name]
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration_refused(folder, case):
    group, changes, sentence = CONFIGS[case]
    rewrite(folder, group, changes)
    refused(sentence, folder)


@pytest.mark.parametrize(
    "group, changes, sentence",
    [
        ("", {"codes": 33}, "head.weight is .*not F32"),
        ("", {"positions": 10**12}, "position_embedding.weight is"),
        ("", {"classes": "3"}, "classes must be an integer of at least 0, got '3'"),
        ("", {"codes": 32.0}, "codes must be an integer of at least 1, got 32.0"),
        ("", {"classes": -1}, "classes must be an integer of at least 0, got -1"),
        ("", {"positions": True}, "positions must be an integer of at least 1, got True"),
        ("", {"tokenizer": None}, "tokenizer must be the codes_digest"),
        ("", {"sampler": 1}, "just transformer, codes"),
        ("transformer", {"heads": -2}, "heads must .*at least 1, got -2"),
        ("transformer", {"heads": 0}, "heads must .*at least 1, got 0"),
        ("transformer", {"blocks": -1}, "blocks must .*at least 1, got -1"),
        ("transformer", {"blocks": 10**9}, "more layers than there are weights"),
        ("transformer", {"dropout": 2}, "config.json.*dropout"),
        ("transformer", {"causal": False}, "code_embedding.weight is"),
    ],
    ids=str,
)
def test_transformer_configuration_refused(tmp_path, group, changes, sentence):
    new_transformer().save_pretrained(tmp_path)
    rewrite(tmp_path, group, changes)
    refused(sentence, tmp_path, Transformer)


def test_transformer_is_not_a_tokenizer(tmp_path):
    new_transformer().save_pretrained(tmp_path)
    refused("must be 'seqgan.Tokenizer' for Tokenizer.from_pretrained", tmp_path)


@pytest.mark.parametrize(
    "text, sentence",
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "config.json"),
        (b"[]", "must be a JSON object"),
        (b'{"model": NaN}', "numbers must be finite, got 'NaN'"),
        (b'{"a": -Infinity}', "numbers must be finite, got '-Infinity'"),
        (b'{"model": 1, "model": 2}', "each name must occur once"),
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


def test_damaged_weights_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    too_long = (2**62).to_bytes(8, "little") + whole[8:]
    pieces = [b"", whole[:5], whole[:500], whole[:-1], whole + b"0", b"{}", os.urandom(1000)]
    for content in [*pieces, too_long]:
        path.write_bytes(content)
        refused("model.safetensors can't be used.*fetch or copy it again", folder)


def test_other_weights_refused(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    name, zeros = "quantizer.codebook", torch.zeros(2)
    for change, sentence in (
        ({name: weights[name][:-1].clone()}, r"codebook is F32 \(31, 16\), not F32 \(32, 16\)"),
        ({name: weights[name].double()}, r"codebook is F64 \(32, 16\), not F32"),
        ({"other": zeros}, r"other is F32 \(2,\), not known"),
        ({f"other{i}": zeros.clone() for i in range(9)}, "; and 6 more"),
        ({"\x1b]0;title\x07": zeros}, r"\?]0;title\? is F32 \(2,\)"),  # a terminal would obey
    ):
        save_file(weights | change, path)
        refused(f"model.safetensors can't be used.*{sentence}.*config.json", folder)
    del weights[name]
    save_file(weights, path)
    refused("codebook is missing, not F32", folder)


def test_other_float16_refused(folder):
    "Weights are of one type; in float16 just those of the model, too."
    path = folder / "model.safetensors"
    half = {name: value.half() for name, value in load_file(path).items()}
    name = "quantizer.codebook"
    for change, sentence in (
        ({name: half[name].float()}, r"codebook is F32 \(32, 16\), not F16 \(32, 16\)"),
        ({name: half[name][:-1].clone()}, r"codebook is F16 \(31, 16\), not F16 \(32, 16\)"),
        ({name: half[name].bfloat16()}, r"codebook is BF16 \(32, 16\), not F16"),
        ({"other": torch.zeros(2).half()}, r"other is F16 \(2,\), not known"),
        ({"other": torch.zeros(2, dtype=torch.int64)}, r"other is I64 \(2,\), not known"),
    ):
        save_file(half | change, path)
        refused(f"model.safetensors can't be used.*{sentence}.*config.json", folder)
    del half[name]
    save_file(half, path)
    refused(r"codebook is missing, not F16 \(32, 16\)", folder)


def test_codes_are_computed_where_the_tokenizer_is(folder, tmp_path, monkeypatch):
    "As it is loaded, that is the CPU, whatever else the machine has."
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (90 * i, 0, 200)).save(images / f"{i}.png")
    tokenizer = Tokenizer.from_pretrained(folder)
    expected = encode_folder(tokenizer, images, tmp_path / "codes", size=16).codes
    for module in ("seqgan.core", "seqgan.training.codes"):
        monkeypatch.setattr(f"{module}.device", lambda: torch.device("meta"), raising=False)
    codes = encode_folder(tokenizer, images, tmp_path / "again", size=16).codes
    assert torch.equal(codes, expected)


class Trap:
    "A pickle that makes a file when it is read."

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
    path.unlink()  # and nothing else is looked for
    refused("model.safetensors is missing", folder, error=FileNotFoundError)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works


def test_saving_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="must be float32 to be saved, got torch.float16"):
        new_tokenizer().half().save_pretrained(folder)
    with pytest.raises(UnicodeEncodeError):
        new_tokenizer().save_pretrained(folder, "\ud800")
    with pytest.raises(ValueError, match="torch.float32, torch.float16, got torch.bfloat16"):
        new_tokenizer().save_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = new_tokenizer()
    tokenizer.quantizer.codebook.data[3, 5] = -65520  # the first that is rounded to infinity
    expected = r"codebook must lie in \[-65504, 65504\] .*float16, got \[-65520.0\]. Store it as"
    with pytest.raises(ValueError, match=expected):
        tokenizer.save_pretrained(folder, dtype=torch.float16)
    Tokenizer.from_pretrained(folder)
    assert len(list(folder.iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        new_tokenizer().save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("script", ["kill", "fuzz"])
def test_in_a_process(child, tmp_path, script):
    result = child(sys.executable, f"tests/{script}_pretrained.py", str(tmp_path / "model"))
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
    for thread in threads:
        thread.start()
    for _ in range(5):
        new_tokenizer()
    for thread in threads:
        thread.join()
    assert not failures


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face Hub that a download asks: repositories as {revision: commit}
    and {(commit, name): content}."""

    def __init__(self):
        self.revisions, self.files, self.asked = {}, {}, []
        self.after_config = None  # called once config.json was sent
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

    def refuse(self, status, code, message, **headers):
        self.answer(status, X_Error_Code=code, X_Error_Message=message, **headers)

    def do_GET(self):
        hub = self.server
        found = re.fullmatch(r"/user/seqgan/resolve/([^/]+)/([^/?]+)(\?.*)?", self.path)
        if not found:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        revision, name = found[1], found[2]
        known = any(revision == commit for commit, _ in hub.files)
        commit = revision if known else hub.revisions.get(revision)
        if self.command == "GET":
            hub.asked.append((commit, name))
        if commit is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        content = hub.files.get((commit, name))
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, X_Repo_Commit=commit, ETag=tag)
        if self.command == "GET" and name == "config.json" and hub.after_config:
            hub.after_config()

    do_HEAD = do_GET


def load_models(lines, folder, environment):
    "For each 'class,source,revision' print a line with a digest or an error."
    import seqgan

    assert "huggingface_hub" not in sys.modules  # it reads the environment when it is imported
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    time.sleep = lambda seconds: None  # no pause before the network is tried again
    for line in lines:
        model, source, revision = line.split(",")
        try:
            found = getattr(seqgan, model).from_pretrained(source, revision=revision or None)
            print("loaded", weights_digest(found))
        except (ValueError, FileNotFoundError) as error:
            print(type(error).__name__, error)


@pytest.fixture
def load(forked, tmp_path):
    "Load models in a process: for each 'class,source,revision' a line with a digest or an error."

    def load(*lines):
        status, output = forked(load_models, lines, str(tmp_path), dict(os.environ)).wait()
        assert status == 0, output[-3000:]
        starts = ("loaded", "ValueError", "FileNotFoundError")
        return [line for line in output.splitlines() if line.startswith(starts)]

    return load


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(f"HF_HUB_{name}", "1")
    proxies = [f"{scheme}_proxy" for scheme in ("http", "https", "all")]
    for name in ["HF_HUB_OFFLINE", "HF_TOKEN", *proxies, *(p.upper() for p in proxies)]:
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.shutdown()
    hub.server_close()


def test_hub(hub, load, tmp_path):
    "Downloads, from a small Hub on this machine."
    models = [new_tokenizer(), new_tokenizer({"quantizer.normalize": False})]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i), "# Card")
    digests = [f"loaded {weights_digest(m)}" for m in models]
    first = hub.commit(tmp_path / "0")

    def move():
        if hub.revisions["main"] == first:
            hub.commit(tmp_path / "1")

    hub.after_config = move  # the repository changes between the two downloads
    revisions = ["", "main", first]
    tokenizers = [f"Tokenizer,user/seqgan,{revision}" for revision in revisions]
    *found, other = load(*tokenizers, "Transformer,user/seqgan,")
    assert found == [digests[0], digests[1], digests[0]]
    assert re.match("ValueError .*config.json can't be used: model must be 'seqgan.Trans", other)
    assert (first, "model.safetensors") in hub.asked[:2]
    assert {name for _, name in hub.asked} == {"config.json", "model.safetensors"}

    (tmp_path / "1" / "model.safetensors").unlink()  # a repository without weights
    hub.commit(tmp_path / "1", "partial")
    asked = ["user/seqgan,v9", "user/other,", "user/x--y,", "user/seqgan,partial"]
    for line, source in zip(load(*(f"Tokenizer,{s}" for s in asked)), asked, strict=True):
        name = source.split(",")[0]
        assert line.startswith(f"FileNotFoundError {name} is not a folder here, and the Hu"), line
        assert "Check the name, the revision and the network" in line


def test_hub_offline(hub, load, tmp_path, monkeypatch):
    "What was downloaded is used, by wish or for want of a network; what was not is an error."
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(tmp_path / "0")
    hub.commit(tmp_path / "0")
    asked = ("Tokenizer,user/seqgan,main", "Tokenizer,user/another,")

    def loads_what_is_kept():
        found = load(*asked)
        assert found[0] == f"loaded {weights_digest(tokenizer)}"
        assert found[1].startswith("FileNotFoundError user/another is not a folder here"), found

    loads_what_is_kept()
    count = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loads_what_is_kept()
    assert len(hub.asked) == count
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.shutdown()
    hub.server_close()
    loads_what_is_kept()


NAMES = [
    "a|b",
    "x\n---\nlicense: mit",
    "`x` <script>",
    "\\|",
    "a\u2028b\u202ec",
    "| | |\r\n|",
    "[a](b) ![c](d) $x$",
    "</details>\n\n# T",
    "```\n# T",
]


def card_of(name):
    values = {name: name}
    return model_card(
        "tokenizer",
        f"user/{name}",
        data=values,
        preset=name,
        settings={name: {name: 1}},
        metrics={name: 1.0},
        protocol=values,
        made=values,
    )


def line_types(card):
    "What each line of a card is: a heading, a row of a table, a fence, ..."
    pattern = r"---|#+ .*|```\w*|</?details>|license.*|\||\s*$|"
    return [re.match(pattern, line)[0] for line in card.split("\n")]


@pytest.mark.parametrize("name", NAMES)
def test_card_is_not_broken_by_names(name):
    card, plain = card_of(name), card_of("a")
    assert line_types(card) == line_types(plain)
    assert len(card.splitlines()) == len(plain.splitlines())
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows)
    assert not any(re.search(r"(?<!\\)<", row) for row in rows)
    assert json.loads(re.search(r"```json\n(.*?)\n```", card, re.S)[1]) == {name: name}
