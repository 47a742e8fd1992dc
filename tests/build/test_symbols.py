"""No object file built for one instruction set defines a symbol that another could be linked to.

Such a symbol is a weak copy of an inline function or template: the linker keeps one copy for the whole program, and if
that is the AVX-512 one, an older CPU meets it in code that has nothing to do with AVX-512.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "build" / "kernels" / "CMakeFiles"
OBJECTS = sorted(KERNELS.glob("pylora_isa_*.dir/**/*.o"))


def isa_of(path: Path) -> str:
    return re.search(r"pylora_isa_(\w+)\.dir", str(path)).group(1)


def shared_symbols(path: Path, isa: str) -> list[str]:
    """Symbols outside the namespace that other files could link to: capitals, u, v and w in nm's output."""
    lines = subprocess.run(
        ["nm", "--defined-only", path], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    symbols = [line.split()[-2:] for line in lines]
    inside = f"6pylora{len(isa)}{isa}"
    return [name for kind, name in symbols if (kind.isupper() or kind in "uvw") and inside not in name]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.skipif(not OBJECTS, reason="the kernels were not built in this tree")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{isa_of(path)}-{path.name}")
def test_isa_object_shares_nothing(path):
    assert shared_symbols(path, isa_of(path)) == []


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("c++") is None, reason="needs nm and a C++ compiler")
def test_a_leak_would_be_seen(tmp_path):
    source = tmp_path / "leak.cpp"
    source.write_text(
        "#include <vector>\nnamespace pylora { namespace avx2 { void f(std::vector<int>& v) { v.push_back(1); } } }\n"
    )
    leaky = tmp_path / "leak.o"
    subprocess.run(["c++", "-std=c++17", "-O1", "-c", source, "-o", leaky], check=True)
    leaks = shared_symbols(leaky, "avx2")
    assert any("vector" in name for name in leaks)
    assert not any("6pylora4avx2" in name for name in leaks)
