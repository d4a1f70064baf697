"""`lora::_tensor_kinds`: the C++ against the Python used where there is no extension."""

from __future__ import annotations

import torch

from lora_kernels.ops._backends.tensor_kinds import tensor_kinds_ref


def test_kinds_are_those_of_the_reference(device):
    a = torch.zeros(6, 4, device=device)
    tensors = [
        a,
        torch.zeros(6, 4, device=device),
        torch.zeros(4, 6, device=device).T,  # other strides
        torch.zeros(6, 4, device=device, dtype=torch.float64),
        torch.zeros(6, 4, device=device, dtype=torch.int32),  # as wide as a
        torch.zeros(25, device=device)[1:].view(6, 4),  # not at a multiple of 16 bytes
        a[:5],
        a[:5].reshape(-1),
        torch.zeros(0, 4, device=device),
        torch.zeros(6, 4, device=device, requires_grad=True),
        *a.unbind(),
    ]
    numbers, addresses, firsts = torch.ops.lora._tensor_kinds(tensors)
    want_numbers, want_addresses, want_firsts = tensor_kinds_ref(tensors)
    assert numbers.device == addresses.device == torch.device("cpu")
    assert torch.equal(numbers, want_numbers) and torch.equal(addresses, want_addresses)
    assert firsts == want_firsts == [0, 2, 3, 4, 5, 6, 7, 8, 10]


def test_no_tensors():
    numbers, addresses, firsts = tensor_kinds_ref([])
    assert not len(numbers) and not len(addresses) and firsts == []
