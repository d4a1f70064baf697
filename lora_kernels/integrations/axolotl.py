"""A plugin for Axolotl: starts and the fused forward for the LoRA layers that Axolotl trains.

In Axolotl's configuration:

    plugins:
      - lora_kernels.integrations.axolotl.LoRAKernelsPlugin
    lora_kernels_init: loram
    lora_kernels_accelerate: true

Written for axolotl 0.19 (`axolotl/integrations/base.py`). Axolotl still trains, saves and merges.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import peft
from axolotl.integrations.base import BasePlugin
from peft.tuners.lora.layer import ParamWrapper
from pydantic import BaseModel, Field, model_validator

from ..init import get_initializer
from ..peft import accelerate, initialize

# Axolotl shows all messages of its own loggers, but only warnings of others.
_LOG = logging.getLogger("axolotl.lora_kernels")

# Axolotl's kernels that read lora_A and lora_B without calling the layers. If none of these options
# is in the configuration, Axolotl turns all of them on.
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_EXPERT_KERNELS = ("use_scattermoe", "use_sonicmoe")


class LoRAKernelsArgs(BaseModel):
    """The options of the plugin, which Axolotl adds to its own."""

    lora_kernels_init: str | None = Field(
        default=None,
        json_schema_extra={
            "description": "The start of the LoRA layers, a name of lora_kernels.init such as "
            "'loram' or 'pissa'. The layers subtract the start; the base does not change."
        },
    )
    lora_kernels_accelerate: bool | None = Field(
        default=None,
        json_schema_extra={"description": "Use lora_kernels' forward and backward for the layers."},
    )

    @model_validator(mode="before")
    @classmethod
    def check_lora_kernels(cls, data: Any) -> Any:
        """Raises ValueError for options that cannot work, before Axolotl loads a model."""
        if isinstance(data, Mapping):
            _check(data)
        return data


class LoRAKernelsPlugin(BasePlugin):
    """Calls `lora_kernels.peft.initialize` and `accelerate` after Axolotl has made the adapter."""

    def get_input_args(self) -> str:
        """The full name of the class with the options."""
        return "lora_kernels.integrations.axolotl.LoRAKernelsArgs"

    def register(self, cfg: MutableMapping[str, Any]) -> None:
        """Keeps Axolotl from turning its LoRA kernels on by itself.

        `cfg` is the configuration before Axolotl checks and completes it.
        """
        wanted = _subtracts(cfg) or cfg.get("lora_kernels_accelerate")
        if wanted and all(cfg.get(name) is None for name in _KERNELS):
            cfg.update(dict.fromkeys(_KERNELS, False))

    def post_lora_load(self, cfg: Mapping[str, Any], model: peft.PeftModel) -> None:
        """Initializes and accelerates the layers of the new adapter.

        The adapter in `lora_model_dir` is trained already and keeps its factors.
        """
        start = cfg.get("lora_kernels_init")
        if start and cfg.get("lora_model_dir"):
            _LOG.info("lora_kernels_init: the adapter of lora_model_dir keeps its factors")
        elif start:
            _refuse_expert_kernels(cfg, model)
            _LOG.info("%s", initialize(model, start, progress=False))
        if cfg.get("lora_kernels_accelerate"):
            _LOG.info("%s", accelerate(model))


def _subtracts(cfg: Mapping[str, Any]) -> bool:
    """Whether the layers will subtract a start; False if no start has this name."""
    name = cfg.get("lora_kernels_init")
    try:
        return isinstance(name, str) and get_initializer(name).changes_base
    except ValueError:
        return False


def _check(cfg: Mapping[str, Any]) -> None:
    name = cfg.get("lora_kernels_init")
    if isinstance(name, str):
        initializer = get_initializer(name)
        if initializer.needs_gradient or initializer.needs_activations:
            raise ValueError(
                f"lora_kernels_init: {name} is computed from gradients or activations, which "
                "Axolotl does not collect: use another start, or add_lora in a script of your own"
            )
    used = name or cfg.get("lora_kernels_accelerate")
    if used and cfg.get("adapter") not in ("lora", "qlora"):
        raise ValueError(
            "lora_kernels_init and lora_kernels_accelerate need adapter: lora, or adapter: qlora"
        )
    if not _subtracts(cfg):
        return
    if kernels := [kernel for kernel in _KERNELS if cfg.get(kernel)]:
        raise ValueError(
            f"{', '.join(kernels)} would lose what lora_kernels_init: {name} subtracts, because "
            "these kernels do not call the layers: set them to false or leave all of them out, or "
            "use lora_kernels_init: lora"
        )
    if cfg.get("relora"):
        raise ValueError(
            f"relora resets the adapter during training, without the start of lora_kernels_init: "
            f"{name}: use only one of the two"
        )
    trl = cfg.get("trl") or {}
    asynchronous = trl.get("async_prefetch") or trl.get("use_data_producer")
    if asynchronous and trl.get("use_vllm") and not trl.get("vllm_lora_sync"):
        raise ValueError(
            "Axolotl's asynchronous trainer sends vLLM weights without what lora_kernels_init: "
            f"{name} subtracts: set trl.vllm_lora_sync: true"
        )


def _refuse_expert_kernels(cfg: Mapping[str, Any], model: peft.PeftModel) -> None:
    """Raises ValueError if Axolotl's kernels compute experts that would subtract a start."""
    kernels = [name for name in _EXPERT_KERNELS if cfg.get(name)]
    if not (kernels and _subtracts(cfg)):
        return
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise ValueError(
            f"{kernels[0]} would lose what lora_kernels_init: {cfg['lora_kernels_init']} subtracts "
            "from the experts, because it reads lora_A and lora_B: turn it off, or leave the "
            "experts out of lora_target_parameters"
        )
