"""The layer under tensor parallelism: several processes compute what one does, in float64."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora
from lora_kernels.layers.linear import LoRAConv1D, LoRAEmbedding

from ..support.exhaustive import EXHAUSTIVE
from ..support.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks
pytest.importorskip("torch.distributed.tensor")

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint  # noqa: E402

R, P, S = Replicate(), Partial(), Shard
EXACT = 1e-12
WORLDS = [2, 4] if EXHAUSTIVE else [2]
# Kinds of layer: absorbed, implicit, with R, with a bias of B, with dropout, all of these.
KINDS = (
    {},
    {"residual": "implicit"},
    {"init_lora_weights": "lora_xs"},
    {"lora_bias": True},
    {"lora_dropout": 0.3},
    {"residual": "implicit", "lora_dropout": 0.3, "lora_bias": True},
)


def adapted(n: int, k: int, r: int = 2, lora_bias: bool = False, **options: Any) -> LoRALinear:
    """A layer that is past its first step, with a bias that is trained."""
    torch.manual_seed(n + k)
    linear = nn.Linear(k, n).double()
    layer = LoRALinear.from_linear(linear, r=r, lora_alpha=3.0, **options)
    if lora_bias:
        layer.active().lora_bias = nn.Parameter(torch.randn(n, dtype=torch.float64))
    for parameter in layer.adapters.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    layer.bias.requires_grad_()
    return layer


def shard(layer: LoRALinear, mesh, W, A, B) -> LoRALinear:
    """The layer, with W, A and B placed like this; None leaves A or B plain."""

    def placed(parameter: nn.Parameter | None, places: Any) -> nn.Parameter | None:
        if parameter is None or places is None:
            return parameter
        parts = distribute_tensor(parameter.data, mesh, places, src_data_rank=None)
        return nn.Parameter(parts, requires_grad=parameter.requires_grad)

    adapter = layer.active()
    rows = [w if isinstance(w, Shard) and w.dim == 0 else R for w in W]
    layer.weight, layer.bias = placed(layer._parameters["weight"], W), placed(layer.bias, rows)
    adapter.lora_A, adapter.lora_B = placed(adapter.lora_A, A), placed(adapter.lora_B, B)
    return layer


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(layer: nn.Module, x: Any, grad: Any) -> list[Tensor]:
    """y, dx and the gradients of all that is trained, whole."""
    torch.manual_seed(5)
    x = x.detach().requires_grad_()
    y = layer(x)
    whole = y.redistribute(placements=[R] * y.device_mesh.ndim) if isinstance(y, DTensor) else y
    whole.backward(grad)
    named = sorted(layer.named_parameters())
    grads = [full(p.grad) for _, p in named if p.requires_grad]
    return [full(whole).detach(), full(x.grad), *grads]


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def everywhere(tensor: Tensor, mesh, places=None) -> Any:
    return distribute_tensor(tensor, mesh, places or [R] * mesh.ndim, src_data_rank=None)


COLUMNS, ROWS = ([S(0)], [R], [S(0)], [R]), ([S(1)], [S(1)], [R], [S(2)])
LAYOUTS = {  # W, A, B, x
    "columns": COLUMNS,
    "rows": ROWS,
    "replicated": ([R], [R], [R], [R]),
    "columns, x by sequence": ([S(0)], [R], [S(0)], [S(1)]),
    "rows, x replicated": ([S(1)], [S(1)], [R], [R]),
    "replicated, x by columns": ([R], [R], [R], [S(2)]),
    "columns, A along r": ([S(0)], [S(0)], [S(0)], [R]),
    "rows, plain factors": ([S(1)], None, None, [S(2)]),
    "columns, factors of rows": ([S(0)], [S(1)], [R], [R]),
}


def compare(rank: int, world: int) -> dict[str, float]:
    """The differences from one process. Parts are uneven, of 4 processes also empty."""
    mesh, found = init_device_mesh("cpu", (world,)), {}
    cases = [((5, 9), KINDS[-1], layout) for layout in LAYOUTS]
    cases += [((5, 9), kind, layout) for kind in KINDS[:-1] for layout in ("columns", "rows")]
    cases += [(size, {}, layout) for size in ((8, 12), (3, 2)) for layout in ("columns", "rows")]
    for (n, k), kind, layout in cases:
        torch.manual_seed(3)
        x, grad = (torch.randn(3, 2, size, dtype=torch.float64) for size in (k, n))
        *places, of_x = LAYOUTS[layout]
        want = run(adapted(n, k, **kind), x, grad)
        layer = shard(adapted(n, k, **kind), mesh, *places)
        got = run(layer, everywhere(x, mesh, of_x), everywhere(grad, mesh))
        found[f"{layout} {n, k} {kind}"] = difference(got, want)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_is_one_process(world):
    for found in on_ranks(world, partial(compare, world=world)):
        assert len(found) == len(LAYOUTS) + 14
        assert {name: error for name, error in found.items() if not error < EXACT} == {}


def meshes(rank: int) -> dict[str, float]:
    """Two mesh dimensions: [replicated or by batch] × columns, 2-D, both on one dimension."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), {}
    cases = {
        "batch, columns": ([R, S(0)], [R, R], [R, S(0)], [S(0), R]),
        "batch, rows": ([R, S(1)], [R, S(1)], [R, R], [S(0), S(2)]),
        "columns, rows": ([S(0), S(1)], [R, S(1)], [S(0), R], [R, S(2)]),
        "columns, columns": ([S(0), S(0)], [R, R], [S(0), S(0)], [R, R]),
        "rows, rows": ([S(1), S(1)], [S(1), S(1)], [R, R], [S(2), S(2)]),
    }
    torch.manual_seed(3)
    x, grad = (torch.randn(2, 3, size, dtype=torch.float64) for size in (9, 7))
    for name, (*places, of_x) in cases.items():
        for kind in ({}, {"lora_dropout": 0.4, "residual": "implicit"}):
            if kind and "batch" in name:  # every part of a batch has a mask of its own
                continue
            want = run(adapted(7, 9, **kind), x, grad)
            layer = shard(adapted(7, 9, **kind), mesh, *places)
            got = run(layer, everywhere(x, mesh, of_x), everywhere(grad, mesh))
            found[f"{name} {kind}"] = difference(got, want)
    return found


def test_meshes_of_two_dimensions():
    for found in on_ranks(4, meshes):
        assert {name: error for name, error in found.items() if not error < EXACT} == {}


def counted(rank: int, world: int) -> list[dict[str, int]]:
    mesh, found = init_device_mesh("cpu", (world,)), []
    for *places, of_x in (COLUMNS, ROWS):
        layer = shard(adapted(8, 12), mesh, *places)
        x = everywhere(torch.ones(2, 3, 12, dtype=torch.float64), mesh, of_x).requires_grad_()
        with CommDebugMode() as forward:
            y = layer(x)
        if y.placements[0].is_partial():
            y = y.redistribute(placements=[R])
        with CommDebugMode() as backward:
            y.sum().backward()
        found += [{str(key).split(".")[-1]: n for key, n in mode.get_comm_counts().items() if n}
                  for mode in (forward, backward)]  # fmt: skip
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_sends_the_gradient_of_the_replicated_factor(world):
    """And, for columns, dx, which the base layer sends too."""
    for found in on_ranks(world, partial(counted, world=world)):
        assert found == [{}, {"all_reduce": 2}, {}, {"all_reduce": 1}]


class Block(nn.Module):
    """A layer by columns and one by rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.up, self.down = adapted(12, 8, **options), adapted(8, 12, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted_first(rank: int, world: int) -> dict[str, float]:
    """`parallelize_module` on adapted layers; then whatever calls them."""
    mesh, found = init_device_mesh("cpu", (world,)), {}
    torch.manual_seed(3)
    x, grad = torch.randn(2, world, 8).double(), torch.randn(2, world, 8).double()
    for kind in ({"lora_bias": True}, {"residual": "implicit", "lora_dropout": 0.3}):
        want = run(Block(**kind), x, grad)
        usual = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        block = parallelize_module(Block(**kind), mesh, usual)
        found[f"{kind}"] = difference(run(block, x, grad), want)
        replicas = [p.grad for p in block.parameters() if p.grad is not None]
        found[f"{kind} replicas"] = _spread(replicas)

        block.zero_grad()
        again = _Checkpointed(block)
        found[f"{kind} checkpoint"] = difference(run(again, x, grad), want)

        by_sequence = {
            "up": ColwiseParallel(input_layouts=S(1)),
            "down": RowwiseParallel(output_layouts=S(1)),
        }
        block = parallelize_module(Block(**kind), mesh, by_sequence)
        part = (slice(None), slice(rank, rank + 1))
        got = run(block, x[part], grad[part])
        parts = [want[0][part], want[1][part], *want[2:]]
        found[f"{kind} sequence"] = difference(got, parts)
        found |= {f"{kind} {name}": e for name, e in _without_gradients(block, kind, x).items()}
    return found


class _Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def _spread(tensors: list[Any]) -> float:
    """How much the processes' plain tensors differ."""
    plain = torch.cat([t.reshape(-1) for t in tensors if not isinstance(t, DTensor)])
    least, largest = plain.clone(), plain.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return float((largest - least).abs().max())


def _without_gradients(block: nn.Module, kind: dict[str, Any], x: Tensor) -> dict[str, float]:
    """Evaluation, with and without the adapters."""
    rank, found = torch.distributed.get_rank(), {}
    plain = Block(**kind).eval()
    block.eval()
    for enabled in (True, False):
        for layer in (block.up, block.down, plain.up, plain.down):
            layer.adapter_enabled = enabled
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                got, want = block(x[:, rank : rank + 1]), plain(x)[:, rank : rank + 1]
                found[f"{mode.__name__} {enabled}"] = difference([got], [want])
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_torch_styles_on_adapted_layers(world):
    for found in on_ranks(world, partial(adapted_first, world=world)):
        assert {name: error for name, error in found.items() if not error < EXACT} == {}


def compiled(rank: int) -> dict[str, float]:
    mesh, found = init_device_mesh("cpu", (2,)), {}
    torch.manual_seed(3)
    x, grad = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    kind = {"residual": "implicit", "lora_bias": True, "lora_dropout": 0.3}
    want = run(Block(**kind), x, grad)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    block = parallelize_module(Block(**kind), mesh, plan)
    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    found["compile"] = difference(run(whole, x, grad), want)
    return found


def test_compiles_as_one_graph():
    for found in on_ranks(2, compiled):
        assert found["compile"] < EXACT


def in_other_ways(rank: int) -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (2,)), {}
    x = torch.linspace(-1, 1, 36).double().reshape(4, 9)

    for name, (*places, _) in LAYOUTS.items():
        for kind in ({}, {"residual": "implicit"}):
            layer, plain = shard(adapted(5, 9, **kind), mesh, *places), adapted(5, 9, **kind)
            for enabled in (True, False):
                layer.adapter_enabled = plain.adapter_enabled = enabled
                got, want = layer.effective_weight(), plain.effective_weight()
                assert got.placements == layer._parameters["weight"].placements
                found[f"effective weight {name} {kind} {enabled}"] = difference([full(got)], [want])

    layer, plain = adapted(6, 8).float(), adapted(6, 8).float()
    shard(layer, mesh, *COLUMNS[:3])
    with torch.autocast("cpu", torch.bfloat16):
        y, want = layer(everywhere(x[:, :8].float(), mesh)), plain(x[:, :8].float())
    assert y.dtype == torch.bfloat16
    found["autocast"] = 1e-12 * difference([full(y).float()], [want.float()])  # 0.02 and less
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32

    for places in (COLUMNS, ROWS) if find_spec("transformers") else ():
        gpt, plain = _conv1d(), _conv1d()
        gpt.weight = nn.Parameter(
            everywhere(gpt.weight.data, mesh, [S(1 - places[0][0].dim)]), requires_grad=False
        )
        got = run(gpt, everywhere(x, mesh), everywhere(x[:, :6], mesh))
        found[f"Conv1D {places}"] = difference(got, run(plain, x, x[:, :6]))
    return found


def _conv1d() -> LoRAConv1D:
    """A `Conv1D` with plain factors."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 9).double())
    add_lora(model, LoRAConfig(r=2, target_modules=["0"]))
    return model[0]


def test_other_layers_and_dtypes():
    for found in on_ranks(2, in_other_ways):
        assert {name: error for name, error in found.items() if not error < EXACT} == {}


def masked(rank: int, world: int, seeds: str) -> list[Tensor]:
    """y of three forwards with A = B = 1, which shows the masks, and the seeds' collectives."""
    mesh, found = init_device_mesh("cpu", (world,)), []
    layers = []
    for *places, of_x in (COLUMNS, ROWS):
        layer = LoRALinear.from_linear(
            nn.Linear(12, 12, bias=False).double(), r=12, lora_alpha=12.0, lora_dropout=0.5,
            init_lora_weights="lora",
        )  # fmt: skip
        adapter = layer.active()
        for parameter in (layer.weight, adapter.lora_A, adapter.lora_B):
            nn.init.zeros_(parameter) if parameter is layer.weight else nn.init.eye_(parameter)
        layers.append(
            (shard(layer, mesh, *places), everywhere(torch.ones(4, 1, 12).double(), mesh, of_x))
        )
    torch.manual_seed(7 + (rank if seeds == "different" else 0))
    for step in range(3):
        for layer, x in layers:
            with CommDebugMode() as mode:
                y = layer(x)
            assert mode.get_total_counts() == (step == 0 and layer is layers[0][0])
            found.append(full(y.redistribute(placements=[R])).detach())
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("seeds", ["equal", "different"])
def test_masks_are_those_of_one_process(world, seeds):
    """Of processes with different generators, they are those of one process with some seeds."""
    found = on_ranks(world, partial(masked, world=world, seeds=seeds))
    one = on_ranks(1, partial(masked, world=1, seeds=seeds))[0]
    for rank in found:
        assert all(torch.equal(a, b) for a, b in zip(rank, found[0], strict=True))
        assert all(set(mask.unique().tolist()) == {0.0, 2.0} for mask in rank)
    assert len({tuple(mask.flatten().tolist()) for mask in found[0]}) == 6  # all differ
    if seeds == "equal" or world == 1:
        assert all(torch.equal(a, b) for a, b in zip(found[0], one, strict=True))


def repeated(rank: int) -> float:
    """Checkpointing repeats a mask also where the generators differ."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    x = torch.ones(2, 3, 8).double()
    found = []
    for wrap in (_Checkpointed, nn.Sequential):
        block = wrap(parallelize_module(Block(lora_dropout=0.5), mesh, plan))
        torch.manual_seed(11 + rank)
        torch.randn(len(found))
        found.append(run_here(block, x))
    return difference(*found)


def run_here(block: nn.Module, x: Tensor) -> list[Tensor]:
    from lora_kernels.layers.linear import seeds

    for own in seeds._SEEDS.values():  # the second run draws what the first one drew
        own.count = 0
        own.counts.clear()
    y = block(x)
    y.square().sum().backward()
    return [y.detach(), *(full(p.grad) for p in block.parameters() if p.requires_grad)]


def test_a_checkpoint_repeats_the_mask_of_different_generators():
    for error in on_ranks(2, repeated):
        assert error < EXACT


def refusals(rank: int) -> list[str]:
    mesh, found = init_device_mesh("cpu", (2,)), []
    x = torch.ones(4, 9).double()
    layer = shard(adapted(5, 9), mesh, *COLUMNS[:3])
    plain = adapted(5, 9)
    table = LoRAEmbedding.over(nn.Embedding(6, 4))
    table.attach("default", plain.active())
    table.weight = nn.Parameter(everywhere(table.weight.data, mesh, [S(0)]), requires_grad=False)
    disabled = adapted(5, 9, residual="implicit")
    shard(disabled, mesh, *COLUMNS[:3]).adapter_enabled = False
    other = init_device_mesh("cpu", (2, 1))
    local = shard(adapted(5, 9), mesh, [R], [R], [R])
    local.weight = nn.Parameter(plain._parameters["weight"].data[:2], requires_grad=False)
    for call in (
        lambda: layer(x),
        lambda: disabled(x),
        lambda: layer(everywhere(x, other)),
        lambda: table(torch.ones(2, dtype=torch.long)),
        lambda: local(x),
    ):
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def test_refuses_in_plain_words():
    for found in on_ranks(2, refusals):
        texts = ("x is a plain tensor", "x is a plain tensor", "use one mesh for both")
        texts += ("embedding cannot run while it is sharded", "a part [2, 9] of the layer's weight")
        assert len(found) == len(texts)
        for text, error in zip(texts, found, strict=True):
            assert text in error
