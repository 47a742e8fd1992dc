"""Records of figures: one JSON object a case, one line each, appended to `<benchmark>.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pylora.bench.runner import SCHEMA

Record = dict[str, Any]


def line(record: Record) -> str:
    return json.dumps(record, sort_keys=True)


def append(records: Sequence[Record], folder: Path) -> list[Path]:
    """Add the records to the files of their benchmarks in `folder`, which is made. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[Path, list[str]] = {}
    for record in records:
        files.setdefault(folder / f"{record['benchmark']}.jsonl", []).append(line(record) + "\n")
    for path, lines in files.items():
        with path.open("a") as file:
            file.writelines(lines)
    return list(files)


def read(files: Iterable[Path]) -> list[Record]:
    """The records of some files, of each case the last; lines of an older schema are left out.

    Raises:
        ValueError: a line is no record.
    """
    latest: dict[str, Record] = {}
    for path in files:
        for number, text in enumerate(path.read_text().splitlines(), start=1):
            try:
                record = json.loads(text)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                raise ValueError(
                    f"pylora bench: --from: expected a JSON object in line {number} of {path}, got {text[:40]!r}"
                )
            if record.get("schema") == SCHEMA:
                key = json.dumps(
                    [record["benchmark"], record["parameters"], record["threads"], record["cpu"], record["isa"]]
                )
                latest.pop(key, None)  # so that the order is that of the last run
                latest[key] = record
    return list(latest.values())


def ratio(record: Record, provider: str, to: str = "base", figure: str = "min") -> float | None:
    """A provider's figure divided by another's; None where there is no such pair or the divisor is 0."""
    figures = record["figures"]
    if provider not in figures or to not in figures or not figures[to][figure]:
        return None
    return float(figures[provider][figure] / figures[to][figure])
