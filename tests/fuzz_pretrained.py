"""Loads models whose configuration or weights were mutated at random.

`python tests/fuzz_pretrained.py FOLDER`: each is a model of the right type that works, or an error
of ours; none hangs or takes much memory.
"""

import collections
import json
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from test_pretrained import Tokenizer, new_tokenizer, new_transformer

FOLDER = Path(sys.argv[1])
R = random.Random(0)

INTEGERS = [0, 1, 2, 3, 4, 8, 16, 32, 64, -1, -2, 10**9, 10**12, 10**30, 10**400, -(10**12)]
INTEGERS += [2**31, 2**63 - 1, 2**63]
NUMBERS = INTEGERS + [0.5, 1e308, -1e-308, float("nan"), float("inf"), True, False]
TEXTS = [None, "", "x", "l2", "squared", "\ud800", "a" * 10000]
TEXTS += ["seqgan.Tokenizer", "seqgan.Transformer"]
COLLECTIONS = [[], {}, [1, 2, 4], [1] * 10000, [10**9] * 3, [[1]], [1, "2", 4], {"codes": 1}]
COLLECTIONS += [[0, 1], [-1, 1]]


def value(depth=0):
    "A random JSON value."
    case = R.randrange(8 if depth < 3 else 5)
    if case < 3:
        return R.choice(NUMBERS)
    if case == 3:
        return R.choice(TEXTS)
    if case == 4:
        return R.choice(COLLECTIONS)
    if case < 7:
        return [value(depth + 1) for _ in range(R.randrange(5))]
    names = ["codes", "heads", "a", "", "model"]
    return {R.choice(names): value(depth + 1) for _ in range(R.randrange(4))}


def dicts(values):
    "A dict and all dicts within it."
    inner = [d for v in values.values() if isinstance(v, dict) for d in dicts(v)]
    return [values, *inner]


def change_settings(values, case):
    "Delete, add, shift or replace a few settings, in place."
    for _ in range(R.choice([1, 1, 1, 2, 3])):
        settings = R.choice(dicts(values))
        if not settings:
            continue
        name = R.choice(list(settings))
        number = isinstance(settings[name], (int, float))
        if case == "delete":
            del settings[name]
        elif case == "add":
            settings[R.choice(["x", "", "codes", "heads", "size", name + "s"])] = value()
        elif case == "shift" and number:
            shifted = settings[name] + R.choice([-1, 1, 0.5, 10**9])
            settings[name] = shifted if R.random() < 0.7 else -settings[name]
        else:
            settings[name] = value()


def change_bytes(text, flip):
    "Flip bits, or replace some bytes by others; now and then cut the end off."
    text = bytearray(text)
    for _ in range(R.choice([1, 1, 2, 8])):
        i = R.randrange(len(text))
        if flip:
            text[i] ^= 1 << R.randrange(8)
        else:
            text[i : i + R.randrange(10)] = bytes(R.randrange(256) for _ in range(R.randrange(4)))
    return bytes(text[: R.randrange(len(text))] if R.random() < 0.1 else text)


def mutated_config(good):
    values = json.loads(good)
    text = json.dumps(values)
    cases = ["any", "delete", "add", "shift", "replace", "replace", "replace", "replace"]
    case = R.choice([*cases, "twice", "deep", "flip", "bytes"])
    if case == "any":
        return json.dumps(value()).encode()
    if case == "twice":
        name = R.choice(list(R.choice(dicts(values))))
        twice = f'"{name}": {json.dumps(value())}, "{name}":'
        return text.replace(f'"{name}":', twice, 1).encode()
    if case == "deep":
        n = R.choice([10, 900, 5000, 100000])
        some = json.dumps(R.choice(list(values.values())))
        return text.replace(some, "[" * n + "]" * n, 1).encode()
    if case in ("flip", "bytes"):
        return change_bytes(text.encode(), flip=case == "flip")
    change_settings(values, case)
    return json.dumps(values, indent=R.choice([None, 1])).encode()


def change_header(header):
    "Replace entries of a header, or their fields, and move some to other names, in place."
    for _ in range(R.choice([1, 1, 2])):
        name = R.choice(list(header))
        if not isinstance(header[name], dict) or R.random() < 0.5:
            header[name] = value()
        else:
            field = R.choice(["dtype", "shape", "data_offsets", "x"])
            offsets = [[2**40, 2**40], [2**62, 4], [0, 4], [-1, 3], [10**9] * 9]
            header[name] = header[name] | {field: R.choice([value(), *offsets, "F16", "I64"])}
        if R.random() < 0.2:
            header[R.choice(["x", "quantizer.codebook", "head.weight"])] = header.pop(name)


def mutated_weights(good):
    n = int.from_bytes(good[:8], "little")
    header, data = good[8 : 8 + n], good[8 + n :]
    case = R.randrange(7)
    if case == 0:
        return good[: R.randrange(len(good))]
    if case == 1:
        return good + bytes(R.randrange(1, 100))
    if case == 2:
        sizes = [0, 1, n - 1, n + 1, 2**31, 2**63, 2**64 - 1, R.randrange(len(good))]
        return R.choice(sizes).to_bytes(8, "little") + good[8:]
    if case == 3:
        flipped = change_bytes(header, flip=True)[:n].ljust(n)
        return good[:8] + flipped + data
    if case == 4:  # other weights, nothing else
        data = bytearray(data)
        data[R.randrange(len(data))] ^= 1 << R.randrange(8)
        return good[: 8 + n] + bytes(data)
    entries = json.loads(header)
    change_header(entries)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def hang(*_):
    raise BaseException("it hangs")


def attempt(model_class):
    "Load and use: the outcome, 'loaded' or the name of the error, and the seconds it took."
    start = time.time()
    signal.alarm(20)
    try:
        model = model_class.from_pretrained(FOLDER)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith(str(FOLDER)), str(error)[:2000]
        assert len(str(error)) < 2000, str(error)[:2000]
        return type(error).__name__, time.time() - start
    finally:
        signal.alarm(0)
    assert type(model) is model_class
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    if model_class is Tokenizer:
        assert model.encode(torch.zeros(1, 3, 16, 16)).shape[0] == 1
    else:
        zeros = torch.zeros(1, model.positions, dtype=torch.int64)
        model(zeros, torch.zeros(1, dtype=torch.int64))
    return "loaded", time.time() - start


def peak():
    "The most memory that this process has held, in MB."
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def fuzz(model, counts):
    "Count the outcomes of many mutations of a model's two files; returns the longest seconds."
    model.save_pretrained(FOLDER)
    model_class = type(model)
    slowest = 0
    for name, n, mutated in (
        ("config.json", 1200, mutated_config),
        ("model.safetensors", 400, mutated_weights),
    ):
        good = (FOLDER / name).read_bytes()
        for i in range(n):
            content = mutated(good)
            (FOLDER / name).write_bytes(content)
            try:
                outcome, seconds = attempt(model_class)
            except BaseException as error:
                place = f"{model_class.__name__}, {name}, number {i}"
                sys.exit(f"{place}: {error!r:.1000}: {content[:1000]!r}")
            counts[model_class.__name__, name, outcome] += 1
            slowest = max(slowest, seconds)
        (FOLDER / name).write_bytes(good)
    assert attempt(model_class)[0] == "loaded"
    return slowest


if __name__ == "__main__":
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30  # a gigabyte more than now, or MemoryError
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, hang)
    models = [new_tokenizer({"autoencoder.attention": 1}), new_transformer()]
    for model in models:  # what PyTorch loads at first use
        model.save_pretrained(FOLDER)
        attempt(type(model))
    before = peak()
    counts = collections.Counter()
    slowest = max(fuzz(model, counts) for model in models)
    grown = peak() - before
    for (model, name, outcome), n in sorted(counts.items()):
        print(f"{model:12} {name:18} {outcome:18} {n}")
    print(f"slowest {slowest:.2f} s, memory grew by {grown:.0f} MB")
    assert grown < 100
    for model in ("Tokenizer", "Transformer"):  # the fuzz reaches both sides
        for name in ("config.json", "model.safetensors"):
            for outcome in ("loaded", "ValueError"):
                assert counts[model, name, outcome] >= 10, (model, name, outcome)
