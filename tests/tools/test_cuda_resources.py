"""The gate on the kernels' machine code: what it reads of the tools' output, and what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="needs pylora's source tree")

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Zexpand:
  REG:168 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:448 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_80
		Function : _Zexpand
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;      /* 0x00 */
                                                                            /* 0x01 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;         /* 0x00 */
        /*0020*/                   LDG.E R4, [R2.64] ;                      /* 0x00 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;    /* 0x00 */
        /*0040*/              @P1  STG.E.128 [R2.64], R4 ;                  /* 0x00 */
        /*0050*/                   STL [R1], R4 ;                           /* 0x00 */
"""
LAUNCHES = """
0 t pylora::Status pylora::cuda::launch_blocks<&(void pylora::cuda::(anonymous namespace)::expand_kernel\
<pylora::cuda::TensorTile<pylora::bf16, true> >(pylora::cuda::ExpandArgs)), 128, 35840, pylora::cuda::ExpandArgs>(void*)
0 W pylora::Status pylora::cuda::launch_blocks<&pylora::cuda::(anonymous namespace)::plan_kernel, 256, 1024, \
pylora::cuda::PlanArgs>(void*)
"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "tools" / "cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def resources(tool, **changed):
    values = {"threads": 128, "registers": 100, "static_shared": 0, "dynamic_shared": 0, "local": 0, "blocks": 4}
    return tool.Resources(**{**values, "instructions": {"HMMA": 3}, **changed})


def test_reads_cuobjdump(tool):
    usage = tool.parse_usage("arch = sm_80\n" + USAGE + "arch = sm_90\n" + USAGE)
    assert usage["sm_90", "_Zexpand"] == {"REG": 168, "STACK": 8, "SHARED": 0, "LOCAL": 0}
    assert len(usage) == 2
    counts = tool.parse_sass(SASS)["sm_80", "_Zexpand"]
    wanted = {"all": 6, "HMMA": 1, "LDGSTS": 1, "LDG.E.128": 1, "LDG": 2, "STG.E.128": 1, "STG": 1, "local": 1}
    assert counts == wanted


def test_reads_launches(tool):
    launches = tool.parse_launches(LAUNCHES)
    assert launches == {"expand_kernel<TensorTile<bf16, true> >": (128, 35840), "plan_kernel": (256, 1024)}


def test_names_do_not_depend_on_the_build(tool):
    hashed = (
        "void pylora::cuda::_GLOBAL__N__6e7d2a7c_9_expand_cu_02aa986d::expand_kernel<pylora::bf16>(pylora::cuda::Args)"
    )
    assert tool.readable(hashed) == "expand_kernel<bf16>"


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 128, 168, 0, 3),  # 65536 registers over 4 warps of 32 * 168
        ("sm_80", 128, 32, 0, 16),  # 64 warps
        ("sm_86", 64, 16, 0, 16),  # the limit of blocks
        ("sm_89", 128, 32, 35840, 2),  # 100 KB over 36 KB with the reserved kilobyte
        ("sm_80", 128, 32, 54 * 1024, 2),
        ("sm_90", 128, 32, 54 * 1024, 4),
        ("sm_80", 1024, 128, 0, 0),  # more registers than there are
        ("sm_86", 128, 32, 100 * 1024, 0),  # a block may have 99 KB
    ],
)
def test_resident_blocks(tool, arch, threads, registers, shared, blocks):
    assert tool.resident_blocks(arch, threads, registers, shared) == blocks


def test_refuses_local_memory_and_what_fits_nowhere(tool):
    assert not tool.faults({"k": {"sm_80": resources(tool)}})
    assert "local memory" in tool.faults({"k": {"sm_80": resources(tool, local=8)}})[0]
    assert "fit nowhere" in tool.faults({"k": {"sm_80": resources(tool, blocks=0)}})[0]


def test_differences(tool, tmp_path):
    report = {"k": {"sm_80": resources(tool)}, "gone": {"sm_80": resources(tool)}}
    path = tmp_path / "record.json"
    tool.record(report, path, "13.0.88")
    recorded = json.loads(path.read_text())["kernels"]
    assert tool.differences(report, recorded) == []
    now = {"k": {"sm_80": resources(tool, registers=101, instructions={"HMMA": 2})}, "new": {"sm_80": resources(tool)}}
    found = tool.differences(now, recorded)
    assert found[0] == "gone on sm_80: recorded, and gone"
    assert found[1] == "k on sm_80: registers 100 recorded, 101 now"
    assert "{'HMMA': 3} recorded, {'HMMA': 2} now" in found[2]
    assert found[3] == "new on sm_80: not recorded"


def test_architectures_that_were_not_built_keep_their_records(tool, tmp_path):
    path = tmp_path / "record.json"
    tool.record({"k": {"sm_80": resources(tool), "sm_90": resources(tool)}}, path, "13.0.88")
    tool.record({"k": {"sm_80": resources(tool, registers=90)}}, path, "13.0.88")
    archs = json.loads(path.read_text())["kernels"]["k"]
    assert (archs["sm_80"]["registers"], archs["sm_90"]["registers"]) == (90, 100)
