"""`add_lora` and what follows it on ZeRO-3's partitions, against one process. The partitions are
those of DeepSpeed, which is not needed here; `test_deepspeed.py` runs it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    hotswap_adapter,
    init,
    load_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_kernels.init.sharded.whole import whole

from ...support import tiny_models
from ...support.exhaustive import EXHAUSTIVE
from ...support.packages import needs_transformers
from ...support.ranks import RankFailed, needs_ranks, on_ranks
from ...support.sharded import distance, logits, shared_folder
from ...support.tiny_experts import tiny_experts
from ...support.zero3 import gather, gathered, partition_all, release

pytestmark = [needs_ranks, needs_transformers]

llama = functools.partial(tiny_models.llama, num_hidden_layers=1)
gpt2 = functools.partial(tiny_models.gpt2, n_layer=1)
EVERYWHERE = ["embed_tokens", "q_proj", "o_proj", "down_proj", "lm_head"]
CASES: dict[str, tuple[Callable[[], nn.Module], LoRAConfig]] = {
    "absorb": (llama, LoRAConfig(r=4)),
    "implicit": (llama, LoRAConfig(r=4, residual="implicit")),
    "pissa": (llama, LoRAConfig(r=4, init_lora_weights="pissa")),
    "lora_xs": (llama, LoRAConfig(r=4, init_lora_weights="lora_xs")),
    "init_ab": (llama, LoRAConfig(r=3, init_lora_weights=init.InitAB(seed=1))),
    "conv1d": (gpt2, LoRAConfig(r=4, bias="lora_only")),
    "bfloat16": (lambda: llama(dtype=torch.bfloat16), LoRAConfig(r=4)),
    "saved": (llama, LoRAConfig(r=4, modules_to_save=["lm_head"])),
    "embedding": (llama, LoRAConfig(r=4, target_modules=EVERYWHERE)),
    "experts": (lambda: tiny_experts("Mixtral"), LoRAConfig(r=4)),
    "rows first": (lambda: tiny_experts("GptOss"), LoRAConfig(r=4)),  # experts as [E, in, out]
}
# Whose W is rewritten by products, whose last bits depend on the sizes of the parts.
ROUNDED = {"pissa": 1e-6, "init_ab": 1e-6, "lora_xs": 1e-6}


def wholes(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def move_(model: nn.Module) -> None:
    """As if all that trains had been trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.02 * step)


def stages(
    make: Callable[[], nn.Module], config: LoRAConfig, folder: Path, sharded: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, tensors) of all that is compared."""

    def outputs(model: nn.Module) -> dict[str, Tensor]:
        with gathered(model):
            return {"logits": logits(model).float()}

    def base() -> nn.Module:
        return partition_all(make()) if sharded else make()

    model = base()
    report = str(add_lora(model, config, progress=False))
    assert ("parts of a ZeRO-3 partition" in report) == sharded
    assert (" of 0 parameters" not in report) and "(0.00 %)" not in report
    yield "start", wholes(model)
    yield "at start", outputs(model)
    move_(model)
    if sharded:
        partition_all(model)
    yield "trained", wholes(model) | outputs(model)
    save_adapter(model, folder / "peft")
    save_adapter(model, folder / "native", format="native")
    if not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n):
        with disable_adapters(model):
            yield "disabled", outputs(model)
    other = base()
    load_adapter(other, folder / "native", progress=False)
    yield "loaded", wholes(other)
    if sharded:
        partition_all(other)
    merge_lora(other)
    yield "merged", wholes(other) | outputs(other)
    third = base()
    load_adapter(third, folder / "peft", progress=False)
    yield "from peft", outputs(third)
    unload_lora(third)
    yield "unloaded", wholes(third) | outputs(third)
    left = [type(m).__name__ for m in (*other.modules(), *third.modules())]
    assert not [name for name in left if "LoRA" in name or "Adapte" in name]


@functools.cache
def alone(name: str) -> dict[str, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        return dict(stages(*CASES[name], Path(folder), False))


def on_partitions(name: str) -> dict[str, dict[str, Tensor]]:
    return dict(stages(*CASES[name], shared_folder(), True))


RUNS = [("absorb", 3), ("conv1d", 2), ("embedding", 2), ("implicit", 2), ("pissa", 2)]
RUNS += [("rows first", 3), ("saved", 2)]
if EXHAUSTIVE:
    RUNS = [(name, world) for name in CASES for world in (2, 3, 4)]


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_as_on_one_process(name: str, world: int) -> None:
    expected = alone(name)
    first, *others = on_ranks(world, lambda rank: on_partitions(name))
    assert first.keys() == expected.keys()
    for stage, tensors in expected.items():
        exact = stage in ("start", "loaded") and name not in ROUNDED
        wide = 4e-2 if name == "bfloat16" else 4e-6
        assert distance(as_floats(first[stage]), as_floats(tensors)) <= (0 if exact else wide), (
            stage
        )
        for other in others:
            assert distance(as_floats(other[stage]), as_floats(first[stage])) == 0, stage
    factors = [n for n in first["start"] if "lora_" in n]
    assert factors and all(torch.equal(first["start"][n], expected["start"][n]) for n in factors)


def as_floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def test_gathered_parameters_are_rewritten_everywhere() -> None:
    """What is whole at the moment: within GatheredParameters, or small, and kept by DeepSpeed."""

    def work(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        model = partition_all(llama())
        kept = [p for n, p in model.named_parameters() if "self_attn" in n]
        for parameter in kept:
            gather(parameter)
        layer = model.model.layers[0].self_attn.q_proj
        add_lora(model, LoRAConfig(r=4), progress=False)
        assert model.model.layers[0].self_attn.q_proj is layer, "DeepSpeed holds the module"
        for parameter in kept:
            release(parameter)
        start = wholes(model)
        for parameter in kept:
            gather(parameter)
        merge_lora(model)
        for parameter in kept:
            release(parameter)
        return start, wholes(model), wholes(partition_all(llama()))

    expected = alone("absorb")["start"]
    for start, merged, base in on_ranks(2, work):
        assert distance(start, expected) == 0
        assert distance(merged, base) < 1e-6  # nothing was trained


def _nan(model: nn.Module) -> None:
    stored = model.model.layers[0].mlp.up_proj.weight.ds_tensor
    stored[0] = torch.nan


def _on_disk(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.weight.ds_tensor.final_location = "nvme"


FAULTS = {
    "nan": (_nan, LoRAConfig(r=4), "up_proj.*NaN or Inf"),
    "nan, pissa": (_nan, LoRAConfig(r=4, init_lora_weights="pissa"), "up_proj.*NaN or Inf"),
    "nvme": (_on_disk, LoRAConfig(r=4), "on NVMe"),
    "rank": (None, LoRAConfig(r=4, rank_pattern={"0.mlp.up_proj": 33}), "r = 33 is larger"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_those_of_all_ranks(fault: str) -> None:
    damage, config, message = FAULTS[fault]

    def work(rank: int) -> bool:
        model = partition_all(llama())
        if damage is not None and (rank == 1 or fault == "nvme"):
            damage(model)
        before = [p.ds_tensor.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            add_lora(model, config, progress=False)
        after = [p.ds_tensor for p in model.parameters()]
        assert not any("LoRA" in type(m).__name__ for m in model.modules())
        return all(torch.equal(a, b) or a.isnan().any() for a, b in zip(after, before, strict=True))

    assert on_ranks(2, work) == [True, True]


def test_the_padding_is_never_read() -> None:
    """It is uninitialized memory, here NaN, on the last rank."""

    def work(rank: int) -> bool:
        model = partition_all(llama(hidden_size=36, num_attention_heads=2, intermediate_size=45))
        padded = any(p.ds_tensor.isnan().any() for p in model.parameters())
        add_lora(model, LoRAConfig(r=4), progress=False)
        merge_lora(partition_all(model))
        assert not any(tensor.isnan().any() for tensor in wholes(model).values())
        return padded

    assert any(on_ranks(7, work))


def test_hotswap_writes_into_partitions() -> None:
    def work(rank: int) -> float:
        folder = shared_folder()
        config = LoRAConfig(r=4, residual="implicit", modules_to_save=["lm_head"])
        donor = llama()
        add_lora(donor, config, progress=False)
        move_(donor)
        if rank == 0:
            save_adapter(donor, folder, format="native")
        dist.barrier()
        model = partition_all(llama())
        add_lora(model, config, progress=False)
        partition_all(model)
        hotswap_adapter(model, folder)
        return distance(wholes(model), wholes(donor))

    assert on_ranks(2, work) == [0, 0]


def test_a_copy_that_deepspeed_does_not_know_takes_no_place() -> None:
    """Of modules that are trained in full, DeepSpeed's engine knows the trained copies only."""

    def work(rank: int) -> None:
        model = llama()
        add_lora(model, LoRAConfig(r=4, modules_to_save=["lm_head"]), progress=False)
        partition_all(model)
        for change in (disable_adapters, unload_lora):
            with pytest.raises(
                ValueError, match=r"DeepSpeed's engine holds its copy.*save_adapter"
            ):
                change(model)
        with gathered(model):
            after = logits(model)
        merge_lora(model)
        with gathered(model):
            assert torch.allclose(logits(model), after, atol=1e-5)

    on_ranks(2, work)


@pytest.mark.parametrize("targets", ["all-linear", EVERYWHERE])
def test_a_resized_vocabulary_is_saved_whole(targets: str | list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "base")

    def resized() -> nn.Module:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(101, mean_resizing=False)
        return model

    def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
        add_lora(model, LoRAConfig(r=4, target_modules=targets), progress=False)
        save_adapter(model, folder)
        return load_file(folder / "adapter_model.safetensors")

    expected = saved(resized(), tmp_path / "alone")
    rows = [name for name, tensor in expected.items() if len(tensor) == 101 and "lora_" not in name]
    assert len(rows) == 2

    def work(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = saved(partition_all(resized()), tmp_path / "ranks")
        model = partition_all(resized())
        load_adapter(model, tmp_path / "alone", progress=False)
        return found, wholes(model)

    one = resized()
    load_adapter(one, tmp_path / "alone", progress=False)
    for found, loaded in on_ranks(2, work):
        assert distance(found, expected) == 0
        assert distance(loaded, wholes(one)) == 0


class DeepSpeedZeRoOffload:
    """Of deepspeed/runtime/zero/parameter_offload.py: what its engine leaves on a module."""

    def register(self, module: nn.Module) -> None:
        def _start_of_forward_hook(module: nn.Module, *args: object) -> None: ...

        module.register_forward_pre_hook(_start_of_forward_hook)


def test_a_model_with_an_engine_gets_no_adapter() -> None:
    model = llama()
    DeepSpeedZeRoOffload().register(model)
    with pytest.raises(ValueError, match=r"deepspeed\.initialize has taken over this model"):
        add_lora(model, progress=False)


def test_a_quantized_partition_names_the_option() -> None:
    def work(rank: int) -> str:
        model = partition_all(llama())
        model.model.layers[0].mlp.up_proj.weight.ds_tensor.ds_quant_scale = torch.ones(1)
        with pytest.raises(ValueError) as caught:
            add_lora(model, LoRAConfig(r=4), progress=False)
        return str(caught.value)

    for text in on_ranks(2, work):
        assert "zero_quantized_nontrainable_weights" in text
        assert "\n" not in text


def test_one_rank_alone_cannot_write() -> None:
    """Rank 0 writes the folder; its error is the error of all."""

    def work(rank: int) -> None:
        model = partition_all(llama())
        add_lora(model, LoRAConfig(r=4), progress=False)
        partition_all(model)
        save_adapter(model, "/proc/nowhere")

    for failed in on_ranks(2, work, check=False):
        assert isinstance(failed, RankFailed)
        assert failed.type in ("OSError", "FileNotFoundError", "PermissionError"), failed.text
