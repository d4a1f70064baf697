"""A kernel launch whose sizes are known beforehand, without Triton's binder.

`kernel[grid](...)` inspects every argument at every call: 25 to 50 us, three times what a decode
kernel runs. A `Launch` does that once for each set of dtypes and alignments, and then calls the
compiled kernel as Triton itself does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton 3.6 to 3.9 launch like this, with all parameters, constants too, as the arguments. It is
# no public interface: where it differs, every launch is an ordinary one, right but slow.
_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, "
    "*bound_args.values())"
)


def _launches_as_known() -> bool:
    source = re.sub(r"\s+", " ", inspect.getsource(JITFunction.run))
    return _LAUNCH in source and hasattr(knobs.runtime, "launch_enter_hook")


DIRECT = _launches_as_known()


class Launch:
    """`kernel` over `grid`, with everything that its machine code depends on but what the tensors
    and scalars of a call say.

    Args:
        kernel: a `triton.jit` function whose parameters are, in this order, tensors, sizes,
            scalars, constants.
        grid: one to three integers.
        sizes: the integers; they are specialised on as Triton does.
        blocks: the first tensors are passed as descriptors of these block shapes.
        constants: the `tl.constexpr` parameters, and options such as `num_warps`.

    """

    __slots__ = (
        "_compiled",
        "_direct",
        "_grid3",
        "_tail",
        "blocks",
        "constants",
        "grid",
        "kernel",
        "sizes",
    )

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        sizes: Sequence[int],
        blocks: Sequence[Sequence[int]] = (),
        **constants: Any,
    ) -> None:
        self.kernel, self.grid, self.sizes = kernel, tuple(grid), tuple(sizes)
        self.blocks = tuple(list(block) for block in blocks)
        self.constants = constants
        self._grid3 = (*self.grid, 1, 1)[:3]
        self._tail = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self._direct = DIRECT and isinstance(kernel, JITFunction)  # else it is interpreted
        self._compiled: dict[tuple, tuple] = {}

    def __call__(
        self, tensors: Sequence[torch.Tensor], scalars: Sequence[float | int] = ()
    ) -> None:
        """Launch on the current device, where all `tensors` are, and on its current stream.

        A scalar is a float, or an integer whose parameter is not specialised and fits 32 bits.
        """
        if not self._direct:
            self._launch_with_binder(tensors, scalars)
            return
        active, device = driver.active, tensors[0].get_device()
        addresses, key, bits = [], [active, device], 0
        for tensor in tensors:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
            key.append(tensor.dtype)
            if tensor.get_device() != device:
                raise ValueError(
                    f"{self.kernel.__name__}: a tensor is on {tensor.device}, another on "
                    f"{tensors[0].device}"
                )
        if bits & 15:
            key += [address & 15 == 0 for address in addresses]
        for tensor in tensors[: len(self.blocks)]:
            key += [tensor.shape, tensor.stride()]
        key = tuple(key)
        compiled = self._compiled.get(key)
        runtime = knobs.runtime
        if (
            compiled is None
            or _is_set(runtime.launch_enter_hook)
            or _is_set(runtime.launch_exit_hook)
        ):
            compiled = self._launch_with_binder(tensors, scalars)
            if compiled is not None and not self.kernel.pre_run_hooks:
                self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata
            return
        run, function, metadata = compiled
        if self.blocks:
            addresses[: len(self.blocks)] = map(_descriptor, tensors, self.blocks)
        stream = active.get_current_stream(device)
        run(
            *self._grid3, stream, function, metadata, None, None, None,
            *addresses, *self.sizes, *scalars, *self._tail,
        )  # fmt: skip

    def _launch_with_binder(self, tensors: Sequence, scalars: Sequence) -> Any:
        described = [
            TensorDescriptor.from_tensor(tensor, block)
            for tensor, block in zip(tensors, self.blocks, strict=False)
        ]
        return self.kernel[self.grid](
            *described, *tensors[len(described) :], *self.sizes, *scalars, **self.constants
        )

    @property
    def is_direct(self) -> bool:
        """Whether a further call with the same dtypes and alignments passes the binder by."""
        return bool(self._compiled)


def _is_set(hook: Any) -> bool:
    """Whether a profiler or a user asked to see launches: an empty `HookChain` is nobody."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """As `from_tensor`, whose checks passed for this shape, these strides and this alignment."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.block_shape = tensor, block
    descriptor.shape, descriptor.strides = tensor.shape, tensor.stride()
    return descriptor
