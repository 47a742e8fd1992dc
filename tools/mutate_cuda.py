"""Breaks the CUDA kernels on purpose, one place at a time, and counts how often the emulated tests notice.

A mutant deletes a barrier or a wait, waits for one group of copies too few, drops a guard at a tail, or shifts an
index. Its kernel's tests (below) run against it until one fails. Exit status 1: fewer than --goal of the mutants were
noticed.

    python tools/mutate_cuda.py                 all of them: hours on two cores
    python tools/mutate_cuda.py --minutes 4     as many as fit; the next call goes on where this one stopped
    python tools/mutate_cuda.py --only decode   one kernel's
    python tools/mutate_cuda.py --list          what there is to break

What a mutant came to is kept in build/mutants/results.json, for as long as the kernel's sources stay as they are and,
if it went unnoticed, its tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "mutants" / "tree"
BUILD = ROOT / "build" / "mutants" / "build"
RESULTS = ROOT / "build" / "mutants" / "results.json"

KERNELS = {
    "plan": (["csrc/cuda/plan.cu"], ["tests/cuda/test_plan.py"]),
    "splits": (["csrc/cuda/segments.cuh"], ["tests/cuda/test_outer.py"]),
    "shrink": (["csrc/cuda/shrink.cu", "csrc/cuda/shrink_tiles.cuh"], ["tests/cuda/test_sgmv.py"]),
    "expand": (["csrc/cuda/expand.cu", "csrc/cuda/expand_tiles.cuh"], ["tests/cuda/test_sgmv.py"]),
    "decode": (
        ["csrc/cuda/decode.cu", "csrc/cuda/decode_tiles.cuh"],
        ["tests/cuda/test_bgmv.py", "tests/cuda/test_multi_lora.py"],
    ),
    "outer": (["csrc/cuda/outer.cu", "csrc/cuda/outer_tiles.cuh"], ["tests/cuda/test_outer.py"]),
    "dropout": (["csrc/lora/dropout.cu"], ["tests/cuda/test_dropout.py"]),
    "merge": (
        [
            f"csrc/merge/{name}"
            for name in ("change.cu", "block.cuh", "sums.cuh", "codec.cuh", "rounding.cuh", "pack.cu")
        ],
        ["tests/cuda/test_merge.py"],
    ),
    "lookup": (["csrc/multi_lora/lookup.cuh"], ["tests/cuda/test_embedding.py"]),
    "norms": (["csrc/dora/norms.cu", "csrc/dora/norms_tiles.cuh"], ["tests/cuda/test_dora.py"]),
    "scale": (["csrc/dora/scale.cu"], ["tests/cuda/test_dora.py"]),
}
"""Sources of each kernel, and its tests."""

RULES = [
    ("barrier deleted", r"__syncthreads\(\);", ";"),
    ("wait deleted", r"(?:cuda::)?cp_async_wait<[^>]*>\(\);", ";"),
    ("wait of one group too few", r"cp_async_wait<(kStages - 2)>\(\);", r"cp_async_wait<\1 + 1>();"),
    ("arrival unordered", r"while \(load_acquire\(.*\) < \w+\)", "while (false)"),
    ("tail guard dropped", r"(?<=\? )left - column(?= : 0)", "8"),
    ("tail guard dropped", r"\binside \? (.+?) : \w+[\({].*?[\)}](?=;)", r"\1"),
    ("tail guard dropped", r"!inside \? 0 : ", ""),
    ("tail guard dropped", r"if \((?:r|rank|line|token|n|k|own|column|r \+ rank)\b[^;{]*[<>]=? [^;{]*\) return;", ";"),
    ("tail guard dropped", r"const int valid = r < num_rows \? (.+?) : 0;", r"const int valid = \1;"),
    ("tail guard dropped", r"row_\[h\] < 0 \? 0 : num_columns - t \* 8", "num_columns - t * 8"),
    ("tail guard dropped", r"\be < valid\b", "true"),
    ("tail guard dropped", r"if \([^;{]*(?:[<>] |[<>]= )[^;{]*\) continue;", ";"),
    ("tail guard dropped", r"if \((?:k|k \+ 1) < (?:left|of\.num_ranks|rank)\)", ""),
    ("tail guard dropped", r" && t < args\.num_tokens(?=;)", ""),
    ("tail guard dropped", r"\br < other\.rows &&", "true &&"),
    ("tail guard dropped", r"if \(column >= 0 && column < work\.num_columns\)", ""),
    ("ranks padded up", r"\bgroup_\.rank - first\b", "kDepth"),
    ("index shifted", r"lane % 16\)", "(lane + 1) % 16)"),
    (
        "index shifted",
        r"high = lane / 16 \* 8, low = lane / 8 % 2 \* 8",
        "low = lane / 16 * 8, high = lane / 8 % 2 * 8",
    ),
    ("index shifted", r"i / 2 \* 8\b", "(1 - i / 2) * 8"),
    ("index shifted", r"\brow_at\((.*?), (r|g|token)\)", r"row_at(\1, 0)"),
    ("sum order or part lost", r"(int|int64_t) (s|split|j|b) = 0; \2 <", r"\1 \2 = 1; \2 <"),
    ("counter left", r"(?:cuda::)?\bstore_global\((?:work\.)?counters? ?(?:\+ \w+)?, 0\);", ";"),
    ("index shifted", r"- 1 < own\b", "- 1 <= own"),
    ("other random bits", r"\bv % 2 \* 16\b", "(1 - v % 2) * 16"),
    ("other random bits", r"\bstatic_cast<uint32_t>\(row\)", "0u"),
    ("index shifted", r"\+ counter % kLanes;", "+ (counter + 1) % kLanes;"),
    ("part of the work lost", r"\b(item|i) \+= cuda::item_step\(\)", r"\1 += 2 * cuda::item_step()"),
    ("tail guard dropped", r"\bwork_\.aligned && valid >= kOnce\b", "work_.aligned"),
    ("tail guard dropped", r"\bk < valid \? 16 : 0\b", "16"),
    ("tail guard dropped", r"if \(k < valid\) (?=add_rank)", ""),
    ("tail guard dropped", r"if \(byte < shape_\.bitmap_bytes\(\)\) ", ""),
    ("tail guard dropped", r"\bp < shape\.count \? ", "true ? "),
    ("tail guard dropped", r"if \(position >= shape_\.count\) return full;", ";"),
    ("tail guard dropped", r"if \(from \+ i < end\) ", ""),
    ("tail guard dropped", r"mask && entry < entries", "mask"),
    (
        "index shifted",
        r"low = lane / 8 % 2 \* 8, high = lane / 16 \* 8",
        "high = lane / 8 % 2 * 8, low = lane / 16 * 8",
    ),
    ("index shifted", r"\bprevious : |lane_id\(\) >= step\b", lambda match: "0 : " if ":" in match[0] else "true"),
    ("index shifted", r"\(1 << 20\) / columns \+ 1", "(1 << 20) / columns"),
    ("index shifted", r"\bpiece / across % down\b", "piece % down"),
    ("index shifted", r"\b(first|row|last|entry|full_entry)_? \* (kSize|line|share)\b", r"\1 * (\2 + 1)"),
    ("rounding", r"0x7fff \+ \(bits >> 16 & 1\)", "0x8000"),
    ("rounding", r"\bone_nan\((add_rn|multiply_add_rn)", r"(\1"),
    ("rounding", r"\brest == rest \? rest : 0\.0f", "rest"),
    ("rounding", r"\bmultiply_rn\(value, static_cast<C>\(args\.scaling\)\)", "value * (C)2"),
    ("log", r"<= 126\b", "<= 127"),
    ("log", r">= -126\b", ">= -127"),
    ("log", r"\(gap - 1\) / 255", "gap / 255"),
    ("log", r"\bposition \* 0x9e3779b9u", "0u"),
    ("log", r"\bones == 0\b", "ones == -1"),
    ("log", r"fulls \* kSize", "fulls"),
    ("log", r"\+ units\) \* kPayloadUnit <=", ") * kPayloadUnit <="),
    ("log", r"\bwork\.mode = Mode::put_back;", ";"),
    ("log", r"if \(work_\.check && !is_unchanged\(\)\) return false;", ";"),
    ("part of the work lost", r"if \((has_low_left|has_low_right)\) (?=multiply|\{)", "if (false) "),
]
"""(what is broken, what is looked for in a line, what stands there instead)."""


@dataclass(frozen=True)
class Mutant:
    kernel: str
    path: str
    line: int  # from 1
    rule: str
    text: str  # the line instead

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text.strip()}"


class Results:
    """What mutants came to, kept in a file from call to call."""

    def __init__(self, path: Path, digest: Callable[[Sequence[str]], str]) -> None:
        self._path, self._digest = path, digest
        self._kept: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def _state(self, mutant: Mutant) -> dict[str, str]:
        sources, tests = KERNELS[mutant.kernel]
        return {"sources": self._digest(sources), "tests": self._digest(tests)}

    def limit(self, mutant: Mutant, measure: Callable[[], float]) -> float:
        """Seconds that the kernel's tests may take, measured once for its sources and tests as they are."""
        key, state = f"limit: {mutant.kernel}", self._state(mutant)
        kept = self._kept.get(key)
        if kept is None or {name: kept[name] for name in state} != state:
            kept = {"seconds": measure(), **state}
            self._keep(key, kept)
        return float(kept["seconds"])

    def has(self, mutant: Mutant) -> bool:
        kept, state = self._kept.get(mutant.key), self._state(mutant)
        if kept is None or kept["sources"] != state["sources"]:
            return False
        return kept["noticed"] is not False or kept["tests"] == state["tests"]

    def __getitem__(self, mutant: Mutant) -> bool | None:
        noticed: bool | None = self._kept[mutant.key]["noticed"]
        return noticed

    def __setitem__(self, mutant: Mutant, noticed: bool | None) -> None:
        self._keep(mutant.key, {"noticed": noticed, **self._state(mutant)})

    def _keep(self, key: str, value: dict[str, Any]) -> None:
        self._kept[key] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._kept, indent=1, sort_keys=True))


def digest_of(paths: Sequence[str]) -> str:
    return hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in paths)).hexdigest()[:16]


def mutants_of(kernel: str) -> Iterator[Mutant]:
    """Every place of a kernel's sources that a rule applies to."""
    for path in KERNELS[kernel][0]:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            if line.lstrip().startswith("//"):
                continue
            for rule, pattern, replacement in RULES:
                broken = re.sub(pattern, replacement, line, count=1)
                if broken != line:
                    yield Mutant(kernel, path, number, rule, broken)


def run(*command: str, environment: dict[str, str] | None = None, seconds: float = 1200) -> bool:
    """Whether the command succeeded in time."""
    try:
        result = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0


def build() -> bool:
    return run("cmake", "--build", str(BUILD), "--target", "_emulated")


def notices(kernel: str, seconds: float) -> bool:
    environment = {"PYLORA_EMULATED": str(BUILD), "OMP_NUM_THREADS": "1"}
    tests = KERNELS[kernel][1]
    return not run(sys.executable, "-m", "pytest", "-q", "-x", *tests, environment=environment, seconds=seconds)


def bring_up_to_date(source: Path, copy: Path) -> None:
    """Copy what differs, as of now: the build goes by files' times, and an older one would leave a mutant's object."""
    if copy.is_file() and copy.read_bytes() == source.read_bytes():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, copy)


def prepare() -> None:
    """A copy of the sources, built as they are: the tests have to pass there."""
    folders = [ROOT / "csrc", ROOT / "cmake"]
    for source in [ROOT / "CMakeLists.txt", *(path for folder in folders for path in folder.rglob("*"))]:
        if source.is_file():
            bring_up_to_date(source, TREE / source.relative_to(ROOT))
    options = ["-DPYLORA_EMULATE=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if not run("cmake", "-S", str(TREE), "-B", str(BUILD), "-G", "Ninja", *options) or not build():
        raise SystemExit("mutate_cuda: the sources as they are do not build")


def try_out(mutant: Mutant, seconds: float) -> bool | None:
    """Whether the tests notice; None if the mutant is no program."""
    path = TREE / mutant.path
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.text + "\n"
    path.write_text("".join(lines))
    try:
        return notices(mutant.kernel, seconds) if build() else None
    finally:
        path.write_text(whole)


def report(results: list[tuple[Mutant, bool | None]], console: Console) -> float:
    """Print shares and what went unnoticed; return the share of all."""
    table = Table("kernel", "mutants", "noticed", "share")
    for kernel in KERNELS:
        mine = [noticed for mutant, noticed in results if mutant.kernel == kernel and noticed is not None]
        if mine:
            table.add_row(kernel, str(len(mine)), str(sum(mine)), f"{sum(mine) / len(mine):.0%}")
    console.print(table)
    for mutant, noticed in results:
        if noticed is False:
            console.print(f"unnoticed: {mutant.path}:{mutant.line}: {mutant.rule}: {mutant.text.strip()}", markup=False)
    counted = [noticed for _, noticed in results if noticed is not None]
    return sum(counted) / len(counted) if counted else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KERNELS, action="append", help="a kernel; may be given several times")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--every", type=int, default=1, help="try each n-th mutant alone")
    parser.add_argument("--goal", type=float, default=0.9, help="share that has to be noticed")
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further mutant is tried")
    parser.add_argument(
        "--patience", type=float, default=4.0, help="times the tests' own time, then they count as failed"
    )
    options = parser.parse_args(arguments)
    mutants = [mutant for kernel in options.only or KERNELS for mutant in mutants_of(kernel)][:: options.every]
    console = Console(width=160)
    if options.list:
        for mutant in mutants:
            console.print(f"{mutant.path}:{mutant.line}: {mutant.rule}: {mutant.text.strip()}", markup=False)
        return 0
    results = Results(RESULTS, digest_of)
    waiting = [mutant for mutant in mutants if not results.has(mutant)]
    try_all(waiting, results, options, console)
    done = [(mutant, results[mutant]) for mutant in mutants if results.has(mutant)]
    share = report(done, console)
    if len(done) < len(mutants):
        console.print(f"{len(mutants) - len(done)} of {len(mutants)} not tried yet")
        return 2
    return 0 if share >= options.goal else 1


def seconds_of_sound(kernel: str) -> float:
    """How long the kernel's tests take on the sources as they are; the last mutant's object may still be there."""
    if not build():
        raise SystemExit("mutate_cuda: the sources as they are do not build")
    start = time.monotonic()
    if notices(kernel, 1200):
        raise SystemExit(f"mutate_cuda: {' '.join(KERNELS[kernel][1])} fails on the sources as they are")
    return time.monotonic() - start


def try_all(mutants: list[Mutant], results: Results, options: argparse.Namespace, console: Console) -> None:
    """Until --minutes have passed."""
    start = time.monotonic()
    if mutants:
        prepare()
    for mutant in mutants:
        if time.monotonic() - start > 60 * options.minutes:
            return
        limit = results.limit(mutant, lambda kernel=mutant.kernel: options.patience * seconds_of_sound(kernel))
        results[mutant] = try_out(mutant, limit)
        word = {True: "noticed", False: "UNNOTICED", None: "does not compile"}[results[mutant]]
        console.print(f"{word}: {mutant.path}:{mutant.line}: {mutant.rule}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
