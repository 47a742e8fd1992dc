"""Run by `make cuda`: the extension in the given folder loads, and has CUDA kernels if the sources do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def main(folder: str) -> None:
    (library,) = Path(folder).glob("pylora/_C.*.so")
    spec = importlib.util.spec_from_file_location("pylora._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels, archs = len(list(ROOT.glob("csrc/*/*.cu"))), module.build_info()["cuda_archs"]
    if bool(kernels) != bool(archs):
        raise SystemExit(f"cuda: {kernels} .cu files, but the extension says it was built for {archs or 'no CUDA'}")
    print(f"cuda: {kernels} .cu files built for {archs or 'nothing'}, loaded with torch {torch.__version__}")


main(*sys.argv[1:])
