"""`AdaptedStack`: the adapters of one 3-D parameter of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ...init.sharded.layout import Block, Shards, is_sharded
from ...init.sharded.subtract import subtract_factors_here_
from ...layers.adapted import AdaptedLayer
from ...layers.linear import ABSORBED
from .forward import SUFFIX, Factors, StartFactors
from .kinds import ForeignExperts
from .parallel import LocalPart, cut_start, local_factors

_BLOCK = 64 * 2**20  # bytes of float32 that are merged at a time


class AdaptedStack(AdaptedLayer):
    """The adapters of `experts`.`parameter`, W [E, out, in] or, if `transposed`, [E, in, out].

    The experts' module calls nothing here: its forward reads `factors`. A, B and R of an adapter
    are stacks [E, r, in], [E, out, r] and [E, r, r].
    """

    parameter: str
    transposed: bool
    part: LocalPart | None  # the forward's part of W, if W is sharded there
    _experts: ForeignExperts

    @classmethod
    def over(cls, experts: ForeignExperts, parameter: str) -> AdaptedStack:
        """The stack of a parameter, without adapters yet."""
        stack = cls()
        stack._begin()
        stack.parameter, stack.transposed = parameter, experts.is_transposed
        stack.training, stack.part = experts.training, None
        # Not a submodule: the experts' module has the stack as one.
        object.__setattr__(stack, "_experts", experts)
        return stack

    @property
    def experts(self) -> ForeignExperts:
        """The module that owns the parameter."""
        return self._experts

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as it is stored."""
        weight: nn.Parameter = self._experts._parameters[self.parameter]
        return weight

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    def name_in(self, path: str) -> str:
        """The parameter's name, from the path of this module in the model."""
        return path.removesuffix(SUFFIX)

    def matrix(self) -> Tensor:
        """A view of the stored weight as [E, out, in]; absorbed factors are not added back."""
        return self.weight.mT if self.transposed else self.weight

    def factors(self, dtype: torch.dtype) -> Factors | None:
        """What a forward in this dtype adds to the product with W; None if nothing.

        A disabled adapter that absorbed its start adds s·B₀A₀ back.
        """
        if not self.adapter_enabled:
            return self._restoring()
        adapter, part = self.active(), self.part
        lora_A, lora_B, lora_R = local_factors(adapter, part)
        lora_A = lora_A if lora_R is None else lora_R @ lora_A
        p = adapter.lora_dropout if self.training else 0.0
        seed = 0 if part is None else part.seed

        def start() -> StartFactors:
            found = adapter.implicit_start()
            return found if part is None else part.of_start(found)

        if not is_dynamo_compiling():
            return Factors(lora_A, lora_B, adapter.scaling, p, start, seed)
        start_A, start_B = start()
        lora_B = adapter.scaled(lora_B, dtype)
        start_B = start_B if start_B is None else adapter.scaled(start_B, dtype)
        return Factors(lora_A, lora_B, 1.0, p, lambda: (start_A, start_B), seed)

    def follow(self, adapter_name: str, mesh: Any, placements: tuple[Any, ...]) -> None:
        """Prepares the forward for a parameter with these placements there, and for the factors of
        an adapter, which are DTensors that fit it.
        """
        self.part = LocalPart.laid_out(self.weight.shape, self.transposed, mesh, placements)
        cut_start(self.adapter(adapter_name))

    def _restoring(self) -> Factors | None:
        if self.absorbed is None:
            return None
        adapter = self.adapter(self.absorbed)
        start = adapter.start_factors()
        if start is None:
            return None
        lora_A, lora_B = start if self.part is None else self.part.of_start(start)
        if lora_A is None or lora_B is None:
            return None
        return Factors(lora_A, lora_B, float(adapter.absorbed_scaling or 0))

    def freeze(self) -> None:
        """Sets `requires_grad` of the experts' parameters to False, and marks an absorbed W."""
        for parameter in self._experts._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        if self.absorbed:
            setattr(self.weight, ABSORBED, True)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """W + s·(BA − B₀A₀) [E, out, in] of the active adapter, in W's dtype."""
        merged = self.matrix().detach().clone()
        self._add_update_(merged)
        return merged

    @torch.no_grad()
    def merge_(self, shared: bool = False) -> None:
        """Adds s·(BA − B₀A₀) of the active adapter to the parameter, in place: summed in float32 or
        wider and rounded once. If it is `shared` with other modules, a new parameter replaces it.
        """
        if shared:
            own = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            self._experts._parameters[self.parameter] = own
        if is_sharded(self.weight):
            right, left = self.active().merge_factors()
            shards = Shards.of(self.weight, self.transposed)
            subtract_factors_here_(shards, right, left, -self.active().scaling)
        else:
            self._add_update_(self.matrix().detach())
        vars(self.weight).pop(ABSORBED, None)

    def expert_views(self) -> list[ExpertView]:
        """The experts one by one."""
        return [ExpertView(self, e) for e in range(self.num_experts)]

    def _add_update_(self, matrix: Tensor) -> None:
        adapter = self.active()
        right, left = adapter.merge_factors()  # [E, k, in], [E, out, k]
        step = max(1, _BLOCK // max(1, 4 * matrix[:1].numel()))
        for begin in range(0, len(matrix), step):
            part = slice(begin, begin + step)
            wide = matrix[part].to(right.dtype)
            wide = torch.baddbmm(wide, left[part], right[part], alpha=adapter.scaling)
            matrix[part].copy_(wide)

    @torch.no_grad()
    def restore_(self) -> nn.Module:
        """Adds absorbed factors to the parameter in place, and returns the module that owns the
        parameter. This stack must not be used afterwards.
        """
        if self.absorbed:
            shards = Shards.of(self.weight, self.transposed)
            self.adapter(self.absorbed).add_absorbed_(shards)
            vars(self.weight).pop(ABSORBED, None)
        module: nn.Module = self._experts
        return module

    def extra_repr(self) -> str:
        """The sizes and the active adapter's settings."""
        return (
            f"{self.parameter}, experts={self.num_experts}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}, residual={self.residual!r}"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise TypeError("nn.DataParallel cannot replicate experts with adapters: use DDP")


@dataclass(frozen=True)
class ExpertView:
    """One expert of a stack, with the attributes of a linear layer that measurements read."""

    stack: AdaptedStack
    index: int

    @property
    def r(self) -> int:
        """The rank."""
        return self.stack.r

    @property
    def scaling(self) -> float:
        """s."""
        return self.stack.scaling

    @property
    def lora_A(self) -> Tensor:
        """[r, in]."""
        return self.stack.lora_A[self.index]

    @property
    def lora_B(self) -> Tensor:
        """[out, r]."""
        return self.stack.lora_B[self.index]

    def middle(self) -> Tensor | None:
        """R or diag(λ) [r, r], or None."""
        middle = self.stack.middle()
        return None if middle is None else middle[self.index]

    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """A₀ [r, in] and B₀ [out, r] of the active adapter, or None."""
        start = self.stack.start_factors()
        return None if start is None else (start[0][self.index], start[1][self.index])

    def base_weight(self) -> Tensor:
        """W [out, in] before it was adapted."""
        matrix, absorbed = self.stack.matrix()[self.index], self.stack.absorbed
        if absorbed is None:
            return matrix
        matrix = matrix.detach().clone()
        shape = (self.stack.num_experts, *matrix.shape)
        own = [Block(self.index, matrix, 0, 0)]
        self.stack.adapter(absorbed).add_absorbed_(
            Shards(shape, own, matrix.dtype, matrix.device, None, True)
        )
        return matrix
