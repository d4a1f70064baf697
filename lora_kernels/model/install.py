"""Replaces a model's layers by adapted ones, and restores all of them if an error occurs; repeats
a model's blocks for adapters by PEFT that need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._utils.errors import needed
from ..layers.adapted import AdaptedLayer, transplant
from ..layers.linear import AdaptedFloatLayer
from .config import Replication
from .plan import LayerPlan
from .saved_modules import SavedTensors
from .selection import output_head


def install(
    model: nn.Module,
    saved: SavedTensors,
    plans: Sequence[LayerPlan],
    tracked_plans: Iterable[LayerPlan],
    adapter_name: str,
) -> None:
    """Puts the adapted layers of `plans` into the model.

    `tracked_plans` yields the same plans, perhaps with a progress bar. Only a lack of memory or an
    interrupt can make this fail. Then all changes are undone; a weight from which s·B₀A₀ had been
    subtracted is restored to one rounding, and a base that LoftQ had rewritten stays quantized.
    """
    layers: list[AdaptedLayer] = []
    try:
        for plan in tracked_plans:
            layers.append(plan.adapted(adapter_name))
            plan.subtract_()
            plan.start = plan.trained = None
            _put(model, saved, plan, plan.base.module, layers[-1])
    except BaseException:
        for plan, layer in zip(plans, layers, strict=False):
            plan.undo_(layer, adapter_name)
            _put(model, saved, plan, layer, plan.base.module)
        raise
    for layer in layers:
        layer.freeze()


def _put(
    model: nn.Module, saved: SavedTensors, plan: LayerPlan, old: nn.Module, new: nn.Module
) -> None:
    """Replaces the layer `old` by `new` under all its names."""
    if new is old:
        return
    for name in (plan.name, *plan.aliases):
        set_module(model, name, new)
    if plan.base.rewritable:  # tensors stay in a layer inside a wrapper
        saved.moved(old, new)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Makes `module` the model's module of that name."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers with adapters, by the first name of each in the model without DDP or compile."""
    return {n: m for n, m in unwrapped(model).named_modules() if isinstance(m, AdaptedLayer)}


def layers_with_names(model: nn.Module) -> list[tuple[list[str], AdaptedLayer]]:
    """The adapted layers, each with all its names."""
    names: dict[int, tuple[list[str], AdaptedLayer]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer):
            names.setdefault(id(module), ([], module))[0].append(name)
    return list(names.values())


def replace_adapted(
    model: nn.Module, names: Sequence[str], layer: AdaptedLayer, plain: nn.Module
) -> None:
    """Replaces an adapted layer by a plain one under all its names; hooks move to the plain one."""
    if isinstance(layer, AdaptedFloatLayer):
        transplant(layer, plain)
    for name in names:
        set_module(model, name, plain)


def untie_if_needed(model: nn.Module) -> None:
    """Sets a Hugging Face model's `tie_word_embeddings` to False if its output head now has its own
    weight, which saving would otherwise drop.
    """
    model = unwrapped(model)
    config, head = getattr(model, "config", None), output_head(model)
    embeddings = getattr(model, "get_input_embeddings", None)
    if config is None or head is None or embeddings is None:
        return
    if not getattr(config, "tie_word_embeddings", False):
        return
    if getattr(embeddings(), "weight", None) is not getattr(head, "weight", None):
        config.tie_word_embeddings = False
        _untie_others(model)


def _untie_others(model: nn.Module) -> None:
    """Gives modules that are still tied, such as BART's three embeddings, parameters of their own:
    with `tie_word_embeddings` False transformers ties nothing when it loads the model.
    """
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for target in tied:
        owner, _, key = target.rpartition(".")
        module = model.get_submodule(owner)
        source = model.get_parameter(tied[target])
        if module._parameters.get(key) is source:
            setattr(module, key, nn.Parameter(source.detach().clone(), source.requires_grad))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


Setting = tuple[nn.Module, str, object]


def disable_fast_path(model: nn.Module) -> list[Setting]:
    """Disables the fast path of torch's encoders that have adapted layers: in eval mode it reads
    the weights directly and bypasses the adapters. Returns the attributes' previous values.
    """
    changed: list[Setting] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            name, off = "use_nested_tensor", False
        else:
            continue
        before = getattr(module, name)
        if before != off and any(isinstance(part, AdaptedLayer) for part in module.modules()):
            changed.append((module, name, before))
            setattr(module, name, off)
    return changed


_SIZE = "num_hidden_layers"  # the option of a model's configuration


class RepeatedBlocks:
    """A model's blocks, repeated as PEFT's `layer_replication` says; copies of a block share its
    parameters. Nothing is done to a model whose blocks are repeated so already.

    Raises:
        ValueError: the model has no such blocks.
        MissingExtraError: PEFT, whose function does it, is not installed.

    """

    def __init__(self, model: nn.Module, replication: Replication) -> None:
        self.replication = replication
        self._before: list[tuple[nn.Module, str, nn.ModuleList]] = []
        self._options: list[tuple[Any, str, Any]] = []
        if any(_are_repeated(blocks, replication) for _, _, blocks in _lists(model)):
            return
        tuners = needed(
            "peft.tuners.tuners_utils", "an adapter with layer_replication", "ecosystem"
        )
        lists = _lists(model)
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None))}
        sizes = [(c, getattr(c, _SIZE, None)) for c in configs.values()]
        try:
            tuners.replicate_layers(model, [list(pair) for pair in replication])
        except (IndexError, AttributeError) as error:
            raise ValueError(
                f"the adapter repeats blocks {list(map(list, replication))} of the model, and this "
                f"{type(model).__name__} does not have them: {error}"
            ) from None
        self._before = [(m, key, old) for m, key, old in lists if getattr(m, key) is not old]
        self._options = [(c, _SIZE, n) for c, n in sizes if getattr(c, _SIZE, None) != n]

    def restore(self) -> None:
        """The blocks as they were before, with the tensors that the first copy of each has now."""
        for module, key, old in self._before:
            copies: Any = getattr(module, key)
            for index, copy in reversed(list(enumerate(copies))):
                _share(copy, old[_source(self.replication, index)])
            setattr(module, key, old.train(module.training))
        for owner, key, value in self._options:
            setattr(owner, key, value)


def separate_blocks(model: nn.Module, replication: Replication) -> None:
    """Gives every copy of a block parameters of its own, without which no file can hold them."""
    size = sum(end - start for start, end in replication)
    for _, _, blocks in _lists(model):
        seen: set[int] = set()
        for module in blocks.modules() if len(blocks) == size else ():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in seen:
                    own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    module._parameters[key] = own
                elif parameter is not None:
                    seen.add(id(parameter))


def _lists(model: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """(the module, the attribute's name, the list) of each list of modules."""
    return [
        (module, key, child)
        for module in model.modules()
        for key, child in module._modules.items()
        if isinstance(child, nn.ModuleList)
    ]


def _source(replication: Replication, index: int) -> int:
    """The number of the original block of which the block `index` is a copy."""
    return [block for start, end in replication for block in range(start, end)][index]


def _are_repeated(blocks: nn.ModuleList, replication: Replication) -> bool:
    """Whether these blocks share their parameters as the copies would, and only so."""
    sources = [block for start, end in replication for block in range(start, end)]
    firsts = [id(next(block.parameters(), None)) for block in blocks]
    if len(firsts) != len(sources) or len(set(sources)) == len(sources):
        return False
    pairs = set(zip(sources, firsts, strict=True))
    return len(pairs) == len(set(sources)) == len(set(firsts))


def _share(source: nn.Module, target: nn.Module) -> None:
    """Puts the parameters and buffers of a copy into the module that it is a copy of."""
    for name, module in target.named_modules():
        twin = source.get_submodule(name)
        module._parameters.update(twin._parameters)
        module._buffers.update(twin._buffers)
