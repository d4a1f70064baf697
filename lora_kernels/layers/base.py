"""What layers with adapters share: their names, which one is active, and switching them off."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._utils.checks import check_rank
from .._utils.errors import unknown_name
from ..init.start import Start, subtract_factors_, subtract_recipe_
from .adapter import Adapter
from .options import AdapterOptions

ABSORBED = "_lora_absorbed"  # set on a Parameter that lacks a start


class AdaptedLayer(Adapter):
    """A layer with one adapter of its own, and room for others beside it over the same base.

    `active_adapter` is the name of the one that counts, unless `adapter_enabled` is False: then the
    layer computes as its base.
    """

    def _begin_as(
        self, adapter_name: str, options: AdapterOptions, start: Start, changes_base: bool
    ) -> None:
        """The layer's own adapter, which is active."""
        self.adapter_name = self.active_adapter = adapter_name
        self.adapter_enabled = True
        self.adapters: nn.ModuleDict | None = None
        self._begin(options, start, changes_base)

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters of this layer, the first one first."""
        return [self.adapter_name, *(self.adapters or ())]

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name, this layer itself for the first."""
        if name == self.adapter_name:
            return self
        if self.adapters is None or name not in self.adapters:
            raise unknown_name("adapter", name, self.adapter_names)
        return self.adapters[name]

    def active(self) -> Adapter:
        """The active adapter."""
        return (
            self if self.active_adapter == self.adapter_name else self.adapter(self.active_adapter)
        )

    def attach(self, name: str, adapter: Adapter) -> None:
        """One more adapter, which is not active yet."""
        if self.adapters is None:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = adapter.train(self.training)

    def detach(self, name: str) -> None:
        """Takes off an adapter that was attached and is not active."""
        del self.adapters[name]
        self.adapters = self.adapters or None

    @property
    def absorbed(self) -> bool:
        """Whether the base lacks the start of an adapter."""
        return self._absorbed_scaling is not None

    def _dropout(self, adapter: Adapter, x: Tensor) -> tuple[float, Tensor | None]:
        """Probability and seed of this call."""
        if not self.training or adapter.lora_dropout == 0:
            return 0.0, None
        # From the global generator, so that manual_seed and checkpointing govern it.
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
        return adapter.lora_dropout, seed


class AdaptedMatrix(AdaptedLayer):
    """A layer that has W itself, as a parameter `weight` that it may rewrite, and `bias`.

    Subclasses say how W is stored, and give `_plain`, the layer without adapters over the given
    parameters.
    """

    transposed = False  # whether `weight` is [in, out]

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        raise NotImplementedError

    def _matrix(self) -> Tensor:
        """W [out, in], a view."""
        return self.weight.T if self.transposed else self.weight

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ) -> None:
        arguments = (state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        is_base = f"{prefix}weight" in state_dict and f"{prefix}_extra_state" not in state_dict
        if self.absorbed and is_base:
            errors.append(
                f"{prefix}weight is a base's, but this layer's lacks the start that its adapter "
                "absorbed: load the base first and adapt it then"
            )
            return
        super()._load_from_state_dict(*arguments)

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if self.absorbed:
            setattr(self.weight, ABSORBED, True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features], in x's dtype."""
        if not self.adapter_enabled:
            return nn.functional.linear(x, self._base_matrix(), self.bias)
        adapter = self.active()
        return torch.ops.lora.linear(
            x,
            self._matrix(),
            self.bias,
            adapter.lora_A,
            adapter.lora_B,
            adapter.scaling,
            *self._dropout(adapter, x),
            *adapter._implicit_start(),
            adapter.lora_R,
        )

    def _base_matrix(self) -> Tensor:
        """W as it was before the adapter: itself, or a copy with the start put back."""
        if not self.absorbed:
            return self._matrix()
        matrix = self._matrix().detach().clone()
        self._put_back_(matrix)
        return matrix

    @torch.no_grad()
    def base_linear(self) -> nn.Module:
        """A new layer of the kind that was adapted, as it was before.

        W is what it was, bit for bit if the residual is implicit or the start was zero, else to one
        rounding of its dtype.
        """
        return self._copied(self._base_matrix().detach().clone())

    @torch.no_grad()
    def restore_(self) -> nn.Module:
        """The layer that was adapted, over this one's own parameters; what it absorbed is put back
        in place. This layer is not to be used any more.
        """
        if self.absorbed:
            self._put_back_(self._matrix().detach())
            vars(self.weight).pop(ABSORBED, None)
        return self._plain(self.weight, self.bias)

    def _copied(self, matrix: Tensor) -> nn.Module:
        """A new layer with W = `matrix` [out, in] and a copy of the bias."""
        weight = matrix.T.contiguous() if self.transposed else matrix
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return self._plain(nn.Parameter(weight), bias)

    def _put_back_(self, matrix: Tensor) -> None:
        """Adds the start that was absorbed to `matrix` in place."""
        if self._beta is not None:
            subtract_recipe_(matrix, self._beta, self.r, -self._absorbed_scaling)
        else:
            subtract_factors_(matrix, self.start_A, self.start_B, -self._absorbed_scaling)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A new layer of the kind that was adapted, with the active adapter merged:
        W + s·(BA − B₀A₀), with BRA for BA if there is an R, summed in float32 or wider and rounded
        once.
        """
        adapter = self.active()
        work = torch.promote_types(adapter.lora_A.dtype, torch.float32)
        matrix = self._matrix().detach().to(work, copy=True)
        left, right = adapter.lora_B.to(work), adapter.lora_A.to(work)
        if adapter.lora_R is not None:
            right = adapter.lora_R.to(work) @ right
        start_A, start_B = adapter._implicit_start()
        if start_A is not None:
            left = torch.cat([left, -start_B.to(work)], dim=1)  # [out, 2r]
            right = torch.cat([right, start_A.to(work)], dim=0)  # [2r, in]
        merged = matrix.addmm_(left, right, alpha=adapter.scaling)
        return self._copied(merged.to(self.weight.dtype))


def refuse_unfit(matrix: Tensor, weight: nn.Parameter, r: int, initializer) -> None:
    """Raises if W [out, in], a view of `weight`, cannot be adapted at that rank.

    Raises:
        ValueError: r does not fit, the weight lacks another adapter's start, or is not there.

    """
    check_rank(r, *matrix.shape)
    if getattr(weight, ABSORBED, False):
        raise ValueError(
            "this weight lacks the start of another adapter, which absorbed it; adapt it with "
            "residual='implicit' if several adapters share it"
        )
    if (initializer.changes_base or initializer.reads_weight) and weight.is_meta:
        raise ValueError(
            f"{type(initializer).__name__} reads the weight, which is on the meta device: "
            "load it first"
        )
