"""DeepSpeed's ZeRO-3 around a model: its engine knows the parameters that there were when it was
made, and partitions no others.
"""

from __future__ import annotations

from torch import nn

_HOOKS = "DeepSpeedZeRoOffload."  # of stage 3, on every module


def refuse_initialized(model: nn.Module) -> None:
    """Raises ValueError if `deepspeed.initialize` has made an engine of stage 3 of the model."""
    hooks = model._forward_pre_hooks.values()
    if any(str(getattr(hook, "__qualname__", "")).startswith(_HOOKS) for hook in hooks):
        raise ValueError(
            "deepspeed.initialize has taken over this model (ZeRO-3), and would not know new "
            "parameters: add or load all adapters before it, also where zero.Init or "
            "from_pretrained has partitioned the model already"
        )
