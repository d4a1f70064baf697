"""DeepSpeed's ZeRO-3 around a model: its engine partitions only the parameters that existed when
the engine was created.
"""

from __future__ import annotations

import sys

from torch import nn

_HOOKS = "DeepSpeedZeRoOffload."  # of stage 3, on every module


def refuse_initialized(model: nn.Module) -> None:
    """Raises ValueError if `deepspeed.initialize` has made an engine of stage 3 for the model."""
    hooks = model._forward_pre_hooks.values()
    if any(str(getattr(hook, "__qualname__", "")).startswith(_HOOKS) for hook in hooks):
        raise ValueError(
            "deepspeed.initialize has taken over this model (ZeRO-3), and would not know new "
            "parameters: add or load all adapters before it, also where zero.Init or "
            "from_pretrained has partitioned the model already"
        )


def refuse_within_init() -> None:
    """Raises ValueError inside of `with deepspeed.zero.Init()`, where DeepSpeed casts every new
    tensor to the dtype of its configuration, float64 ones too, and partitions every new parameter.
    """
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if getattr(module, "zero_init_context", 0):
        raise ValueError(
            "adapters cannot be added inside of `with deepspeed.zero.Init()`, which rounds all new "
            "tensors: leave it first; the partitioned model can be adapted after it"
        )
