"""The one place where `torch.ops.lora.*` is declared: a schema, a reference, a fake per operator.

An operator that a user calls is either a kernel itself or a thin composite over a kernel whose name
begins with an underscore. Composites hold what is the same on every device: checks and allocation.
Kernels get a reference for every device here; the extension and Triton override dispatch keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.library import Library

LIBRARY = Library("lora", "DEF")


def define_composite(schema: str, function: Callable) -> None:
    """Declares an operator that is plain Python over other operators, on every device."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")


def define_kernel(schema: str, reference: Callable, fake: Callable) -> None:
    """Declares a functional kernel with its reference implementation and its fake."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora::{name}", fake, lib=LIBRARY)


def define_constant_kernel(schema: str, function: Callable, fake: Callable) -> None:
    """Declares a kernel in plain Python, on every device, whose results carry no gradient.

    Not a composite, for one whose checks read values: `torch.compile` looks into a composite, and
    cannot follow such a check.
    """
    name = schema.partition("(")[0]
    define_kernel(schema, function, fake)
    op = getattr(torch.ops.lora, name).default

    def without_gradient(keyset, *args, **kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    LIBRARY.impl(name, without_gradient, "Autograd", with_keyset=True)


def define_mutating_kernel(
    schema: str, reference: Callable, mutated: Callable[..., list[torch.Tensor]]
) -> None:
    """Declares a kernel that writes its arguments and returns nothing.

    Only that form is functionalized by every supported torch: one that returns its argument, or a
    list, is not. `mutated` picks the written tensors out of the arguments, whose version counters
    are then raised: kernels write through raw pointers, which autograd cannot see.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora::{name}", lambda *args, **kwargs: None, lib=LIBRARY)
    op = getattr(torch.ops.lora, name).default

    def raise_versions(keyset, *args, **kwargs):
        written = mutated(*args)
        try:
            torch.autograd.graph.increment_version(written)
        except RuntimeError:  # inference tensors have no version
            kept = [t for t in written if not t.is_inference()]
            torch.autograd.graph.increment_version(kept)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)

    LIBRARY.impl(name, raise_versions, "ADInplaceOrView", with_keyset=True)
