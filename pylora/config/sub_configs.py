"""The small configurations that hang on fields of LoraConfig, one per mechanism, with their checks."""

# ruff: noqa: RUF009 (option() makes a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pylora.config.fields import option


@dataclass
class LoraRuntimeConfig:
    """How to run on this machine. Never written to a file and never read from one."""

    ephemeral_gpu_offload: bool = option(
        False,
        help="Move a tensor that lies in CPU memory to the GPU for a costly step and back afterwards. Concerns DoRA's "
        "initialisation only.",
    )


@dataclass
class VeloraConfig:
    """VeLoRA: keep the input of A for the backward pass as one coefficient per group (https://arxiv.org/abs/2405.17991).

    Raises:
        ValueError: `num_groups` or `scale` is not positive, or `init_type` is unknown.
    """

    num_groups: int = option(
        64, help="Groups that the features of a token are cut into; more groups lose less and store more."
    )
    scale: float = option(1.0, help="Factor on the input that the backward pass reconstructs.")
    init_type: Literal["batch_average", "batch_average_once", "random"] = option(
        "batch_average",
        help="Where the projection vectors come from: 'batch_average' (each forward pass anew), 'batch_average_once' "
        "(the first forward pass only), or 'random'.",
    )

    def __post_init__(self) -> None:
        if self.num_groups <= 0:
            raise ValueError(f"`num_groups` should be positive, got {self.num_groups}.")
        if self.scale <= 0:
            raise ValueError(f"`scale` should be positive, got {self.scale}.")
        known = ("batch_average_once", "batch_average", "random")
        if self.init_type not in known:
            *others, last = (repr(name) for name in known)
            raise ValueError(
                f"Unsupported `init_type` {self.init_type!r}. Supported values are {', '.join(others)}, and {last}."
            )


@dataclass
class LoftQConfig:
    """LoftQ: start from the factors that best repair the base weight's quantisation (https://arxiv.org/abs/2310.08659)."""

    loftq_bits: int = option(4, help="Bits of the quantised base weight.")
    loftq_iter: int = option(1, help="Alternations between quantising and decomposing the rest.")


@dataclass
class ArrowConfig:
    """Arrow: route each token among trained adapters (https://arxiv.org/abs/2405.11157), optionally after subtracting
    general knowledge (GenKnowSub, https://aclanthology.org/2025.acl-short.54/).

    Raises:
        ValueError: `top_k` or `router_temperature` is not positive.
    """

    top_k: int = option(3, help="Adapters that serve a token together.")
    router_temperature: float = option(1.0, help="Temperature of the softmax over adapters.")
    use_gks: bool = option(False, help="Subtract the general adapters from the task adapters first (GenKnowSub).")
    task_adapter_names: list[str] | None = option(
        None, init=False, help="Names of the task adapters; filled in when the routed model is built."
    )
    gks_adapter_names: list[str] | None = option(
        None, init=False, help="Names of the general adapters; filled in when the routed model is built."
    )
    rng_seed: int | None = option(None, help="Seed that makes the routing repeatable; None leaves it to chance.")

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ValueError(f"top_k cannot be negative or zero, got {self.top_k}.")
        if self.router_temperature <= 0:
            raise ValueError(f"router_temperature must be greater than 0, got {self.router_temperature}.")


@dataclass
class BdLoraConfig:
    """BD-LoRA: block-diagonal A or B, so that sharded serving needs no exchange between the shards.

    Row-sharded modules (output and down projections) want a block-diagonal A, column-sharded ones (query, key, value,
    up and gate projections) a block-diagonal B.

    Raises:
        ValueError: a name is in both lists.
    """

    target_modules_bd_a: list[str] | None = option(
        None, help="A module whose name contains one of these strings gets a block-diagonal A."
    )
    target_modules_bd_b: list[str] | None = option(
        None, help="A module whose name contains one of these strings gets a block-diagonal B."
    )
    nblocks: int = option(1, help="Blocks of the block-diagonal factor: the number of shards when serving.")
    match_strict: bool = option(
        True, help="Refuse a targeted module that is in neither list; False gives such a module plain LoRA."
    )

    def __post_init__(self) -> None:
        overlap = set(self.target_modules_bd_a or []) & set(self.target_modules_bd_b or [])
        if overlap:
            raise ValueError(
                f"Found overlapping modules in target_modules_bd lists: {self.target_modules_bd_a} (A) and "
                f"{self.target_modules_bd_b} (B) both name {sorted(overlap)}."
            )


@dataclass
class EvaConfig:
    """EVA: initialise A from the directions that explain most of the layers' inputs (https://arxiv.org/abs/2410.07170).

    Raises:
        ValueError: `rho` is below 1, or `tau` is outside 0 to 1.
    """

    rho: float = option(
        2.0, help="A layer's rank may grow to rho * r when ranks are redistributed; 1.0 leaves every rank as it is."
    )
    tau: float = option(
        0.99, help="A layer's decomposition has converged when successive singular vectors agree to this cosine."
    )
    use_label_mask: bool = option(True, help="Leave out positions whose label is `label_mask_value`.")
    label_mask_value: int = option(-100, help="The label of positions that are left out.")
    whiten: bool = option(False, help="Divide the singular vectors by their singular values.")
    adjust_scaling_factors: bool = option(
        True, help="Change each layer's scaling with its new rank, so that gradients keep their size."
    )

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError(f"`rho` must be >= 1.0, got {self.rho}.")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"`tau` must be between 0.0 and 1.0, got {self.tau}.")


@dataclass
class KasaConfig:
    """KaSA: cut the base weight's r smallest singular components away and train a diagonal between A and B
    (https://arxiv.org/abs/2412.06071). The cut is final: disabling or unmerging the adapter does not bring them back.

    Raises:
        ValueError: a coefficient is negative.
    """

    beta: float = option(1e-4, help="Weight of the penalty on the squared diagonal (the paper's equations 9 and 10).")
    gamma: float = option(
        1e-3, help="Weight of the penalty that keeps A and B close to orthogonal (the paper's equation 11)."
    )

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


@dataclass
class CordaConfig:
    """CorDA: decompose the base weight in the light of its inputs' covariance (https://arxiv.org/abs/2406.05223)."""

    cache_file: str | None = option(
        None, help="File that keeps the decomposition, much smaller than the residual weights it allows to rebuild."
    )
    covariance_file: str | None = option(
        None, help="File that keeps the covariance matrices (about as large as the model), to try other ranks later."
    )
    corda_method: Literal["ipm", "kpm"] = option(
        "ipm",
        help="'ipm' starts from the directions that the new task uses, 'kpm' from those that known tasks need least.",
    )
    verbose: bool = option(False, help="Report the progress of the initialisation.")
    use_float16_for_covariance: bool = option(False, help="Half the memory of the covariance, at less precision.")
    prune_temporary_fields: bool = option(True, help="Delete what preprocessing left on the modules once it was used.")


@dataclass
class LoraGAConfig:
    """LoRA-GA: point the first step of the factors along the full gradient (https://arxiv.org/abs/2407.05000)."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = option(
        "ArB2r",
        help="Which of the gradient's first 2r singular directions go where: 'ArBr' (odd ones to A, even ones to B), "
        "'A2rBr' (the second r to A), 'ArB2r' (the first r to A), or 'random'.",
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = option(
        "stable",
        help="Size of the factors: 'stable' (by `stable_gamma`), 'weight_svd' (by the weight's singular values), "
        "'gd_scale' (by a gradient step), or 'unit'.",
    )
    stable_gamma: int = option(16, help="Gamma of the 'stable' scale.")


@dataclass
class MontecloraConfig:
    """MonteCLoRA: perturb the factors with samples from a learnt distribution, for better calibrated adapters.

    Raises:
        ValueError: `num_samples`, `dirichlet_prior` or `buffer_size` is not positive.
    """

    num_samples: int = option(8, help="Samples per forward pass: more are smoother and cost more.")
    use_entropy: bool = option(False, help="Add an entropy term against the samples' weights collapsing to one.")
    dirichlet_prior: float = option(0.1, help="Concentration of the prior over the samples' weights; large is uniform.")
    sample_scaler: float = option(1e-4, help="Size of the perturbation; near 0 this is plain LoRA.")
    kl_loss_weight: float = option(1e-5, help="Weight of the divergence from the prior in the loss.")
    buffer_size: int = option(150, help="Draws that the sampler keeps ready.")

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
