"""`LoRAEmbedding`: a layer with adapters that replaces an `nn.Embedding` and uses its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...ops.linear.factors import without_autocast
from ..adapter import Adapter
from ..kinds import ForeignLayer, lookup_scale
from .float_layer import AdaptedFloatLayer
from .parallel import refuse_parallel_embedding

_OPTIONS = (
    *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
    *("scale_grad_by_freq", "sparse"),
)


class LoRAEmbedding(AdaptedFloatLayer, nn.Embedding):  # type: ignore[misc]  # another `freeze`
    """y = W[i] + s · Aᵀ[i] Bᵀ for tokens i; W [V, D] is frozen, A [r, V] and B [D, r] are trained.
    These are columns of Wᵀ + s·BA, where Wᵀ is a matrix [out = D, in = V]. Initial factors, R and
    the residual are as for `LoRALinear`.

    Only the rows that are looked up are read: a forward adds a product of rank r (2r if it
    subtracts initial factors), in float32 (float64 over a float64 base), also under autocast. A's
    gradient is dense, [r, V]. Until the first step, y is W[i] bit for bit ("implicit") or to one
    rounding ("absorb"). DoRA's magnitudes [D] are those of the columns of the table W; every
    forward reads all of W for their norms.

    As in PEFT: `lora_dropout` has no effect, because there is no input to drop; the column of A at
    `padding_idx` gets no gradient; and if a model's subclass multiplies by `embed_scale`, the
    update is multiplied too.
    """

    weight: nn.Parameter
    transposed = True
    _class: type[nn.Embedding]
    _scale_form: str  # the result of `lookup_scale`

    @classmethod
    def over(cls, embedding: ForeignLayer) -> LoRAEmbedding:
        """A layer with the parameter of `embedding`, and no adapter yet."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        _copy_options(embedding, layer)
        layer.weight, layer.training = embedding.weight, embedding.training
        layer._describe(type(embedding))
        layer._begin()
        return layer

    def _describe(self, former: type[nn.Module]) -> None:
        self._class, self._scale_form = former, lookup_scale(self, former) or ""  # type: ignore[assignment]
        self.register_parameter("bias", None)

    def _base_class(self) -> type[nn.Module]:
        return self._class

    def _given_back(self) -> nn.Module:
        del self._parameters["bias"]
        return super()._given_back()

    def attach(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter.

        Raises:
            ValueError: the adapter has a bias of B.

        """
        if adapter.lora_bias is not None:
            raise ValueError("the adapter of an embedding cannot have a bias of lora_B")
        adapter.embedding = True
        super().attach(name, adapter)

    def forward(self, input: Tensor) -> Tensor:
        """y [..., D] of the tokens [...], integers, in the weight's dtype."""
        refuse_parallel_embedding(self.matrix(), self.lora_A, self.lora_B)
        rows = self._rows_of(input, self.matrix().T)  # [..., D]
        if self.adapter_enabled:
            rows = self._updated(rows, input, self.active())
        elif self.absorbed:
            rows = self._restored(rows, input, self.adapter(self.absorbed))
        return rows * self._scale() if self._scale_form else rows

    def _rows_of(self, input: Tensor, table: Tensor) -> Tensor:
        """The rows [..., k] of a table [V, k]."""
        return nn.functional.embedding(
            input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )

    def _scale(self) -> Any:
        """The factor of the original layer's forward: a number, or a tensor of one element."""
        scale: Any = self.embed_scale
        return scale.to(self.matrix().dtype) if self._scale_form == "cast" else scale

    def _updated(self, rows: Tensor, input: Tensor, adapter: Adapter) -> Tensor:
        """`rows` [..., D] with the adapter's update, s · (z (B − B₀)ᵀ + (z − z₀) B₀ᵀ), whose two
        terms are both exactly zero before the first step.
        """
        lora_A = adapter.lora_A  # [r, V]
        self._check_size(lora_A)
        work = torch.promote_types(rows.dtype, lora_A.dtype)
        lora_B, scaling, start_A, start_B = adapter.operands(work)
        z, left = self._rows_of(input, lora_A.T).to(work), lora_B.to(work)  # [..., r], [D, r]
        with without_autocast(rows):
            middle = adapter.middle()  # [r, r]
            if middle is not None:
                z = z @ middle.to(work).T
            if start_A is not None and start_B is not None:
                z0, left0 = self._rows_of(input, start_A.T).to(work), start_B.to(work)
                z, left = torch.cat([z, z - z0], -1), torch.cat([left - left0, left0], 1)
            left = left if scaling == 1 else left * scaling
            return _plus_product(rows, z, left, adapter.gain(self.matrix()))

    def _restored(self, rows: Tensor, input: Tensor, adapter: Adapter) -> Tensor:
        """`rows` [..., D] plus the product of the initial factors, which was subtracted from W."""
        start, scaling = adapter.start_factors(), adapter.absorbed_scaling
        if start is None or scaling is None:
            return rows
        work = torch.promote_types(rows.dtype, start[0].dtype)
        z0 = self._rows_of(input, start[0].T).to(work)  # [..., r]
        with without_autocast(rows):
            return _plus_product(rows, z0, start[1].to(work) * scaling)

    def _check_size(self, lora_A: Tensor) -> None:
        """Raises ValueError if the weight's number of rows has changed."""
        found, known = self.matrix().shape[-1], lora_A.shape[-1]
        if lora_A.dim() == 2 and found != known:
            raise ValueError(f"this embedding has {found} rows, its adapter has {known}; {_RESIZE}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_embeddings" and vars(self).get(name, value) != value:
            self._refuse_resizing(value)
        super().__setattr__(name, value)

    def _refuse_resizing(self, size: int) -> None:
        """Raises ValueError for transformers' `resize_token_embeddings`, which has already resized
        the weight when it calls this. Added rows are removed again; removed rows are lost.
        """
        known, weight = self.num_embeddings, self._parameters.get("weight")
        lost = ""
        if weight is not None and len(weight) == size > known:
            weight.data = weight.data[:known].clone()
        elif weight is not None and len(weight) < known:
            lost = ". The removed rows are lost: load the model again"
        raise ValueError(
            f"this embedding cannot be resized to {size} rows: its adapter has {known}; "
            f"{_RESIZE}{lost}"
        )

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Embedding:
        plain = self._class.__new__(self._class)
        nn.Module.__init__(plain)
        _copy_options(self, plain)
        plain.weight = weight
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """The sizes and the active adapter's settings."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, r={self.r}, "
            f"scaling={self.scaling:g}, residual={self.residual!r}"
        )


_RESIZE = "unload_lora, then resize_token_embeddings, then add_lora or load_adapter"


def _copy_options(old: ForeignLayer, new: nn.Module) -> None:
    """Gives `new` the options of an `nn.Embedding`, and the scale of a model's subclass."""
    for name in _OPTIONS:
        setattr(new, name, getattr(old, name))
    scale = getattr(old, "embed_scale", None)
    if isinstance(scale, Tensor):
        persistent = "embed_scale" not in old._non_persistent_buffers_set
        new.register_buffer("embed_scale", scale, persistent=persistent)
    elif scale is not None:
        new.embed_scale = scale


def _plus_product(rows: Tensor, z: Tensor, left: Tensor, gain: Tensor | None = None) -> Tensor:
    """`rows` [..., D] + z [..., k] leftᵀ, with left [D, k], times `gain` [D] if that is given;
    computed in z's dtype and rounded once.
    """
    flat = rows.reshape(-1, rows.shape[-1]).to(z.dtype)  # [n, D]
    total = torch.addmm(flat, z.reshape(-1, z.shape[-1]), left.T)
    total = total if gain is None else total * gain
    return total.view(rows.shape).to(rows.dtype)
