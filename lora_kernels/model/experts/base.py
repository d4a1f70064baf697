"""`ExpertsBase`: a 3-D parameter of experts, as `add_lora` sees it: the `BaseLayer` of a stack."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ...layers.adapted import AdaptedLayer
from ...layers.adapter import Adapter
from ...layers.base import BaseLayer
from ...layers.kinds import refuse_sharded
from .kinds import ForeignExperts, projections, why_not_adaptable
from .module import add_stack, remove_stack, stacks_of

KIND = "experts"


class ExpertsBase(BaseLayer):
    """One 3-D parameter of an experts module, W [E, out, in] or, if `transposed`, [E, in, out].

    Attributes:
        parameter: its name in the module.
        layer: the module.

    """

    def __init__(self, experts: ForeignExperts, parameter: str) -> None:
        self.layer, self.parameter = experts, parameter
        self.kind, self.rewritable, self.transposed = KIND, True, bool(experts.is_transposed)

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        """The parameter's `AdaptedStack` if it is adapted, else the experts' module."""
        return stacks_of(self.layer).get(self.parameter, self.layer)

    @property
    def num_experts(self) -> int:  # type: ignore[override]
        """E."""
        return self.stored_weight.shape[0]

    @property
    def stored_weight(self) -> Tensor:
        """The parameter."""
        return cast(Tensor, self.layer._parameters[self.parameter])

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module and the name of its parameter."""
        return self.layer, self.parameter

    def parameter_name(self, name: str) -> str:
        """The name of the weight, of the layer called `name`."""
        return name

    def matrices(self) -> list[Tensor]:
        """A view of each expert's W [out, in]."""
        return list(self.weight().unbind())

    def refuse_sharded(self, name: str) -> None:
        """Raises a ValueError that names the parameter if it is not loaded or in a flat one."""
        refuse_sharded(name.rpartition(".")[0], self.layer, rewritable=True)

    def adapted(self, adapter: Adapter, adapter_name: str) -> AdaptedLayer:
        """The parameter's stack, with this adapter added; the weight is not changed."""
        stack = add_stack(self.layer, self.parameter)
        try:
            stack.attach(adapter_name, adapter)
        except BaseException:
            if not stack.adapter_names:
                remove_stack(stack)
            raise
        return stack


def experts_bases(name: str, experts: nn.Module) -> dict[str, ExpertsBase]:
    """The parameters of the module `name` that can be adapted, by their names in the model; {} if
    it is not an experts module or cannot be adapted.
    """
    if why_not_adaptable(experts) is not None:
        return {}
    return {
        f"{name}.{parameter}" if name else parameter: ExpertsBase(experts, parameter)
        for parameter in projections(experts)
    }
