"""`LayerState`: one layer's adapter without the layer, as adapter files store it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..init.fused import Parts
from ..init.start import subtract_factors_
from ..ops.linear.factors import product_factors
from ..ops.linear.row_norms import row_gain
from .options import AdapterOptions

# Rounding to bfloat16 loses 0.24 % of a product, times `cancellation`: 0.43 % at most.
_MOST_CANCELLATION = 1.8
# An adapter's tensors.
FACTORS = (
    *("lora_A", "lora_B", "lora_R", "start_A", "start_B", "lora_bias"),
    *("lora_magnitude", "lora_diag"),
)
# The tensors that are, or were, trained.
TRAINED = tuple(name for name in FACTORS if not name.startswith("start_"))


class WithStart:
    """Factors and initial factors: of an `Adapter`, or of its `LayerState`."""

    lora_A: Tensor  # [r, in], of experts [E, r, in]
    lora_B: Tensor  # [out, r], of experts [E, out, r]
    lora_R: Tensor | None  # [r, r], of experts [E, r, r]
    lora_diag: Tensor | None  # [r], of experts [E, r]
    start_A: Tensor | None
    start_B: Tensor | None
    beta: Tensor | float | None  # of experts [E]

    def left(self) -> Tensor:
        """B [out, r], as the forward uses it."""
        return self.lora_B

    def middle(self) -> Tensor | None:
        """What is between A and B: R or diag(λ) [r, r]; None if there is nothing."""
        return self.lora_R if self.lora_diag is None else torch.diag_embed(self.lora_diag)

    @torch.no_grad()
    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """The initial factors A₀ [r, in] and B₀ [out, r], stored or computed from β.

        None if s·B₀A₀ is not subtracted: it is zero, or changes the model on purpose.
        """
        if self.start_A is not None and self.start_B is not None:
            return self.start_A, self.start_B
        if self.beta is None:
            return None
        return dst_start(self.lora_A, self.lora_B, self.beta)


@dataclass
class LayerState(WithStart):
    """The adapter of one linear layer, W_base + s·(BA − B₀A₀), with BRA for BA if there is an R.

    `lora_A` [r, in], `lora_B` [out, r], `lora_R` [r, r] or None; s = `scaling`. The initial factors
    are those of a DST start of scale `beta` (A₀ = βΦₘᵀ, B₀ = βΦₙ, in the dtypes of A and B), or
    `start_A` [r, in] and `start_B` [out, r]; if all three are None, nothing is subtracted.
    `residual` says whether s·B₀A₀ was subtracted from the base's weight ("absorb") or is subtracted
    in every forward ("implicit").

    `weight_norm` is ‖W_base‖_F, which tells whether another base is the same; None if unknown.
    `lora_bias` [out] is PEFT's bias of B, which adds s·`lora_bias` to the output; or None.
    `embedding` says that the layer is an embedding of `in` tokens; W is then its transposed weight.
    If `kernel` is not empty, the layer is a convolution with kernels of this size and with
    `groups`; W is then its weight, flattened from the second dimension on.

    With `lora_diag` λ [r], the update is B diag(λ) A in place of BA (KaSA). With `lora_magnitude`
    m [out], the adapted weight is (m ⊘ ‖V‖) ∘ V, where V = W_base + s·(BA − B₀A₀), and ‖V‖ [out]
    are the norms of its rows (DoRA). `trains` says which of A and B train, "AB" or "A". If `parts`
    is not empty, the layer is fused, and B is zero outside the blocks of these parts
    (`init.fused`).

    The adapters of E experts that a model keeps in one parameter are one state: its factors have an
    additional first dimension [E], and `beta` and `weight_norm` are float64 [E].
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    lora_alpha: float
    lora_R: Tensor | None = None
    beta: float | Tensor | None = None
    start_A: Tensor | None = None
    start_B: Tensor | None = None
    residual: str = "absorb"
    weight_norm: float | Tensor | None = None
    lora_bias: Tensor | None = None
    embedding: bool = False
    lora_magnitude: Tensor | None = None
    lora_diag: Tensor | None = None
    trains: str = "AB"
    kernel: tuple[int, ...] = ()
    groups: int = 1
    parts: Parts = ()

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_A.shape[-2]

    def options(self, scaling_rule: str, lora_dropout: float, residual: str) -> AdapterOptions:
        """The settings of the adapter; the arguments are settings that the state does not have."""
        use_dora = self.lora_magnitude is not None
        own = (self.r, self.lora_alpha, scaling_rule, lora_dropout, residual)
        return AdapterOptions(*own, use_dora, self.trains, self.parts)

    @property
    def experts(self) -> int | None:
        """The number of experts; None for a linear layer."""
        return self.lora_A.shape[0] if self.lora_A.dim() == 3 else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer, or of each expert."""
        return self.lora_B.shape[-2], self.lora_A.shape[-1]

    def stored_shape(self, transposed: bool = False) -> tuple[int, ...]:
        """The shape of the layer's weight in a model; `transposed`: it is stored as [in, out]."""
        rows, cols = self.shape
        if self.kernel:
            return (rows, cols // math.prod(self.kernel), *self.kernel)
        return (cols, rows) if transposed or self.embedding else (rows, cols)

    def matrix_of(self, weight: Tensor, transposed: bool = False) -> Tensor:
        """A view [out, in] of a contiguous weight that has the `stored_shape`."""
        if self.kernel:
            return weight.view(len(weight), -1)
        return weight.T if transposed or self.embedding else weight

    def expert(self, index: int) -> LayerState:
        """The state of one of the experts, with views of the tensors."""

        def own(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        def number(value: float | Tensor | None) -> float | None:
            return float(value[index]) if isinstance(value, Tensor) else value

        return replace(
            self,
            lora_A=self.lora_A[index],
            lora_B=self.lora_B[index],
            lora_R=own(self.lora_R),
            beta=number(self.beta),
            start_A=own(self.start_A),
            start_B=own(self.start_B),
            weight_norm=number(self.weight_norm),
            lora_bias=own(self.lora_bias),
            lora_magnitude=own(self.lora_magnitude),
            lora_diag=own(self.lora_diag),
        )

    @property
    def changes_base(self) -> bool:
        """Whether s·B₀A₀ is subtracted, so that A and B alone, on the original base, are wrong."""
        return self.beta is not None or self.start_A is not None

    @torch.no_grad()
    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A' [k, in] and B' [out, k], in float32 or wider: s·B'A' is the update of the original
        base, and V − W_base if there are magnitudes. k = r, or 2r if s·B₀A₀ is subtracted.
        """
        start_A, start_B = self.start_factors() or (None, None)
        return product_factors(self.lora_A, self.lora_B, self.middle(), start_A, start_B)

    @torch.no_grad()
    def add_to_(self, weight: Tensor) -> None:
        """W ← V = W + s·B'A' in place, or (m ⊘ ‖V‖) ∘ V if there are magnitudes; in float32 or
        wider, rounded once, by blocks of rows. W is the original base's, [out, in] of any strides.
        """
        right, left = (factor.to(weight.device) for factor in self.update_factors())
        gain = None
        if self.lora_magnitude is not None:
            norms = torch.ops.lora.row_norms(weight, right, left, self.scaling)
            gain = row_gain(self.lora_magnitude.to(weight.device), norms)
        subtract_factors_(weight, right, left, -self.scaling, gain)

    @torch.no_grad()
    def portable_factors(self) -> tuple[Tensor, Tensor]:
        """A' [k, in] and s·B' [out, k], which may be rounded to 16 bits. Their product is the
        update (V − W_base if there are magnitudes). They are those of `update_factors`, or, if the
        parts of these cancel, those of an SVD.
        """
        if self.experts is not None:
            pairs = [self.expert(e).portable_factors() for e in range(self.experts)]
            rights, lefts = zip(*pairs, strict=True)
            return torch.stack(rights), torch.stack(lefts)
        right, left = self.update_factors()
        left = scaled(left, self.scaling)
        if cancellation(right, left) > _MOST_CANCELLATION:
            return svd_factors(right, left, right.shape[0])
        return right, left

    @torch.no_grad()
    def portable_bias(self) -> Tensor | None:
        """s·`lora_bias` [out] in float32 or wider, which the adapter adds to the layer's output;
        None if there is none.
        """
        return None if self.lora_bias is None else scaled(self.lora_bias, self.scaling)


def change_by_gain(y: Tensor, bias: Tensor | None, update: Tensor, gain: Tensor) -> Tensor:
    """g ∘ (y − b + `update`) + b − y, which DoRA adds to the base's output y, whose bias is b; in
    g's dtype. It is exactly zero if g is 1 and the update is zero. g and b must be broadcastable to
    y's shape.
    """
    direction = y.to(gain.dtype)
    if bias is not None:
        direction = direction - bias.to(direction)
    return (gain - 1) * direction + gain * update.to(gain.dtype)


def scaled(factor: Tensor, scaling: float) -> Tensor:
    """s · `factor`, in float32 or wider, rounded once."""
    work = torch.promote_types(factor.dtype, torch.float32)
    return (factor.detach().double() * scaling).to(work)


def cancellation(right: Tensor, left: Tensor) -> float:
    """√(Σ ‖bₖ‖²‖aₖ‖²) / ‖BA‖_F of A = `right` [k, in] and B = `left` [out, k]: the factor by which
    rounding A and B changes the product more than it would if the parts were orthogonal.
    """
    right, left = right.double(), left.double()
    gram_A, gram_B = right @ right.T, left.T @ left
    parts = float((gram_A.diagonal() * gram_B.diagonal()).sum())
    whole = float((gram_A * gram_B).sum())
    if parts == 0 or not math.isfinite(parts):
        return 1.0
    return math.sqrt(parts / whole) if whole > 0 else math.inf


def svd_factors(right: Tensor, left: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A' [r, in] and B' [out, r], the best approximation of rank r of the product of A = `right`
    [k, in] and B = `left` [out, k]; both contain √σ. The SVD is that of the small core of two QR
    decompositions, in float64: no [out, in] matrix is formed. If the product has a smaller rank
    than r, the rest is zero. The factors of experts have an additional first dimension [E].
    """
    QB, RB = torch.linalg.qr(left.double())
    QA, RA = torch.linalg.qr(right.double().mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
    root = S[..., :r].sqrt()
    new_left = (QB @ U[..., :r]) * root[..., None, :]
    new_right = (root[..., None] * Vh[..., :r, :]) @ QA.mT
    missing = r - root.shape[-1]
    if missing > 0:
        shape = new_right.shape
        new_right = torch.cat([new_right, new_right.new_zeros(*shape[:-2], missing, shape[-1])], -2)
        shape = new_left.shape
        new_left = torch.cat([new_left, new_left.new_zeros(*shape[:-1], missing)], -1)
    return new_right.to(right.dtype), new_left.to(left.dtype)


def dst_start(lora_A: Tensor, lora_B: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """A₀ = βΦₘᵀ [r, in] and B₀ = βΦₙ [out, r], in the dtypes and on the devices of A and B; with
    the β [E] of experts, [E, r, in] and [E, out, r].
    """
    r = lora_A.shape[-2]

    def basis(size: int, factor: Tensor) -> Tensor:
        """β times the basis [size, r]: the product in float64, rounded once."""
        work, device = torch.float64, factor.device
        scale = torch.as_tensor(beta, dtype=work, device=device)[..., None, None]
        product = torch.ops.lora.dst_basis(size, r, dtype=work, device=device) * scale
        return product.reshape(*factor.shape[:-2], size, r).to(factor.dtype)

    return basis(lora_A.shape[-1], lora_A).mT, basis(lora_B.shape[-2], lora_B)
