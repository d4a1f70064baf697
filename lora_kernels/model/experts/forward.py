"""The forward of experts with adapters: transformers' contract, over `lora::grouped_linear`.

    y[t] = Σ_k w[t, k] · down(gate(up(x[t])))   with the experts that `top_k_index` names

Outside of a compiler the whole block is one autograd function, which saves x, the routing and the
output of the first projection: the activation is computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ...ops.grouped_linear import check_grouped
from ...ops.philox import dropout_seed
from .kinds import ForeignExperts, projections
from .routing import Routing, combined

SUFFIX = "_lora"  # of the submodules that hold a parameter's adapters
StartFactors = tuple[Tensor | None, Tensor | None]


def _no_start() -> StartFactors:
    return None, None


@dataclass(frozen=True)
class Factors:
    """What the forward adds to one projection: s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ), for each expert.

    lora_A is [E, r, in], lora_B [E, out, r]. `start` returns A₀ and B₀ of these shapes, or
    (None, None); it is called again in the backward, so that they need not be saved. `seed` changes
    the seed of the dropout.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: float = 0.0
    start: Callable[[], StartFactors] = _no_start
    seed: int = 0


@dataclass(frozen=True)
class _Projection:
    """One of the two products: W [E, out, in], the bias [E, out], and its adapter's factors."""

    weight: Tensor
    bias: Tensor | None
    factors: Factors
    seed: Tensor | None

    @property
    def extras(self) -> tuple[Any, ...]:
        """The operator's arguments after A and B."""
        start_A, start_B = self.factors.start()
        return self.factors.scaling, self.factors.dropout, self.seed, start_A, start_B


def experts_forward(
    experts: ForeignExperts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    factors: Mapping[str, Factors],
) -> Tensor:
    """The output [T, H], in x's dtype, of x = `hidden_states` [T, H] with the experts
    `top_k_index` [T, k] and their `top_k_weights` [T, k].

    `factors` has the factors of each adapted parameter, by the parameter's name; other parameters
    are multiplied without an update. As in transformers, the products are in the dtype of the
    experts' weights, even under autocast.
    """
    first, second = (_projection(experts, name, factors) for name in projections(experts))
    routing = Routing.sorted(top_k_index, first.weight.shape[0])
    x = hidden_states.to(first.weight.dtype)
    learned = (
        x,
        top_k_weights,
        first.factors.lora_A,
        first.factors.lora_B,
        second.factors.lora_A,
        second.factors.lora_B,
    )
    with torch.amp.autocast(x.device.type, enabled=False):
        if is_dynamo_compiling() or _trains_itself(experts):
            y = _by_operators(experts, first, second, routing, x, top_k_weights)
        else:
            block = _Block(experts, first, second, routing)
            y = _BlockFunction.apply(block, *learned)
    return y.to(hidden_states.dtype)


def activation(experts: ForeignExperts, up: Tensor) -> Tensor:
    """The input of the second projection [S, I] from the output of the first one."""
    result: Tensor = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
    return result


def _has_post_norm(experts: ForeignExperts) -> bool:
    return getattr(experts, "has_post_expert_norm", False)


def _projection(experts: ForeignExperts, name: str, factors: Mapping[str, Factors]) -> _Projection:
    weight: Tensor = experts._parameters[name]
    weight = weight.mT if experts.is_transposed else weight  # [E, out, in]
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    own = factors.get(name)
    if own is None:
        count, rows, cols = weight.shape
        own = Factors(weight.new_empty(count, 0, cols), weight.new_empty(count, rows, 0), 1.0)
    seed = dropout_seed(weight.device) ^ own.seed if own.dropout else None
    return _Projection(weight, bias, own, seed)


def _trains_itself(experts: nn.Module) -> bool:
    """Whether a parameter of the module other than its adapters' is trained: a bias, a norm."""
    own = any(p is not None and p.requires_grad for p in experts._parameters.values())
    return own or any(
        parameter.requires_grad
        for name, child in experts._modules.items()
        if child is not None and not name.endswith(SUFFIX)
        for parameter in child.parameters()
    )


def _by_operators(
    experts: ForeignExperts,
    first: _Projection,
    second: _Projection,
    routing: Routing,
    x: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    def multiplied(part: _Projection, rows: Tensor | None, inputs: Tensor) -> Tensor:
        own = part.factors
        operands = (inputs, part.weight, part.bias, routing.ends, rows, own.lora_A, own.lora_B)
        result: Tensor = torch.ops.lora.grouped_linear(*operands, *part.extras)
        return result

    hidden = activation(experts, multiplied(first, routing.tokens, x))  # [S, I]
    y = multiplied(second, None, hidden)  # [S, H]
    y = experts.post_expert_norm(y) if _has_post_norm(experts) else y
    return combined(y, top_k_weights, routing)


@dataclass(frozen=True)
class _Block:
    """The block's operands without a gradient."""

    experts: ForeignExperts
    first: _Projection
    second: _Projection
    routing: Routing

    def multiply(
        self, part: _Projection, x: Tensor, rows: Tensor | None, A: Tensor, B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """y [S, out] and z [S, r] of x[rows]."""
        operands = (x, part.weight, part.bias, self.routing.ends, rows, A, B, *part.extras)
        check_grouped(*operands)  # the kernel would read factors that are offloaded
        y, z = torch.ops.lora.grouped_linear_forward(*operands)
        return y, z

    def backward(
        self,
        part: _Projection,
        grad: Tensor,
        x: Tensor,
        rows: Tensor | None,
        A: Tensor,
        B: Tensor,
        z: Tensor,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, A and B, of which an unneeded one is empty."""
        ends, needs = self.routing.ends, [needs[0], False, *needs[1:]]
        dx, _, dA, dB = torch.ops.lora.grouped_linear_backward(
            grad, x, part.weight, ends, rows, A, B, z, *part.extras, needs
        )
        return dx, dA, dB


class _BlockFunction(torch.autograd.Function):
    """The whole block. Saved: x, the routing, the first projection's output, and z of both."""

    @staticmethod
    def forward(
        ctx: Any,
        block: _Block,
        x: Tensor,
        top_k_weights: Tensor,
        A1: Tensor,
        B1: Tensor,
        A2: Tensor,
        B2: Tensor,
    ) -> Tensor:
        up, z1 = block.multiply(block.first, x, block.routing.tokens, A1, B1)
        y, z2 = block.multiply(block.second, activation(block.experts, up), None, A2, B2)
        if _has_post_norm(block.experts):
            y = block.experts.post_expert_norm(y)
        ctx.block = block
        ctx.save_for_backward(x, top_k_weights, A1, B1, A2, B2, up, z1, z2)
        return combined(y, top_k_weights, block.routing)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, top_k_weights, A1, B1, A2, B2, up, z1, z2 = ctx.saved_tensors
        block, (_, *needs) = ctx.block, ctx.needs_input_grad
        first, routing = block.first, block.routing
        with torch.enable_grad():
            up = up.detach().requires_grad_()
            hidden = activation(block.experts, up)  # [S, I], again
        after = _after_activation(block, grad, hidden.detach(), top_k_weights, A2, B2, z2, needs)
        dhidden, dweights, dA2, dB2 = after
        dx = dA1 = dB1 = None
        if any((needs[0], *needs[2:4])):
            (dup,) = torch.autograd.grad(hidden, up, dhidden)  # [S, 2I]
            del up, hidden, dhidden
            wanted = [needs[0], *needs[2:4]]
            grads = block.backward(first, dup, x, routing.tokens, A1, B1, z1, wanted)
            dx, dA1, dB1 = (g if need else None for g, need in zip(grads, wanted, strict=True))
        return None, dx, dweights, dA1, dB1, dA2, dB2


def _after_activation(
    block: _Block,
    grad: Tensor,
    hidden: Tensor,
    top_k_weights: Tensor,
    A: Tensor,
    B: Tensor,
    z: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `hidden` [S, I], the routing weights [T, k], A and B of the second product;
    that of `hidden` is empty if nothing needs it.

    y is not saved. Without a norm after it, y is linear in h: the product of y and `grad` is the
    product of h and its gradient, plus the product of the bias and `grad`.
    """
    _, needs_weights, _, _, needs_A, needs_B = needs
    routing, second = block.routing, block.second
    needs_hidden = any(needs[:4])  # for the routing weights too
    weights = routing.of_pairs(top_k_weights).unsqueeze(-1)  # [S, 1]
    dy = grad.index_select(0, routing.tokens)  # [S, H]
    dpairs = None
    wanted = [needs_hidden, needs_A, needs_B]
    if _has_post_norm(block.experts):
        dy, dpairs = _through_norm(block, dy, weights, hidden, A, B)
        dhidden, dA, dB = block.backward(second, dy, hidden, None, A, B, z, wanted)
    else:
        dy = dy.to(second.weight.dtype)
        scaled = (hidden * weights).to(hidden.dtype), (z * weights).to(z.dtype)
        dhidden, dA, dB = block.backward(second, dy, scaled[0], None, A, B, scaled[1], wanted)
        if needs_weights:
            dpairs = (hidden * dhidden).sum(-1, dtype=weights.dtype)  # [S]
            if second.bias is not None:
                last = len(second.bias) - 1
                own = second.bias[routing.experts.clamp(max=last)]  # [S, H]
                through_bias = (dy * own).sum(-1, dtype=weights.dtype)
                dpairs += through_bias.masked_fill_(routing.experts > last, 0)
        if needs_hidden:
            dhidden = (dhidden * weights).to(hidden.dtype)
    dweights = None
    if needs_weights and dpairs is not None:
        dweights = routing.to_pairs(dpairs).view_as(top_k_weights).to(top_k_weights.dtype)
    return dhidden, dweights, dA if needs_A else None, dB if needs_B else None


def _through_norm(
    block: _Block, dy: Tensor, weights: Tensor, hidden: Tensor, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of y [S, H] and of the sorted routing weights [S], with y computed again."""
    y, _ = block.multiply(block.second, hidden, None, A, B)
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        normed = block.experts.post_expert_norm(y)
    (through,) = torch.autograd.grad(normed, y, (dy * weights).to(normed.dtype))
    return through, (dy * normed.detach()).sum(-1, dtype=weights.dtype)
