"""Fused LoRA kernels as Axolotl and Unsloth put them over PEFT's layers: what they compute is
W + s·BA, so that a start that the layers subtract would be lost.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from ..support.packages import needs_peft
from ..support.peft_models import accelerate, adapted, initialize, linear_layers
from ..support.running import close, logits, move, same_bits, token_ids, weights_of
from ..support.tiny_models import llama

pytestmark = needs_peft

SUBTRACTED = ("loram", "pissa", "olora")
PLAIN = ("lora", "gaussian", "init_b", "init_ab_plus")

# What the kernels read and compute, in PyTorch. The names are those of the packages.
PARAMETERS = """
import torch
from torch.nn.functional import linear, silu


def get_lora_parameters(proj):
    base_layer = {base}
    W = base_layer.weight
    if getattr(proj, "disable_adapters", True) or proj.merged:
        return W, None, None, None
    adapter = proj.active_adapters[0]
    return W, proj.lora_A[adapter].weight, proj.lora_B[adapter].weight, proj.scaling[adapter]


def matmul_lora(X, W, A, B, s):
    out = linear(X, W)
    return out if A is None else out + s * linear(linear(X, A), B)
"""
KERNELS = """

def apply_lora_mlp_swiglu(self, X, inplace=True):
    gate = matmul_lora(X, *get_lora_parameters(self.gate_proj))
    up = matmul_lora(X, *get_lora_parameters(self.up_proj))
    return matmul_lora(silu(gate) * up, *get_lora_parameters(self.down_proj))


def apply_lora_qkv(self, X, inplace=True):
    return tuple(
        matmul_lora(X, *get_lora_parameters(proj))
        for proj in (self.q_proj, self.k_proj, self.v_proj)
    )


def apply_lora_o(self, X):
    return matmul_lora(X, *get_lora_parameters(self.o_proj))
"""
# A class's forward after Axolotl's rewriting; Unsloth hands `self` to the instance's functions.
ATTENTION = """
from transformers.models.llama.modeling_llama import (
    apply_rotary_pos_emb, eager_attention_forward
)


def original_apply_qkv(self, hidden_states):
    return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)


def original_apply_o(self, hidden_states):
    return self.o_proj(hidden_states)


def attention_forward(
    self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs
):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    Q, K, V = self.apply_qkv({owner}hidden_states)
    Q, K, V = (part.view(shape).transpose(1, 2) for part in (Q, K, V))
    Q, K = apply_rotary_pos_emb(Q, K, *position_embeddings)
    out, weights = eager_attention_forward(
        self, Q, K, V, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
    )
    return self.apply_o({owner}out.reshape(*shape[:-2], -1).contiguous()), weights
"""
# Unsloth's decoding: the head's forward goes by closures to functions that read the layers.
DECODING = """

def LlamaAttention_fast_forward_inference(self, X):
    return matmul_lora(X, *get_lora_parameters(self.q_proj))


def model_inference(attention):
    def inference(self, X):
        return [attention(layer.self_attn, X) for layer in self.model.layers]

    return inference


def causal_forward(inference, old):
    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return inference(self, *args)
        return old(self, *args, past_key_values=past_key_values, **kwargs)

    return forward


def fast_forward(old):
    return causal_forward(model_inference(LlamaAttention_fast_forward_inference), old)
"""
AXOLOTL_BASE = 'proj.base_layer if hasattr(proj, "base_layer") else proj'
UNSLOTH_BASE = 'getattr(proj, "base_layer", proj)'


class Modules:
    """Makes modules of other packages for one test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.folder = monkeypatch, folder

    def __call__(self, name: str, source: str, with_source: bool = True) -> types.ModuleType:
        """A module in `sys.modules`, which `inspect` finds the source of if it has one."""
        if not with_source:
            module = types.ModuleType(name)
            exec(compile(source, "<no file>", "exec"), vars(module))
        else:
            file = self.folder / f"{name.replace('.', '_')}.py"
            file.write_text(source)
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        self.monkeypatch.setitem(sys.modules, name, module)
        return module


@pytest.fixture
def modules(monkeypatch, tmp_path) -> Iterator[Modules]:
    yield Modules(monkeypatch, tmp_path)


def attention_patched(modules: Modules, package: str) -> types.ModuleType:
    """The attention class with a forward that calls apply_qkv and apply_o of the instances."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    owner, name = ("", "axolotl.monkeypatch.lora_kernels")
    if package == "unsloth":
        owner, name = ("self, ", "unsloth.models.llama")
    module = modules(name, ATTENTION.replace("{owner}", owner), with_source=False)
    modules.monkeypatch.setattr(LlamaAttention, "forward", module.attention_forward)
    return module


def axolotl(modules: Modules, model: nn.Module, parts=("qkv", "o", "mlp"), with_source=True):
    """As `apply_lora_kernel_patches` does: bound methods; the originals where a part is off."""
    original = attention_patched(modules, "axolotl")
    source = PARAMETERS.replace("{base}", AXOLOTL_BASE) + KERNELS
    kernels = modules("axolotl.kernels.lora", source, with_source)
    for layer in model.get_base_model().model.layers:
        attention = layer.self_attn
        for part in ("qkv", "o"):
            function = getattr(original, f"original_apply_{part}")
            if part in parts:
                function = getattr(kernels, f"apply_lora_{part}")
            setattr(attention, f"apply_{part}", types.MethodType(function, attention))
        if "mlp" in parts:
            layer.mlp.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, layer.mlp)


def unsloth(modules: Modules, model: nn.Module, with_source=True):
    """As `patch_peft_model` does: plain functions in the attention, a method in the MLP."""
    attention_patched(modules, "unsloth")
    source = PARAMETERS.replace("{base}", UNSLOTH_BASE) + KERNELS
    kernels = modules("unsloth.kernels.fast_lora", source, with_source)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.apply_qkv = kernels.apply_lora_qkv
        layer.self_attn.apply_o = kernels.apply_lora_o
        layer.mlp.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, layer.mlp)


def unsloth_decoding(modules: Modules, model: nn.Module):
    """No kernels in the instances, as with dropout; the class's forward decodes past the layers."""
    from transformers import LlamaForCausalLM

    source = PARAMETERS.replace("{base}", UNSLOTH_BASE) + DECODING
    module = modules("unsloth.models.llama_decoding", source)
    forward = module.fast_forward(LlamaForCausalLM.forward)
    modules.monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


def in_a_list(modules: Modules, model: nn.Module):
    """A kernel for a part of the model that is no child: Axolotl's `FakeMLP`."""
    source = PARAMETERS.replace("{base}", AXOLOTL_BASE) + KERNELS
    kernels = modules("axolotl.kernels.lora", source)
    for layer in model.get_base_model().model.layers:
        part = nn.Module()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(part, name, getattr(layer.mlp, name))
        layer.mlp.forward = types.MethodType(kernels.apply_lora_mlp_swiglu, part)


def without_variants(modules: Modules, model: nn.Module):
    """PEFT's layer itself with another package's forward, from a time without variants."""
    from peft.tuners.lora.layer import Linear

    source = PARAMETERS.replace("{base}", "proj.base_layer") + (
        "\n\ndef unsloth_forward(self, x, *args, **kwargs):\n"
        "    return matmul_lora(x, *get_lora_parameters(self))\n"
    )
    module = modules("Linear_peft_forward", source)
    for layer in linear_layers(model).values():
        assert type(layer) is Linear
        layer.forward = types.MethodType(module.unsloth_forward, layer)


PATCHES: dict[str, Callable[[Modules, nn.Module], None]] = {
    "axolotl": axolotl,
    "axolotl without source": lambda m, model: axolotl(m, model, with_source=False),
    "unsloth": unsloth,
    "unsloth without source": lambda m, model: unsloth(m, model, with_source=False),
    "axolotl's FakeMLP": in_a_list,
    "a layer's forward": without_variants,
}


def made(seed: int = 0) -> nn.Module:
    return adapted(llama(seed=seed, attn_implementation="eager"))


@pytest.mark.parametrize("kind", PATCHES)
def test_a_subtracted_start_is_refused_and_nothing_changes(modules, kind):
    model = made()
    move(model)
    PATCHES[kind](modules, model)
    before, attributes = weights_of(model), {id(m): dict(vars(m)) for m in model.modules()}
    for method in SUBTRACTED:
        with pytest.raises(ValueError, match=r"(?s)without calling the layers.*lora-kernels init"):
            initialize(model, method)
    assert same_bits(weights_of(model), before)
    assert all(vars(m) == attributes[id(m)] for m in model.modules())


def test_the_refusal_names_the_kernel_the_layers_and_the_switches(modules):
    model = made()
    axolotl(modules, model, parts=("mlp",))
    with pytest.raises(ValueError) as error:
        initialize(model, "loram")
    text = str(error.value)
    assert "axolotl.kernels.lora.apply_lora_mlp_swiglu computes 6 layers" in text
    assert "model.layers.0.mlp.gate_proj" in text and "q_proj" not in text
    assert "lora_mlp_kernel" in text and "FastLanguageModel" not in text
    other = made()
    unsloth(modules, other)
    with pytest.raises(ValueError, match=r"14 layers.*FastLanguageModel"):
        initialize(other, "loram")


@pytest.mark.parametrize("kind", PATCHES)
def test_the_numbers_prove_that_the_subtraction_would_be_lost(modules, kind):
    """The same model, initialized first and patched then, computes another function."""
    model = made()
    want = logits(model)
    initialize(model, "pissa")
    assert close(logits(model), want)  # this first forward finds no kernels
    PATCHES[kind](modules, model)
    assert not torch.allclose(logits(model), want, atol=1e-3)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("method", PLAIN)
def test_starts_that_subtract_nothing_are_allowed_in_all_layers(modules, kind, method):
    base = llama(attn_implementation="eager")
    model = adapted(base)
    PATCHES[kind](modules, model)
    report = initialize(model, method)
    assert report.layers == list(linear_layers(model)) and not report.left
    alone = adapted(base)
    for name, layer in linear_layers(alone).items():
        patched = linear_layers(model)[name]
        layer.load_state_dict(patched.state_dict())
    move(alone, seed=3)
    move(model, seed=3)
    got = logits(model)  # the check before the first forward finds nothing to say
    modules.monkeypatch.undo()
    assert close(got, logits(alone), 1e4)


def test_original_functions_of_axolotl_are_no_kernels(modules):
    """With all parts switched off, Axolotl still replaces the class's forward."""
    model = made()
    want = logits(model)
    axolotl(modules, model, parts=())
    assert initialize(model, "pissa").subtracted
    assert close(logits(model), want)


def test_a_layer_s_forward_that_knows_variants_is_no_kernel(modules):
    """Unsloth compiles PEFT's layers anew from PEFT's own source."""
    source = (
        "import inspect, textwrap\n"
        "from peft.tuners.lora import layer\n"
        "from peft.tuners.lora.layer import *\n"
        "from peft.tuners.lora.layer import VARIANT_KWARG_KEYS\n"
        "exec(textwrap.dedent(inspect.getsource(layer.Linear.forward)))\n"
        "unsloth_forward = forward\n"
    )
    compiled = modules("Linear_peft_forward", source)
    model = made()
    want = logits(model)
    for layer in linear_layers(model).values():
        layer.forward = types.MethodType(compiled.unsloth_forward, layer)
    assert initialize(model, "pissa").subtracted
    assert close(logits(model), want)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("how", ("forward", "generate", "train"))
def test_kernels_that_come_later_are_noticed_before_training(modules, kind, how):
    model = made()
    initialize(model, "loram")
    PATCHES[kind](modules, model)
    with pytest.raises(RuntimeError, match=r"(?s)since the model was initialized.*Turn these"):
        if how == "train":
            model.train()
        elif how == "generate":
            model.generate(input_ids=token_ids(), max_new_tokens=1)
        else:
            logits(model)
    assert not model.training
    with pytest.raises(RuntimeError, match="since the model was initialized"):
        logits(model)  # again: the error is not raised only once


def test_kernels_that_come_even_later_are_noticed_at_training_and_at_saving(modules, tmp_path):
    model = made()
    initialize(model, "loram")
    logits(model)
    model.train().eval()
    unsloth(modules, model)
    with pytest.raises(RuntimeError, match="since the model was initialized"):
        model.train()
    with pytest.warns(UserWarning, match="the model did not if it was trained"):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_decoding_of_the_whole_class_is_found_through_closures(modules):
    model = made()
    unsloth_decoding(modules, model)
    with pytest.raises(ValueError, match=r"llama_decoding.forward computes 2 layers"):
        initialize(model, "loram")
    assert len(initialize(model, "lora").layers) == 14


def test_loading_an_adapter_with_a_start_onto_kernels_is_noticed(modules, tmp_path):
    source = made()
    initialize(source, "loram")
    move(source)
    source.save_pretrained(tmp_path / "adapter")
    model = made()
    initialize(model, "lora")
    unsloth(modules, model)
    logits(model)
    model.load_adapter(tmp_path / "adapter", "default")
    with pytest.raises(RuntimeError, match="since the model was initialized"):
        logits(model)


def test_merged_adapters_are_right_with_kernels(modules):
    model = made()
    initialize(model, "loram")
    move(model)
    want = logits(copy.deepcopy(model))
    model.merge_adapter()
    unsloth(modules, model)
    for _ in range(2):
        assert close(logits(model), want, 1e4)
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="since the model was initialized"):
        logits(model)


def test_models_without_kernels_are_unaffected(tmp_path):
    model = made()
    want = logits(model)
    report = initialize(model, "loram")
    accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.train().training and not copied.eval().training
            assert close(logits(copied), want, 1e4)
            copied.save_pretrained(tmp_path / "adapter")
    base = model.get_base_model()
    assert not base._forward_pre_hooks
    report.undo()
    assert "train" not in vars(model) and "save_pretrained" not in vars(model)


def test_undo_removes_the_look_before_the_first_forward(modules):
    model = made()
    initialize(model, "loram").undo()
    assert not model.get_base_model()._forward_pre_hooks
    unsloth(modules, model)
    logits(model.train())


def test_a_compiled_model_has_no_graph_break():
    model = made()
    initialize(model, "loram")
    compiled = torch.compile(model.get_base_model(), backend="eager", fullgraph=True)
    assert close(logits(compiled), logits(model))


HARMLESS = {
    "the MLP's forward prints a norm": ("mlp", """
        def forward(self, x):
            self.seen = float(self.gate_proj.lora_A["default"].weight.norm())
            return type(self).forward(self, x)
    """),
    "it casts to the dtype of a factor": ("mlp", """
        def forward(self, x):
            x = x.to(self.gate_proj.lora_A["default"].weight.dtype)
            return type(self).forward(self, x)
    """),
    "a method that no forward calls": ("mlp", """
        def penalty(self):
            return self.gate_proj.lora_A["default"].weight.norm() + self.gate_proj.weight.norm()
    """),
    "the attention's forward prints a norm": ("self_attn", """
        def forward(self, *args, **kwargs):
            self.seen = float(self.q_proj.lora_A["default"].weight.norm())
            return type(self).forward(self, *args, **kwargs)
    """),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMLESS)
def test_code_that_calls_the_layers_is_no_kernel(modules, kind):
    model = made()
    where, source = HARMLESS[kind]
    code = modules("mytrainer.patches", textwrap.dedent(source))
    for layer in model.get_base_model().model.layers:
        owner = getattr(layer, where)
        for name in ("forward", "penalty"):
            if hasattr(code, name):
                setattr(owner, name, types.MethodType(getattr(code, name), owner))
    want = logits(model)
    initialize(model, "pissa")
    assert close(logits(model), want)


WRAPPED = {
    "functools.wraps": """
        def wrapped(old):
            @functools.wraps(old)
            def forward(self, x):
                return apply_lora_mlp_swiglu(self, x)
            return forward
    """,
    "a default argument": """
        def wrapped(old):
            @functools.wraps(old)
            def forward(self, x, kernel=apply_lora_mlp_swiglu):
                return kernel(self, x)
            return forward
    """,
    "torch.compile": """
        def wrapped(old):
            return torch.compile(apply_lora_mlp_swiglu, backend="eager")
    """,
    "a callable object": """
        class Kernel:
            def __call__(self, mlp, x):
                return apply_lora_mlp_swiglu(mlp, x)

        def wrapped(old):
            kernel = Kernel()
            return lambda self, x: kernel(self, x)
    """,
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_kernels_inside_other_functions(modules, kind, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = made()
    source = PARAMETERS.replace("{base}", AXOLOTL_BASE) + KERNELS
    code = modules("somekernels", "import functools\nimport torch\n" + source +
                   textwrap.dedent(WRAPPED[kind]))  # fmt: skip
    monkeypatch.setattr(LlamaMLP, "forward", code.wrapped(LlamaMLP.forward))
    with pytest.raises(ValueError, match=r"computes? 6 layers"):
        initialize(model, "pissa")
