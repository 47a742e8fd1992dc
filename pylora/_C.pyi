"""The native extension, built by setup.py from csrc/. Only `pylora._native` imports it."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

__version__: str

def build_info() -> dict[str, str]:
    """Facts of the build: version, torch, source_hash, cuda_archs, compiler, isas_built."""

def cpu_isa() -> str:
    """The instruction set in use. Raises where PYLORA_CPU_ISA names one that the CPU or the build lacks."""

def cpu_isas_supported() -> list[str]:
    """The instruction sets that this CPU and its operating system support, built or not, narrowest first."""

def set_cpu_isa(name: str) -> None:
    """Switch all later CPU kernel launches of the process. Raises, changing nothing, where the set cannot be used."""

def has_code_for_gpu(index: int) -> bool:
    """Whether this build has kernels that run on the GPU of this index."""

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
def dense_forward(layer: nn.Module, x: Tensor, /) -> Tensor | None:
    """A `pylora.layers.Linear`'s forward by an op; None where its modules have to be called."""

def dense_mixed_forward(
    layer: nn.Module, x: Tensor, names: tuple[str, ...], order: Tensor, indptr: Tensor, slots: Tensor, /
) -> Tensor | None:
    """The same for a batch whose rows have different adapters; slot i is names[i]. The last three are a `BatchPlan`."""

def register_dora(
    variant_class: type, magnitudes_class: type, writes_and_trust: Callable[[], tuple[int, int]], /
) -> None:
    """Whose forwards `dense_forward` makes itself while their norms are kept."""

def dora_row_squares(weight: Tensor) -> Tensor: ...
def dora_row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor: ...
def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> Tensor: ...
def dora_linear_norms(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    squares: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor]: ...

class KeptNorms:
    """DoRA's norms while W, A and B are known unchanged: csrc/dora/kept_norms.h. True while norms are kept."""

    def find(self, weight: Tensor, a: Tensor, b: Tensor, scaling: float, writes: int, trust: int) -> Tensor | None: ...
    def keep(
        self, weight: Tensor, a: Tensor, b: Tensor, scaling: float, writes: int, trust: int, norms: Tensor
    ) -> None: ...
    def find_squares(self, weight: Tensor, writes: int, trust: int) -> Tensor | None: ...
    def keep_squares(self, weight: Tensor, writes: int, trust: int, squares: Tensor) -> None: ...
    def clear(self) -> None: ...
    def __bool__(self) -> bool: ...

def bidiagonalise_(
    matrix: Tensor,
    basis: Tensor,
    left: Tensor,
    diagonal: Tensor,
    above: Tensor,
    locked: int,
    begin: int,
    end: int,
    seed: int,
) -> None: ...
def gram_product(matrix: Tensor, x: Tensor) -> Tensor: ...
def ritz_residuals(diagonal: Tensor, above: Tensor, rank: int) -> tuple[Tensor, Tensor]: ...
def keep_largest(x: Tensor, count: int) -> Tensor: ...
def uniform_(out: Tensor, bound: float, skip: int) -> None: ...
def sgmv_(
    y: Tensor,
    x: Tensor,
    a_pool: Sequence[Tensor],
    b_pool: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
    out_first: bool,
    /,
) -> None: ...
def sgmv_shrink(
    x: Tensor, a_pool: Sequence[Tensor], ranks: Tensor, segment_indptr: Tensor, segment_slots: Tensor, /
) -> Tensor: ...
def sgmv_expand_(
    y: Tensor,
    v: Tensor,
    b_pool: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
    out_first: bool,
    /,
) -> None: ...
def bgmv_(
    y: Tensor,
    x: Tensor,
    a_pool: Sequence[Tensor],
    b_pool: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    token_slots: Tensor,
    out_first: bool,
    /,
) -> None: ...
def bgmv_shrink(x: Tensor, a_pool: Sequence[Tensor], ranks: Tensor, token_slots: Tensor, /) -> Tensor: ...
def bgmv_expand_(
    y: Tensor,
    v: Tensor,
    b_pool: Sequence[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    token_slots: Tensor,
    out_first: bool,
    /,
) -> None: ...
def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    dropout: Sequence[float],
    rng: Tensor | None,
    order: Tensor,
    indptr: Tensor,
    slots: Tensor,
    /,
) -> Tensor: ...
def multi_lora_embedding_(
    y: Tensor,
    tokens: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    order: Tensor,
    indptr: Tensor,
    slots: Tensor,
    padding_idx: int,
    /,
) -> None: ...
def multi_lora_conv_(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    order: Tensor,
    indptr: Tensor,
    slots: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    /,
) -> None: ...
def merge_(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None],
    log: bool,
) -> Tensor: ...
def unmerge_(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None],
    log: Tensor | None,
) -> None: ...
def swap_(
    w: Tensor,
    old_a: Sequence[Tensor],
    old_b: Sequence[Tensor],
    old_scalings: Sequence[float],
    old_row_scales: Sequence[Tensor | None],
    old_log: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None],
    log: bool,
) -> Tensor: ...
def merge_is_finite(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None],
) -> bool: ...
