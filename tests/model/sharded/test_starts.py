"""Every start that needs no data, on a model that FSDP2 has sharded: the bits of one process."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import LoRAConfig, add_lora
from lora_kernels.init import (
    Initializer,
    KaSA,
    LoftQ,
    LoRAM,
    LoRAXS,
    PiSSA,
    get_initializer,
    initializer_names,
)

from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, whole_tensors
from ...support.tiny_models import llama

pytestmark = needs_ranks

OPTIONS: list[Initializer] = [
    *(LoRAM(basis=basis) for basis in ("orthogonal", "gaussian")),
    *(LoRAM(gain=gain) for gain in ("log_half", "exact")),
    *(LoRAM(statistic="variance"), LoRAM(track="pissa"), PiSSA(method="exact")),
    *(LoRAXS(retain_part="bottom"), KaSA(seed=1)),
]


def without_data() -> list[Initializer]:
    """`OPTIONS` and the registered starts with their default options, except LoftQ, which is
    refused, and KaSA without a seed, drawn by the process that computes the SVD.
    """
    named = [get_initializer(name) for name in initializer_names() if name != "kasa"]
    return OPTIONS + [
        start
        for start in named
        if not (start.needs_gradient or start.needs_activations or isinstance(start, LoftQ))
    ]


def adapted(model: torch.nn.Module, start: Initializer) -> dict[str, Tensor]:
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(r=4, init_lora_weights=start), progress=False)
    return whole_tensors(model)


def test_every_start_has_the_bits_of_one_process():
    starts = without_data()
    assert len(starts) >= 20
    wanted = [adapted(llama(), start) for start in starts]

    def work(rank: int) -> list[list[str]]:
        differing = []
        for start, want in zip(starts, wanted, strict=True):
            found = adapted(fully_sharded(llama()), start)
            assert found.keys() == want.keys()
            differing.append([n for n, t in want.items() if not torch.equal(found[n], t)])
        return differing

    for differing in on_ranks(2, work):
        wrong = {repr(s): names for s, names in zip(starts, differing, strict=True) if names}
        assert not wrong
