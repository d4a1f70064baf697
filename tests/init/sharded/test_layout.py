"""Starts on shards against those of one process, in every layout of one and two mesh dimensions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lora_kernels import init
from lora_kernels.init.sharded.layout import Shards, fill_, full_shape, text_of
from lora_kernels.init.sharded.subtract import subtract_start_here_
from lora_kernels.init.sharded.sums import largest_entry, sums_of
from lora_kernels.init.sharded.whole import whole

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import needs_ranks, on_ranks

pytestmark = needs_ranks

SHAPES = [(16, 24), (13, 9), (5, 31), (64, 6), (7, 7)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LORAM_DTYPES = DTYPES if EXHAUSTIVE else DTYPES[:2]
R = 3


def layouts(world: int) -> dict[str, tuple]:
    """{name: (mesh, placements)} of all layouts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    line = init_device_mesh("cpu", (world,))
    found: dict[str, tuple] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "replicated": (line, [Replicate()]),
        "packed rows": (line, [_StridedShard(0, split_factor=2)]),
        "packed columns": (line, [_StridedShard(1, split_factor=2)]),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        both = {
            "rows, columns": [Shard(0), Shard(1)],
            "columns, rows": [Shard(1), Shard(0)],
            "rows twice": [Shard(0), Shard(0)],
            "FSDP2 over column-wise": [_StridedShard(0, split_factor=2), Shard(0)],
            "columns twice, strided": [_StridedShard(1, split_factor=2), Shard(1)],
            "HSDP": [Replicate(), Shard(0)],
        }
        found |= {name: (square, placements) for name, placements in both.items()}
    return found


def distributed(tensor: Tensor, mesh, placements) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)


@functools.cache
def weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def starts_of(shards: list[Shards], initializer: init.Initializer) -> list[init.Start]:
    sums = sums_of(shards)
    stand_ins = [torch.empty((), dtype=s.dtype).expand(s.shape) for s in shards]
    return [
        initializer.starts([w], R, 0.5, sums=[own[0]])[0]
        for w, own in zip(stand_ins, sums, strict=True)
    ]


def compared(rank: int, initializer: init.Initializer, dtypes: tuple) -> list[str]:
    """The layouts in which W, A or B differ from those of one process."""
    wrong = []
    for dtype in dtypes:
        for name, (mesh, placements) in layouts(dist.get_world_size()).items():
            tensors = [distributed(weight(shape, dtype), mesh, placements) for shape in SHAPES]
            shards = [Shards.of(tensor) for tensor in tensors]
            for tensor, own, start in zip(
                tensors, shards, starts_of(shards, initializer), strict=True
            ):
                expected = weight(full_shape(tensor), dtype).clone()
                one = initializer.absorb_(expected, R, 0.5)
                subtract_start_here_(own, start, 0.5)
                errors = [
                    float((found - wanted).abs().max())
                    for found, wanted in (
                        (start.lora_A, one.lora_A),
                        (start.lora_B, one.lora_B),
                        (whole(tensor), expected),
                    )
                ]
                # The sums of float64 weights are rounded in another order: β's last bit.
                room = 4 * torch.finfo(dtype).eps * float(expected.abs().max() + 1)
                error = max(errors)
                if error > (room if dtype == torch.float64 else 0):
                    wrong.append(f"{name} {list(expected.shape)} {dtype}: {error}")
    return wrong


@pytest.mark.parametrize("world", [1, 2, 4] if EXHAUSTIVE else [4])
def test_loram_has_the_bits_of_one_process(world):
    for found in on_ranks(world, lambda rank: compared(rank, init.LoRAM(), LORAM_DTYPES)):
        assert found == []


@pytest.mark.parametrize(
    "initializer",
    [
        init.LoRAM(basis="orthogonal", statistic="variance"),
        init.LoRAM(basis="gaussian", gain="log_half"),
        init.InitAB(seed=3),
    ],
    ids=lambda initializer: type(initializer).__name__,
)
def test_other_starts(initializer):
    dtypes = DTYPES if EXHAUSTIVE else (torch.bfloat16,)
    for found in on_ranks(4, lambda rank: compared(rank, initializer, dtypes)):
        assert found == []


def test_sums_are_equal_on_all_ranks():
    """Also those of replicas, and to the last bit; they are one process's to 1e-14."""

    def work(rank: int) -> list[Tensor]:
        tensors = [
            distributed(weight(shape, torch.float32), mesh, placements)
            for mesh, placements in layouts(4).values()
            for shape in SHAPES
        ]
        return sums_of([Shards.of(tensor) for tensor in tensors])

    first, *others = on_ranks(4, work)
    for sums in zip(first, *others, strict=True):
        assert all(torch.equal(sums[0], other) for other in sums[1:])
    expected = [torch.ops.lora.frobenius_stats([weight(s, torch.float32)]) for s in SHAPES]
    for index, own in enumerate(first):
        torch.testing.assert_close(own, expected[index % len(SHAPES)], rtol=1e-14, atol=1e-13)


def test_one_collective_of_two_numbers_a_weight():
    """A replica's NaN counts too, so that all processes see it."""

    def work(rank: int) -> tuple:
        from torch.distributed.tensor.debug import CommDebugMode

        found = layouts(4)
        on_line = [found["rows"], found["columns"], found["replicated"]]
        tensors = [distributed(weight(SHAPES[0], torch.float32), *layout) for layout in on_line]
        shards = [Shards.of(tensor) for tensor in tensors]
        with CommDebugMode() as count:
            sums_of(shards)
        if rank == 3:
            shards[2].blocks[0].data[0, 0] = torch.nan
        return count.get_total_counts(), sums_of(shards), largest_entry(shards[0])

    for total, sums, largest in on_ranks(4, work):
        assert total == 1
        assert [bool(own.isfinite().all()) for own in sums] == [True, True, False]
        assert float(largest) == float(weight(SHAPES[0], torch.float32).abs().max())


def test_stacks_and_transposed_weights():
    """Experts of which processes have 2, 2, 1 and 0; and [in, out] weights."""

    def work(rank: int) -> bool:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard

        mesh = init_device_mesh("cpu", (4,))
        full = weight((5, 6, 8), torch.float32)
        right = True
        for dim in range(3):
            tensor = distributed(full, mesh, [Shard(dim)])
            own = Shards.of(tensor, transposed=True)
            right &= own.shape == (5, 8, 6)
            for e, data, row, col in own.blocks:
                there = full[e].T[row : row + data.shape[0], col : col + data.shape[1]]
                right &= torch.equal(data, there)
            sums = sums_of([own])[0]
            expected = torch.ops.lora.frobenius_stats(list(full.unbind()))
            right &= torch.allclose(sums, expected, rtol=1e-14, atol=1e-13)
            fill_(tensor, full + 1)
            right &= torch.equal(whole(tensor), full + 1)
        return right

    assert all(on_ranks(4, work))


def test_texts():
    def work(rank: int) -> dict[str, str]:
        full = weight((8, 8), torch.float32)
        return {name: text_of(distributed(full, *own)) for name, own in layouts(4).items()}

    texts = on_ranks(4, work)[0]
    assert texts["rows"] == "in 4 parts by rows"
    assert texts["rows, columns"] == "in 2 parts by rows and 2 parts by columns"
    assert texts["rows twice"] == "in 4 parts by rows"
    assert texts["HSDP"] == "in 2 parts by rows"
    assert texts["replicated"] == "replicated"
    assert text_of(torch.ones(2, 2)) == ""


def test_partial_sums_are_refused():
    def work(rank: int) -> str:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial

        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match="no values of its own"):
            Shards.of(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
        return "refused"

    assert on_ranks(2, work) == ["refused"] * 2
