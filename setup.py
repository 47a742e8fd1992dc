"""Builds pylora's native part: CMake makes the torch-free kernel library, torch's BuildExtension makes `pylora._C`.

Environment:
    PYLORA_CUDA        1: compile the CUDA kernels whatever torch is installed; 0: leave them out;
                       unset: compile them where torch has CUDA and nvcc is found.
    PYLORA_CUDA_ARCHS  architectures, "80;90" unless set. PTX of the last one is added for newer GPUs.
    CUDA_HOME, CXX     where the CUDA toolkit is; the C++ compiler.
    MAX_JOBS           parallel compilations, one a core unless set.

The project's metadata is in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION: str = runpy.run_path(str(ROOT / "pylora" / "_version.py"))["__version__"]
SOURCE_HASH: str = runpy.run_path(str(ROOT / "pylora" / "_source_hash.py"))["source_hash"](ROOT)
INSTALL_COMMAND = "pip install --no-build-isolation ."
OLDEST_TORCH = (2, 11)  # that has been tried; also in pyproject.toml


def fail(message: str) -> NoReturn:
    """Stop with `message` as the last thing printed, without a traceback that would bury it."""
    raise SystemExit(f"\npylora: cannot build: {message}\n")


def note(message: str) -> None:
    print(f"pylora: {message}", file=sys.stderr, flush=True)


if int(setuptools.__version__.split(".")[0]) < 77:
    # Older ones cannot read pyproject.toml's license field and say so in ninety lines.
    fail(f"setuptools {setuptools.__version__} is too old. Run `pip install -U 'setuptools>=77'`.")

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    TORCH_ERROR = None
except Exception as error:  # a torch whose libraries do not load raises OSError, a broken one anything
    BuildExtension, TORCH_ERROR = build_ext, error


class CudaPlan(NamedTuple):
    """What the CUDA part is built with."""

    nvcc: str
    archs: list[str]


def find_nvcc() -> str | None:
    """The nvcc to use: CUDACXX, then the CUDA_HOME or CUDA_PATH toolkit, then PATH, then the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def cuda_archs() -> list[str]:
    archs = [arch for arch in re.split(r"[;,\s]+", os.environ.get("PYLORA_CUDA_ARCHS", "80;90")) if arch]
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not archs:
        fail(f'PYLORA_CUDA_ARCHS: expected architectures such as "80;90" or "90a", got {", ".join(wrong) or "none"!r}')
    return archs


def plan_cuda() -> CudaPlan | None:
    """Decide from PYLORA_CUDA, torch and the toolkit whether the CUDA kernels are built."""
    wanted = os.environ.get("PYLORA_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        fail(f"PYLORA_CUDA: expected 1, 0 or nothing, got {wanted!r}")
    if wanted == "0" or (not wanted and torch.version.cuda is None):
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        where = "nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
        if wanted:
            fail(f"PYLORA_CUDA=1 but {where}. Install a CUDA toolkit or set CUDA_HOME, or unset PYLORA_CUDA.")
        note(f"torch has CUDA {torch.version.cuda} but {where}; building for the CPU only.")
        return None
    if not any(ROOT.glob("csrc/*/*.cu")):
        if wanted:
            note("PYLORA_CUDA=1: this version has no CUDA kernels, so there are none to build.")
        return None
    return CudaPlan(nvcc, cuda_archs())


def find_tool(name: str) -> str:
    """Path of `cmake` or `ninja`: the one beside this Python first, since pip may run with PATH not set to it."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        fail(f"{name} was not found. Run `pip install cmake ninja`, then `{INSTALL_COMMAND}`.")
    return found


def check_machine() -> str:
    """Check everything the build needs before it starts. Returns the C++ compiler's command."""
    if TORCH_ERROR is not None:
        fail(
            f"torch cannot be imported ({type(TORCH_ERROR).__name__}: {TORCH_ERROR}).\n"
            "pylora is compiled against the torch it will run with, so torch has to be there first and pip must not "
            f"build in an isolated environment:\n    pip install torch==2.13.0\n    {INSTALL_COMMAND}"
        )
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        fail(f"torch {torch.__version__} is too old. Run `pip install 'torch>={oldest}'`, then `{INSTALL_COMMAND}`.")
    if not sys.platform.startswith("linux"):
        fail(f"pylora builds on Linux; this is {sys.platform!r}.")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        fail(
            f"the C++ compiler `{compiler}` was not found. Install one (Debian, Ubuntu: apt-get install g++; "
            "Fedora: dnf install gcc-c++) or set CXX to it."
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        fail("Python.h was not found. Install Python's headers (Debian, Ubuntu: apt-get install python3-dev).")
    return compiler


def run(command: list[str], failure: str, **environment: str) -> None:
    print(shlex.join(command), flush=True)
    if subprocess.run(command, env={**os.environ, **environment}, check=False).returncode:
        fail(failure)


@contextlib.contextmanager
def build_lock() -> Iterator[None]:
    """Hold build/.lock, waiting for whoever has it: two builds of one tree would write the same files.

    The system takes the lock back when the process ends, however it ends.
    """
    import fcntl  # not everywhere; check_machine has refused those systems by now

    path = ROOT / "build" / ".lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another build of this tree is running (it holds {path}); waiting for it to end.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def jobs() -> str:
    return os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))


def build_kernels(folder: Path, compiler: str, cuda: CudaPlan | None) -> list[str]:
    """Build libpylora_kernels.a in `folder` with CMake. Returns what the extension has to link."""
    cache = folder / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(folder)  # CMake refuses a build folder that was moved or copied along with its tree
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    environment = {"CXX": compiler}
    if cuda is None:
        configure.append("-DPYLORA_CUDA=OFF")
    else:
        configure += ["-DPYLORA_CUDA=ON", f"-DPYLORA_CUDA_ARCHS={';'.join(cuda.archs)}"]
        environment["CUDACXX"] = cuda.nvcc
    without_cuda = " To build without CUDA, set PYLORA_CUDA=0." if cuda else ""
    run(configure, f"CMake could not configure the kernel library; its message is above.{without_cuda}", **environment)
    target = [cmake, "--build", str(folder), "--target", "pylora_kernels", "--parallel", jobs()]
    run(target, f"the kernels did not compile; the compiler's message is above.{without_cuda}", **environment)
    cuda_link = (folder / "cuda_link.txt").read_text().split("\n") if cuda else []
    return [str(folder / "libpylora_kernels.a"), *filter(None, cuda_link)]


def write_if_changed(path: Path, text: str) -> None:
    """Write `text`, leaving an identical file's time alone so that ninja does not compile it again."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def module_source(folder: Path, cuda: CudaPlan | None) -> str:
    """Write the file that defines the build's facts for csrc/module.cpp and includes it. Returns its path.

    As compiler options they would stand on every file's command line, and each change anywhere would compile all.
    """
    facts = {
        "VERSION": VERSION,
        "TORCH_VERSION": torch.__version__,
        "SOURCE_HASH": SOURCE_HASH,
        "CUDA_ARCHS": ";".join(cuda.archs) if cuda else "",
    }
    lines = [f'#define PYLORA_{name} "{value}"' for name, value in facts.items()]
    path = folder / "pylora_module.cpp"
    write_if_changed(path, "\n".join(["// Written by setup.py.", *lines, '#include "module.cpp"', ""]))
    return os.path.relpath(path, ROOT)  # object files are named after it


class BuildNative(BuildExtension):
    """build_ext: checks the machine, waits for other builds, then builds the kernel library and the extension on it."""

    def run(self) -> None:
        self.cxx = check_machine()
        with build_lock():
            # torch's BuildExtension calls ninja by name.
            os.environ["PATH"] = os.pathsep.join([os.path.dirname(find_tool("ninja")), os.environ.get("PATH", "")])
            self.cuda = plan_cuda()
            # An editable install would build in a temporary folder and so from nothing each time.
            kind = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
            self.build_temp = str(ROOT / "build" / f"{kind}{'-cuda' if self.cuda else ''}")
            super().run()

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        temp = Path(self.build_temp)
        kernels = ROOT / "build" / ("kernels-cuda" if self.cuda else "kernels")
        jobs()
        linked = build_kernels(kernels, self.cxx, self.cuda)
        extension.extra_objects = [item for item in linked if not item.startswith("-")]
        extension.extra_link_args += [item for item in linked if item.startswith("-")]
        extension.sources = [module_source(temp, self.cuda), *extension.sources]
        if self.cuda:
            extension.define_macros.append(("PYLORA_WITH_CUDA", "1"))
        try:
            super().build_extensions()
        except Exception as error:
            fail(f"pylora._C did not compile or link; the compiler's message is above. ({error})")


class FreshBuild(build):
    """build: empties build/lib first, since a module deleted from the tree would otherwise stay in later wheels."""

    def run(self) -> None:
        library = Path(self.build_lib).resolve()
        if ROOT / "build" in library.parents:
            shutil.rmtree(library, ignore_errors=True)
        super().run()


class PackagedBenchmarks(build_py):
    """build_py: puts the cases of `benchmarks/` into a wheel as `pylora/bench/cases`, for `pylora bench`."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for case in ROOT.glob("benchmarks/*/bench_*.py"):
            target = Path(self.build_lib) / "pylora" / "bench" / "cases" / case.parent.name / case.name
            self.mkpath(str(target.parent))
            self.copy_file(str(case), str(target))


def extension() -> Extension:
    """`pylora._C`, or a bare stand-in where torch is missing: enough for an sdist, and build_ext then says why."""
    patterns = ("csrc/*/op.cpp", "csrc/binding/*.cpp")
    sources = sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))
    if TORCH_ERROR is not None:
        return Extension("pylora._C", sources)
    abi = int(torch.compiled_with_cxx11_abi())
    return CppExtension(
        "pylora._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        # at::parallel_for is a template around an OpenMP pragma: without -fopenmp it is a loop on one thread. It is not
        # said to the linker, so that GOMP's symbols are those of the runtime that torch brings, and its pool serves.
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fopenmp",
            "-fvisibility=hidden",
            "-Wall",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        ],
        # Symbols of the kernel library and of libcudart stay private, so another extension's copies cannot mix in.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
    )


setup(
    ext_modules=[extension()], cmdclass={"build": FreshBuild, "build_ext": BuildNative, "build_py": PackagedBenchmarks}
)
