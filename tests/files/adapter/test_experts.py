"""Adapters of experts in files: both layouts, saved and resumed bit for bit, and read by PEFT."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.files.adapter.folder import read_adapter, write_adapter
from lora_kernels.files.adapter.hotswap import hotswap_adapter
from lora_kernels.files.adapter.peft_format.experts.naming import stored_experts
from lora_kernels.layers.state import FACTORS
from lora_kernels.model.lora import adapter_state

from ...support.exhaustive import EXHAUSTIVE
from ...support.packages import needs_peft
from ...support.running import move
from ...support.tiny_experts import EXPERTS, expert_parameters, tiny_experts

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")

R = 2
IDS = torch.arange(1, 13).view(2, 6)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(family: str, parameters: list[str] | None = None, **options) -> tuple:
    """(the base, the same with an adapter that was moved from its start)."""
    base = tiny_experts(family, **options.pop("model", {}))
    model = copy.deepcopy(base)
    names = [n for n in expert_parameters(model) if not parameters or n.endswith(tuple(parameters))]
    options = {"r": R, "lora_alpha": 3, "target_modules": ["q_proj"]} | options
    if not any(name.endswith("q_proj") for name, _ in model.named_modules()):
        options["target_modules"] = ["q_b_proj"]
    add_lora(model, LoRAConfig(target_parameters=names, **options), progress=False)
    move(model)
    return base, model


def assert_same(model: nn.Module, other: nn.Module, folded: bool = False) -> None:
    """All tensors and numbers of the active adapters have the same bits."""
    mine, others = adapter_state(model).layers, adapter_state(other).layers
    assert mine.keys() == others.keys()
    for name, layer in mine.items():
        for key in (*FACTORS, "beta", "weight_norm"):
            want, got = getattr(layer, key), getattr(others[name], key)
            if folded and key in ("lora_A", "lora_R"):
                continue
            same = torch.equal(want, got) if isinstance(want, torch.Tensor) else want == got
            assert same, (name, key)
        assert (layer.scaling, layer.r) == (others[name].scaling, others[name].r)


CASES = [
    ("Mixtral", None, {}),
    ("Qwen3Moe", ["gate_up_proj"], {"init_lora_weights": "pissa"}),
    ("Qwen2Moe", ["down_proj"], {"residual": "implicit"}),
    ("GptOss", None, {"init_lora_weights": "lora_xs"}),
    ("NemotronH", ["up_proj"], {"scaling": "rslora", "lora_dropout": 0.1}),
]


@pytest.mark.parametrize(
    ("family", "parameters", "options"),
    CASES if EXHAUSTIVE else CASES[1:4],
    ids=lambda v: str(v)[:24],
)
@pytest.mark.parametrize("form", ["native", "each", "stacked"])
def test_training_resumes_bit_for_bit(family, parameters, options, form, tmp_path):
    if family == "GptOss" and form == "each":
        pytest.skip("its checkpoint has one tensor of all experts")
    base, model = adapted(family, parameters, **options)
    arguments = {"format": "native"} if form == "native" else {"experts": form}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="plain PEFT will leave")
        save_adapter(model, tmp_path, **arguments)
    fresh = copy.deepcopy(base)
    load_adapter(fresh, tmp_path, progress=False)
    assert_same(model, fresh, folded="lora_xs" in options.values() and form != "native")
    assert torch.allclose(logits(fresh), logits(model), atol=1e-6)
    if options.get("residual") == "implicit":
        move(fresh)
        hotswap_adapter(fresh, tmp_path)
        assert_same(model, fresh)


@needs_peft
@pytest.mark.parametrize("parameters", [None, ["gate_up_proj", "up_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize(
    "family", ["Mixtral", "Qwen3Moe", "Olmoe", "Qwen2Moe", "GptOss", "NemotronH"]
)
def test_peft_reads_what_auto_writes(family, parameters, tmp_path):
    """All of it, with the same strength, whatever is adapted beside the experts."""
    import peft

    base, model = adapted(family, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = save_adapter(model, tmp_path)
    assert saved.rank == 2 * R
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    want, bare = logits(model), logits(base)
    assert (logits(loaded) - want).norm() < 1e-5 * (want - bare).norm()


@needs_peft
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Olmoe"])
def test_peft_reads_both_layouts_alike(family, tmp_path):
    import peft

    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}}
    base, model = adapted(family, **patterns)
    found = []
    for layout in ("each", "stacked"):
        save_adapter(model, tmp_path / layout, experts=layout)
        config = json.loads((tmp_path / layout / ADAPTER_CONFIG).read_text())
        assert config["r"] == config["lora_alpha"] == 6
        assert not config["rank_pattern"] and not config["alpha_pattern"]
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / layout)
        found.append(logits(loaded))
    assert torch.equal(*found)
    want, bare = logits(model), logits(base)
    assert (found[0] - want).norm() < 1e-5 * (want - bare).norm()


@needs_peft
def test_pefts_missing_family(tmp_path):
    """PEFT drops the pairs of qwen2_moe, as `save_adapter` says; this package reads them."""
    import peft

    base, model = adapted("Qwen2Moe")
    with pytest.warns(UserWarning, match=r"bare .*experts.*does not read the pairs of each expert"):
        save_adapter(model, tmp_path, experts="each")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    want, bare = logits(model), logits(base)
    assert (logits(loaded) - want).norm() > 0.1 * (want - bare).norm()


@pytest.mark.parametrize(
    ("family", "layout"),
    [("Mixtral", "each"), ("Qwen3Moe", "each"), ("DeepseekV3", "each"), ("Qwen2Moe", "stacked"),
     ("GptOss", "stacked"), ("GraniteMoe", "stacked"), ("NemotronH", "stacked"),
     ("Qwen3VLMoe", "stacked")],
)  # fmt: skip
def test_the_layout_of_a_family(family, layout):
    found = stored_experts(tiny_experts(family))
    assert {stored.layout for stored in found.values()} == {layout}
    assert list(found) == expert_parameters(tiny_experts(family))


@pytest.mark.parametrize("options", [{}, {"compress_to": 1, "dtype": "bfloat16"}], ids=str)
def test_vllm_reads_stacked(options, tmp_path):
    """A and B of all experts, by vLLM's reshapes of the tensors: its formula, not ours."""
    _, model = adapted("GptOss", lora_alpha=5)
    saved = save_adapter(model, tmp_path, **options)
    tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
    for name, layer in adapter_state(model).layers.items():
        if layer.experts is None:
            continue
        module = name.rpartition(".")[0] + (".base_layer" if "gate_up" in name else "")
        A, B = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        A = A.reshape(EXPERTS, -1, A.shape[-1])
        B = B.reshape(B.shape[0], -1, EXPERTS)
        got = torch.stack([B[:, :, e] @ A[e] for e in range(EXPERTS)])
        right, left = layer.update_factors()
        want = layer.scaling * left.double() @ right.double()
        error = float((got - want).norm() / want.norm())
        assert error == pytest.approx(saved.errors[name], rel=1e-3) if options else error < 1e-6


@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_truncation(layout, tmp_path):
    """To the best of rank 1, by dense SVDs in float64, with its error; which PEFT reads too."""
    _, model = adapted("Mixtral")
    saved = save_adapter(model, tmp_path, compress_to=1, experts=layout)
    layers = read_adapter(tmp_path).layers
    if layout == "each":
        fresh = tiny_experts("Mixtral")
        load_adapter(fresh, tmp_path, progress=False)
        layers = adapter_state(fresh).layers
    for name, layer in adapter_state(model).layers.items():
        right, left = layer.update_factors()
        dense = layer.scaling * left.double() @ right.double()
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        best = U[..., :1] * S[..., None, :1] @ Vh[..., :1, :]
        got = layers[name].scaling * layers[name].lora_B.double() @ layers[name].lora_A.double()
        assert torch.allclose(got, best, atol=1e-6 * float(S.max()))
        error = float((best - dense).norm() / dense.norm())
        assert saved.errors[name] == pytest.approx(error, rel=1e-4)


def test_float16_holds_small_updates(tmp_path):
    """The halves of each expert are balanced: their entries have one size."""
    _, model = adapted("Qwen3Moe", init_lora_weights="lora")
    state = adapter_state(model)
    state.experts = stored_experts(model)
    for layer in state.layers.values():
        layer.lora_B *= 1e-5
    saved = write_adapter(tmp_path, state, dtype="float16")
    assert saved.error < 1e-3
    tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
    names = [name for name in tensors if "experts.0.gate_proj.lora_A" in name]
    assert all(torch.equal(tensors[n], tensors[n.replace("gate", "up")]) for n in names)


def test_names_that_are_not_known(tmp_path):
    _, model = adapted("GptOss")
    with pytest.raises(ValueError, match=r"one tensor of all experts.*'stacked' is right"):
        save_adapter(model, tmp_path, experts="each")
    with pytest.raises(ValueError, match=r"experts 'stack'.*stacked"):
        save_adapter(model, tmp_path, experts="stack")
    state = adapter_state(adapted("Mixtral")[1])  # without what the model tells
    with pytest.raises(ValueError, match=r"names that the model's checkpoint has.*--base"):
        write_adapter(tmp_path, state, experts="each")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_changed_tensors(layout, tmp_path):
    """Without the recipe, the same update is read."""
    base, model = adapted("Mixtral", init_lora_weights="lora")
    save_adapter(model, tmp_path, experts=layout)
    file = tmp_path / ADAPTER_FILE
    tensors, metadata = safetensors.load_file(file), {}
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for name in tensors:
        if "experts" in name and "lora_B" in name:
            tensors[name] = tensors[name] * 2
    safetensors.save_file(tensors, file, metadata)
    fresh = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="another program has changed the tensors"):
        load_adapter(fresh, tmp_path, progress=False)
    want, got = adapter_state(model).layers, adapter_state(fresh).layers
    for name in expert_parameters(base):
        double = 2 * want[name].scaling * want[name].lora_B @ want[name].lora_A
        assert torch.allclose(got[name].scaling * got[name].lora_B @ got[name].lora_A, double)


@pytest.mark.parametrize("layout", ["each", "stacked"])
def test_a_missing_tensor(layout, tmp_path):
    _, model = adapted("Qwen3Moe")
    save_adapter(model, tmp_path, experts=layout)
    file = tmp_path / ADAPTER_FILE
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.load_file(file)
    lost = [name for name in tensors if "experts" in name][:2]
    safetensors.save_file({n: t for n, t in tensors.items() if n not in lost}, file, metadata)
    with pytest.raises(ValueError, match="missing"):
        read_adapter(tmp_path)


def test_compiled_blocks(tmp_path):
    """Their names are those of the bare model."""
    base, model = adapted("Mixtral")
    for wrapped in (base, model):
        wrapped.model.layers[0] = torch.compile(wrapped.model.layers[0], backend="eager")
    save_adapter(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
    prefix = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    assert f"{prefix}.lora_A.weight" in tensors
    load_adapter(base, tmp_path, progress=False)
    assert_same(model, base)


@pytest.mark.parametrize("layout", ["each", "stacked"])
@pytest.mark.parametrize("kept", ["gate_up_proj", "down_proj"])
def test_what_is_not_adapted(kept, layout, tmp_path):
    """Its zeros are in the file, and no layer is made of them, with a recipe or without."""
    base, model = adapted("Qwen3Moe", [kept])
    save_adapter(model, tmp_path, experts=layout, compress_to=1)
    tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
    assert any(not t.any() for name, t in tensors.items() if "lora_A" in name)
    load_adapter(base, tmp_path, progress=False)
    assert adapter_state(base).layers.keys() == adapter_state(model).layers.keys()


def test_parts_that_cancel(tmp_path):
    """Of one expert, the factors of an SVD are in the file, and all bits in the recipe."""
    _, model = adapted("Qwen3Moe", residual="implicit")
    state = adapter_state(model)
    state.experts = stored_experts(model)
    for name in state.experts:
        layer = state.layers[name]
        start_A, start_B = layer.start_factors()
        layer.lora_A[2], layer.lora_B[2] = 8 * start_A[2], start_B[2] / 8
        layer.lora_B[2] += 1e-4
    write_adapter(tmp_path, state)
    for name, layer in read_adapter(tmp_path).layers.items():
        assert torch.equal(layer.lora_A, state.layers[name].lora_A)
        assert torch.equal(layer.lora_B, state.layers[name].lora_B)
    tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
    start = "base_model.model.model.layers.0.mlp.experts.{}.down_proj.lora_A.weight"
    sizes = [float(tensors[start.format(e)].abs().max()) for e in range(EXPERTS)]
    assert sizes[2] < 2 * max(sizes[:2])  # not the 8-fold one


def test_many_experts_and_blocks(tmp_path):
    """Numbers of two digits in the names, and one expert alone."""
    for number, blocks in ((11, 2), (1, 1)):
        config = {"num_experts": number, "num_hidden_layers": blocks, "num_experts_per_tok": 1}
        base, model = adapted("Qwen3Moe", model=config)
        parts = {p.name for stored in stored_experts(model).values() for p in stored.parts}
        projections = ("gate_proj", "up_proj", "down_proj")
        assert parts == {
            f"model.layers.{block}.mlp.experts.{{}}.{p}"
            for block in range(blocks)
            for p in projections
        }
        save_adapter(model, tmp_path / str(number))
        load_adapter(base, tmp_path / str(number), progress=False)
        assert_same(model, base)


def test_the_classes_of_vllm_are_the_types_of_models():
    """The table by which a layout is chosen, and the one of `lora-kernels check`."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES,
    )

    from lora_kernels.files.adapter.peft_format.experts.naming import _3D_IN_VLLM
    from lora_kernels.files.serving.engines.vllm import _JOINED_EXPERTS

    types = {name: kind for kind, name in (*TEXT.items(), *IMAGES.items()) if isinstance(name, str)}
    known = {types[name] for name in _JOINED_EXPERTS if name in types}
    assert "gpt_oss" in known
    assert all(kind.startswith(_3D_IN_VLLM) for kind in known)
    plain = [name.replace("_", "") for name in _3D_IN_VLLM]
    classes = [name.replace("_", "").lower() for name in _JOINED_EXPERTS]
    assert all(name.startswith(tuple(plain)) for name in classes)
    assert len(plain) == len(_JOINED_EXPERTS)
