"""Compare the records of two revisions digit by digit.

    python tests/compare_records.py BEFORE AFTER

BEFORE and AFTER are folders `reports/results` that `seqgan reproduce --preset smoke` wrote, one
with each revision, on one machine. Records are matched by the settings that both know. Their
metrics, curves, protocols and the digests of their networks must be equal to the last bit; only
names may differ, and RENAMED lists those of settings.
"""

import json
import sys
from pathlib import Path

RENAMED = {
    "memory.parts": "memory.gradient_accumulation",
    "memory.checkpoint": "memory.gradient_checkpointing",
    "tokenizer_training.average": "tokenizer_training.ema",
}
COMPARED = ("metrics", "curves", "protocol", "networks")
MISSING = "missing"


def flatten(value: object, prefix: str = "", lists: bool = True) -> dict[str, object]:
    "The leaves of nested dicts, and of lists if `lists`, by dotted names."
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and lists:
        items = enumerate(value)
    else:
        return {prefix: value}
    found = {}
    for key, inner in items:
        found |= flatten(inner, f"{prefix}.{key}" if prefix else str(key), lists)
    return found


def settings_of(record: dict) -> dict[str, object]:
    "The settings of a record, by today's names."
    found = flatten(record["config"], lists=False)
    return {RENAMED.get(name, name): value for name, value in found.items()}


def leaves_of(record: dict) -> dict[str, object]:
    "All numbers and digests of a record that must not change."
    found = {}
    for part in COMPARED:
        found |= flatten(record[part], part)
    return found


def read(folder: str) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(Path(folder).rglob("*.json"))]


def by_settings(records: list[dict], names: set[str]) -> dict[str, dict[str, object]]:
    "The leaves of each record, by the settings called `names`."
    found = {}
    for record in records:
        settings = {k: v for k, v in settings_of(record).items() if k in names}
        found[json.dumps(settings, sort_keys=True)] = leaves_of(record)
    return found


def main(before: str, after: str) -> int:
    old, new = read(before), read(after)
    names = set.intersection(*(set(settings_of(record)) for record in old + new))
    old, new = by_settings(old, names), by_settings(new, names)
    common = old.keys() & new.keys()
    different = len(old.keys() ^ new.keys())
    count = 0
    for key in sorted(common):
        for leaf in sorted(old[key].keys() | new[key].keys()):
            count += 1
            a, b = old[key].get(leaf, MISSING), new[key].get(leaf, MISSING)
            if a != b:
                different += 1
                print(f"{leaf}: {a} before, {b} after")
    print(f"{len(old)} records before, {len(new)} after, {len(common)} with the same settings")
    print(f"{count} values compared, {different} different or alone")
    return different


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:3])))
