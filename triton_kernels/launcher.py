"""Repeated launches of a kernel with the same sizes, without Triton's binder.

`kernel[grid](...)` inspects every argument at every call. That takes 25 to 50 us, three times as
long as a decode kernel runs. A `Launch` does this once for each set of dtypes and alignments; then
it calls the compiled kernel as Triton does.
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

# How Triton 3.6 to 3.9 launch a kernel: all parameters, including constants, are arguments. This is
# not a public interface. If it differs, all launches go through the binder: correct but slower.
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
    """Launches of `kernel` on `grid` that differ only in their tensors and scalars.

    Args:
        kernel: a `triton.jit` function whose parameters are, in this order, tensors, sizes,
            scalars, constants.
        grid: one to three integers.
        sizes: the integer arguments, on which the kernel is specialized as usual.
        blocks: the block shapes of the first tensors, which are passed as tensor descriptors.
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
        self._direct = DIRECT and isinstance(kernel, JITFunction)  # false in the interpreter
        self._compiled: dict[tuple, tuple] = {}

    def __call__(
        self, tensors: Sequence[torch.Tensor], scalars: Sequence[float | int] = ()
    ) -> None:
        """Launch on the current stream of the current device, on which all `tensors` must be.

        A scalar is a float, or a 32-bit integer whose parameter is not specialized.
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
        """Whether another call with the same dtypes and alignments bypasses the binder."""
        return bool(self._compiled)


def _is_set(hook: Any) -> bool:
    """Whether a launch hook is set, for instance by a profiler; an empty `HookChain` is not."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Like `from_tensor` without its checks, which passed for the same shape and strides before."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.block_shape = tensor, block
    descriptor.shape, descriptor.strides = tensor.shape, tensor.stride()
    return descriptor
