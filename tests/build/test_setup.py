"""setup.py and the source distribution: what a build needs is checked first, and the error names the fix."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pylora._source_hash import source_hash
from pylora._version import __version__

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs pylora's source tree")


@pytest.fixture
def tree(tmp_path):
    """A copy of what the build reads, so that a build that starts by mistake disturbs nothing."""
    copy = tmp_path / "tree"
    for folder in ("csrc", "cmake", "pylora"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def without_torch(folder: Path) -> dict[str, str]:
    """An environment whose Python finds a torch that cannot be imported."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(
        'raise ImportError("libtorch_cpu.so: cannot open shared object file")\n'
    )
    return {"PYTHONPATH": str(folder)}


def build(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *(arguments or ("build_ext", "--build-lib", "out"))]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def expect_failure(result: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert result.returncode != 0
    message = result.stderr[result.stderr.index("pylora: cannot build:") :]
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in message, message


def test_missing_torch(tree, tmp_path):
    result = build(tree, **without_torch(tmp_path))
    expect_failure(result, "torch cannot be imported", "pip install torch", "pip install --no-build-isolation .")


def test_old_torch(tree):
    source = (tree / "setup.py").read_text()
    (tree / "setup.py").write_text(source.replace("OLDEST_TORCH = (2, 11)", "OLDEST_TORCH = (1000, 0)"))
    expect_failure(build(tree), "is too old", "torch>=1000.0")


def test_missing_compiler(tree):
    expect_failure(build(tree, CXX="no-such-compiler"), "no-such-compiler", "apt-get install g++", "CXX")


def test_a_second_build_waits_for_the_first(tree):
    fcntl = pytest.importorskip("fcntl")
    (tree / "build").mkdir()
    with (tree / "build" / ".lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--build-lib", "out"],
            cwd=tree,
            env={**os.environ, "PYLORA_CUDA": "yes"},  # ends the build as soon as it has the lock
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        waiting = next(line for line in second.stderr if line.startswith("pylora:"))
        assert "another build of this tree is running" in waiting
        assert second.poll() is None
    _, message = second.communicate(timeout=60)
    assert "PYLORA_CUDA: expected 1, 0 or nothing, got 'yes'" in message
    assert second.returncode != 0


def test_missing_nvcc(tree, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "ninja", "cmake"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    # The machine's own toolkit in its usual folder must not be found either.
    source = (tree / "setup.py").read_text()
    (tree / "setup.py").write_text(source.replace("/usr/local/cuda/bin/nvcc", "/nonexistent/nvcc"))
    result = build(tree, PYLORA_CUDA="1", PATH=str(tools), CUDA_HOME="", CUDA_PATH="", CUDACXX="")
    expect_failure(result, "PYLORA_CUDA=1", "nvcc was not found", "CUDA_HOME")


@pytest.mark.parametrize(
    ("variables", "fragments"),
    [
        ({"PYLORA_CUDA": "yes"}, ("PYLORA_CUDA", "'yes'")),
        ({"PYLORA_CUDA": "1", "PYLORA_CUDA_ARCHS": "80;hopper"}, ("PYLORA_CUDA_ARCHS", "'hopper'")),
    ],
)
def test_wrong_setting(tree, variables, fragments):
    if "PYLORA_CUDA_ARCHS" in variables:
        (tree / "csrc/lora/kernel.cu").write_text("// present, so that the architectures matter\n")
        (tree / "nvcc").write_text("#!/bin/sh\n")
        (tree / "nvcc").chmod(0o755)
        variables = {**variables, "CUDACXX": str(tree / "nvcc")}
    expect_failure(build(tree, **variables), *fragments)


def test_compiler_error_is_shown_and_leaves_no_extension(tree):
    (tree / "csrc/cpu/broken.cpp").write_text('#error "a mistake"\n')
    for name in (tree / "csrc").glob("*/*.isa.cpp"):
        name.unlink()  # so that the mistake is met within a second or two
    result = build(tree, "build_ext", "--inplace")
    assert "a mistake" in result.stdout + result.stderr
    expect_failure(result, "kernels did not compile")
    assert not list((tree / "pylora").glob("_C.*.so"))


def test_sdist_is_complete_and_needs_no_torch(tree, tmp_path):
    result = build(tree, "--quiet", "sdist", "--dist-dir", str(tmp_path), **without_torch(tmp_path))
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / f"pylora-{__version__}.tar.gz") as archive:
        # Debian 12's Python 3.11.2 has no filters yet.
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / "unpacked" / f"pylora-{__version__}"
    assert source_hash(unpacked) == source_hash(tree) == source_hash(ROOT)
    for name in ("LICENSE", "README.md", "pyproject.toml", "pylora/py.typed", "pylora/_C.pyi"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_license_and_metadata():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    text = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text())
    assert '"torch>={}.{}"'.format(*oldest.groups()) in text
    requires = re.search(r"requires = \[(.*?)\]", text).group(1)
    assert "torch" not in requires
    assert 'attr = "pylora._version.__version__"' in text
