"""The mutants of the CUDA kernels: every rule finds a place, and what goes unnoticed is said."""

import importlib.util
import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="needs pylora's source tree")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("mutate_cuda", ROOT / "tools" / "mutate_cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_kernel_and_every_kind_of_fault(tool):
    mutants = [mutant for kernel in tool.KERNELS for mutant in tool.mutants_of(kernel)]
    assert {mutant.rule for mutant in mutants} == {rule for rule, _, _ in tool.RULES}
    assert all(len(list(tool.mutants_of(kernel))) >= 4 for kernel in tool.KERNELS)
    for mutant in mutants:
        assert (ROOT / mutant.path).read_text().splitlines()[mutant.line - 1] != mutant.text
    assert all((ROOT / test).is_file() for _, tests in tool.KERNELS.values() for test in tests)


def test_every_cuda_file_of_the_segments_is_some_kernels(tool):
    named = {path for paths, _ in tool.KERNELS.values() for path in paths}
    assert {f"csrc/cuda/{path.name}" for path in (ROOT / "csrc" / "cuda").glob("*.cu")} <= named


def test_report(tool):
    mutants = list(tool.mutants_of("decode"))[:3]
    out = io.StringIO()
    share = tool.report(list(zip(mutants, [True, False, None], strict=True)), Console(file=out, width=160))
    assert share == 0.5  # one that does not compile is not counted
    assert f"unnoticed: {mutants[1].path}:{mutants[1].line}" in out.getvalue()


def test_a_restored_source_is_newer_than_the_mutant(tool, tmp_path):
    """Or the build would keep the mutant's object."""
    source, copy = tmp_path / "a.cu", tmp_path / "tree" / "a.cu"
    source.write_text("whole")
    os.utime(source, (0, 0))
    tool.bring_up_to_date(source, copy)
    assert (copy.read_text(), copy.stat().st_mtime > 0) == ("whole", True)
    os.utime(copy, (1, 1))
    tool.bring_up_to_date(source, copy)
    assert copy.stat().st_mtime == 1  # the same text: nothing to build
    copy.write_text("mutant")
    tool.bring_up_to_date(source, copy)
    assert copy.read_text() == "whole"
