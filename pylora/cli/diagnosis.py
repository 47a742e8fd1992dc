"""What `pylora doctor` finds out: facts about the build, the machine and the packages, and what is wrong with them.

Gathering is apart from printing so that the facts can be tested and given out as JSON. Nothing here raises: a part that
cannot be examined is a problem to report.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pylora import _native
from pylora._version import __version__
from pylora.errors import PyloraBuildError

REQUIRED_PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy")
OPTIONAL_PACKAGES = ("peft", "accelerate")


@dataclass
class Diagnosis:
    """The facts, ready for JSON; problems are what does not work, notes what works but could be better."""

    pylora: dict[str, str]
    torch: dict[str, str | None]
    extension: dict[str, Any] = field(default_factory=lambda: {"usable": False})
    cpu: dict[str, Any] = field(default_factory=dict)
    gpus: list[dict[str, str]] = field(default_factory=list)
    packages: dict[str, str | None] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Examine the installation. Takes as long as importing torch."""
    diagnosis = Diagnosis(
        pylora={
            "version": __version__,
            "location": str(Path(_native.__file__).parent),
            "python": platform.python_version(),
        },
        torch={"version": None, "cuda": None},
    )
    torch = _import_torch()
    if torch is not None:
        diagnosis.torch = {"version": str(torch.__version__), "cuda": torch.version.cuda}
    module = _examine_extension(diagnosis)
    if module is not None:
        _examine_cpu(diagnosis, module)
    if torch is not None:
        _examine_gpus(diagnosis, torch)
    _examine_packages(diagnosis)
    return diagnosis


def _import_torch() -> Any:
    try:
        import torch
    except Exception:  # the extension's own report says why, with the fix
        return None
    return torch


def _examine_extension(diagnosis: Diagnosis) -> ModuleType | None:
    """Facts of the build. Also returns an extension that loads but does not fit, whose facts help to see why."""
    try:
        module: ModuleType | None = _native.load()
        diagnosis.extension["usable"] = True
    except PyloraBuildError as error:
        diagnosis.problems.append(str(error))
        module = sys.modules.get("pylora._C")
    if module is None:
        return None
    info = module.build_info()
    diagnosis.extension.update(
        version=info["version"],
        torch=info["torch"],
        isas_built=_split(info["isas_built"]),
        cuda_archs=_split(info["cuda_archs"]),
        # GCC's __VERSION__ is a bare number; Clang's names itself.
        compiler=f"GCC {info['compiler']}" if info["compiler"][:1].isdigit() else info["compiler"],
        file=module.__file__,
    )
    return module


def _examine_cpu(diagnosis: Diagnosis, module: ModuleType) -> None:
    cap = os.environ.get("PYLORA_CPU_ISA") or None
    supported = module.cpu_isas_supported()
    diagnosis.cpu = {"machine": platform.machine(), "supported": supported, "cap": cap, "in_use": None}
    try:
        in_use = diagnosis.cpu["in_use"] = module.cpu_isa()
    except (RuntimeError, ValueError) as error:
        diagnosis.problems.append(f"{error}. Unset PYLORA_CPU_ISA, or set it to one of: {_join(supported)}.")
        return
    best = [isa for isa in supported if isa in diagnosis.extension["isas_built"]][-1]
    if in_use != best:
        diagnosis.notes.append(f"The CPU kernels run as {in_use} where {best} is there, because PYLORA_CPU_ISA={cap}.")


def _examine_gpus(diagnosis: Diagnosis, torch: ModuleType) -> None:
    """GPUs that torch sees, and whether the built CUDA kernels reach them."""
    if not torch.cuda.is_available():
        return
    built = diagnosis.extension.get("cuda_archs", [])
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        arch = f"{major}{minor}"
        diagnosis.gpus.append({"name": torch.cuda.get_device_name(index), "arch": arch})
        if diagnosis.extension["usable"] and not built:
            diagnosis.notes.append(
                f"GPU {index} (sm_{arch}) is visible, but pylora is built without CUDA kernels and uses the CPU only. "
                f"With a CUDA toolkit: {_native.rebuild_command('PYLORA_CUDA=1')}"
            )
        elif built and not _reaches(built, major, minor):
            settings = f"PYLORA_CUDA_ARCHS={arch}"
            diagnosis.problems.append(
                f"GPU {index} needs sm_{arch}, and the CUDA kernels are built for {_join(built)}. "
                f"Build for it: {_native.rebuild_command(settings)}"
            )


def _reaches(built: list[str], major: int, minor: int) -> bool:
    """Whether a GPU of compute capability major.minor runs code built for `built`, given PTX of the last entry.

    Binary code runs on the same major version from its minor version on; PTX is compiled for anything newer; code with
    a letter suffix runs on that very architecture only.
    """
    for arch in built:
        digits = re.sub(r"\D", "", arch)
        exact = (int(digits[:-1]), int(digits[-1])) == (major, minor)
        if exact or (arch == digits and int(digits[:-1]) == major and int(digits[-1]) <= minor):
            return True
    return int(re.sub(r"\D", "", built[-1])) <= major * 10 + minor


def _examine_packages(diagnosis: Diagnosis) -> None:
    for name in (*REQUIRED_PACKAGES, *OPTIONAL_PACKAGES):
        try:
            diagnosis.packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            diagnosis.packages[name] = None
            if name in REQUIRED_PACKAGES and name != "torch":
                diagnosis.problems.append(f"{name} is not installed, and pylora needs it: pip install {name}")


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"[;,]", text) if part]


def _join(items: list[str]) -> str:
    return ", ".join(items) or "none"
