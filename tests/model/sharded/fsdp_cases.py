"""What ranks do with FSDP2 and adapters that come and go: (rank, world) -> results."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.model.install.sharded import fsdp

from ...support.exhaustive import EXHAUSTIVE
from .fsdp_models import (
    WIDTH,
    Model,
    adapt,
    adapt_in_place,
    collectives,
    first_step,
    freeze,
    full,
    hang_on,
    layers,
    loss_of,
    members,
    sharded,
    step_of,
    train,
)

# ---- two ranks: what is trained ------------------------------------------------------------------


def trained(
    rank: int, world: int, *, first: bool = False, accumulate: int = 1, **options: Any
) -> Any:
    """The adapter that joined a sharded model, before or after its first step."""
    model = sharded(**options)
    if first:
        first_step(model, rank, world)
    adapt_in_place(model)
    return train(model, rank, world, accumulate=accumulate)


def after_eval(rank: int, world: int) -> Any:
    model = sharded()
    with torch.no_grad():
        loss_of(model, 0)
    assert not hasattr(model.lm_head.weight, "device_mesh"), "the root is not unsharded"
    adapt_in_place(model)
    return train(model, rank, world)


def after_prefetch(rank: int, world: int) -> Any:
    """A gathering that no forward has waited for."""
    model = sharded()
    first_step(model, rank, world)
    model.blocks[0].unshard(async_op=True)
    adapt_in_place(model)
    return train(model, rank, world)


def own_layer(rank: int, world: int) -> Any:
    return trained(rank, world, wrap=("blocks.0.q", "blocks.1.o"), first=True)


def replicated(rank: int, world: int) -> Any:
    """torch's DDP that is made of FSDP2's parts."""
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.device_mesh import init_device_mesh

    model, line = Model(), init_device_mesh("cpu", (world,), mesh_dim_names=("replicate",))
    for block in model.blocks:
        replicate(block, mesh=line)
    replicate(model, mesh=line)
    first_step(model, rank, world)
    adapt_in_place(model)
    return train(model, rank, world)


def compiled(rank: int, world: int) -> Any:
    model = sharded()
    first_step(model, rank, world)
    adapt_in_place(model)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return train(model, rank, world)


def single(rank: int, world: int) -> Any:
    """Each rank a data-parallel world of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    grid = init_device_mesh("cpu", (world, 1), mesh_dim_names=("others", "shard"))
    model = sharded(mesh=grid["shard"])
    first_step(model, 0, 1)
    adapt_in_place(model)
    return train(model)


def by_columns(rank: int, world: int) -> Any:
    from torch.distributed.tensor import Shard

    return trained(
        rank, world, first=True, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None
    )


def offloaded(rank: int, world: int) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return trained(rank, world, first=True, offload_policy=CPUOffloadPolicy(pin_memory=False))


def checkpointed(rank: int, world: int) -> Any:
    model = sharded()
    for block in model.blocks:
        block.checkpointed = True
    first_step(model, rank, world)
    adapt_in_place(model)
    return train(model, rank, world)


def ignored(rank: int, world: int) -> Any:
    """Weights that FSDP2 ignores: the adapters join the groups around them."""
    from torch.distributed.fsdp import fully_shard

    model = Model()
    weights = {layer.weight for layer in layers(model)}
    fully_shard(model.blocks[0], ignored_params=set(model.blocks[0].parameters()))
    fully_shard(model.blocks[1], ignored_params=weights)
    fully_shard(model, ignored_params=weights | set(model.blocks[0].parameters()))
    first_step(model, rank, world)
    adapt_in_place(model)
    return train(model, rank, world)


def grouped(rank: int, world: int) -> Any:
    """Two modules with one state."""
    from torch.distributed.fsdp import fully_shard

    model = Model()
    fully_shard([model.blocks[0], model.blocks[1]])
    fully_shard(model)
    first_step(model, rank, world)
    adapt_in_place(model)
    return train(model, rank, world)


def in_other_torch(case: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    """The case as if torch's FSDP2 had other private names."""

    def work(rank: int, world: int) -> Any:
        names = fsdp._GROUP
        fsdp._GROUP = (*names, "renamed")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the FSDP2 of torch")
                return case(rank, world)
        finally:
            fsdp._GROUP = names

    return work


AS_ALONE = {
    "before a first step": trained,
    "after a first step": functools.partial(trained, first=True),
    "after an evaluation": after_eval,
    "a layer that is FSDP2's itself": own_layer,
    "weights cut by columns": by_columns,
    "weights that are ignored": ignored,
    "checkpointed blocks": checkpointed,
    "replicas": in_other_torch(functools.partial(trained, first=True)),
}
ACCUMULATED = {
    "accumulated": functools.partial(trained, accumulate=2, first=True),
    "accumulated replicas": in_other_torch(functools.partial(trained, accumulate=2)),
}
if EXHAUSTIVE:
    AS_ALONE |= {
        "after a prefetch": after_prefetch,
        "weights on the CPU": offloaded,
        "two modules with one group": grouped,
        "compiled blocks": compiled,
        "one rank": single,
        "replicate": replicated,
    }


# ---- two ranks: adapted in place or before sharding ----------------------------------------------


def both_orders(
    rank: int,
    world: int,
    *,
    frozen: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """(joined before a first step, joined after one, adapted before it was sharded)."""
    later = sharded(dtype=dtype, **options)
    later.requires_grad_(not frozen)
    if frozen:  # no parameter of a group trains when FSDP2 fixes its dtypes
        loss_of(later, 50, rank, world)
    else:
        first_step(later, rank, world)
    at_once = sharded(dtype=dtype, **options)
    for model in (later, at_once):
        adapt_in_place(model, dtype=torch.float32)
    before = functools.partial(adapt, dtype=torch.float32)
    expected = sharded(before, dtype=dtype, **options)
    return [train(model, rank, world) for model in (at_once, later, expected)]


def policy(**dtypes: torch.dtype) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(**dtypes)}


def mixed(rank: int, world: int, frozen: bool = False) -> Any:
    both = policy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return both_orders(rank, world, frozen=frozen, **both)


def mixed_reduced_in_half(rank: int, world: int) -> Any:
    return both_orders(rank, world, frozen=True, **policy(param_dtype=torch.bfloat16))


ORDERS = {
    "mixed precision, all frozen": functools.partial(mixed, frozen=True),
    "bfloat16 weights": functools.partial(both_orders, dtype=torch.bfloat16),
}
if EXHAUSTIVE:
    frozen_bf16 = functools.partial(both_orders, dtype=torch.bfloat16, frozen=True)
    ORDERS |= {
        "mixed precision": mixed,
        "mixed precision, reduced in bfloat16": mixed_reduced_in_half,
        "bfloat16 weights, all frozen": frozen_bf16,
    }


# ---- two ranks: collectives, leaving, switching --------------------------------------------------


def counts(rank: int, world: int) -> Any:
    """Collectives of a step: of the base, joined, adapted before sharding, after leaving."""
    base = sharded().requires_grad_(False)
    expected = sharded(adapt)
    model = sharded()
    first_step(model, rank, world)
    step = functools.partial(step_of, rank=rank, world=world)
    result = {"joining": collectives(lambda: adapt_in_place(model))}
    for _ in range(2):
        fsdp.reshard(base)
        result |= {"base": collectives(lambda: loss_of(base, 0, rank, world))}
        result |= {"expected": collectives(step(expected)), "joined": collectives(step(model))}
    adapters = [layer.adapters for layer in layers(model)]
    result["leaving"] = collectives(lambda: fsdp.leave(model, adapters))
    kinds = {hasattr(p, "full_tensor") for a in adapters for p in a.parameters()}
    for layer in layers(model):
        layer.__class__ = nn.Linear
        del layer.adapters
    numbers = [len(group.fsdp_params) for group in fsdp._groups(model)]
    result["left"] = collectives(lambda: loss_of(model, 0, rank, world))
    same = torch.equal(loss_of(model, 1, rank, world), loss_of(base, 1, rank, world))
    return {**result, "kinds": kinds, "numbers": numbers, "same": same}


def left_and_back(rank: int, world: int) -> Any:
    """An adapter that leaves makes room for another one, which trains as in a new model."""
    model = sharded()
    adapt_in_place(model)
    train(model, rank, world)
    fsdp.leave(model, [layer.adapters["one"] for layer in layers(model)])
    for layer in layers(model):
        layer.adapters = nn.ModuleDict()
    adapt_in_place(model)
    return train(model, rank, world)


def emptied(rank: int, world: int) -> Any:
    """Adapters with groups of their own, which have nothing to gather when the adapters leave."""
    model = sharded(adapt, wrap=[f"blocks.{b}.{n}.adapters.one" for b in (0, 1) for n in "qo"])
    train(model, rank, world)
    with torch.no_grad():
        loss_of(model, 0)
    fsdp.leave(model, [layer.adapters["one"] for layer in layers(model)])
    for layer in layers(model):
        layer.adapters = nn.ModuleDict()
    adapt_in_place(model)
    return train(model, rank, world)


def switched(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Trains one adapter, then the other, then the first again beside the head."""
    result = {}
    for turn, name in enumerate(("one", "two", "one")):
        for layer in layers(model):
            layer.active = name
        freeze(model, name)
        model.lm_head.weight.requires_grad_(turn == 2)
        fsdp.sync_trainable(model)
        result |= {f"{turn}.{k}": v for k, v in train(model, rank, world, name).items()}
        for key, parameter in model.named_parameters():
            allowed = f"adapters.{name}." in key or (turn == 2 and key == "lm_head.weight")
            assert allowed or parameter.grad is None, f"{key} has a gradient"
    return {**result, "head": full(model.lm_head.weight)}


def with_two(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        hang_on(layer, "one", 3)
        hang_on(layer, "two", 2)
    return model


def switching(rank: int, world: int) -> Any:
    model = sharded()
    first_step(model, rank, world)
    fsdp.reshard(model)
    with_two(model)
    fsdp.join(model, {**members(model, "one"), **members(model, "two")})
    return switched(model, rank, world)


def exchanged(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Trains a float32 copy of the bfloat16 head in the head's place."""
    fsdp.reshard(model)
    copy = nn.Parameter(model.lm_head.weight.detach().to(torch.float32, copy=True))
    model.lm_head.weight = copy
    model.requires_grad_(False)
    copy.requires_grad_(True)
    fsdp.sync_trainable(model)
    optimizer = torch.optim.SGD([copy], lr=0.1)
    for step in range(2):
        loss_of(model, step, rank, world).backward()
        optimizer.step()
        optimizer.zero_grad()
    fsdp.reshard(model)
    assert model.lm_head.weight is copy
    return {"head": full(copy)}


def exchanging(rank: int, world: int, first: bool) -> Any:
    model = sharded(dtype=torch.bfloat16)
    if first:
        first_step(model, rank, world)
    return exchanged(model, rank, world)


def stored(rank: int, world: int) -> Any:
    """What a joined adapter's own state_dict has after a forward, and what it loads."""
    model = sharded()
    first_step(model, rank, world)
    adapt_in_place(model)
    model.set_reshard_after_forward(False)  # the groups stay unsharded after a forward
    with torch.no_grad():
        before = loss_of(model, 0)
        state = layers(model)[0].adapters.state_dict()
    sharded_ones = [hasattr(tensor, "full_tensor") for tensor in state.values()]
    twice = {name: 2 * tensor for name, tensor in state.items()}
    with torch.no_grad():
        loss_of(model, 0)
        layers(model)[0].adapters.load_state_dict(twice, assign=True)
        after = loss_of(model, 0)
        layers(model)[0].adapters.load_state_dict({n: t / 2 for n, t in twice.items()})
        again = loss_of(model, 0)
    names = {p._param_fqn for group in fsdp._groups(model) for p in group.fsdp_params}
    wanted = {name for name, _ in model.named_parameters()}
    return {
        "sharded": sharded_ones,
        "changed": bool(after != before),
        "back": bool(again == before),
        "names": names == wanted,
    }


def flags(rank: int, world: int) -> Any:
    """What is frozen while the root holds unsharded parameters stays frozen."""
    model = sharded()
    with torch.no_grad():
        loss_of(model, 0)
    model.requires_grad_(False)
    fsdp.reshard(model)
    frozen = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        loss_of(model, 0)
    model.lm_head.requires_grad_(True)
    fsdp.reshard(model)
    return frozen, [name for name, p in model.named_parameters() if p.requires_grad]


def errors(rank: int, world: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    def text(work: Callable[[], Any]) -> str:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            work()
        return f"{caught.type.__name__}: {caught.value}"

    model = sharded()
    found = {"outside": text(lambda: fsdp.reshard(model.lm_head))}
    fsdp.reshard(model.blocks[0])
    adapt(model)
    wrong = {**members(model), (layers(model)[0].adapters["one"], "A"): (Model().embed, "weight")}
    found["unmanaged"] = text(lambda: fsdp.join(model, wrong))
    found["unchanged"] = all(not hasattr(f, "full_tensor") for f, _ in held(model))
    found["unmanaged replica"] = in_other_torch(lambda *_: text(lambda: fsdp.join(model, wrong)))(
        0, 0
    )

    mixed_up = sharded(dtype=torch.bfloat16)
    adapt(mixed_up)
    fsdp.join(mixed_up, members(mixed_up))
    mixed_up.blocks[0].q.bias.requires_grad_(True)
    found["dtypes"] = text(lambda: fsdp.sync_trainable(mixed_up))

    stopped = sharded()
    hook = stopped.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(stopped, 0)
    hook.remove()
    found["interrupted"] = text(lambda: fsdp.reshard(stopped))

    plain = sharded()
    plain.lm_head.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    found["exchanged"] = text(lambda: fsdp.sync_trainable(plain))

    lone = fully_shard(nn.Linear(WIDTH, WIDTH))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        hang_on(lone)
        names = fsdp._GROUP
        fsdp._GROUP = (*names, "renamed")
        fsdp.join(lone, {(lone.adapters["one"], "A"): (lone, "weight")})
        fsdp._GROUP = names
    found["warning"] = " ".join(str(w.message) for w in warned)
    return found


def held(model: nn.Module) -> list[tuple[Tensor, str]]:
    return [(getattr(module, name), name) for module, name in members(model)]


def layouts(rank: int, world: int) -> Any:
    """Managed and plain, not managed, and after the fact by unsharding."""
    model = sharded()
    model.extra = nn.Linear(2, 2)
    first_step(model, rank, world)
    names = {place: name for name, place in places_of(model).items()}
    known = {names[place]: layout for place, layout in fsdp.unsharded_layouts(model).items()}
    other = in_other_torch(lambda *_: fsdp.unsharded_layouts(model))(0, 0)
    return known, {names[place]: layout for place, layout in other.items()}


def places_of(model: nn.Module) -> dict[str, fsdp.Place]:
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


OTHERS = {
    "emptied": emptied,
    "switching": switching,
    "exchanged after": functools.partial(exchanging, first=True),
    **{f.__name__: f for f in (counts, stored, flags, errors, layouts)},
}
if EXHAUSTIVE:
    OTHERS |= {
        "left and back": left_and_back,
        "exchanged before": functools.partial(exchanging, first=False),
    }


# ---- four ranks ----------------------------------------------------------------------------------


def mesh(*names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def hybrid(rank: int, world: int) -> Any:
    return trained(rank, world, first=True, mesh=mesh("replicate", "shard"))


def pending(rank: int, world: int) -> Any:
    """The errors while gradients wait for their all-reduce, and training after it."""
    model = sharded(mesh=mesh("replicate", "shard"))
    adapt_in_place(model)
    adapters = [layer.adapters["one"] for layer in layers(model)]
    model.set_requires_all_reduce(False)
    loss_of(model, 0, rank, world).backward()
    for change in (
        functools.partial(fsdp.leave, model, adapters),
        functools.partial(fsdp.join, model, members(model)),
    ):
        with pytest.raises(RuntimeError, match="not yet all-reduced"):
            change()
    adapters[0].A.requires_grad_(False)
    with pytest.raises(RuntimeError, match="not yet all-reduced"):
        fsdp.sync_trainable(model)
    adapters[0].A.requires_grad_(True)
    model.set_requires_all_reduce(True)
    loss_of(model, 0, rank, world).backward()
    model.zero_grad()
    fsdp.sync_trainable(model)
    return train(model, rank, world)


def kept_flags(rank: int, world: int) -> Any:
    """Parameters that lie on fewer ranks after a forward stay frozen."""
    model = sharded(reshard_after_forward=2)
    adapt_in_place(model)
    before = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        loss_of(model, 0)
    assert layers(model)[0].weight.device_mesh.ndim == 2, "the blocks lie on all ranks"
    fsdp.reshard(model)
    assert [p.requires_grad for p in model.parameters()] == before
    return train(model, rank, world)


def resharded_to_two(rank: int, world: int) -> Any:
    return trained(rank, world, first=True, reshard_after_forward=2)


def over_tensor_parallel(rank: int, world: int, *, first: bool = True) -> Any:
    """FSDP2 over tensor parallelism: two data-parallel ranks of two processes each."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    grid = mesh("dp", "tp")
    model = Model()
    for block in model.blocks:
        plan = {"q": ColwiseParallel(use_local_output=False), "o": RowwiseParallel()}
        parallelize_module(block, grid["tp"], plan)
        fully_shard(block, mesh=grid["dp"])
    fully_shard(model, mesh=grid["dp"])
    dp = grid["dp"].get_local_rank()
    if first:
        first_step(model, dp, 2)
    known = fsdp.unsharded_layouts(model)
    by_hand = in_other_torch(lambda *_: fsdp.unsharded_layouts(model))(0, 0)
    assert known == by_hand, "the layouts by unsharding differ"
    assert known[model.embed, "weight"] is None
    adapt(model)
    for layer in layers(model):
        tp, placements = known[layer, "weight"]
        assert tp == grid["tp"]
        by_rows = placements[0].is_shard(0)
        for name, placement in (("A", 1), ("B", 0)):
            place = placements if by_rows == (placement == 0) else [dist.tensor.Replicate()]
            value = getattr(layer.adapters["one"], name).detach()
            value = distribute_tensor(value, tp, place, src_data_rank=None)
            setattr(layer.adapters["one"], name, nn.Parameter(value))
    fsdp.join(model, members(model))
    fsdp.sync_trainable(model)
    return train(model, dp, 2)


FOUR = {"HSDP": hybrid, "HSDP, pending": pending, "tensor parallel": over_tensor_parallel}
if EXHAUSTIVE:
    FOUR |= {
        "HSDP replicas": in_other_torch(hybrid),
        "uneven": trained,
        "resharded to two": resharded_to_two,
        "resharded to two, frozen": kept_flags,
        "tensor parallel, before": functools.partial(over_tensor_parallel, first=False),
        "tensor parallel, replicas": in_other_torch(over_tensor_parallel),
    }
