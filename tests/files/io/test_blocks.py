"""Blocks of files, and the buffers they are read into."""

from __future__ import annotations

import threading

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels._utils.safetensors import DTYPES, Entry, render
from lora_kernels.files.io.blocks import divide
from lora_kernels.files.io.buffers import BufferPool


class TestBlocks:
    @given(
        sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
        dtypes=st.lists(st.sampled_from(["F32", "BF16", "F16", "F64", "U8"]), min_size=12),
        edited=st.sets(st.integers(0, 11)),
        block=st.integers(8, 64),
        only=st.booleans(),
        cast=st.sampled_from([None, torch.float16, torch.float32]),
    )
    def test_all_bytes_once_and_in_order(self, sizes, dtypes, edited, block, only, cast):
        from lora_kernels.files.io import blocks

        entries, position = [], 0
        for k, size in enumerate(sizes):
            end = position + size * (DTYPES[dtypes[k]].itemsize if dtypes[k] in DTYPES else 1)
            entries.append(Entry(str(k), dtypes[k], (size,), position, end))
            position = end
        source = render(entries, {})
        target = source if only else source.cast(cast)
        names = {str(k) for k in edited if k < len(sizes)}
        old, blocks.BLOCK = blocks.BLOCK, block
        try:
            made = divide(source, target, names, only_edited=only)
        finally:
            blocks.BLOCK = old
        for layout, side in ((source, "source"), (target, "target")):
            pieces = [getattr(p, side) for b in made for p in b.pieces]
            if not only:
                assert [p.begin for p in pieces[1:]] == [p.end for p in pieces[:-1]]
                assert pieces[0].begin == 0 and pieces[-1].end == layout.data_size
            for b in made:
                inside = [getattr(p, side) for p in b.pieces]
                assert [p.begin for p in inside[1:]] == [p.end for p in inside[:-1]]
        whole = {e.name: e for e in source.entries}
        seen = [p.source for b in made for p in b.pieces if p.edited]
        assert {e.name for e in seen} == names and all(e == whole[e.name] for e in seen)
        for b in made:
            if len(b.pieces) > 1:
                assert max(b.source_size, b.target_size) <= block or len(b.pieces) == 1
            before, after, size = b.places(8 * 7, 8 * 9)
            assert before + b.source_size <= size and after + b.target_size <= size
            assert before == after or before + b.source_size <= after


class TestBuffers:
    def test_limit(self):
        pool = BufferPool(100)
        a, b = pool.take(40), pool.take(60)
        waiting = threading.Thread(target=lambda: taken.append(pool.take(90)))
        taken: list = []
        waiting.start()
        pool.give_back(a)
        waiting.join(0.05)
        assert waiting.is_alive()  # 40 are free, but no more
        pool.give_back(b)
        waiting.join(5)
        assert taken[0].capacity == 90  # the others made room
        pool.give_back(taken[0])
        assert pool.take(10) is taken[0]

    def test_closed(self):
        pool = BufferPool(10)
        pool.take(10)
        errors: list = []

        def wait():
            try:
                pool.take(1)
            except RuntimeError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        pool.close()
        waiting.join(5)
        assert len(errors) == 1
