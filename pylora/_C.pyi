"""The native extension, built by setup.py from csrc/. Only `pylora._native` imports it."""

from torch import Tensor

__version__: str

def build_info() -> dict[str, str]:
    """Facts of the build: version, torch, source_hash, cuda_archs, compiler, isas_built."""

def cpu_isa() -> str:
    """The instruction set in use. Raises where PYLORA_CPU_ISA names one that the CPU or the build lacks."""

def cpu_isas_supported() -> list[str]:
    """The instruction sets that this CPU and its operating system support, built or not, narrowest first."""

def set_cpu_isa(name: str) -> None:
    """Switch all later CPU kernel launches of the process. Raises, changing nothing, where the set cannot be used."""

def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> Tensor: ...
def lora_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout_p: float, rng: Tensor | None
) -> Tensor: ...
def lora_dropout(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor: ...
