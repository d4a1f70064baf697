"""The rows of a mixture's products: the pairs of a token and one of its experts, by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The S = T·k pairs (token, choice) of T tokens with k experts each, sorted by expert.

    Attributes:
        order: int64 [S], the numbers of the sorted pairs; pair p is choice p % k of token p // k.
        tokens: int64 [S], the token of each sorted pair.
        experts: int64 [S], the expert of each sorted pair; E for a pair without an expert.
        ends: int32 [E], for each expert, the number of pairs of all experts up to this one.

    """

    order: Tensor
    tokens: Tensor
    experts: Tensor
    ends: Tensor

    @classmethod
    def sorted(cls, top_k_index: Tensor, num_experts: int) -> Routing:
        """The routing of `top_k_index` [T, k]; it does not synchronize with the device."""
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        numbers = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
        # Not bincount or histc: their results have another shape or type per device.
        ends = torch.searchsorted(experts, numbers, right=True).to(torch.int32)
        return cls(order, order // top_k_index.shape[-1], experts, ends)

    def of_pairs(self, values: Tensor) -> Tensor:
        """`values` [T, k] in the order of the sorted pairs, [S]."""
        return values.reshape(-1)[self.order]

    def to_pairs(self, values: Tensor) -> Tensor:
        """`values` [S, ...] of the sorted pairs in the order of the pairs."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(self.order), device=self.order.device)
        return values.index_select(0, inverse)


def combined(y: Tensor, top_k_weights: Tensor, routing: Routing) -> Tensor:
    """The sum over each token's experts of routing weight times y [S, H], as [T, H]; in the wider
    of the two dtypes, as transformers computes it.
    """
    tokens, k = top_k_weights.shape
    pairs = routing.to_pairs(y).view(tokens, k, y.shape[-1])  # [T, k, H]
    return (pairs * top_k_weights.unsqueeze(-1)).sum(dim=1)
