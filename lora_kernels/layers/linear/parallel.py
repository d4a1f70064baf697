"""The forward of an adapted layer under tensor parallelism: its tensors are DTensors.

Every process calls `lora::linear` with its parts of the tensors. In each mesh dimension, the layer
is sharded in one of these ways (S(d): along the dimension d; R: replicated; P: partial sums):

    W     x      A     B     b     y
    S(0)  R      R     S(0)  S(0)  S(-1)
    S(1)  S(-1)  S(1)  R     R     P
    R     R      R     R     R     R
    R     S(i)   R     R     R     S(i)    i is not the last dimension: a part of the batch

So the forward sends what the base layer sends, and nothing for the adapter. The gradient of a
replicated factor is a sum over the processes: one all-reduce of [r, in] or [out, r] for each layer
in the backward. Factors with other placements are redistributed for each forward, and their
gradients are redistributed back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ...init.sharded.layout import is_dtensor, of_dimension
from ..adapter import Adapter
from .seeds import mesh_seed

# torch.distributed is imported only for a tensor that needs it.
DTensor: TypeAlias = Any
DeviceMesh: TypeAlias = Any
Placement: TypeAlias = Any
Placements: TypeAlias = tuple[Placement, ...]  # one for each mesh dimension
_PLAIN = frozenset((Tensor, nn.Parameter))
PARALLEL_DORA = (
    "a DoRA adapter (use_dora) cannot run while its layer is sharded by tensor parallelism: the "
    "norms of the rows would need all parts of the weight; leave the layer out of the parallel "
    "plan, or use an adapter without use_dora"
)
PARALLEL_EMBEDDING = (
    "an adapted embedding cannot run while it is sharded by tensor parallelism: leave it "
    "out of target_modules, or out of the parallel plan"
)


class Update(NamedTuple):
    """What a forward adds to x Wᵀ + b: s · drop(x) Aᵀ Rᵀ Bᵀ − s · x A₀ᵀ B₀ᵀ + `bias`. The tensors
    are plain or DTensors. `stored` are the A and B of the adapter.
    """

    lora_A: Tensor  # [r, in]
    lora_B: Tensor  # [out, r]
    scaling: float
    stored: tuple[Tensor, Tensor]
    start_A: Tensor | None = None  # [r, in]
    start_B: Tensor | None = None  # [out, r]
    lora_R: Tensor | None = None  # [r, r]
    bias: Tensor | None = None  # [out]

    @staticmethod
    def of(adapter: Adapter, dtype: torch.dtype) -> Update:
        """The update of an adapter, for a forward in this dtype."""
        lora_B, scaling, start_A, start_B = adapter.operands(dtype)
        bias = adapter.output_bias(dtype)
        lora_A, lora_R, stored = adapter.lora_A, adapter.middle(), (adapter.lora_A, adapter.lora_B)
        return Update(lora_A, lora_B, scaling, stored, start_A, start_B, lora_R, bias)

    @staticmethod
    def of_absorbed(adapter: Adapter) -> Update | None:
        """What the adapter has subtracted from W; None if it subtracted nothing."""
        start, scaling = adapter.start_factors(), adapter.absorbed_scaling
        if start is None or scaling is None:
            return None
        return Update(*start, scaling, (adapter.lora_A, adapter.lora_B))


def is_parallel(*tensors: Tensor) -> bool:
    """Whether one of the tensors is a DTensor."""
    # Every forward asks this, mostly of plain tensors.
    return not _PLAIN.issuperset(map(type, tensors)) and any(map(is_dtensor, tensors))


def check_input(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError if W is a DTensor, and x is not or is on another mesh."""
    if not is_parallel(weight):
        return
    mesh = _mesh(weight)
    if not is_parallel(x):
        raise ValueError(
            "the layer's weight is sharded over processes, but x is a plain tensor: call the layer "
            "through its model (after parallelize_module or fully_shard), or pass "
            "DTensor.from_local(x, mesh, placements)"
        )
    if _mesh(x) != mesh:
        raise ValueError(
            f"x is a DTensor of {_mesh(x)}, the layer's weight one of {mesh}: use one mesh for both"
        )


def parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, dropout: float = 0.0
) -> Tensor:
    """y [..., out] of x [..., in], W [out, in] and b [out], in x's dtype.

    If x is a DTensor, so is y, and the other tensors are DTensors on its mesh, or plain tensors
    that every process has whole. x, W and b may also be local parts, while A and B are DTensors
    that fit W's part. Then y is a local part too; if W's part has only some columns, y is a partial
    sum. `dropout` is a probability; the mask is the one that a single process would draw.

    Raises:
        ValueError: the tensors do not fit together.

    """
    check_input(x, weight)
    width = update.lora_A.shape[1]
    if not is_parallel(x):
        layout = _Layout.of_factors(*update.stored, x.dim())
        return _linear(layout, x, weight, bias, layout.parts(update, weight), dropout, width)
    mesh = _mesh(x)
    layout = _Layout.of(mesh, _placements(weight, mesh), _placements(x, mesh), x.dim())
    local_x = layout.part(x, layout.all("x"), layout.all("grad_x"))
    local_W = layout.part(weight, layout.all("W"), layout.all("grad_W"))
    local_b = layout.once(bias)
    y = _linear(layout, local_x, local_W, local_b, layout.parts(update, local_W), dropout, width)
    return _wrapped(y, mesh, layout.all("y"), (*x.shape[:-1], weight.shape[0]))


def on_parts(weight: Tensor, update: Update, compute: Callable[[Tensor, Update], Tensor]) -> Tensor:
    """`compute(W, update)` [out, in], from the local parts of its operands: a DTensor that is
    sharded as W [out, in] is, or a local part if W is one.
    """
    if not is_parallel(weight):
        layout = _Layout.of_factors(*update.stored, 2)
        return compute(weight, layout.parts(update, weight))
    mesh = _mesh(weight)
    layout = _Layout.of(mesh, _placements(weight, mesh), (_replicated(),) * mesh.ndim, 2)
    local = layout.part(weight, layout.all("W"), layout.all("grad_W"))
    found = compute(local, layout.parts(update, local))
    return _wrapped(found, mesh, layout.all("W"), tuple(weight.shape))


def refuse_parallel_dora(adapter: Adapter) -> None:
    """Raises ValueError if the adapter has magnitudes; its layer's tensors are DTensors."""
    if adapter.lora_magnitude is not None:
        raise ValueError(PARALLEL_DORA)


def refuse_parallel_embedding(*tensors: Tensor) -> None:
    """Raises ValueError if a tensor of an adapted embedding is a DTensor."""
    if is_parallel(*tensors):
        raise ValueError(PARALLEL_EMBEDDING)


def _linear(
    layout: _Layout,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    update: Update,
    dropout: float,
    width: int,
) -> Tensor:
    """y from the local parts, with the mask for this part of x [..., width]."""
    lora_A, start_A, offset, seed = update.lora_A, update.start_A, 0, None
    if dropout:
        offset = layout.column_offset(width)
        seed = mesh_seed(layout.mesh, x.device, layout.batch_part())
        if offset % 4:  # the mask is drawn for four columns at once: columns of zeros before x
            before = offset % 4
            x, weight, lora_A = (_padded(t, before) for t in (x, weight, lora_A))
            start_A = None if start_A is None else _padded(start_A, before)
            offset -= before
    y: Tensor = torch.ops.lora.linear(
        x,
        weight,
        bias,
        lora_A,
        update.lora_B,
        update.scaling,
        dropout,
        seed,
        start_A,
        update.start_B,
        update.lora_R,
        offset,
    )
    return y if update.bias is None else y + update.bias.to(y.dtype)


class _Way(NamedTuple):
    """The placements of the operands, and of the gradients that a process computes from its parts,
    in one mesh dimension.
    """

    W: Placement
    x: Placement
    A: Placement
    B: Placement  # and of b
    y: Placement
    grad_W: Placement
    grad_x: Placement
    grad_A: Placement
    grad_B: Placement
    grad_R: Placement
    grad_b: Placement

    @staticmethod
    def of(W: Placement, x: Placement, dims: int) -> _Way:
        """For a W and an x [..., in] of `dims` dimensions with these placements. x is redistributed
        to fit W, except that a replicated W follows an x of which each process has some columns.
        """
        R, P, last = _replicated(), _partial(), dims - 1
        if _dim(W) is None and _dim(x, dims) == last:
            W = of_dimension(x, 1)
        if _dim(W) == 0:
            return _Way(W, R, R, W, of_dimension(W, last), W, P, P, W, P, W)
        if _dim(W) == 1:
            x = of_dimension(W, last)
            return _Way(W, x, W, R, P, W, x, W, P, P, R)
        if _dim(x, dims) is None:
            return _Way(*(R,) * 11)
        return _Way(R, x, R, R, x, P, x, P, P, P, P)


@dataclass(frozen=True)
class _Layout:
    """How the operands of a forward are sharded in all mesh dimensions."""

    mesh: DeviceMesh
    ways: tuple[_Way, ...]

    @staticmethod
    def of(mesh: DeviceMesh, W: Placements, x: Placements, dims: int) -> _Layout:
        """For a W and an x [..., in] of `dims` dimensions with these placements."""
        return _Layout(mesh, tuple(_Way.of(w, p, dims) for w, p in zip(W, x, strict=True)))

    @staticmethod
    def of_factors(A: Tensor, B: Tensor, dims: int) -> _Layout:
        """For the W and x of `dims` dimensions whose parts fit those of A and B."""
        mesh = _mesh(A if is_parallel(A) else B)
        W = tuple(
            a if _dim(a) == 1 else b if _dim(b) == 0 else _replicated()
            for a, b in zip(_placements(A, mesh), _placements(B, mesh), strict=True)
        )
        x = tuple(of_dimension(w, dims - 1) if _dim(w) == 1 else _replicated() for w in W)
        return _Layout.of(mesh, W, x, dims)

    def all(self, name: str) -> Placements:
        """The placements of an operand or gradient, by its name in `_Way`."""
        return tuple(getattr(way, name) for way in self.ways)

    def part(self, tensor: Tensor, placements: Placements, grads: Placements) -> Tensor:
        """The local part of a tensor with these placements; its local gradient will have the
        placements `grads`. The tensor's gradient gets the tensor's own placements; for a plain
        tensor it is whole.
        """
        tensor = _as_dtensor(tensor, self.mesh)
        if _mesh(tensor) != self.mesh:
            raise ValueError(
                f"a factor of the adapter is a DTensor of {_mesh(tensor)}, but the layer runs on "
                f"{self.mesh}: distribute both over one mesh"
            )
        sharded: DTensor = tensor
        if not torch.is_grad_enabled():
            local: Tensor = sharded.to_local()
            if sharded.placements == placements:
                return local
            # In inference mode, torch 2.11 cannot redistribute a parameter.
            sharded = _wrapped(local.detach(), self.mesh, sharded.placements, sharded.shape)
        local = sharded.redistribute(self.mesh, placements).to_local(grad_placements=grads)
        return local

    def parts(self, update: Update, weight: Tensor) -> Update:
        """The local parts of an update, for this part of W [out, in].

        Raises:
            ValueError: the parts of A and B do not fit W's.

        """

        def part(tensor: Tensor | None, name: str) -> Tensor | None:
            if tensor is None:
                return None
            return self.part(tensor, self.all(name), self.all(f"grad_{name}"))

        everywhere = (_replicated(),) * self.mesh.ndim
        lora_A = self.part(update.lora_A, self.all("A"), self.all("grad_A"))
        lora_B = self.part(update.lora_B, self.all("B"), self.all("grad_B"))
        lora_R = update.lora_R
        if lora_R is not None:
            lora_R = self.part(lora_R, everywhere, self.all("grad_R"))
        if (lora_B.shape[0], lora_A.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"this process has a part {list(weight.shape)} of the layer's weight, but factors "
                f"for {[lora_B.shape[0], lora_A.shape[1]]}, by their placements: give A the "
                "sharding of W's columns and B that of its rows"
            )
        start_A, start_B = part(update.start_A, "A"), part(update.start_B, "B")
        bias = self.once(update.bias)
        extras = (start_A, start_B, lora_R, bias)
        return Update(lora_A, lora_B, update.scaling, (lora_A, lora_B), *extras)

    def once(self, bias: Tensor | None) -> Tensor | None:
        """The local part of a bias [out]. If the results of processes are added up, one of them
        gets the bias. The others get zeros that pass the bias's gradient, or None if none is
        needed.
        """
        if bias is None:
            return None
        own = self.part(bias, self.all("B"), self.all("grad_b"))
        where = _coordinate(self.mesh)
        if not any(way.y.is_partial() and at for way, at in zip(self.ways, where, strict=True)):
            return own
        return own - own.detach() if own.requires_grad else None

    def column_offset(self, width: int) -> int:
        """The index in x [..., width] of the first local column.

        Raises:
            ValueError: the local columns are not contiguous.

        """
        begin, size = 0, width
        for index, (way, at) in enumerate(zip(self.ways, _coordinate(self.mesh), strict=True)):
            if _dim(way.W) != 1:
                continue
            if getattr(way.W, "split_factor", None) is not None:
                raise ValueError(
                    f"lora_dropout needs contiguous columns of W, but it is placed as {way.W}: set "
                    "lora_dropout=0"
                )
            length = -(-size // self.mesh.size(index))  # of all parts but the last ones
            skipped = min(length * at, size)
            begin, size = begin + skipped, min(length, size - skipped)
        return begin

    def batch_part(self) -> int:
        """The index of this process's part of the batch, among the parts of this mesh."""
        number = 0
        for index, (way, at) in enumerate(zip(self.ways, _coordinate(self.mesh), strict=True)):
            if _dim(way.W) is None and not way.x.is_replicate():
                number = number * self.mesh.size(index) + at
        return number


def _mesh(tensor: Tensor) -> DeviceMesh:
    sharded: DTensor = tensor
    return sharded.device_mesh


def _placements(tensor: Tensor, mesh: DeviceMesh) -> Placements:
    """The placements of a DTensor; a plain tensor is replicated."""
    if not is_parallel(tensor):
        return (_replicated(),) * mesh.ndim
    sharded: DTensor = tensor
    return tuple(sharded.placements)


def _as_dtensor(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The tensor itself if it is a DTensor, else a replicated DTensor of it."""
    if is_parallel(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    if not torch.is_grad_enabled():  # in inference mode, torch 2.11 cannot wrap a parameter
        tensor = tensor.detach()
    whole: Tensor = DTensor.from_local(tensor, mesh, (_replicated(),) * mesh.ndim, run_check=False)
    return whole


def _wrapped(
    local: Tensor, mesh: DeviceMesh, placements: Placements, shape: Sequence[int]
) -> Tensor:
    """A DTensor of this shape, perhaps uneven, with this local part."""
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    strides = [1]
    for length in reversed(size[1:]):
        strides.insert(0, strides[0] * max(length, 1))
    whole: Tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=size, stride=tuple(strides)
    )
    return whole


def _coordinate(mesh: DeviceMesh) -> tuple[int, ...]:
    """The index of this process in each mesh dimension."""
    return tuple(mesh.get_local_rank(dim) for dim in range(mesh.ndim))


def _replicated() -> Placement:
    from torch.distributed.tensor import Replicate

    return Replicate()


def _partial() -> Placement:
    from torch.distributed.tensor import Partial

    return Partial()


def _dim(placement: Placement, dims: int = 2) -> int | None:
    """The sharded dimension of a tensor with `dims` dimensions."""
    dim: int | None = getattr(placement, "dim", None)
    return None if dim is None else dim % dims


def _padded(tensor: Tensor, before: int) -> Tensor:
    """The tensor with columns of zeros before its own."""
    return nn.functional.pad(tensor, (before, 0))
