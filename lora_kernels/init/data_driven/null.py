"""LoRA-Null: W's part on the directions that the layer's inputs do not use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..._utils.checks import as_integer
from ...ops import svd
from ..base import register_initializer
from ..spectral.triplets import refuse_small_rank, split
from ..start import Start, StartRequest
from .activations import FromActivations, measured


@dataclass(frozen=True)
class LoRANull(FromActivations):
    """B = U√(S / s), A = √(S / s)·Vᵀ of W N Nᵀ = USVᵀ, where N [m, r] are the eigenvectors of
    Σ xᵀx of the layer's inputs with the r smallest eigenvalues.

    Tang et al., arXiv 2503.02659, and the authors' code: s·BA = W N Nᵀ hardly acts on those inputs,
    and neither do the gradients of B. W changes (W − s·BA). The paper trains A and B (its v1), or
    freezes A (v2): call `requires_grad_(False)` on `lora_A` for v2. The code divides the inputs of
    each sample by `|max x|`; here every input has the same weight, as in the paper.

    With fewer than m − r inputs, the eigenvalues are zero, and N consists of any r directions
    without an input: capture several times m inputs.

    Only the SVD of W N [n, r] is computed: with W N = USZᵀ, V = N Z. Cost: r eigenvectors of an
    [m, m] matrix, as for MiLoRA, and one product of W with r columns. ValueError if W holds NaN
    or Inf, or is zero on one of the directions.

    `method` and `seed` are those of `lora_kernels.svd.minor`.
    """

    method: str = "randomized"
    seed: int = 0
    changes_base = True
    reads_weight = True

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def make_start(self, request: StartRequest) -> Start:
        found = measured(request, "LoRANull")
        device, dtype = request.weight.device, request.factor_dtype
        gram = found.whole_gram().to(device)
        directions = svd.minor(gram, request.r, self.method, seed=self.seed).Vh.mT.double()
        used = request.weight.double() @ directions  # [n, r]
        if not bool(used.isfinite().all()):
            raise ValueError("weight holds NaN or Inf")
        U, S, Zh = torch.linalg.svd(used, full_matrices=False)
        refuse_small_rank(S.to(dtype), used, "weight on the directions without inputs", "LoRANull")
        start = split(U, S, Zh @ directions.mT, request.scaling)
        return Start(start.lora_A.to(dtype), start.lora_B.to(dtype))


register_initializer("lora_null", LoRANull)
