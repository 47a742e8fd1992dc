"""What each CUDA kernel takes of a GPU, read from the compiled objects: the gate behind `make cuda`.

Prints, for every kernel and architecture, registers, shared memory, the blocks that fit on a multiprocessor and the
instructions that matter, and holds them against benchmarks/results/cuda_resources.json. Exit status 1: a kernel keeps
anything in local memory (a spill), cannot be launched at all, or is not what the file says.

None of this is a time: no kernel runs here.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "cuda_resources.json"


@dataclass(frozen=True)
class Limits:
    """A multiprocessor's limits: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared: int  # bytes for all resident blocks
    shared_block: int  # bytes for one of them


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024, 99 * 1024),
}
REGISTERS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 65536, 256, 128, 1024

INSTRUCTIONS = {
    "HMMA": r"HMMA\.",
    "LDSM": r"LDSM\.",
    "LDGSTS": r"LDGSTS\.",
    "LDG.E.128": r"LDG\.E\S*\.128",
    "LDG": r"LDG\.",
    "STG.E.128": r"STG\.E\S*\.128",
    "STG": r"STG\.",
    "FFMA": r"FFMA",
    "SHFL": r"SHFL\.",
    "BAR": r"BAR\.SYNC",
    "ATOM": r"(?:ATOMG?|RED)\.",
    "local": r"(?:LDL|STL)\b",
}


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture. `blocks`: that fit on a multiprocessor at once."""

    threads: int
    registers: int
    static_shared: int
    dynamic_shared: int
    local: int
    blocks: int
    instructions: dict[str, int]


def resident_blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of a kernel that fit on a multiprocessor by registers, shared memory, warps and the limit of blocks.

    Args:
        arch: e.g. "sm_80".
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.

    Returns:
        0: the kernel cannot be launched.
    """
    limits = LIMITS[arch]
    if shared > limits.shared_block:
        return 0
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    block_shared = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // max(warp_registers, 1) // warps
    return min(limits.blocks, limits.warps // warps, by_registers, limits.shared // block_shared)


def readable(symbol: str) -> str:
    """A demangled kernel without the namespaces, the arguments and nvcc's per-file hash."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+?::|\bpylora::", "", symbol)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and not name.startswith("(", i - 1):
            name = name[:i]
            break
    name = re.sub(r"\((?:int|bool|unsigned int|[\w:]+)\)(\d+)", r"\1", name)
    return re.sub(r"(?:\w+::)+(?=\w+[<,>]|\w+$)", "", name)


def parse_usage(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, mangled kernel): REG, STACK, SHARED, LOCAL} of `cuobjdump -res-usage`."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            name = match[1]
        elif name and "REG:" in line:
            usage[arch, name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            name = ""
    return usage


def parse_sass(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, mangled kernel): instruction counts, "all" among them} of `cuobjdump -sass`."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    arch, current = "", None
    for line in text.splitlines():
        if match := re.match(r"\s*code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = counts.setdefault((arch, match[1]), Counter())
        elif current is not None and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S.*?);", line)):
            current["all"] += 1
            for name, pattern in INSTRUCTIONS.items():
                current[name] += bool(re.match(pattern, match[1]))
    return {key: {name: n for name, n in count.items() if n} for key, count in counts.items()}


def parse_launches(symbols: str) -> dict[str, tuple[int, int]]:
    """{kernel, readable: (threads, dynamic shared bytes)} of `nm -C`: template arguments of cuda::launch_blocks."""
    launches = {}
    for line in symbols.splitlines():
        match = re.search(r"cuda::launch_blocks<&(.*), (\d+), (\d+), ", line)
        if match:
            launches[readable(re.sub(r"^\((.*)\)$", r"\1", match[1]))] = (int(match[2]), int(match[3]))
    return launches


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the CUDA toolkit, or of the package in requirements-dev.txt."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = shutil.which(name) or (str(packaged) if packaged.is_file() else None)
    if found is None:
        raise SystemExit(f"cuda_resources: {name} was not found; `make install` brings it")
    return found


def output(*command: str) -> str:
    path = f"{Path(find_tool('nvdisasm')).parent}:/usr/bin:/bin"
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout


def demangled(names: Iterable[str]) -> dict[str, str]:
    unique = sorted(set(names))
    lines = subprocess.run(["c++filt"], input="\n".join(unique), capture_output=True, text=True, check=True).stdout
    return dict(zip(unique, lines.splitlines(), strict=True))


def measure(obj: Path) -> dict[str, dict[str, Resources]]:
    """{kernel: {architecture: what it takes}} of an object file."""
    cuobjdump = find_tool("cuobjdump")
    usage, sass = (
        parse_usage(output(cuobjdump, "-res-usage", str(obj))),
        parse_sass(output(cuobjdump, "-sass", str(obj))),
    )
    launches = parse_launches(output("nm", "-C", str(obj)))
    names = demangled(name for _, name in usage)
    result: dict[str, dict[str, Resources]] = {}
    for (arch, mangled), used in sorted(usage.items()):
        name = readable(names[mangled])
        if name not in launches:
            raise SystemExit(f"cuda_resources: {obj.name}: {name} is not launched by cuda::launch_blocks")
        threads, dynamic = launches[name]
        counts = sass[arch, mangled]
        # From sm_90 on, the kilobyte that a block's launch takes for itself counts as the kernel's.
        reserved = SHARED_RESERVED if used["SHARED"] >= SHARED_RESERVED and int(arch[3:]) >= 90 else 0
        static = used["SHARED"] - reserved
        result.setdefault(name, {})[arch] = Resources(
            threads=threads,
            registers=used["REG"],
            static_shared=static,
            dynamic_shared=dynamic,
            local=used["STACK"] + used["LOCAL"] + counts.pop("local", 0),
            blocks=resident_blocks(arch, threads, used["REG"], static + dynamic),
            instructions=counts,
        )
    return result


Report = dict[str, dict[str, Resources]]


def faults(report: Report) -> list[str]:
    """Why a kernel must not ship: it spills, or it cannot be launched."""
    found = []
    for name, archs in report.items():
        for arch, r in archs.items():
            if r.local:
                found.append(f"{name} on {arch}: {r.local} bytes or instructions of local memory")
            if r.blocks == 0:
                found.append(f"{name} on {arch}: {r.registers} registers and {r.dynamic_shared} bytes fit nowhere")
    return found


def differences(report: Report, recorded: dict[str, dict[str, dict[str, object]]]) -> list[str]:
    """Where the report is not what was recorded, of the architectures that were both built and recorded."""
    found = []
    archs = {arch for by_arch in report.values() for arch in by_arch}
    archs &= {arch for by_arch in recorded.values() for arch in by_arch}
    for name in sorted(report.keys() | recorded.keys()):
        for arch in sorted(archs):
            now = asdict(report[name][arch]) if arch in report.get(name, {}) else None
            then = recorded.get(name, {}).get(arch)
            if now is None and then is None:
                continue
            if now is None or then is None:
                found.append(f"{name} on {arch}: {'not recorded' if then is None else 'recorded, and gone'}")
                continue
            changed = [key for key in now if now[key] != then.get(key)]
            found += [f"{name} on {arch}: {key} {then.get(key)} recorded, {now[key]} now" for key in changed]
    return found


def print_report(report: Report, console: Console) -> None:
    shown = [name for name in INSTRUCTIONS if name not in ("local", "LDG", "STG")]
    table = Table(title="CUDA kernels: compiled, never timed here")
    table.add_column("kernel", no_wrap=True)
    table.add_column("arch")
    for heading in ("threads", "regs", "static", "dynamic", "blocks/SM", *shown, "all"):
        table.add_column(heading, justify="right")
    for name, archs in sorted(report.items()):
        for arch, r in archs.items():
            counts = [str(r.instructions.get(key, 0) or "") for key in (*shown, "all")]
            facts = (r.threads, r.registers, r.static_shared, r.dynamic_shared, r.blocks)
            table.add_row(name, arch, *(str(fact) for fact in facts), *counts)
    console.print(table)


def record(report: Report, path: Path, nvcc: str) -> None:
    """Write the report, a kernel and architecture a line; architectures that were not built keep their lines."""
    before = json.loads(path.read_text())["kernels"] if path.is_file() else {}
    lines = []
    for name in sorted(report):
        archs = {**before.get(name, {}), **{arch: asdict(r) for arch, r in report[name].items()}}
        rows = ",\n".join(f"      {json.dumps(arch)}: {json.dumps(archs[arch])}" for arch in sorted(archs))
        lines.append(f"    {json.dumps(name)}: {{\n{rows}\n    }}")
    path.write_text(f'{{\n  "nvcc": {json.dumps(nvcc)},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n")


def nvcc_version(objects: Path) -> str:
    """Of the compiler that CMake made the objects with: the folder above them has its CMakeCache.txt."""
    cache = (objects / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    if compiler is None:
        raise SystemExit(f"cuda_resources: {objects}/CMakeCache.txt names no CUDA compiler")
    output = subprocess.run([compiler[1], "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", output)
    return match[1] if match else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", type=Path, help="CMake's build folder with the compiled .cu.o files")
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    report: Report = {}
    for obj in sorted(options.objects.rglob("*.cu.o")):
        operator = obj.parent.name
        report.update({f"{operator}: {name}": archs for name, archs in measure(obj).items()})
    if not report:
        raise SystemExit(f"cuda_resources: no kernels under {options.objects}")
    print_report(report, Console(width=max(Console().width, 200)))
    found = faults(report)
    version = nvcc_version(options.objects)
    if options.update and not found:
        record(report, RECORD, version)
    elif not options.update:
        recorded = json.loads(RECORD.read_text())
        if recorded["nvcc"] == version:
            found += differences(report, recorded["kernels"])
        else:
            print(f"cuda_resources: nvcc {version}, recorded with {recorded['nvcc']}: counts are not compared")
    for fault in found:
        print(f"cuda_resources: {fault}")
    if found and not options.update:
        print("cuda_resources: `make cuda UPDATE=1` records what is there now")
    print(f"cuda_resources: {len(report)} kernels, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
