"""The format of files: headers that are damaged, and blocks and buffers."""

from __future__ import annotations

import json
import struct
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_kernels.files.io.blocks import cut
from lora_kernels.files.io.buffers import BufferPool
from lora_kernels.files.io.layout import DTYPES, Entry, read_layout, render

from ..checkpoint.folders import random_tensor, read_file, write_file


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin: int, end: int, dtype: str = "U8", shape=None) -> dict:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape,
            "data_offsets": [begin, end]}  # fmt: skip


class TestLayout:
    def test_as_the_package_reads_it(self, odd_model):
        safetensors = pytest.importorskip("safetensors")
        for file in odd_model.glob("*.safetensors"):
            layout = read_layout(file)
            with safetensors.safe_open(file, framework="np") as opened:
                assert dict(layout.metadata) == opened.metadata()
                assert {e.name for e in layout.entries} == set(opened.keys())
                for e in layout.entries:
                    part = opened.get_slice(e.name)
                    assert (list(e.shape), e.dtype) == (part.get_shape(), part.get_dtype())
            assert [e.name for e in layout.entries] == list(read_file(file)[0])

    def test_a_cast_file_as_the_package_reads_it(self, odd_model, tmp_path):
        safetensors = pytest.importorskip("safetensors")
        for file in odd_model.glob("*.safetensors"):
            layout = read_layout(file).cast(torch.float16)
            path = tmp_path / file.name
            path.write_bytes(layout.head() + bytes(layout.data_size))
            with safetensors.safe_open(path, framework="np") as opened:
                assert {e.name for e in layout.entries} == set(opened.keys())
            assert layout.start % 8 == 0

    @pytest.mark.parametrize(
        "content,match",
        [
            (b"", "has no header"),
            (b"1234567", "has no header"),
            (struct.pack("<Q", 1 << 40) + b"{}", "has no header"),
            (struct.pack("<Q", 3) + b"{}", "has no header"),
            (struct.pack("<Q", 2) + b"\xff\xff", "its header is wrong"),
            (struct.pack("<Q", 2) + b"[]", "its header is wrong"),
            (struct.pack("<Q", 100_000) + b"[" * 100_000, "its header is wrong"),
            (header(a={"dtype": "U8"}), "its header is wrong"),
            (header(a=entry(0, 4)) + b"123", "has 3 bytes|bytes, its header wants"),
            (header(a=entry(0, 4)) + b"12345", "its header wants"),
            (header(a=entry(1, 4)) + b"1234", "do not follow"),
            (header(a=entry(0, 3), b=entry(2, 4)) + b"1234", "do not follow"),
            (header(a=entry(0, 3), b=entry(4, 5)) + b"12345", "do not follow"),
            (header(a=entry(0, 4, "F32", [2])) + b"1234", "which its shape does not"),
            (header(a=entry(0, "4", "F32", [1])) + b"1234", "its header is wrong"),
        ],
    )
    def test_damaged(self, content, match, tmp_path):
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=match) as raised:
            read_layout(file)
        assert "x.safetensors is damaged" in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_dtypes_to_come(self, tmp_path):
        """What is not known is copied."""
        file = tmp_path / "x.safetensors"
        file.write_bytes(header(a=entry(0, 4, "F4", [8])) + b"1234")
        layout = read_layout(file)
        assert layout.cast(torch.float16) is layout

    def test_nothing_to_cast(self, tmp_path):
        rng = np.random.default_rng(0)
        write_file(tmp_path / "x", {"a": random_tensor(rng, "F16", (3, 5))})
        layout = read_layout(tmp_path / "x")
        assert layout.cast(torch.float16) is layout and layout.cast(None) is layout


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
            made = cut(source, target, names, only_edited=only)
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
