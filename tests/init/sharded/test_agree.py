"""Random numbers that all processes draw alike."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels import LoRAConfig, add_lora
from lora_kernels.init.sharded.agree import agreed_randomness

from ...support.packages import needs_transformers
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, whole_tensors
from ...support.tiny_models import llama

pytestmark = needs_ranks
CPU = torch.device("cpu")


def test_all_draw_what_the_first_would_and_go_on_from_where_they_were():
    def work(rank: int) -> list[Tensor]:
        drawn = []
        for seed in (1, 1 + rank):
            torch.manual_seed(seed)
            with agreed_randomness(CPU):
                drawn.append(torch.rand(3))
            drawn.append(torch.rand(3))
        return drawn

    found = on_ranks(2, work)
    first, then = torch.rand(6, generator=torch.Generator().manual_seed(1)).split(3)
    own = torch.rand(3, generator=torch.Generator().manual_seed(2))
    for rank, drawn in enumerate(found):
        wanted = [first, then, first, own if rank else then]
        assert all(torch.equal(a, b) for a, b in zip(drawn, wanted, strict=True))


@needs_transformers
def test_starts_without_a_seed_have_the_bits_of_one_process():
    def adapted(model: torch.nn.Module, start: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        add_lora(model, LoRAConfig(r=2, init_lora_weights=start), progress=False)
        return whole_tensors(model)

    names = ("lora", "init_ab")
    for found in on_ranks(2, lambda rank: [adapted(fully_sharded(llama()), n) for n in names]):
        for name, whole in zip(names, found, strict=True):
            wanted = adapted(llama(), name)
            assert all(torch.equal(tensor, wanted[key]) for key, tensor in whole.items())
