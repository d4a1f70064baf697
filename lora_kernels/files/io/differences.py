"""The bit differences of two tensors as text, which is short if the numbers differ by roundings."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def difference(want: Tensor, got: Tensor) -> str:
    """The text from which `changed` restores `want` out of `got`; "" if their bits are equal.

    Both tensors have the same floating-point dtype and shape. The text has one bit for each number,
    which says whether the number differs. The differences of the bits follow as integers, ordered
    byte by byte, because most differences are small. In JSON the text needs no escapes.
    """
    if want.dtype != got.dtype or want.shape != got.shape:
        raise ValueError(
            "dtypes and shapes must be equal, they are "
            f"{want.dtype} {list(want.shape)} and {got.dtype} {list(got.shape)}"
        )
    new, old = _bits(want), _bits(got)
    differs = new != old
    if not differs.any():
        return ""
    change = new[differs] - old[differs]  # may wrap around
    top = change.dtype.type(8 * change.itemsize - 1)
    one = change.dtype.type(1)
    change = (change << one) ^ (np.zeros_like(change) - (change >> top))  # sign in the last bit
    planes = change.astype(change.dtype.newbyteorder("<")).view(np.uint8)
    content = np.packbits(differs).tobytes() + planes.reshape(-1, change.itemsize).T.tobytes()
    return base64.b85encode(zlib.compress(content, 1)).decode("ascii")


def changed(got: Tensor, text: str) -> Tensor:
    """The tensor `want`, where `text` is `difference(want, got)`.

    Raises:
        ValueError: the text is damaged, or belongs to a tensor of another size.

    """
    bits = _bits(got).copy()
    kind, size = bits.dtype.type, bits.itemsize
    try:
        content = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
        mask, planes = np.split(content, [-(-bits.size // 8)])
        differs = np.unpackbits(mask, count=bits.size).astype(bool)
        change = np.ascontiguousarray(planes.reshape(size, -1).T).view(f"<u{size}").ravel()
        change = change.astype(kind)
        change = (change >> kind(1)) ^ (np.zeros_like(change) - (change & kind(1)))
        bits[differs] += change
    except (ValueError, IndexError, zlib.error, binascii.Error):
        raise ValueError("the differences of its bits are damaged") from None
    return torch.from_numpy(bits.view(np.uint8)).view(got.dtype).reshape(got.shape)


def _bits(tensor: Tensor) -> Any:
    """The bits of each number as an unsigned integer, in an array that may share its memory."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().view(_UNSIGNED[tensor.element_size()])
