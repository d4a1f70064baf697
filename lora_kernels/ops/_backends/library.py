"""Declares the operators `torch.ops.lora.*`: each has a schema, a reference and a fake.

An operator that users call is either a kernel or a thin composite over a kernel whose name begins
with an underscore. Composites do what is the same on every device: checks and allocation. Each
kernel's reference, in plain torch, runs on every device; the C++ extension and Triton override it
for the dispatch keys that they support.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import DispatchKeySet
from torch.library import Library

LIBRARY = Library("lora", "DEF")


def define_composite(schema: str, function: Callable[..., object]) -> None:
    """Declare an operator that is plain Python over other operators, on every device."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")


def define_kernel(
    schema: str, reference: Callable[..., object], fake: Callable[..., object]
) -> None:
    """Declare a functional kernel with its reference and its fake."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora::{name}", fake, lib=LIBRARY)


def define_constant_kernel(
    schema: str, function: Callable[..., object], fake: Callable[..., object]
) -> None:
    """Declare a kernel in plain Python, for every device, whose results carry no gradient.

    For functions whose checks read values: `torch.compile` traces into a composite and cannot trace
    such a check.
    """
    name = schema.partition("(")[0]
    define_kernel(schema, function, fake)
    op = getattr(torch.ops.lora, name).default

    def without_gradient(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> object:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    LIBRARY.impl(name, without_gradient, "Autograd", with_keyset=True)


def define_mutating_kernel(
    schema: str, reference: Callable[..., object], mutated: Callable[..., list[torch.Tensor]]
) -> None:
    """Declare a kernel that writes into its arguments and returns nothing.

    This is the only form that every supported torch can functionalize: it cannot functionalize a
    kernel that returns its argument or a list. `mutated` selects the written tensors from the
    arguments. Their version counters are incremented here, because kernels write through raw
    pointers, which autograd does not see.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora::{name}", lambda *args, **kwargs: None, lib=LIBRARY)
    op = getattr(torch.ops.lora, name).default

    def raise_versions(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> object:
        written = mutated(*args)
        try:
            torch.autograd.graph.increment_version(written)
        except RuntimeError:  # inference tensors have no version counter
            kept = [t for t in written if not t.is_inference()]
            torch.autograd.graph.increment_version(kept)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    LIBRARY.impl(name, raise_versions, "ADInplaceOrView", with_keyset=True)
