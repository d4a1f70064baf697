"""torch's fast path of `nn.TransformerEncoderLayer`, which reads weights past their layers."""

from __future__ import annotations

from torch import nn

from .adapted import AdaptedLayer

Setting = tuple[nn.Module, str, object]


def leave_fast_path(model: nn.Module) -> list[Setting]:
    """Keeps encoders with adapted layers off it, where in eval mode the adapters would not count:
    by the attributes that torch itself asks. Returns what they were.
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
