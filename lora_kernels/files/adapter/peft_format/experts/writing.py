"""How a file stores experts: the layout, the tensors' names and the options in the configuration.

Both projections of a module are written, and a projection that is not adapted is written as zeros:
PEFT's names depend on which parameters of a module are adapted, and vLLM refuses a file that has
only one projection.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....._utils.names import match_names
from .....model.config import AdapterState, ExpertPart, StoredExperts
from .layouts import EACH, STACKED

DOWN = "down_proj"
# Parameters that x is multiplied with first: outputs as a multiple of the inputs of the other one.
FIRST = {"gate_up_proj": 2, "up_proj": 1}

_WORDS_OF_SGLANG = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

Parts = Mapping[str, tuple[ExpertPart, ...]]


def chosen_layout(state: AdapterState, experts: str) -> str:
    """The layout of this adapter's file: `experts`. "auto" means the layout in which the adapter
    was read or that was chosen for its model; if there is none, "each" if the names in a checkpoint
    are known.

    Raises:
        ValueError: "each" for experts whose names in a checkpoint are not known.

    """
    known = {name: state.experts.get(name) for name in expert_layers(state)}
    lacking = [name for name, stored in known.items() if stored is None or not stored.parts]
    if experts == "auto":
        wanted = {stored.layout for stored in known.values() if stored is not None} - {""}
        each = bool(known) and not lacking and wanted <= {EACH}
        return EACH if each else STACKED
    if experts == EACH and lacking:
        raise ValueError(
            f"experts='each' needs the names that the model's checkpoint has for each expert of "
            f"{lacking[0]!r}, which are not known: the checkpoint has one tensor of all experts, "
            "where experts='stacked' is right, or the model is not given (--base of lora-kernels "
            "convert)"
        )
    return experts


def expert_layers(state: AdapterState) -> list[str]:
    """The names of the layers that are parameters of experts."""
    return [name for name, layer in state.layers.items() if layer.experts is not None]


def missing_projections(state: AdapterState) -> dict[str, tuple[int, int, int]]:
    """(experts, out, in) by name of the parameters that are not adapted, while another parameter of
    the same module is.
    """
    found = {}
    for name in expert_layers(state):
        layer, (module, _, parameter) = state.layers[name], name.rpartition(".")
        out, columns = layer.shape
        if parameter in FIRST:
            beside, shape = DOWN, (columns, out // FIRST[parameter])
        elif parameter == DOWN:
            beside = _first_of(state, module)
            shape = (columns * FIRST[beside], out)
        else:
            continue
        if f"{module}.{beside}" not in state.layers:
            found[f"{module}.{beside}"] = (layer.experts or 1, *shape)
    return found


def _first_of(state: AdapterState, module: str) -> str:
    """The name of the first parameter of a module."""
    known = [p for p in FIRST if f"{module}.{p}" in (*state.layers, *state.experts)]
    return known[0] if known else next(iter(FIRST))


def file_parts(
    state: AdapterState, layout: str, missing: Mapping[str, tuple[int, int, int]] | None = None
) -> dict[str, tuple[ExpertPart, ...]]:
    """The tensors that hold experts in a file of this layout, by the names of their parameters. The
    parameters are the adapted ones and those in `missing` (default: `missing_projections`).
    """
    missing = missing_projections(state) if missing is None else missing
    shapes = {name: state.layers[name].shape[0] for name in expert_layers(state)}
    shapes |= {name: out for name, (_, out, _) in missing.items()}
    if layout == EACH:
        known = {name: state.experts.get(name, StoredExperts()).parts for name in shapes}
        return {name: parts for name, parts in known.items() if parts}
    return {n: (ExpertPart(own, 0, shapes[n]),) for n, own in wrappers(list(shapes)).items()}


def wrappers(names: list[str]) -> dict[str, str]:
    """The name of PEFT's wrapper of each parameter. PEFT wraps a module once for each adapted
    parameter, in the order of the parameters in the module: "down_proj" is outermost.
    """
    found = {}
    for name in names:
        module = name.rpartition(".")[0]
        own = [other for other in names if other.rpartition(".")[0] == module]
        own.sort(key=lambda other: other.endswith(f".{DOWN}"))
        found[name] = module + ".base_layer" * (len(own) - 1 - own.index(name))
    return found


def target_parameters(names: list[str], known: list[str] | None) -> list[str]:
    """The value of PEFT's option of this name: endings that match exactly these parameters among
    `known`, all parameters of the model; or whole names.
    """
    endings = sorted({".".join(name.split(".")[-2:]) for name in names})
    if known is not None and set(match_names(known, endings, known)) == set(names):
        return endings
    return sorted(names)


def layout_of(parts: Parts) -> str:
    """The layout of a file with these parts."""
    return EACH if any("{}" in part.name for own in parts.values() for part in own) else STACKED


def target_modules(parts: Parts) -> list[str]:
    """Values for `target_modules`: the last parts of the names of the experts' linear layers in a
    checkpoint, and SGLang's words for them. If they match other layers too, these layers get an
    update of zero.
    """
    ends = {part.name.rpartition(".")[2] for own in parts.values() for part in own}
    return sorted(ends | {_WORDS_OF_SGLANG[end] for end in ends if end in _WORDS_OF_SGLANG})
