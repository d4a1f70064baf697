"""Repeats a model's blocks, for adapters by PEFT that need it (`layer_replication`)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..._utils.errors import needed
from ...init.sharded.layout import is_sharded
from ..config import Replication, repeated_blocks

_SIZE = "num_hidden_layers"  # the option of a model's configuration


class RepeatedBlocks:
    """A model's blocks, repeated as PEFT's `layer_replication` says; copies of a block share its
    parameters. A model whose blocks are already repeated in this way does not change.

    Raises:
        ValueError: the model has no such blocks, or is sharded.
        MissingExtraError: PEFT, whose function repeats the blocks, is not installed.

    """

    def __init__(self, model: nn.Module, replication: Replication) -> None:
        self.replication = replication
        self._before: list[tuple[nn.Module, str, nn.ModuleList]] = []
        self._options: list[tuple[Any, str, Any]] = []
        if any(_are_repeated(blocks, replication) for _, _, blocks in _lists(model)):
            return
        if any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"the adapter repeats blocks of the model ({list(map(list, replication))}), which "
                "is sharded: load the adapter before it is sharded"
            )
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
        """Restores the former blocks, with the tensors that the first copy of each has now."""
        for module, key, old in self._before:
            copies: Any = getattr(module, key)
            sources = repeated_blocks(self.replication)
            # The first copy of a block comes last, so that its tensors stay.
            for source, copy in reversed(list(zip(sources, copies, strict=False))):
                _share(copy, old[source])
            setattr(module, key, old.train(module.training))
        for owner, key, value in self._options:
            setattr(owner, key, value)


def separate_blocks(model: nn.Module, replication: Replication) -> None:
    """Gives every copy of a block its own parameters, so that files can store them."""
    size = len(repeated_blocks(replication))
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


def _are_repeated(blocks: nn.ModuleList, replication: Replication) -> bool:
    """Whether these blocks share their parameters exactly as the copies would."""
    sources = repeated_blocks(replication)
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
