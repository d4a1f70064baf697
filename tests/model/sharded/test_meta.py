"""Adapters of models on the meta device: they wait for their start, and `start_adapters` gives them
that of one process, to the bit, wherever the weights lie.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lora_kernels.init as starts
from lora_kernels import (
    LoRAConfig,
    add_lora,
    capture_gradients,
    disable_adapters,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    start_adapters,
    unload_lora,
)

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import RankFailed, needs_ranks, on_ranks
from ...support.sharded import BATCH, fully_sharded, logits, trained, whole_tensors
from ...support.tiny_models import gpt2, llama, mixtral

WAITS = "waits for its start: load the weights, then call start_adapters"
STARTS = {
    "loram": LoRAConfig(r=4),
    "implicit": LoRAConfig(r=4, residual="implicit"),
    "pissa": LoRAConfig(r=3, init_lora_weights="pissa"),
    "pissa implicit": LoRAConfig(r=3, init_lora_weights="pissa", residual="implicit"),
    "lora_xs": LoRAConfig(r=4, init_lora_weights="lora_xs"),
    "lora": LoRAConfig(r=3, init_lora_weights=starts.LoRA(seed=1)),
    "init_ab": LoRAConfig(r=3, init_lora_weights=starts.InitAB(seed=1)),
    "embedding": LoRAConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=starts.Gaussian(seed=1)
    ),
}

SHARDED = [*STARTS] if EXHAUSTIVE else ["pissa implicit"]


def on_meta(make=llama) -> nn.Module:
    """The model without weights; with the buffers that no checkpoint has."""
    model = make().to("meta")
    _restore_buffers(model, make)
    return model


def _restore_buffers(model: nn.Module, make) -> None:
    for name, buffer in make().named_buffers():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, buffer)


def loaded(model: nn.Module, make=llama) -> nn.Module:
    """The model with its weights, each process its own part."""
    model.to_empty(device="cpu")
    _restore_buffers(model, make)
    weights = make().state_dict()
    for name, parameter in model.named_parameters():
        if name in weights:
            _fill(parameter.data, weights[name])
    return model


def _fill(part: Tensor, weight: Tensor) -> None:
    if hasattr(part, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        weight = distribute_tensor(weight, part.device_mesh, part.placements)
    part.copy_(weight)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, stored starts and numbers."""
    own = {n: b.clone() for n, b in model.named_buffers() if "start_" in n}
    numbers = {n: t for n, t in model.state_dict().items() if n.endswith("_extra_state")}
    return whole_tensors(model) | own | numbers


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def adapted(config: LoRAConfig, make=llama, **options) -> nn.Module:
    model = make()
    add_lora(model, config, progress=False, **options)
    return model


@pytest.mark.parametrize("name", STARTS)
def test_one_process(name):
    want = adapted(STARTS[name])
    model = on_meta()
    report = add_lora(model, STARTS[name], progress=False)
    assert report.adapted[0].waits and "call start_adapters(model)" in str(report)
    report = start_adapters(loaded(model), progress=False)
    assert not report.adapted[0].waits and "start_adapters" not in str(report)
    assert_equal(tensors(model), tensors(want))
    assert torch.equal(logits(model), logits(want))
    assert trained(model, 2) == trained(want, 2)
    unload_lora(model)
    assert torch.equal(logits(model), logits(unload_lora(want)))


def test_weights_that_are_assigned():
    want = adapted(STARTS["loram"])
    model = on_meta()
    add_lora(model, STARTS["loram"], progress=False)
    model.load_state_dict(llama().state_dict(), assign=True)  # A and B stay on meta
    start_adapters(model, progress=False)
    assert_equal(tensors(model), tensors(want))


@needs_ranks
def test_shards():
    """FSDP2 after `add_lora`, and HSDP before it."""

    def work(rank: int):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        found = {}
        for name in SHARDED:
            model = on_meta()
            add_lora(model, STARTS[name], progress=False)
            fully_sharded(model)
            start_adapters(loaded(model), progress=False)
            found[name, "before"] = tensors(model), trained(model, 1)
            model = fully_sharded(on_meta(), mesh)
            add_lora(model, STARTS[name], progress=False)
            report = start_adapters(loaded(model), progress=False)
            assert "[32, 32] in 2 parts by rows" in str(report)
            found[name, "after"] = tensors(model), trained(model, 1)
        return found

    want = {name: adapted(STARTS[name]) for name in SHARDED}
    want = {name: (tensors(model), trained(model, 1)) for name, model in want.items()}
    for ours in on_ranks(4, work):
        for (name, _), (start, losses) in ours.items():
            assert_equal(start, want[name][0])
            torch.testing.assert_close(losses, want[name][1], rtol=0, atol=1e-5)


def test_what_needs_the_start_says_so(tmp_path):
    model = on_meta()
    add_lora(model, STARTS["implicit"], progress=False)
    save_adapter(adapted(STARTS["loram"]), tmp_path)
    calls = {
        "forward": lambda: model(input_ids=BATCH),
        "save": lambda: save_adapter(model, tmp_path),
        "merge": lambda: merge_lora(model),
        "switch": lambda: set_adapter(model, "default"),
        "read": lambda: model.model.layers[0].self_attn.q_proj.start_factors(),
        "start": lambda: start_adapters(model),
    }
    for after_loading in (False, True):
        if after_loading:
            loaded(model)
            calls.pop("start")
        for call in calls.values():
            with pytest.raises(ValueError, match=WAITS):
                call()
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(llama()))
    add_lora(model, STARTS["implicit"], adapter_name="second", progress=False)  # has its start
    start_adapters(model, progress=False)
    for call in (start_adapters, lambda m: start_adapters(m, adapter_name="second")):
        with pytest.raises(ValueError, match=r"waits for its start|has its start already"):
            call(model)
    assert float(trained(model, 1)[0]) > 0


def test_compiled():
    model, want = nn.Sequential(nn.Linear(8, 6)), nn.Sequential(nn.Linear(8, 6))
    weights = copy.deepcopy(want.state_dict())
    model.to("meta")
    add_lora(model, LoRAConfig(r=2, target_modules=["0"]), progress=False)
    add_lora(want, LoRAConfig(r=2, target_modules=["0"]), progress=False)
    model.load_state_dict(weights, assign=True)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=WAITS):
        compiled(x)
    start_adapters(compiled, progress=False)
    torch.testing.assert_close(compiled(x), want(x))


def test_a_checkpoint_of_a_started_adapter_starts():
    want = adapted(STARTS["loram"])
    trained(want, 2)
    for assign in (True, False):
        model = on_meta()
        add_lora(model, STARTS["loram"], progress=False)
        if not assign:
            loaded(model)
        model.load_state_dict(copy.deepcopy(want.state_dict()), assign=assign)
        assert_equal(tensors(model), tensors(want))
        with disable_adapters(model), disable_adapters(want):
            assert torch.equal(logits(model), logits(want))
        with pytest.raises(ValueError, match="no adapter of this model waits"):
            start_adapters(model)
    waiting = on_meta()
    add_lora(waiting, STARTS["loram"], progress=False)
    state = loaded(waiting).state_dict()
    with pytest.raises(ValueError, match="waits for its start: save it after start_adapters"):
        adapted(STARTS["loram"]).load_state_dict(state)
    again = on_meta()
    add_lora(again, STARTS["loram"], progress=False)
    again.load_state_dict(state, assign=True)  # both wait
    start_adapters(again, progress=False)
    assert_equal(tensors(again), tensors(adapted(STARTS["loram"])))


def test_gradients_come_with_the_start():
    batches = [{"input_ids": BATCH, "labels": BATCH}]
    config = LoRAConfig(r=3, init_lora_weights="lora_ga", target_modules=["q_proj"])
    gradients = capture_gradients(llama(), batches, ["q_proj"], progress=False)
    want = adapted(config, gradients=gradients)
    model = on_meta()
    with pytest.raises(ValueError, match="pass gradients= to start_adapters"):
        add_lora(model, config, gradients=gradients)
    add_lora(model, config, progress=False)
    loaded(model)
    before = tensors(model)
    with pytest.raises(ValueError, match="pass gradients="):
        start_adapters(model, progress=False)
    assert_equal(tensors(model), before)
    start_adapters(model, gradients=gradients, progress=False)
    assert_equal(tensors(model), tensors(want))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
        (
            mixtral,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.gate_up_proj"],
                "residual": "implicit",
            },
        ),
        (
            mixtral,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.down_proj"],
                "init_lora_weights": "pissa",
            },
        ),
        (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_experts_and_transposed_weights(make, options):
    config = LoRAConfig(r=2, **options)
    model = on_meta(make)
    add_lora(model, config, progress=False)
    with pytest.raises(ValueError, match=WAITS):
        loaded(model, make).tie_weights()
        model(input_ids=BATCH)
    start_adapters(model, progress=False)
    want = adapted(config, make)
    assert_equal(tensors(model), tensors(want))
    assert torch.equal(logits(model), logits(want))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"init_lora_weights": "loftq"}, "is on the meta device, and LoftQ rewrites the whole"),
            ({"modules_to_save": ["lm_head"]}, "lm_head.weight is to be trained in full"),
            ({"r": 1000}, "r = 1000 is larger than"),
        ],
    )
    def test_options(self, options, text):
        model = on_meta()
        with pytest.raises(ValueError, match=re.escape(text)):
            add_lora(model, LoRAConfig(**{"r": 2, **options}))
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear

    def test_a_part_on_meta(self):
        model = llama()
        model.model.layers[1].self_attn.k_proj.to("meta")
        with pytest.raises(ValueError, match=r"1.self_attn.k_proj.weight is on the meta device"):
            add_lora(model, LoRAConfig(r=2))

    def test_another_adapter_before_the_start(self, tmp_path):
        model = on_meta()
        add_lora(model, LoRAConfig(r=2), progress=False)
        with pytest.raises(ValueError, match=f"'default' {WAITS}"):
            add_lora(model, LoRAConfig(r=2), adapter_name="second")
        save_adapter(adapted(STARTS["implicit"]), tmp_path)
        loaded(model)
        with pytest.raises(ValueError, match=f"'default' {WAITS}"):
            load_adapter(model, tmp_path, adapter_name="second")

    def test_weights_that_were_tied_after_the_plan(self):
        model = on_meta()
        add_lora(model, LoRAConfig(r=2, target_modules=["lm_head"]), progress=False)
        loaded(model)
        model.lm_head.weight = model.model.embed_tokens.weight
        with pytest.raises(ValueError, match="lm_head cannot absorb its start any more"):
            start_adapters(model)
        with pytest.raises(ValueError, match=WAITS):
            model(input_ids=BATCH)

    def test_an_undeclared_R(self):
        class Surprise(starts.Initializer):
            changes_base = False

            def make_start(self, request):
                n, m = request.shape
                r = request.r
                zeros = [request.empty(*shape).zero_() for shape in ((r, m), (n, r), (r, r))]
                return starts.Start(zeros[0], zeros[1], lora_R=zeros[2])

        model = on_meta()
        config = LoRAConfig(r=2, init_lora_weights=Surprise(), target_modules=["q_proj"])
        add_lora(model, config, progress=False)
        before = tensors(loaded(model))
        with pytest.raises(ValueError, match=r"q_proj: the start has an R.*`has_R`"):
            start_adapters(model, progress=False)
        assert_equal(tensors(model), before)

    @needs_ranks
    def test_ranks(self):
        def work(rank: int):
            model = on_meta()
            add_lora(model, LoRAConfig(r=2), progress=False)
            loaded(fully_sharded(model))
            bad = model.model.layers[1].mlp.up_proj.weight
            if rank:
                bad.to_local()[0, 0] = torch.nan
            before = tensors(model)
            texts = []
            with pytest.raises(ValueError) as caught:
                start_adapters(model, progress=False)
            texts.append(str(caught.value))
            assert_equal(tensors(model), before)
            _fill(bad.data, llama().model.layers[1].mlp.up_proj.weight)
            start_adapters(model, progress=False)
            found = tensors(model)

            model = llama() if rank == 0 else on_meta()  # weights on the first rank only
            add_lora(model, LoRAConfig(r=2), progress=False)
            model = fully_sharded(model.to("meta"))
            with pytest.raises(ValueError) as caught:
                start_adapters(model, progress=False)
            return found, [*texts, str(caught.value)]

        for found, texts in on_ranks(2, work):
            assert_equal(found, tensors(adapted(LoRAConfig(r=2))))
            assert "layers.1.mlp.up_proj" in texts[0] and "NaN or Inf" in texts[0]
            assert "on ranks [1] of 2 only" in texts[1]


@needs_ranks
def test_weights_of_the_first_rank_by_torch():
    """torch sends the first rank's whole checkpoint, and with it the start, to those that wait."""

    def work(rank: int):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        model = on_meta()
        add_lora(model, STARTS["pissa"], progress=False)
        loaded(fully_sharded(model))
        state = adapted(STARTS["pissa"]).state_dict() if rank == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, state, options=options)
        found = tensors(model)
        dist.barrier()
        return found, logits(unload_lora(model))

    want = adapted(STARTS["pissa"])
    for found, base in on_ranks(2, work):
        assert not isinstance(found, RankFailed)
        assert_equal(found, tensors(want))
        torch.testing.assert_close(base, logits(llama()))
