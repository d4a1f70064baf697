"""`capture_gradients` on models that FSDP2 or tensor parallelism has sharded: one process, which
sees all batches, is the oracle.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import LoRAConfig, add_lora, capture_gradients
from lora_kernels.model.install.sharded.fsdp import reshard

from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, whole_tensors
from ...support.tiny_models import VOCABULARY, gpt2, llama
from ...support.zero3 import partition

pytestmark = needs_ranks

BATCHES = torch.randint(1, VOCABULARY, (4, 2, 8), generator=torch.Generator().manual_seed(0))
REAL = torch.float64  # of the comparisons: the order of sums must not count
ALL = r".*(_proj|c_\w+|lm_head|embed_tokens|wte)"


def on_one(make, targets="all-linear") -> dict[str, Tensor]:
    return capture_gradients(make().to(REAL), list(BATCHES), targets, progress=False)


def captured(model: nn.Module, parts: int = 0, **options) -> dict[str, Tensor]:
    """With this rank's share of the batches; `parts` ranks have different ones, 0: all."""
    ranks = parts or dist.get_world_size()
    share = BATCHES.tensor_split(ranks)[dist.get_rank() * ranks // dist.get_world_size()]
    return capture_gradients(model, list(share), progress=False, **options)


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a gathered sum; the sums have to be DTensors."""
    assert list(found) == list(wanted)
    return max(
        float((found[name].full_tensor() - wanted[name]).norm() / wanted[name].norm())
        for name in wanted
    )


def state(model: nn.Module) -> list[object]:
    reshard(model)
    return [
        (name, p.requires_grad, p.grad if p.grad is None else p.grad.to_local().tolist(),
         len(p._post_accumulate_grad_hooks or {}))
        for name, p in model.named_parameters()
    ]  # fmt: skip


def mesh(*sizes: int, names: tuple[str, ...]):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def sharded_gpt2() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = gpt2().to(REAL)
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def adapted(**options) -> nn.Module:
    model = fully_sharded(llama(dtype=REAL))
    add_lora(model, LoRAConfig(r=4, residual="implicit", **options), progress=False)
    return model


def test_sums_are_those_of_one_process():
    plain, wte = on_one(llama), on_one(gpt2, ALL)

    def work(rank: int) -> dict[str, float]:
        errors = {}
        model = fully_sharded(llama(dtype=REAL))
        before = state(model)
        found = captured(model)
        assert state(model) == before
        errors["never run"] = error(found, plain)
        assert {str(g.placements) for g in found.values()} == {"(Shard(dim=0),)"}
        model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
        before = state(model)
        errors["after a step"] = error(captured(model, device=None), plain)
        assert state(model) == before
        errors["Conv1D, a tied embedding"] = error(captured(sharded_gpt2(), targets=ALL), wte)
        errors["adapted"] = error(captured(adapted()), plain)
        for module in model.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_gradient_divide_factor(3.0)
                module.set_force_sum_reduction_for_comms(True)
        errors["another factor"] = error(captured(model), plain)
        return errors

    for errors in on_ranks(2, work):
        assert max(errors.values()) < 1e-12, errors


def test_on_four_ranks():
    """With replicas, with gradients that are not yet all-reduced, and over tensor parallelism."""
    plain = on_one(llama)

    def work(rank: int) -> dict[str, float]:
        replicated = mesh(2, 2, names=("replicate", "shard"))
        model = fully_sharded(llama(dtype=REAL), replicated)
        errors = {"hsdp": error(captured(model), plain)}
        model.set_requires_all_reduce(False)
        errors["no all-reduce"] = error(captured(model), plain)
        both = mesh(2, 2, names=("data", "tensor"))
        model = fully_sharded(tensor_parallel(llama(dtype=REAL), both["tensor"]), both["data"])
        errors["over tensor parallelism"] = error(captured(model, parts=2), plain)
        return errors

    for errors in on_ranks(4, work):
        assert max(errors.values()) < 1e-12, errors


def tensor_parallel(model: nn.Module, tensor_mesh) -> nn.Module:
    from torch.distributed.tensor import parallel

    plan = {
        f"model.layers.*.{name}": style()
        for names, style in (
            (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                parallel.ColwiseParallel,
            ),
            (("mlp.gate_proj", "mlp.up_proj"), parallel.ColwiseParallel),
            (("self_attn.o_proj", "mlp.down_proj"), parallel.RowwiseParallel),
        )
        for name in names
    }
    return parallel.parallelize_module(model, tensor_mesh, plan)


def test_tensor_parallelism():
    """Both ranks see the same batches; also weights that are plain there are counted once."""
    wanted = on_one(llama, ALL)

    def work(rank: int) -> float:
        model = tensor_parallel(llama(dtype=REAL), mesh(2, names=("tensor",)))
        found = captured(model, parts=1, targets=ALL)
        plain = {name: g for name, g in found.items() if type(g) is Tensor}
        assert sorted(plain) == ["lm_head", "model.embed_tokens"]
        for name, gradient in plain.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12)
        rest = {name: g for name, g in wanted.items() if name not in plain}
        return error({name: found[name] for name in rest}, rest)

    assert max(on_ranks(2, work)) < 1e-12


def test_gradients_that_are_being_accumulated_stay():
    """Amid an accumulation without communication, whose sum is that without the capture."""

    def work(rank: int) -> float:
        own = BATCHES.tensor_split(2)[rank]
        grads = []
        for captures in (False, True):
            model = fully_sharded(llama(dtype=REAL))
            model.set_requires_gradient_sync(False)
            model(input_ids=own[0], labels=own[0]).loss.backward()
            if captures:
                captured(model)
            model.set_requires_gradient_sync(True)
            model(input_ids=own[1], labels=own[1]).loss.backward()
            reshard(model)
            grads.append([p.grad.to_local() for p in model.parameters()])
        return max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True) if a.numel())

    assert max(on_ranks(2, work)) < 1e-12


@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "lora_sb"])
def test_starts_are_those_of_one_process(method):
    config = LoRAConfig(r=4, init_lora_weights=method)
    model = llama()
    sums = capture_gradients(model, list(BATCHES), progress=False)
    add_lora(model, config, gradients=sums, progress=False)
    wanted = whole_tensors(model)

    def work(rank: int) -> dict[str, Tensor]:
        own = fully_sharded(llama())
        torch.manual_seed(rank)
        add_lora(own, config, gradients=captured(own), progress=False)
        return whole_tensors(own)

    for found in on_ranks(2, work):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert float((found[name] - tensor).abs().max()) < 1e-4 * float(tensor.abs().max() + 1)


class FaultError(Exception):
    pass


def batches_of(rank: int, fault: str):
    """Two batches, but for one of the ranks."""
    yield BATCHES[0]
    if fault == "iteration" and rank == 1:
        raise ValueError("no further batch")
    if fault != "number" or rank == 0:
        yield BATCHES[1]


def faulty_loss(rank: int, fault: str, model: nn.Module, batch: Tensor) -> Tensor:
    value = model(input_ids=batch, labels=batch).loss
    if fault == "loss" and rank == 1:
        return value * float("nan")
    return value


FAULTS = {
    "iteration": "no further batch",
    "number": "1 of 2 ranks have only 1 batches",
    "loss": "the loss of batch 1 is nan",
    "forward": "within the forward",
}


def test_errors_are_those_of_all_ranks():
    """The model is as before, and goes on; nobody waits."""
    wanted = on_one(llama)

    def work(rank: int) -> tuple[dict[str, str], float]:
        model = fully_sharded(llama(dtype=REAL))
        model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
        before, texts = state(model), {}
        for fault in FAULTS:
            hooked = model.model.layers[1].mlp if fault == "forward" else nn.Module()
            hook = hooked.register_forward_hook(raising)
            try:
                loss = functools.partial(faulty_loss, rank, fault)
                capture_gradients(model, batches_of(rank, fault), loss=loss, progress=False)
            except (ValueError, FaultError) as failed:
                texts[fault] = str(failed)
            hook.remove()
            goes_on = fault != "forward" or hasattr(model, "reset_iter_state")  # torch 2.13
            assert not goes_on or state(model) == before, fault
        return texts, error(captured(model), wanted) if goes_on else 0.0

    for texts, wrong in on_ranks(2, work):
        assert texts.keys() == FAULTS.keys() and wrong < 1e-12
        assert all(FAULTS[fault] in text for fault, text in texts.items()), texts


def raising(*_: object) -> None:
    raise FaultError("within the forward")


def test_what_has_no_gradient_says_so():
    def work(rank: int) -> list[str]:
        model = fully_sharded(llama())
        texts = []
        for own in (model.model.layers[0].mlp, zero3()):
            with pytest.raises(ValueError) as caught:
                capture_gradients(own, [BATCHES[0]], progress=False)
            texts.append(str(caught.value))
        return texts

    for texts in on_ranks(2, work):
        assert "pass the model to which fully_shard was applied" in texts[0]
        assert "capture the gradients before deepspeed.initialize" in texts[1]
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="part of a flat parameter of FSDP: capture the gradients"):
        capture_gradients(model, list(BATCHES), progress=False)


def zero3() -> nn.Module:
    model = llama()
    partition(model.model.layers[0].self_attn.q_proj.weight)
    return model
