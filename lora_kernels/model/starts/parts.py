"""Which layers have an adapter for each of their parts (`LoRAConfig.fused_parts`)."""

from __future__ import annotations

from ...init.base import Initializer
from ...init.fused import Parts, parts_of
from ...layers.base import BaseLayer
from ...layers.kinds import CONVOLUTION, EMBEDDING
from ..config import LoRAConfig
from .job import naming


def layer_parts(
    name: str, base: BaseLayer, config: LoRAConfig, initializer: Initializer, waits: bool
) -> Parts:
    """The parts of the layer `name`; empty if `fused_parts` does not name it. `waits` says whether
    its weight is on the meta device.

    Raises:
        ValueError: the layer or the start cannot have parts, the sizes are not the weight's, or
            a part's rank is too large; the layer is named.

    """
    sizes = config.layer_parts(name)
    if sizes is None:
        return ()
    kind = type(initializer).__name__
    refuse_parts(name, base)
    reason = None
    if waits:
        reason = "its weight is on the meta device: adapt the model once its weights are loaded"
    elif initializer.has_R:
        reason = f"{kind} trains an R, which would mix the parts: use another start"
    elif initializer.rewrites_base or initializer.compensates or not initializer.subtracts:
        reason = f"{kind} rewrites the whole weight: use another start"
    if reason is not None:
        raise ValueError(f"fused_parts is not possible for {name}: {reason}")
    rows = base.shape[0]
    with naming(name):
        parts = parts_of(sizes, rows)
    adapted = sum(end - begin for begin, end in parts)
    if config.use_dora and adapted < rows:
        raise ValueError(
            f"fused_parts leaves out {rows - adapted} of the {rows} rows of {name}, whose norms "
            "use_dora would train: give it all parts"
        )
    return parts


def refuse_parts(name: str, base: BaseLayer) -> None:
    """Raises ValueError if the layer is of a kind that cannot have an adapter with parts."""
    reason = None
    if base.num_experts is not None:
        reason = "it is a parameter of experts"
    elif base.kind == EMBEDDING:
        reason = "it is an embedding"
    elif base.kind == CONVOLUTION:
        reason = "it is a convolution"
    elif base.sharded:
        reason = "it is sharded: adapt the model before it is sharded"
    if reason is not None:
        raise ValueError(f"fused_parts is not possible for {name}: {reason}")


def part_names(name: str, parts: Parts, rows: int) -> dict[str, int]:
    """{name: rows} of the parts, or of the layer if it has none: "h.0.attn.c_attn[0:768]"."""
    named = {f"{name}[{begin}:{end}]": end - begin for begin, end in parts}
    return named or {name: rows}
