"""Changes a model in place that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded.

Only this file uses private names of FSDP2, which torch 2.11 to 2.13 have. With other versions of
torch, `replicas` does what the public names allow.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .replicas import (
    Layout,
    Place,
    average_gradients,
    held_parameters,
    keep_requires_grad,
    layouts_by_unsharding,
    stop_averaging,
)

# The attributes of FSDP2's parameter groups and parameters in the supported versions of torch.
_GROUP = (
    *("fsdp_params", "modules", "mesh_info", "post_forward_mesh_info", "device", "mp_policy"),
    *("offload_policy", "comm_ctx", "is_sharded", "wait_for_unshard", "_all_gather_result"),
    *("_init_mp_dtypes", "_register_state_dict_hooks", "_partial_reduce_output"),
    *("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"),
    *("_post_forward_indices", "gradient_divide_factor", "reduce_grads", "all_reduce_grads"),
    "_all_reduce_hook",
)
_PARAMETER = (
    *("_module_info", "sharded_param", "is_dtensor", "all_gather_outputs", "reset_sharded_param"),
    *("init_dtype_attrs", "_post_load_hook_handle", "_param_fqn", "unsharded_accumulated_grad"),
)
_DYNAMO_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # set by fully_shard


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model to which `fully_shard` was applied, outer ones first."""
    # Without an import of ours: where nobody has imported FSDP2, no module is FSDP2's.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def is_managed(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model or a part of it."""
    return bool(fsdp_modules(model))


def reshard(model: nn.Module) -> None:
    """Makes all modules hold the sharded parameters, as before the first forward.

    FSDP2's root keeps the unsharded parameters after a forward, and changes of these would be lost.
    Their `requires_grad` is carried over. There is no collective, and a model without FSDP2 does
    not change.

    Raises:
        ValueError: parameters are managed by an FSDP2 module outside of `model`.
        RuntimeError: a forward of the model runs, or was interrupted by an error.

    """
    modules = fsdp_modules(model)
    groups = _groups(model) if modules else []
    _check_whole(model, groups)
    if not modules:
        return
    for group in groups or ():
        if group._all_gather_result is not None:
            group.wait_for_unshard()  # of a prefetch that no forward has used
    before = held_parameters(model)
    for module in modules:
        module.reshard()  # type: ignore[operator]
    keep_requires_grad(before, held_parameters(model))
    if not all(group.is_sharded for group in groups or ()):
        raise RuntimeError(
            "FSDP2 still holds unsharded parameters: a forward of this model runs, or was "
            "interrupted by an error. Change the model outside of its forward; after an error "
            "call reset_iter_state() on the root FSDP2 module (torch 2.13), or build the model anew"
        )


def unsharded_layouts(model: nn.Module) -> dict[Place, Layout | None]:
    """The layouts in the forward of the parameters that FSDP2 manages, by (module, name).

    A `Layout` if the parameter is a DTensor in the forward (FSDP2 over tensor parallelism), None if
    it is a plain tensor. Other parameters are not in the result.
    """
    reshard(model)
    groups = _groups(model)
    if groups is None:
        return layouts_by_unsharding(fsdp_modules(model))
    return {
        place: _layout(parameter)
        for group in groups
        for parameter in group.fsdp_params
        for place in _places(parameter)
    }


def join(model: nn.Module, members: Mapping[Place, Place]) -> None:
    """Makes new parameters members of FSDP2's parameter groups.

    They are then sharded by rows, gathered and reduced with their group, without a further
    collective. With an unsupported version of FSDP2, they stay replicated, a warning says so, and
    their gradients are averaged over the data-parallel ranks instead.

    Args:
        model: the model, with all FSDP2 modules that manage the parameters.
        members: {(module, name) of a new parameter: (module, name) of a parameter whose group it
            joins}. If FSDP2 ignores the latter, the new one joins the innermost group around it.
            The new parameters are registered, hold the same values on all ranks, and are plain
            tensors, or DTensors on the mesh that `unsharded_layouts` gives. All ranks pass them in
            the same order.

    Raises:
        ValueError: a parameter that is to be joined is not within an FSDP2 module of the model.
        RuntimeError: FSDP2 holds gradients that are not yet all-reduced. In both cases the model is
            unchanged.

    """
    if not members:
        return
    reshard(model)
    groups = _groups(model)
    if groups is None:
        _replicate(model, members)
        return
    owners = _owners(model, groups, members.values())
    joined = {id(owners[place]): owners[place] for place in members.values()}.values()
    for group in joined:
        _check_reduced(group)
    for place, of in members.items():
        _add(owners[of], *place)
    for group in joined:
        _renew_hooks(group)
        if len(_trained_dtypes(group)) < 2:  # else `sync_trainable` has yet to be called
            group._init_mp_dtypes()
    _enter_names(model)


def leave(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Removes all parameters of the given modules, and of modules inside them, from FSDP2's groups.

    FSDP2 runs no collective for them afterwards. They stay sharded DTensors.

    Raises:
        RuntimeError: as for `join`. The model is then unchanged.

    """
    gone = {module for root in modules for module in root.modules()}
    if not gone or not is_managed(model):
        return
    reshard(model)
    groups = _groups(model)
    stop_averaging(p for module in gone for p in module.parameters(recurse=False))
    left = [g for g in groups or () if any(_is_within(p, gone) for p in g.fsdp_params)]
    for group in left:
        _check_reduced(group)
    for group in left:
        _remove(group, gone)
    for state in _states(model) if left else ():
        _drop_empty_groups(state)


def sync_trainable(model: nn.Module, mixed: bool = False) -> None:
    """Updates FSDP2 after changes of the sharded parameters: which of them train, and parameters
    that were exchanged for others of the same shape.

    Call this after each change of `requires_grad`: FSDP2 fixes the dtypes in which a group reduces
    gradients before its first forward. Exchange parameters after `reshard`. There is no collective.
    With `mixed`, parameters of several dtypes may train in one group, as in a model that FSDP2 has
    not run yet.

    Raises:
        ValueError: parameters of several dtypes train in one group, which FSDP2 cannot reduce.
        RuntimeError: as for `reshard` and `join`.

    """
    groups = _groups(model)
    for group in groups or ():
        if group.is_sharded:
            _follow_exchanged(group)
    reshard(model)
    for group in groups or ():
        _follow_trainable(group, mixed)


def check_one_dtype(model: nn.Module, trained: Mapping[Place, tuple[str, torch.dtype]]) -> None:
    """Raises ValueError if FSDP2 could not reduce the gradients of parameters that are to train.

    For each parameter, `trained` has a text and the dtype of what trains there or joins its group.
    """
    for group in _groups(model) or ():
        here = [trained[p] for m in group.fsdp_params for p in _places(m) if p in trained]
        texts = {dtype: text for text, dtype in reversed(here)}  # the first of each dtype
        if len(texts) > 1:
            kind = type(group.modules[0]).__name__
            both = " and ".join(f"{text} in {dtype}" for dtype, text in texts.items())
            raise ValueError(
                f"{both} would train in one FSDP2 module ({kind}), which reduces gradients in one "
                "dtype: apply fully_shard to one of these modules on its own, or load the model in "
                "float32 (with a MixedPrecisionPolicy, if it is to compute in fewer bits)"
            )


@contextmanager
def summed_gradients(model: nn.Module) -> Iterator[dict[Place, float]]:
    """Inside the context, every backward reduces the gradients of all data-parallel ranks, even if
    the user accumulates gradients; the accumulated gradients are restored afterwards.

    Yields the number by which FSDP2 divides the sum of the ranks' gradients, by (module, name) of
    each parameter that FSDP2 manages. An error inside ends the forward or backward that it
    interrupts; with torch 2.13 it ends for FSDP2 too, which can then go on.

    Raises:
        ValueError: this version of FSDP2 is not supported, or a hook of the user changes the sums.

    """
    reshard(model)
    groups = _groups(model)
    _check_summable(groups)
    kept = [_set_aside(group) for group in groups or ()]
    contexts = list({id(c): c for c in (s._state_ctx for s in _states(model))}.values())
    last = [context.is_last_backward for context in contexts]
    try:
        for context in contexts:
            context.is_last_backward = True
        sync_trainable(model)
        yield {p: _divisor(g) for g in groups or () for m in g.fsdp_params for p in _places(m)}
    except BaseException:
        for root in _roots(model):
            if hasattr(root, "_reset_iter_state"):
                root._reset_iter_state()
        raise
    finally:
        for context, value in zip(contexts, last, strict=True):
            context.is_last_backward = value
        for put_back in kept:
            put_back()


# ---- what a model has of FSDP2 -------------------------------------------------------------------


def _states(model: nn.Module) -> list[Any]:
    """The states of FSDP2 in a model; several modules can have one."""
    states = [module._get_fsdp_state() for module in fsdp_modules(model)]  # type: ignore[operator]
    return list({id(state): state for state in states}.values())


def _groups(model: nn.Module) -> list[Any] | None:
    """The parameter groups of a model, or None if this version of FSDP2 is not supported."""
    if not is_managed(model):
        return []
    if not _knows_classes():
        return None
    groups = [group for state in _states(model) for group in _groups_of(state)]
    known = all(hasattr(group, name) for group in groups for name in _GROUP) and all(
        _is_known(p) for group in groups for p in group.fsdp_params
    )
    return groups if known else None


@functools.cache
def _knows_classes() -> bool:
    import inspect

    from torch.distributed.fsdp import FSDPModule

    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
        from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
    except ImportError:
        return False
    expected = (
        *("param", "module_info", "mesh_info", "post_forward_mesh_info", "device"),
        *("shard_placement_fn", "mp_policy", "offload_policy"),
    )
    return (
        tuple(inspect.signature(FSDPParam).parameters) == expected
        and tuple(inspect.signature(ParamModuleInfo).parameters)[:2] == ("module", "param_name")
        and hasattr(FSDPModule, "_get_fsdp_state")
        and all(hasattr(FSDPState(), name) for name in ("_fsdp_param_group", "_state_ctx"))
    )


def _is_known(parameter: Any) -> bool:
    spec = hasattr(parameter, "_unsharded_dtensor_spec") or hasattr(parameter, "_tp_spec")
    return all(hasattr(parameter, n) for n in _PARAMETER) and (spec or not parameter.is_dtensor)


def _groups_of(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = state._fsdp_param_group  # torch 2.11: a state has one group at most
    return [] if group is None else [group]


def _places(parameter: Any) -> list[Place]:
    """The modules that hold a parameter, the first one and those that share it."""
    info = parameter._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def _layout(parameter: Any) -> Layout | None:
    spec = getattr(parameter, "_unsharded_dtensor_spec", None)
    if spec is None:
        spec = getattr(parameter, "_tp_spec", None)  # torch 2.11
    return None if spec is None else Layout(spec.mesh, tuple(spec.placements))


def _check_whole(model: nn.Module, groups: list[Any] | None) -> None:
    """Raises ValueError if an FSDP2 module outside of the model manages parameters of it."""
    if groups is None or "torch.distributed.fsdp" not in sys.modules:
        return
    managed = {m for group in groups for p in group.fsdp_params for m, _ in _places(p)}
    for name, module in model.named_modules():
        # `FSDPParam` leaves a hook on the module of each of its parameters.
        hooks = module._load_state_dict_post_hooks.values()
        if module not in managed and any(_is_from_fsdp(hook) for hook in hooks):
            raise ValueError(
                f"the parameters of {name or type(model).__name__!r} are sharded by an FSDP2 "
                "module outside of the given one: pass the model to which fully_shard was applied"
            )


def _is_from_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__qualname__", "")).startswith("FSDPParam.")


def _check_reduced(group: Any) -> None:
    if group._partial_reduce_output is not None:
        raise RuntimeError(
            "FSDP2 keeps gradients that are not yet all-reduced (set_requires_all_reduce(False)): "
            "finish the accumulation before the model's trained parameters change"
        )


def _owners(model: nn.Module, groups: list[Any], places: Iterable[Place]) -> dict[Place, Any]:
    """The groups of the parameters at some places, or those of the modules around them."""
    managed = {p: group for group in groups for m in group.fsdp_params for p in _places(m)}
    around: dict[nn.Module, Any] = {}
    if not all(place in managed for place in places):  # some are among fully_shard's ignored ones
        for outer in fsdp_modules(model):
            own = _groups_of(outer._get_fsdp_state())  # type: ignore[operator]
            around |= dict.fromkeys(outer.modules(), own[0]) if own else {}
    owners = {place: managed.get(place, around.get(place[0])) for place in places}
    for (module, name), group in owners.items():
        if group is None:
            raise ValueError(
                f"the parameter {name!r} of a {type(module).__name__} is not within an FSDP2 "
                "module of this model: pass the model to which fully_shard was applied"
            )
    return owners


# ---- members come and go -------------------------------------------------------------------------


def _add(group: Any, module: nn.Module, name: str) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    parameter = getattr(module, name)
    full = parameter.detach().contiguous()
    if not full.is_meta:
        full = full.to(group.device)  # with CPU offload, the sharded weight is elsewhere
    member = FSDPParam(
        nn.Parameter(full, requires_grad=parameter.requires_grad),
        ParamModuleInfo(module, name),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,  # the user's shard_placement_fn is for the weights: A and B are sharded by rows
        group.mp_policy,
        group.offload_policy,
    )
    member.init_dtype_attrs(group.mp_policy)
    group.fsdp_params.append(member)
    for mark in _DYNAMO_MARKS:
        setattr(module, mark, True)


def _replicate(model: nn.Module, members: Mapping[Place, Place]) -> None:
    warnings.warn(
        f"the FSDP2 of torch {torch.__version__} is not known here: the adapters' parameters stay "
        "replicated on all ranks instead of being sharded with their layers, and their gradients "
        "are averaged one by one. Results are the same",
        stacklevel=3,
    )
    average_gradients(members)


def _is_within(parameter: Any, modules: set[nn.Module]) -> bool:
    return all(module in modules for module, _ in _places(parameter))


def _remove(group: Any, modules: set[nn.Module]) -> None:
    leaving = [p for p in group.fsdp_params if _is_within(p, modules)]
    group.fsdp_params[:] = [p for p in group.fsdp_params if not _is_within(p, modules)]
    for parameter in leaving:
        parameter._post_load_hook_handle.remove()
        for module, _ in _places(parameter):
            for mark in _DYNAMO_MARKS:
                module.__dict__.pop(mark, None)
    _renew_hooks(group)
    if len(_trained_dtypes(group)) < 2:
        group._init_mp_dtypes()


def _drop_empty_groups(state: Any) -> None:
    """FSDP2 cannot gather a group without parameters."""
    groups = _groups_of(state)
    kept = [group for group in groups if group.fsdp_params]
    if len(kept) == len(groups):
        return
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups[:] = kept
        for index, group in enumerate(kept):
            group._param_group_index, group._num_param_groups = index, len(kept)
    else:
        state._fsdp_param_group = None
    # The order of past forwards, from which FSDP2 guesses what to prefetch, names the group too.
    order = getattr(groups[0].comm_ctx, "post_forward_order", [])
    for group in order:
        group._post_forward_indices.clear()
    order.clear()


def _renew_hooks(group: Any) -> None:
    """Sets FSDP2's state_dict hooks, which return sharded parameters, on the current modules."""
    handles = (
        group._module_to_pre_save_state_dict_hook_handle,
        group._module_to_pre_load_state_dict_hook_handle,
    )
    if not handles[0]:
        return  # before the first forward: FSDP2 sets them then
    for kind in handles:
        for handle in kind.values():
            handle.remove()
        kind.clear()
    group._register_state_dict_hooks()


def _enter_names(model: nn.Module) -> None:
    """Gives new members the full names that FSDP2's error messages use."""
    for root in _roots(model):
        members = {p.sharded_param: p for g in _context_groups(root) for p in g.fsdp_params}
        for name, parameter in root._modules[0].named_parameters():
            if parameter in members:
                members[parameter]._param_fqn = name


def _roots(model: nn.Module) -> list[Any]:
    """The root states above the model's modules that have run a forward."""
    states = [state for one in _states(model) for state in one._state_ctx.all_states]
    return list({id(state): state for state in states if state._is_root}.values())


def _context_groups(root: Any) -> Iterator[Any]:
    for state in root._state_ctx.all_states:
        yield from _groups_of(state)


# ---- parameters that change ----------------------------------------------------------------------


def _follow_exchanged(group: Any) -> None:
    """Makes a group gather the parameters that its modules hold now."""
    for parameter in list(group.fsdp_params):
        for other in _split(parameter):
            group.fsdp_params.append(other)
            _follow(other)
        _follow(parameter)


def _follow(parameter: Any) -> None:
    """Makes FSDP2 gather what the module holds now."""
    old = parameter.sharded_param
    module, name = _places(parameter)[0]
    new = getattr(module, name)
    if new is old:
        return
    if not _lie_alike(new, old):
        raise ValueError(
            f"a parameter {name!r} that FSDP2 shards was exchanged for one of another shape or "
            "kind: give the new one the old one's DTensor layout"
        )
    parameter.reset_sharded_param()
    if new.dtype != old.dtype:  # the buffers of the gathered one have the old dtype
        _drop_gathered(parameter)


def _split(parameter: Any) -> list[Any]:
    """Modules that shared a parameter and hold different ones now get one of FSDP2's each."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import ParamModuleInfo

    first, *shared = _places(parameter)
    held = getattr(*first)
    apart = [place for place in shared if getattr(*place) is not held]
    if not apart:
        return []
    kept = [place for place in shared if place not in apart]
    parameter._module_info = ParamModuleInfo(*first, [m for m, _ in kept], [n for _, n in kept])
    others = []
    for place in apart:
        other = copy.copy(parameter)
        other._module_info = ParamModuleInfo(*place)
        other._orig_param_uid = -id(other)  # torch 2.13 refuses one that another parameter has
        other._post_load_hook_handle = place[0].register_load_state_dict_post_hook(
            functools.partial(_reset_after_load, other)
        )
        _drop_gathered(other)
        others.append(other)
    return others


def _reset_after_load(parameter: Any, *_: object) -> None:
    """FSDP2's own hook on the module of each of its parameters."""
    parameter.reset_sharded_param()


def _drop_gathered(parameter: Any) -> None:
    parameter.all_gather_outputs, parameter._unsharded_inner_tensors = [], []
    parameter.__dict__.pop("_unsharded_param", None)


def _lie_alike(new: Any, old: Any) -> bool:
    names = ("shape", "device_mesh", "placements")
    return all(getattr(new, name, None) == getattr(old, name) for name in names)


def _trained_dtypes(group: Any) -> set[torch.dtype]:
    sharded = [p.sharded_param for p in group.fsdp_params]
    return {p.dtype for p in sharded if p.requires_grad}


def _follow_trainable(group: Any, mixed: bool) -> None:
    dtypes = _trained_dtypes(group)
    if len(dtypes) > 1 and not mixed:
        raise ValueError(
            f"parameters of {', '.join(sorted(map(str, dtypes)))} train in one FSDP2 module "
            f"({type(group.modules[0]).__name__}), which reduces gradients in one dtype: train "
            "fewer of them, cast them to one dtype, or apply fully_shard to their modules apart"
        )
    for parameter in group.fsdp_params:
        gathered = getattr(parameter, "_unsharded_param", None)
        trains = parameter.sharded_param.requires_grad
        if gathered is not None and gathered.requires_grad != trains:
            _check_reduced(group)
            gathered.requires_grad_(trains)
    if len(dtypes) < 2:
        group._init_mp_dtypes()


# ---- gradients -----------------------------------------------------------------------------------


def _check_summable(groups: list[Any] | None) -> None:
    """Raises ValueError if it is not known how FSDP2 reduces gradients."""
    advice = "capture the gradients before fully_shard is applied"
    if groups is None:
        raise ValueError(f"the FSDP2 of torch {torch.__version__} is not known here: {advice}")
    if any(group._all_reduce_hook is not None for group in groups):
        raise ValueError(
            f"a hook changes the gradients that FSDP2 reduces (set_all_reduce_hook): {advice}"
        )


def _divisor(group: Any) -> float:
    """The number by which a group divides the sum of its ranks' gradients."""
    if group.gradient_divide_factor is not None:
        return float(group.gradient_divide_factor)
    sizes = (getattr(group.mesh_info, f"{n}_mesh_size", 1) for n in ("shard", "replicate"))
    return float(math.prod(sizes))


def _set_aside(group: Any) -> Callable[[], None]:
    """Makes a group reduce every gradient at once, and only new ones; the result undoes this."""
    names = ("reduce_grads", "all_reduce_grads", "_partial_reduce_output")
    settings = {name: getattr(group, name) for name in names}
    held = [(p, p.unsharded_accumulated_grad) for p in group.fsdp_params]
    gathered = [getattr(p, "_unsharded_param", None) for p in group.fsdp_params]
    grads = [(p, p.grad) for p in gathered if p is not None]

    def put(values: dict[str, Any], accumulated: bool) -> None:
        for name, value in values.items():
            setattr(group, name, value)
        for parameter, total in held:
            parameter.unsharded_accumulated_grad = total if accumulated else None
        for parameter, grad in grads:
            parameter.grad = grad if accumulated else None

    put(dict(zip(names, (True, True, None), strict=True)), accumulated=False)
    return functools.partial(put, settings, accumulated=True)
