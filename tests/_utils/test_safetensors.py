"""The safetensors format: layouts, damaged headers, casts."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch

from lora_kernels._utils.safetensors import read_layout

from ..files.checkpoint.folders import random_tensor, read_file, write_file


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
            assert layout.data_offset % 8 == 0

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
            (header(a=entry(0, 4)) + b"123", "bytes, its header says"),
            (header(a=entry(0, 4)) + b"12345", "its header says"),
            (header(a=entry(1, 4)) + b"1234", "do not follow"),
            (header(a=entry(0, 3), b=entry(2, 4)) + b"1234", "do not follow"),
            (header(a=entry(0, 3), b=entry(4, 5)) + b"12345", "do not follow"),
            (header(a=entry(0, 4, "F32", [2])) + b"1234", "its shape another number"),
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
        """Tensors of unknown dtypes are copied."""
        file = tmp_path / "x.safetensors"
        file.write_bytes(header(a=entry(0, 4, "F4", [8])) + b"1234")
        layout = read_layout(file)
        assert layout.cast(torch.float16) is layout

    def test_nothing_to_cast(self, tmp_path):
        rng = np.random.default_rng(0)
        write_file(tmp_path / "x", {"a": random_tensor(rng, "F16", (3, 5))})
        layout = read_layout(tmp_path / "x")
        assert layout.cast(torch.float16) is layout and layout.cast(None) is layout
