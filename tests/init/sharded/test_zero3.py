"""The stretches of ZeRO-3 as rectangles of the whole, and what is read and written through them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_kernels.init.sharded.layout import Shards, fill_, full_shape, is_sharded, text_of
from lora_kernels.init.sharded.subtract import subtract_factors_here_
from lora_kernels.init.sharded.sums import sums_of
from lora_kernels.init.sharded.whole import whole
from lora_kernels.init.sharded.zero3 import (
    Partition,
    gathered,
    is_partitioned,
    partition_of,
    settle_,
)

from ...support.ranks import needs_ranks, on_ranks
from ...support.zero3 import ZeroParamStatus, gather, partition, release

SHAPES = [(1,), (7,), (1, 1), (5, 7), (1, 9), (9, 1), (3, 4, 5), (2, 1, 3), (4, 8)]


def numbered(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def stretches(whole: Tensor, parts: int) -> list[Partition]:
    """Of all ranks, as views of copies of the whole."""
    flat, size = whole.reshape(-1), -(-whole.numel() // parts)
    begins = [min(rank * size, len(flat)) for rank in range(parts)]
    shape = tuple(whole.shape)
    return [
        Partition(flat[begin : begin + size].clone(), begin, shape, None, parts, rank)
        for rank, begin in enumerate(begins)
    ]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 9))
def test_rectangles_of_all_ranks_are_the_whole_once(sizes: list[int], parts: int) -> None:
    whole = numbered(tuple(sizes))
    seen = torch.zeros_like(whole)
    for own in stretches(whole, parts):
        found = list(own.rectangles())
        assert len(found) <= 2 * len(sizes) - 1
        for data, place in found:
            assert len(place) == data.dim() == whole.dim() and data.numel()
            assert torch.equal(data, whole[place])
            seen[place] += 1
        joined = torch.cat([data.reshape(-1) for data, _ in found] or [own.data])
        assert torch.equal(joined, own.data)  # in their order, nothing left out
    assert torch.equal(seen, torch.ones_like(whole))


@pytest.mark.parametrize("shape", SHAPES)
def test_rectangles_are_views(shape: tuple[int, ...]) -> None:
    for own in stretches(numbered(shape), 3):
        for data, _ in own.rectangles():
            data.add_(100)
        wanted = numbered(shape).reshape(-1)[own.begin : own.begin + len(own.data)] + 100
        assert torch.equal(own.data, wanted)


def test_a_matrix_is_at_most_three_rectangles_and_a_stack_five() -> None:
    head, body, tail = stretches(numbered((5, 7)), 3)[1].rectangles()
    assert head[1] == (slice(1, 2), slice(5, 7)) and body[1] == (slice(2, 3), slice(0, 7))
    assert tail[1] == (slice(3, 4), slice(0, 3))
    pieces = [place for _, place in stretches(numbered((5, 4, 3)), 2)[0].rectangles()]
    assert pieces == [
        (slice(0, 2), slice(0, 4), slice(0, 3)),
        (slice(2, 3), slice(0, 2), slice(0, 3)),
    ]


def test_plain_tensors_are_not_partitioned() -> None:
    weight = nn.Parameter(numbered((3, 4)))
    assert not is_partitioned(weight)
    settle_(weight)
    assert torch.equal(weight, numbered((3, 4)))


def layouts(rank: int) -> None:
    """On every rank: reads, sums, gathers and writes each shape, plain and as a transposed one."""
    for shape in SHAPES:
        values = numbered(shape) + 1
        weight = partition(nn.Parameter(values.clone()))
        assert is_partitioned(weight) and is_sharded(weight) and weight.numel() == 0
        assert full_shape(weight) == shape
        assert torch.equal(gathered(weight), values) and torch.equal(whole(weight), values)
        assert weight.numel() == 0, "gathering leaves the parameter as it is"
        fill_(weight, values * 2)
        assert torch.equal(gathered(weight), values * 2)
        if len(shape) == 1:
            continue
        for transposed in (False, True):
            shards = Shards.of(weight, transposed)
            matrix = (values * 2).mT if transposed else values * 2
            stack = matrix if matrix.dim() == 3 else matrix[None]
            assert shards.shape == tuple(matrix.shape) and shards.dtype == torch.float32
            for index, data, row, col in shards.blocks:
                rows, cols = data.shape
                assert torch.equal(data, stack[index, row : row + rows, col : col + cols])
            sums = sums_of([shards])[0]
            wanted = torch.stack([stack.double().sum((1, 2)), (stack.double() ** 2).sum((1, 2))], 1)
            assert torch.equal(sums, wanted)  # whole numbers: exact in any order


@needs_ranks
@pytest.mark.parametrize("world", [2, 3])
def test_partitions_of_zero_init(world: int) -> None:
    on_ranks(world, layouts)


def kept_copies(rank: int) -> None:
    values = numbered((5, 3)) + 1
    weight: Any = partition(nn.Parameter(values.clone()))
    gather(weight)  # by GatheredParameters, or because it is small
    assert not is_partitioned(weight) and is_sharded(weight)
    assert torch.equal(gathered(weight), values) and torch.equal(whole(weight), values)
    shards = Shards.of(weight)
    assert [block.data.shape for block in shards.blocks] == [values.shape]
    wanted = torch.stack([values.double().sum(), (values.double() ** 2).sum()])
    assert torch.equal(sums_of([shards])[0][0], wanted), "replicas count once"
    subtract_factors_here_(shards, torch.ones(1, 3), torch.ones(5, 1), -2.0)
    assert torch.equal(weight, values + 2)
    release(weight)
    assert torch.equal(gathered(weight), values + 2), "what was written is lost on release"
    weight.ds_secondary_tensor = torch.zeros(15)  # ZeRO++'s, which forwards would gather
    fill_(weight, values)
    settle_(weight)
    assert weight.ds_secondary_tensor is None
    assert torch.equal(gathered(weight), values)


@needs_ranks
def test_the_other_copies_that_deepspeed_keeps_follow() -> None:
    on_ranks(2, kept_copies)


def refused(rank: int) -> list[str]:
    def message(change) -> str:
        weight = partition(nn.Parameter(numbered((5, 3))))
        change(weight)
        with pytest.raises(ValueError) as caught:
            Shards.of(weight)
        return str(caught.value)

    def elsewhere(weight: Any) -> None:
        weight.ds_tensor.final_location = "nvme"

    def quantized(weight: Any) -> None:
        weight.ds_tensor.ds_quant_scale = torch.ones(1)

    def packed(weight: Any) -> None:
        weight.weight_quantized = True

    def in_flight(weight: Any) -> None:
        weight.ds_status = ZeroParamStatus.INFLIGHT

    def in_groups(weight: Any) -> None:  # MiCS: the whole in each of several groups
        weight.ds_tensor = torch.zeros(15)
        weight.ds_tensor.ds_numel = 15

    return [message(change) for change in (elsewhere, quantized, packed, in_flight, in_groups)]


@needs_ranks
def test_what_cannot_be_read_is_refused_in_one_line() -> None:
    for rank in on_ranks(2, refused):
        nvme, quantized, packed, in_flight, groups = rank
        assert "on NVMe" in nvme and 'offload_param "cpu"' in nvme
        assert "zero_quantized_nontrainable_weights" in quantized and quantized == packed
        assert "gathering this ZeRO-3 parameter at this moment" in in_flight
        assert "2 processes hold 15 entries each" in groups and "[5, 3]" in groups


def described(rank: int) -> tuple[str, int]:
    weight = partition(nn.Parameter(numbered((2, 2))))
    return text_of(weight), len(partition_of(weight).data)


@needs_ranks
def test_an_empty_stretch_and_the_text() -> None:
    assert [size for _, size in on_ranks(3, described)] == [2, 2, 0]
    assert on_ranks(2, described)[0][0] == "in 2 parts of a ZeRO-3 partition"
