"""`LoRAConfig`: how a model is adapted, in PEFT's words. `AdapterState`: a model's adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_integer, check_positive
from .._utils.errors import did_you_mean, unknown_name
from .._utils.names import ALL_LINEAR, pattern_matches
from .._utils.peft_names import (
    BIASES,
    OPTIONS_OF_VARIANTS,
    OPTIONS_WITHOUT_EFFECT,
    TASK_TYPES,
)
from ..init import Initializer, get_initializer
from ..init.fused import Sizes, checked_sizes
from ..init.sharded.layout import pieces
from ..layers.options import DEFAULT_ALPHA, AdapterOptions, lora_scaling, resolve_rule
from ..layers.state import LayerState

RESIDUALS = ("auto", "absorb", "implicit")


@dataclass(frozen=True)
class LoRAConfig:
    """How `add_lora` adapts a model. Names and matching rules are those of PEFT's `LoraConfig`.

    Args:
        r: rank.
        target_modules: which layers to adapt. "all-linear" means every linear layer except the
            output head, the routers of experts, layers that the model does not call, and layers
            that are too small for `r`. Any other string is a regular expression that matches the
            whole name. A list contains names or their last parts; it may name embeddings,
            convolutions and attentions too.
        target_parameters: names or their last parts of the 3-D parameters in which a mixture of
            experts keeps its experts' matrices ("mlp.experts.gate_up_proj"). Each expert gets its
            own adapter. If nothing else is adapted, `target_modules` may be None.
        exclude_modules: the layers not to adapt, as a regular expression or a list as above.
        lora_alpha: the α from which the scaling rule computes s; 8 by default, 256 for
            "alpha_sqrt".
        lora_dropout: the probability of dropping an element of A's input x during training. It has
            no effect on embeddings and `nn.MultiheadAttention`.
        bias: which biases are trained: "none", "all" (of the whole model) or "lora_only" (of the
            adapted layers).
        use_rslora: PEFT's spelling of scaling="rslora".
        scaling: the rule for s: "lora", "rslora" or "alpha_sqrt" (see `LoRALinear`).
        init_lora_weights: a name, an object of `lora_kernels.init`, or PEFT's True, which means
            "lora".
        residual: how a layer subtracts a non-zero s·B₀A₀. "absorb" rewrites W ← W − s·B₀A₀ once;
            "implicit" subtracts it in every forward; "auto" means "absorb" if the weight can be
            rewritten, else "implicit" (the weight is quantized, or tied to another module). To
            attach several adapters to one base, set "implicit" for all of them, including the
            first.
        modules_to_save: names or last parts of modules that are trained in full, as copies.
        layers_to_transform: the number or numbers of the blocks to adapt; all blocks if None.
        layers_pattern: the name or names of the list of blocks ("layers", "h"), needed if layer
            names contain other numbers too.
        rank_pattern: {name, ending or regular expression: r} for layers with another rank. Experts
            are matched by the name of their parameter ("gate_up_proj"): see `with_expert_rank`.
        alpha_pattern: {name, ending or regular expression: lora_alpha} for layers with another
            lora_alpha.
        ensure_weight_tying: whether tied modules are adapted together. Tied modules are the input
            embedding and all modules that share its weight, such as the output head. If
            `target_modules` or `modules_to_save` names one of them, all are adapted, or trained in
            full, with one shared update. This update gets the gradients of all of them, and the
            modules stay tied when the adapter is merged.
        fused_parts: {name, ending or regular expression: parts} for fused layers, whose rows are
            several projections one after another (GPT-2's "c_attn", Phi-3's "qkv_proj" and
            "gate_up_proj", the in_proj of an attention). Each part gets its own A and B of rank r,
            with its own start from its rows of W; without this option all parts share one A. Give
            the number of equal parts ({"c_attn": 3}), the number of rows of each part
            ({"qkv_proj": (4096, 1024, 1024)}), or the first row and the row after the last of each
            adapted part ({"c_attn": ((0, 768), (1536, 2304))} adapts q and v alone). The rows of a
            part must be contiguous; "query_key_value" of GPT-NeoX, BLOOM and Falcon interleaves
            them by heads. With P parts, the layer has rank P·r with the s of rank r, and B is zero
            outside the parts' blocks. B and the optimizer's states store these zeros.
        use_dora: whether the norms of the adapted weights' rows are trained too (DoRA, see
            `LoRALinear`).
        task_type: PEFT's task type ("CAUSAL_LM" ...), which is written to the adapter's files. As
            in PEFT, the head of "SEQ_CLS" and "TOKEN_CLS" ("classifier", "score") and of
            "QUESTION_ANS" ("qa_outputs") is added to `modules_to_save`, unless it is a target.

    Raises:
        ValueError: a value out of range or an unknown name.
        TypeError: a value of the wrong type, an unknown option, or a PEFT option that is not
            implemented here (never silently ignored).

    """

    r: int = 8
    target_modules: str | Sequence[str] | None = ALL_LINEAR
    exclude_modules: str | Sequence[str] | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    scaling: str | None = None
    init_lora_weights: str | bool | Initializer = "loram"
    residual: str = "auto"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    task_type: str | None = None
    target_parameters: Sequence[str] | None = None
    use_dora: bool = False
    ensure_weight_tying: bool = False
    fused_parts: Mapping[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: object, **options: object) -> LoRAConfig:
        """Raises TypeError for unknown options, with a reason or the nearest name."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name in OPTIONS_OF_VARIANTS + OPTIONS_WITHOUT_EFFECT:
                raise TypeError(
                    f"LoRAConfig has no {name!r}: what PEFT does with it is not implemented here, "
                    "or needs no option"
                )
            if name not in known:
                raise TypeError(
                    f"LoRAConfig has no option {name!r}{did_you_mean(name.lower(), known)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.bias not in BIASES:
            raise unknown_name("bias", self.bias, BIASES)
        if self.residual not in RESIDUALS:
            raise unknown_name("residual", self.residual, RESIDUALS)
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise unknown_name("task_type", self.task_type, TASK_TYPES)
        for option in (
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "modules_to_save",
            "layers_pattern",
        ):
            self._check_names(option)
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: give names, or 'all-linear'")
        if not self.target_modules:
            object.__setattr__(self, "target_modules", ())
        for option in ("modules_to_save", "target_parameters"):
            if isinstance(getattr(self, option), str):
                raise TypeError(f"{option} must be a list of names, got {getattr(self, option)!r}")
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora must be True or False, got {self.use_rslora!r}")
        for option in ("use_dora", "ensure_weight_tying"):
            if not isinstance(getattr(self, option), bool):
                value = getattr(self, option)
                raise TypeError(f"{option} must be True or False, got {value!r}")
        if self.use_dora and self.target_parameters:
            raise ValueError(
                "use_dora=True is not implemented for target_parameters, the parameters of "
                f"experts ({', '.join(self.target_parameters)}): give them an adapter of their own "
                "without use_dora"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")
        if isinstance(self.layers_to_transform, Sequence):
            object.__setattr__(self, "layers_to_transform", tuple(self.layers_to_transform))
        for index in self.layer_indices() or ():
            as_integer(index, "layers_to_transform", minimum=0)
        self._check_patterns()
        self._check_fused_parts()
        self._options(self.r, self.lora_alpha, self.initializer, "absorb")

    @property
    def initializer(self) -> Initializer:
        """The initializer that `init_lora_weights` names.

        Raises:
            ValueError: an unknown name, or False.

        """
        if self.init_lora_weights is True:
            return get_initializer("lora")
        if self.init_lora_weights is False:
            raise ValueError(
                "init_lora_weights=False leaves PEFT's layers with a random B, which changes the "
                "model; name a start ('loram', 'lora', 'init_ab_plus' ...)"
            )
        return get_initializer(self.init_lora_weights)

    @property
    def scaling_rule(self) -> str:
        """The name of the rule for s: "lora", "rslora" or "alpha_sqrt"."""
        return resolve_rule(self.scaling, self.use_rslora)

    def layer_rank(self, name: str) -> int:
        """The rank r of the layer `name`."""
        return int(_matched(self.rank_pattern, name, self.r))

    def layer_alpha(self, name: str) -> float:
        """`lora_alpha` of the layer `name`."""
        default = DEFAULT_ALPHA[self.scaling_rule] if self.lora_alpha is None else self.lora_alpha
        return _matched(self.alpha_pattern, name, default)

    def layer_scaling(self, name: str) -> float:
        """s of the layer `name`."""
        return lora_scaling(self.layer_alpha(name), self.layer_rank(name), self.scaling_rule)

    def layer_parts(self, name: str) -> Sizes | None:
        """The parts that `fused_parts` gives the layer `name`; None if it gives none."""
        patterns = self.fused_parts
        return next((v for key, v in patterns.items() if pattern_matches(key, name)), None)

    def layer_options(self, name: str, initializer: Initializer, residual: str) -> AdapterOptions:
        """The options of the layer `name`, whose factors `initializer` computes.

        Raises:
            ValueError, TypeError: as `AdapterOptions.checked`.

        """
        return self._options(self.layer_rank(name), self.layer_alpha(name), initializer, residual)

    def layer_indices(self) -> tuple[int, ...] | None:
        """The numbers of the blocks to adapt; None for all blocks."""
        layers = self.layers_to_transform
        if layers is None or isinstance(layers, Sequence):
            return None if not layers else tuple(layers)
        return (layers,)

    def _options(
        self, r: int, lora_alpha: float | None, initializer: Initializer, residual: str
    ) -> AdapterOptions:
        return AdapterOptions.checked(
            initializer,
            r,
            lora_alpha,
            use_rslora=self.use_rslora,
            scaling=self.scaling,
            lora_dropout=self.lora_dropout,
            residual=residual,
            use_dora=self.use_dora,
        )

    def _check_names(self, option: str) -> None:
        value = getattr(self, option)
        if value is None or isinstance(value, str):
            return
        if not isinstance(value, (Sequence, set, frozenset)) or not all(
            isinstance(name, str) for name in value
        ):
            raise TypeError(f"{option} must be a string or a list of names, got {value!r}")
        # PEFT's files contain sets; sorted, equal configurations have equal tuples.
        names = sorted(value) if isinstance(value, (set, frozenset)) else value
        object.__setattr__(self, option, tuple(names))

    def _check_patterns(self) -> None:
        patterns = self.layers_pattern or ()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            _check_expression("layers_pattern", pattern)
        for option in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, option)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{option} must be a dict, got {type(patterns).__name__}")
            for key, value in patterns.items():
                _check_expression(option, key)
                if option == "rank_pattern":
                    as_integer(value, f"{option}[{key!r}]", minimum=1)
                else:
                    check_positive(value, f"{option}[{key!r}]")
            object.__setattr__(self, option, dict(patterns))

    def _check_fused_parts(self) -> None:
        if not isinstance(self.fused_parts, Mapping):
            raise TypeError(f"fused_parts must be a dict, got {type(self.fused_parts).__name__}")
        found = {}
        for key, value in self.fused_parts.items():
            _check_expression("fused_parts", key)
            found[key] = checked_sizes(value, f"fused_parts[{key!r}]")
        object.__setattr__(self, "fused_parts", found)


def _check_expression(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{option} has {pattern!r}, not a regular expression: {error}") from None


def _matched(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches."""
    return next((v for key, v in patterns.items() if pattern_matches(key, name)), default)


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that PEFT has trained (`trainable_token_indices`): `values` [n, dim] are
    the new rows of the tokens `indices`.
    """

    indices: tuple[int, ...]
    values: Tensor

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless these rows fit the weight `name`, which has this shape."""
        if len(shape) != 2 or shape[1] != self.values.shape[1]:
            raise ValueError(
                f"the adapter has rows of {self.values.shape[1]} numbers for {name!r}, which is "
                f"{list(shape)}"
            )
        if max(self.indices) >= shape[0]:
            raise ValueError(
                f"the adapter has a row of {name!r} for token {max(self.indices)}, the model's "
                f"vocabulary has {shape[0]}: resize its embeddings first"
            )

    @torch.no_grad()
    def put_(self, weight: Tensor) -> Tensor:
        """Writes the rows into the weight, in the weight's dtype, and returns the weight. Into a
        DTensor, it writes only the rows of this process.
        """
        for data, (rows, cols) in pieces(weight):
            own = [k for k, row in enumerate(self.indices) if rows.start <= row < rows.stop]
            index = torch.tensor([self.indices[k] - rows.start for k in own], device=data.device)
            data.index_copy_(0, index.long(), self.values[own, cols].to(data.device, data.dtype))
        return weight


# PEFT's `layer_replication`, pairs (start, end): the adapted model has the base's blocks start to
# end − 1 of each pair, one pair after another.
Replication = tuple[tuple[int, int], ...]


def repeated_blocks(replication: Replication) -> list[int]:
    """For each block of the adapted model, the number of the base's block that it copies."""
    return [block for start, end in replication for block in range(start, end)]


@dataclass(frozen=True)
class ExpertPart:
    """Tensors of a file that hold the rows `start` to `stop` of all experts' matrices [out, in].

    If `name` contains "{}", each expert has its own tensor, and "{}" stands for its number;
    otherwise one tensor holds all experts. `name` does not include ".weight".
    """

    name: str
    start: int
    stop: int

    def names(self, experts: int) -> list[str]:
        """The name of each expert's tensor, or the one name."""
        if "{}" not in self.name:
            return [self.name]
        return [self.name.replace("{}", str(e)) for e in range(experts)]


@dataclass(frozen=True)
class StoredExperts:
    """How files store an expert parameter and its adapter.

    Attributes:
        parts: the tensors of a checkpoint that has a tensor for each expert; empty for other
            checkpoints, or if this is not known.
        layout: the form of the adapter in its file, "each" or "stacked"; "" if it is not decided.
        exchanged: whether A and B may have to be exchanged, which the model's shapes decide. False:
            no. True: PEFT before 0.19 wrote the file. None: an unknown version of PEFT wrote it.

    """

    parts: tuple[ExpertPart, ...] = ()
    layout: str = ""
    exchanged: bool | None = False


@dataclass
class AdapterState:
    """The adapter of a model: a `LayerState` for each layer, by its name in the base model.

    `extra` holds the tensors that are trained in full (`modules_to_save` and biases), by their
    names in the base model's state_dict, and `rows` the trained rows of other tensors. Modules that
    are tied to the input embedding get its rows too, unless they have their own. If `replication`
    is not empty, the layers' names are those of a model whose blocks are repeated in this way.
    `base_model` is the base model's name or path, if known. `experts` says, by name, how files
    store parameters of experts; it may lack some, and may have others that are not adapted.
    """

    config: LoRAConfig
    layers: dict[str, LayerState]
    extra: dict[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    rows: dict[str, TokenRows] = field(default_factory=dict)
    replication: Replication = ()
    experts: dict[str, StoredExperts] = field(default_factory=dict)
