"""`Adapter`: the factors of one adapter of one layer, and the data that restore its base."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .._utils.checks import is_dtensor
from ..init.fused import check_parts, within_blocks
from ..init.sharded.layout import Shards, fill_, full_shape, is_flattened, is_sharded, local_part
from ..init.sharded.subtract import subtract_factors_here_, subtract_recipe_here_
from ..init.sharded.whole import whole
from ..init.start import Start
from ..ops.linear.factors import product_factors
from ..ops.linear.row_norms import row_gain
from ..ops.loram_init import shortened
from .options import AdapterOptions
from .state import TRAINED, LayerState, WithStart

_CALLS = (nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__)
_OWN_STATE = ("start_A", "start_B", "_extra_state")  # state that is not in Parameters
_Pair = tuple[Tensor, Tensor]
_NORM_BITS = 32  # of the stored norm of W, which only has to tell one base from another
_LOAD = "load it as a further adapter, load_adapter(..., adapter_name=...)"


class Adapter(WithStart, nn.Module):
    """A [r, in], B [out, r] and, for some starts, R [r, r]; s; and the initial factors A₀ and B₀.
    Adapters by PEFT may have a bias of B [out], which is multiplied by s and added to the output.
    KaSA adds λ [r], a diagonal between A and B; DoRA adds the magnitudes m [out] of W's rows.

    A₀ and B₀ are needed to restore the base. For a DST start they are computed from β; for other
    starts they are stored. A layer that subtracts s·B₀A₀ in its forward ("implicit") always stores
    them, except for experts, where they would double the adapter's memory. A, B and R are float32,
    or float64 over a float64 base. For E experts they are stacks with an additional first dimension
    [E].

    If `options.parts` is not empty, the layer is fused: B is zero outside the blocks of these
    parts, and the forward uses only the blocks, so that all other entries of B have zero gradients.
    """

    lora_A: nn.Parameter  # [r, in], of experts [E, r, in]
    lora_B: nn.Parameter  # [out, r], of experts [E, out, r]
    lora_R: nn.Parameter | None  # [r, r], of experts [E, r, r]
    lora_bias: nn.Parameter | None  # [out]
    lora_diag: nn.Parameter | None  # [r], of experts [E, r]
    lora_magnitude: nn.Parameter | None  # [out]
    beta: Tensor | None
    scaling: float
    embedding = False  # whether the layer is an embedding
    kernel: tuple[int, ...] = ()  # of a convolution
    groups = 1
    _scaling_bits: Tensor
    _aside: _Pair | None = None  # the values of start_A and start_B while these are on meta

    def __init__(self, options: AdapterOptions, start: Start, changes_base: bool) -> None:
        super().__init__()
        self.options = options
        # Stored, because every forward reads it.
        self.lora_dropout = options.lora_dropout
        self.residual = options.residual
        for name in TRAINED:
            values: Tensor | None = getattr(start, name, None)
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.set_trainable(True)
        self._set_start(start, changes_base)
        self.register_buffer("_scaling_bits", None, persistent=False)
        self.scaling = options.scaling

    def _set_start(self, start: Start, changes_base: bool) -> None:
        """Stores what restores the base."""
        absorbed = changes_base and self.residual == "absorb"
        recomputed = start.beta is not None and (absorbed or start.lora_A.dim() == 3)
        keep = changes_base and not recomputed
        pair = start.subtracted() if keep else (None, None)
        for name, factor in zip(("start_A", "start_B"), pair, strict=True):
            self.register_buffer(name, None if factor is None else factor.detach().clone())
        self._subtracts = changes_base and not absorbed
        self.beta = start.beta if changes_base else None
        # s, if s·B₀A₀ was subtracted from the base's weight.
        self.absorbed_scaling = self.options.scaling if absorbed else None
        self._weight_norm = start.weight_norm if changes_base else None
        self._rewritten = start.rewritten

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "scaling":
            self._store_scaling()

    def _store_scaling(self) -> None:
        """Stores s on the factors' device, for compiled forwards: a Python number would be part of
        the graph, and each s would need its own graph. The buffer holds the bits of s as an
        integer, because casting a model rounds floating-point buffers.
        """
        s = torch.tensor(self.scaling, dtype=torch.float64, device="cpu")
        self._scaling_bits = s.view(torch.int64).to(self.lora_A.device)

    def scaled(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """s · `factor` for compiled forwards in this dtype. The result has the widest of `dtype`,
        the factor's dtype and float32.
        """
        work = torch.promote_types(torch.promote_types(factor.dtype, dtype), torch.float32)
        return factor.to(work) * self._scaling_bits.view(torch.float64)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        pair = self._aside or self._stored_pair()
        if in_forward():  # hooks that store a weight in fewer bits cast the whole layer
            super()._apply(_keeping_dtype(fn), recurse)
        else:
            super()._apply(fn, recurse)
            self._store_scaling()  # `to_empty` has lost it
            self._move_beta()
        if self.start_A is not None and self.start_A.is_meta:
            self._aside = pair
        elif self._aside is not None:
            self._take_from_aside()
        return self

    def _stored_pair(self) -> _Pair | None:
        """The stored A₀ and B₀, if they have values."""
        if self.start_A is None or self.start_B is None or self.start_A.is_meta:
            return None
        return self.start_A, self.start_B

    def _take_from_aside(self) -> None:
        """Restores the values of start_A and start_B, which were on the meta device."""
        if self._aside is None or self.start_A is None or self.start_B is None:
            return
        device = local_part(self.lora_A).device
        start_A, start_B = self._aside
        self.start_A = start_A.to(device, self.start_A.dtype)
        self.start_B = start_B.to(device, self.start_B.dtype)
        self._aside = None

    def _move_beta(self) -> None:
        """Moves β to the factors' device, because forwards of experts read it there."""
        if self.beta is not None and not self.lora_A.is_meta:
            self.beta = self.beta.to(self.lora_A.device)

    @property
    def r(self) -> int:
        """The rank."""
        return self.options.r

    def load_factors(self, factors: Mapping[str, Tensor]) -> None:
        """Replaces the trained tensors (the names in `state.TRAINED`) by `factors`, which are not
        copied. Trained tensors that are not in `factors` become None.
        """
        for name in TRAINED:
            values = factors.get(name)
            setattr(self, name, None if values is None else nn.Parameter(values))
        self.set_trainable(True)

    def check_replaceable(self, state: LayerState) -> None:
        """Raises ValueError, with the reason, if `replace_` does not accept this state."""
        if self.absorbed_scaling is not None:
            raise ValueError(
                "its start was subtracted from the weight (residual='absorb'), which would have to "
                "change too: add the adapter with residual='implicit'"
            )
        if self.r != state.r:
            raise ValueError(f"its rank is {self.r}, the new one has {state.r}: {_LOAD}")
        if self.options.parts != state.parts:
            raise ValueError(f"its fused layer has other parts than the new one's: {_LOAD}")
        if (self.kernel, self.groups) != (state.kernel, state.groups):
            raise ValueError("its layer's kernels or groups are others than the new one's")
        if self.embedding != state.embedding:
            own, new = ("an embedding", "none") if self.embedding else ("no embedding", "one")
            raise ValueError(f"its layer is {own}, the new one's is {new}")
        for name in TRAINED:
            _check_same(name, getattr(self, name), getattr(state, name))
        if state.changes_base and not self._subtracts:
            raise ValueError(f"the new one has a start to subtract, this one has none: {_LOAD}")
        if state.changes_base and self.start_A is None and state.beta is None:
            raise ValueError(f"the new one has another kind of start to subtract: {_LOAD}")

    @torch.no_grad()
    def replace_(self, state: LayerState, options: AdapterOptions) -> None:
        """Overwrites the factors, the start and the numbers with those of `state`, in place, so
        that optimizers and compiled forwards keep their tensors. `options.residual` is this
        adapter's.
        """
        start_A, start_B = state.start_factors() or (torch.zeros(()), torch.zeros(()))
        news: dict[str, Tensor | None] = {name: getattr(state, name) for name in TRAINED}
        for name, new in (news | {"start_A": start_A, "start_B": start_B}).items():
            old: Tensor | None = getattr(self, name)
            if old is not None and new is not None:
                fill_(old, new.expand(full_shape(old)))

        def number(value: float | Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return torch.as_tensor(value, dtype=torch.float64, device=self.lora_A.device)

        self.beta, self._weight_norm = number(state.beta), number(state.weight_norm)
        before = self.options
        self.options, self.lora_dropout = options, options.lora_dropout
        self.scaling = options.scaling
        if before.trains != options.trains:
            self.set_trainable(any(parameter.requires_grad for parameter in self.parameters()))

    def set_trainable(self, trainable: bool) -> None:
        """Sets `requires_grad` of the tensors that train: R if there is one, else the factors that
        `options.trains` names; also the bias of B, λ and the magnitudes.
        """
        trains = "" if self.lora_R is not None else self.options.trains
        frozen = {f"lora_{half}" for half in "AB" if half not in trains}
        for name in TRAINED:
            parameter: nn.Parameter | None = getattr(self, name)
            if parameter is not None:
                parameter.requires_grad_(trainable and name not in frozen)

    def implicit_start(self) -> tuple[Tensor | None, Tensor | None]:
        """A₀ [r, in] and B₀ [out, r] if the forward subtracts s·B₀A₀, else (None, None)."""
        if not self._subtracts or self.start_A is not None:
            return (self.start_A, self.start_B) if self._subtracts else (None, None)
        return self.start_factors() or (None, None)

    def lacks(self, name: str) -> bool:
        """Whether a parameter is None, as most optional parameters are. Every forward asks this,
        and reading an attribute of nn.Module takes 0.3 us.
        """
        if self._parameters.get(name, self) is None:
            return True
        return getattr(self, name) is None  # a view by FSDP, or another adapter's

    def middle(self) -> Tensor | None:
        """What is between A and B: R or diag(λ) [r, r]; None if there is nothing."""
        return None if self.lacks("lora_R") and self.lacks("lora_diag") else super().middle()

    def left(self) -> Tensor:
        """B [out, r]; for a fused layer, its blocks, and zeros that pass no gradient."""
        if not self.options.parts:
            return self.lora_B
        if not is_dynamo_compiling() and is_dtensor(self.lora_B):
            raise ValueError(
                "an adapter with fused_parts cannot run while its B is sharded by tensor "
                "parallelism: leave the layer out of the parallel plan, or out of fused_parts"
            )
        return within_blocks(self.lora_B, self.options.parts)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, float, Tensor | None, Tensor | None]:
        """B [out, r], s, A₀ [r, in] and B₀ [out, r] for a forward in this dtype. If it is being
        compiled, B and B₀ are multiplied by s, and 1 is returned for s.
        """
        start_A, start_B = self.implicit_start()
        if not is_dynamo_compiling():
            return self.left(), self.scaling, start_A, start_B
        if start_B is not None:
            start_B = self.scaled(start_B, dtype)
        return self.scaled(self.left(), dtype), 1.0, start_A, start_B

    def output_bias(self, dtype: torch.dtype) -> Tensor | None:
        """s times the bias of B [out] for a forward in this dtype; None if there is none."""
        bias = None if self.lacks("lora_bias") else self.lora_bias
        if bias is None:
            return None
        return self.scaled(bias, dtype) if is_dynamo_compiling() else bias * self.scaling

    def add_absorbed_(self, weight: Shards) -> None:
        """Adds the absorbed start, if there is one, to this process's parts of W."""
        if self.absorbed_scaling is None:
            return
        if self.beta is not None:
            subtract_recipe_here_(weight, self.beta, self.r, -self.absorbed_scaling)
        elif self.start_A is not None and self.start_B is not None:
            start_A, start_B = whole(self.start_A), whole(self.start_B)
            subtract_factors_here_(weight, start_A, start_B, -self.absorbed_scaling)

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """‖V‖ [out], the norms of the rows of V = W + s·(BA − B₀A₀), which the forward computes
        from the stored W [out, in]; float32, or float64 over a float64 base.
        """
        lora_B, scaling, start_A, start_B = self.operands(torch.float32)
        right, left = product_factors(self.lora_A, lora_B, self.middle(), start_A, start_B)
        norms: Tensor = torch.ops.lora.row_norms(weight, right, left, scaling)
        return norms

    def gain(self, weight: Tensor) -> Tensor | None:
        """m ⊘ ‖V‖ [out] for the stored W [out, in]; only m gets a gradient (`row_gain`). None
        without magnitudes.
        """
        magnitude = self.lora_magnitude
        return None if magnitude is None else row_gain(magnitude, self.row_norms(weight))

    def measure_(self, weight: Tensor) -> None:
        """Gives a DoRA adapter at its start the magnitudes m = ‖V‖, so that the layer computes what
        it would without DoRA. W [out, in] is the weight after an absorbed start was subtracted.

        Raises:
            ValueError: a norm is not finite, or the weight is on the meta device.

        """
        if weight.is_meta:
            raise ValueError(
                "use_dora needs the norms of the weight's rows, and the weight is on the meta "
                "device: load it first"
            )
        norms = self.row_norms(weight)
        if not bool(norms.isfinite().all()):
            raise ValueError(
                "use_dora needs the norms of the weight's rows, and one is not finite: the weight "
                "holds NaN or Inf, or its numbers are too large"
            )
        self.lora_magnitude = nn.Parameter(norms)
        self.set_trainable(True)

    @torch.no_grad()
    def merge_factors(self) -> tuple[Tensor, Tensor]:
        """A' [k, in] and B' [out, k], in float32 or wider: the forward adds s·B'A' to W.

        k = r, or 2r if the forward subtracts s·B₀A₀. Sharded factors are gathered on the CPU.
        """
        own = self.layer_state() if self.sharded else self
        start = own.start_factors() if self.residual == "implicit" else None
        start_A, start_B = start or (None, None)
        return product_factors(own.lora_A, own.left(), own.middle(), start_A, start_B)

    @property
    def sharded(self) -> bool:
        """Whether this process may have only a part of the factors."""
        return is_sharded(self.lora_A) or is_sharded(self.lora_B)

    @torch.no_grad()
    def layer_state(self, keep: bool = True) -> LayerState:
        """Copies of the adapter's tensors on the CPU, and its numbers.

        Sharded tensors are gathered: all their processes must call this method. A process whose
        `keep` is False gets tensors on the meta device.

        If the start rewrote the base (LoftQ), the state describes an adapter of the rewritten base,
        from which nothing is subtracted.
        """

        def copied(tensor: Tensor) -> Tensor:
            return whole(tensor, keep)

        def copied_if_any(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else copied(tensor)

        # A start of zeros means that `replace_` has loaded an adapter without a start.
        zero = self.start_A is not None and not bool(self.start_A.any())
        stored = self.beta is None and not self._rewritten and not zero
        norm = None if self._rewritten else self._weight_norm
        if norm is not None:  # the file of sharded weights has the bytes of one process
            norm = shortened(norm, self.lora_A.dtype, _NORM_BITS)

        def number(value: Tensor | None) -> float | Tensor | None:
            if value is None or value.dim() == 1:
                return None if value is None else value.detach().to("cpu", torch.float64, copy=True)
            return float(value)

        lora_B = copied(self.lora_B)
        return LayerState(
            lora_A=copied(self.lora_A),
            lora_B=within_blocks(lora_B, self.options.parts) if self.options.parts else lora_B,
            scaling=self.scaling,
            lora_alpha=self.options.lora_alpha,
            lora_R=copied_if_any(self.lora_R),
            beta=number(self.beta),
            start_A=copied_if_any(self.start_A) if stored else None,
            start_B=copied_if_any(self.start_B) if stored else None,
            residual=self.residual,
            weight_norm=number(norm),
            lora_bias=copied_if_any(self.lora_bias),
            embedding=self.embedding,
            kernel=self.kernel,
            groups=self.groups,
            lora_magnitude=copied_if_any(self.lora_magnitude),
            lora_diag=copied_if_any(self.lora_diag),
            trains=self.options.trains,
            parts=self.options.parts,
        )

    @property
    def _experts(self) -> int | None:
        """The number of experts; None for one matrix."""
        shape = full_shape(self.lora_A)
        return shape[0] if len(shape) == 3 else None

    def get_extra_state(self) -> Tensor:
        """The numbers that restore the base: [s, β] in float64, which `.to(dtype)` does not change.

        s is NaN unless initial factors were absorbed with it. β is NaN unless the start is a DST
        start, infinite if there is an R, and minus infinite if there is a λ; each expert has a β.
        If there are magnitudes, s is negative: −s, or minus infinite for NaN. The size does not
        depend on the start, because `torch.distributed.checkpoint` loads only into tensors of the
        saved size, and skips entries that only the file has, such as an R.
        """
        scaling = math.nan if self.absorbed_scaling is None else self.absorbed_scaling
        state = torch.full((1 + (self._experts or 1),), math.nan, dtype=torch.float64)
        state[0] = scaling
        if self.lora_magnitude is not None:
            state[0] = -math.inf if math.isnan(scaling) else -scaling
        if self.beta is not None:
            state[1:] = self.beta.detach().cpu()
        elif self.lora_R is not None or self.lora_diag is not None:
            state[1:] = -math.inf if self.lora_R is None else math.inf
        return state

    def _numbers(self, state: Tensor) -> tuple[float | None, Tensor | None]:
        """s and β of an `_extra_state`, None for NaN. Until version 0.1, missing numbers at the end
        were left out: [], [s].
        """
        values = state.detach().cpu().to(torch.float64)
        scaling, beta = values[:1], values[1:]
        if self._experts is None:
            beta = beta[:1].squeeze(0)
        s = float(scaling) if scaling.numel() > 0 else math.nan
        absorbed = not math.isnan(s) and s != -math.inf
        has_beta = beta.numel() > 0 and bool(beta.isfinite().all())
        return abs(s) if absorbed else None, beta.clone() if has_beta else None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.lora_A.is_meta:
            # accelerate shards a model on meta and expects a sharded Parameter under every name.
            for name in _OWN_STATE:
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        missing: list[str] = rest[2]
        own = [prefix + name for name in _OWN_STATE] if self.lora_A.is_meta else []
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            self._expect_start(state, state_dict, prefix)
        self._check_blocks(state_dict.get(f"{prefix}lora_B"))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        missing[:] = [key for key in missing if key not in own]
        if self.lora_A.is_meta:
            return
        if self.start_A is not None and not self.start_A.is_meta:
            self._aside = None  # loaded
        self._take_from_aside()
        if self._scaling_bits.is_meta:
            self._store_scaling()
        self._move_beta()

    def _check_blocks(self, lora_B: Tensor | None) -> None:
        """Raises ValueError if this layer is fused and the saved B belongs to an adapter with other
        parts. torch reports shapes that differ.
        """
        if not self.options.parts or lora_B is None or lora_B.is_meta or is_sharded(lora_B):
            return
        if lora_B.shape == self.lora_B.shape:
            check_parts(self.options.parts, lora_B)

    def _expect_start(self, state: Tensor, state_dict: dict[str, Any], prefix: str) -> None:
        """Allocates A₀ and B₀ if the saved adapter stores them, and removes this adapter's if the
        saved adapter has a recipe instead.

        Raises:
            ValueError: the saved adapter has an R, a λ or magnitudes, which this adapter and the
                state_dict lack.

        """
        scaling, beta = self._numbers(state)
        lost = self.lora_magnitude is None and f"{prefix}lora_magnitude" not in state_dict
        if lost and bool((state.flatten()[:1] < 0).any()):
            raise ValueError(
                "the saved layer has DoRA's magnitudes (lora_magnitude), this one has none: "
                "construct it with use_dora=True"
            )
        marks = state.flatten()[1:]
        for name, what, mark in (("lora_R", "an R", math.inf), ("lora_diag", "a λ", -math.inf)):
            # If the state_dict has the tensor, torch reports it.
            lost = getattr(self, name) is None and prefix + name not in state_dict
            if lost and bool((marks == mark).any()):
                raise ValueError(
                    f"the saved layer has {what} ({name}), this one has none: construct it with "
                    "the same init_lora_weights"
                )
        saved_A, saved_B = (state_dict.get(prefix + name) for name in ("start_A", "start_B"))
        if beta is not None and (scaling is not None or self._experts):
            self.start_A = self.start_B = self._aside = None
        elif self.start_A is None and saved_A is not None and saved_B is not None:
            dtype, device = self.lora_A.dtype, local_part(self.lora_A).device
            self.start_A = torch.empty(saved_A.shape, dtype=dtype, device=device)
            self.start_B = torch.empty(saved_B.shape, dtype=dtype, device=device)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the numbers that `get_extra_state` returned.

        Raises:
            ValueError: the saved adapter's `residual` differs from this adapter's, or its initial
                factors were absorbed with another s.

        """
        scaling, beta = self._numbers(state)
        if scaling == math.inf:
            raise ValueError(
                "the saved adapter waits for its start: save it after start_adapters(model)"
            )
        # If nothing was absorbed, A₀ and B₀ are stored only for a forward that subtracts them.
        subtracts = self.start_A is not None or beta is not None
        saved = "implicit" if scaling is None and subtracts else "absorb"
        if self.residual != saved and (scaling is not None or subtracts):
            raise ValueError(
                f"the saved layer has residual={saved!r}, this one {self.residual!r}: the saved "
                "weight and start do not fit this layer; construct it with the same residual"
            )
        if scaling is not None and scaling != self.scaling:
            raise ValueError(
                f"the saved layer absorbed its start with scaling {scaling:g}, this one has "
                f"{self.scaling:g}: construct it with the same r, lora_alpha and scaling rule"
            )
        recomputed = beta is not None and (scaling is not None or self._experts)
        if self.start_A is None and not recomputed and (scaling is not None or subtracts):
            raise ValueError(
                "the saved layer has stored its start (start_A, start_B), of which this one has "
                "none: construct it with the same init_lora_weights"
            )
        self.absorbed_scaling, self.beta = scaling, beta
        self._subtracts = scaling is None and subtracts
        self._move_beta()
        self._weight_norm = None


def in_forward() -> bool:
    """Whether the caller runs inside the call of a module, for example in a hook."""
    if is_dynamo_compiling():
        return True
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _CALLS:
            return True
        frame = frame.f_back
    return False


def _keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, which moves and casts a tensor, without the cast."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved


def _check_same(name: str, old: Tensor | None, new: Tensor | None) -> None:
    """Raises ValueError unless both are None, or `new` has the shape of `old`, which can be written
    in place.
    """
    if old is None and new is None:
        return
    if old is None or new is None:
        has, lacks = ("this one", "the new one") if new is None else ("the new one", "this one")
        raise ValueError(f"{has} has {name}, {lacks} does not: {_LOAD}")
    if is_flattened(old) or old.is_meta or not (type(old.data) is Tensor or is_sharded(old)):
        raise ValueError(f"its {name} is sharded or not loaded: replace it before that")
    shape = full_shape(old)
    if shape != tuple(new.shape):
        raise ValueError(f"its {name} is {list(shape)}, the new one is {list(new.shape)}")
