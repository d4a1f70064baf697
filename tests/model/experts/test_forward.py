"""The forward of experts with adapters, and its gradients, against a float64 oracle that goes
through the tokens one by one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_kernels.model.experts import forward as module
from lora_kernels.model.experts.forward import Factors, experts_forward
from lora_kernels.model.experts.routing import Routing

E, H, INNER, R, K, T = 5, 12, 7, 3, 2, 11


class Experts(nn.Module):
    """Experts with transformers' flags: what `use_experts_implementation` sets."""

    def __init__(
        self, *, transposed=False, interleaved=False, bias=False, gate=True, norm=False
    ) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = gate, bias, transposed
        self.is_concatenated, self.has_post_expert_norm = not interleaved, norm
        self._is_expert_parallel = False
        self.act_fn = nn.SiLU()
        rows = 2 * INNER if gate else INNER
        self.first = "gate_up_proj" if gate else "up_proj"
        for name, (out, cols) in ((self.first, (rows, H)), ("down_proj", (H, INNER))):
            shape = (E, cols, out) if transposed else (E, out, cols)
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64), False))
            if bias:
                own = nn.Parameter(torch.randn(E, out, dtype=torch.float64), False)
                setattr(self, f"{name}_bias", own)
        if norm:
            self.post_expert_norm = nn.RMSNorm(H, dtype=torch.float64).requires_grad_(False)
            nn.init.uniform_(self.post_expert_norm.weight, 0.5, 1.5)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return nn.functional.silu(gate) * up


KINDS = {
    "normal": {},
    "transposed": {"transposed": True},
    "gpt_oss": {"transposed": True, "interleaved": True, "bias": True},
    "no_gate": {"gate": False},
    "post_norm": {"norm": True},
    "post_norm_and_bias": {"norm": True, "bias": True},
}


def oracle(experts, x, index, weights, factors):
    """transformers' contract, token by token."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros(H, dtype=x.dtype)
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            if e == E:
                continue
            v = x[t]
            for name in (experts.first, "down_proj"):
                W = getattr(experts, name)[e]
                y = (W.T if experts.is_transposed else W) @ v
                if experts.has_bias:
                    y = y + getattr(experts, f"{name}_bias")[e]
                if name in factors:
                    own = factors[name]
                    y = y + own.scaling * own.lora_B[e] @ (own.lora_A[e] @ v)
                    A0, B0 = own.start()
                    if A0 is not None:
                        y = y - own.scaling * B0[e] @ (A0[e] @ v)
                v = y
                if name != "down_proj":
                    v = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
            if experts.has_post_expert_norm:
                v = experts.post_expert_norm(v)
            row = row + w * v
        rows.append(row)
    return torch.stack(rows)


def sizes(experts) -> dict[str, tuple[int, int]]:
    return {experts.first: (2 * INNER if experts.has_gate else INNER, H), "down_proj": (H, INNER)}


def random_factors(experts, names, start=False) -> dict[str, Factors]:
    factors = {}
    for name in names:
        out, cols = sizes(experts)[name]
        A, B = (torch.randn(*s, dtype=torch.float64) for s in ((E, R, cols), (E, out, R)))
        own = (torch.randn_like(A), torch.randn_like(B)) if start else (None, None)
        factors[name] = Factors(
            A.requires_grad_(), B.requires_grad_(), 0.7, start=lambda own=own: own
        )
    return factors


def inputs():
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    # Expert 3 has no rows.
    index = torch.stack([torch.tensor([0, 1, 2, 4])[torch.randperm(4)[:K]] for _ in range(T)])
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    return x, index, weights


def leaves(x, weights, factors) -> list[Tensor]:
    return [x, weights, *(t for own in factors.values() for t in (own.lora_A, own.lora_B))]


def assert_near(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-12 * (1 + float(b.detach().abs().max()))


@pytest.fixture(params=["block", "operators"], autouse=True)
def path(request, monkeypatch):
    """Both ways: one autograd function, and one for each product."""
    if request.param == "operators":
        monkeypatch.setattr(module, "_trains_itself", lambda experts: True)
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", ["both", "first", "second", "both_with_start", "none"])
def test_outputs_and_gradients(kind, adapted):
    experts = Experts(**KINDS[kind])
    names = {"first": [experts.first], "second": ["down_proj"], "none": []}
    names = names.get(adapted, [experts.first, "down_proj"])
    factors = random_factors(experts, names, start=adapted == "both_with_start")
    x, index, weights = inputs()
    y = experts_forward(experts, x, index, weights, factors)
    expected = oracle(experts, x, index, weights, factors)
    assert_near([y], [expected])
    grad, where = torch.randn_like(y), leaves(x, weights, factors)
    assert_near(torch.autograd.grad(y, where, grad), torch.autograd.grad(expected, where, grad))


def test_only_what_is_needed():
    experts = Experts()
    factors = random_factors(experts, ["down_proj"])
    x, index, weights = inputs()
    y = experts_forward(experts, x.detach(), index, weights.detach(), factors)
    own = factors["down_proj"]
    found = torch.autograd.grad(y.sum(), [own.lora_A, own.lora_B])
    expected = oracle(experts, x, index, weights, factors).sum()
    assert_near(found, torch.autograd.grad(expected, [own.lora_A, own.lora_B]))


def test_tokens_that_no_expert_takes():
    experts = Experts(bias=True)
    factors = random_factors(experts, [experts.first, "down_proj"])
    x, index, weights = inputs()
    index[2, 0], index[5] = E, E
    y = experts_forward(experts, x, index, weights, factors)
    expected = oracle(experts, x, index, weights, factors)
    assert_near([y], [expected])
    assert y[5].abs().max() == 0
    where = leaves(x, weights, factors)
    found = torch.autograd.grad(y.sum(), where)
    assert_near(found, torch.autograd.grad(expected.sum(), where))


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count):
    experts = Experts()
    factors = random_factors(experts, [experts.first, "down_proj"])
    x, index, weights = inputs()
    x, index, weights = x[:count], index[:count], weights[:count]
    y = experts_forward(experts, x, index, weights, factors)
    assert y.shape == (count, H)
    own = factors["down_proj"].lora_A
    (grad,) = torch.autograd.grad(y.sum(), [own])
    assert grad.shape == own.shape and (count or grad.abs().max() == 0)


def test_a_trained_bias_or_norm_has_its_gradient():
    experts = Experts(bias=True, norm=True)
    trained = [experts.gate_up_proj_bias, experts.down_proj_bias, experts.post_expert_norm.weight]
    for parameter in trained:
        parameter.requires_grad_(True)
    factors = random_factors(experts, ["down_proj"])
    x, index, weights = inputs()
    found = torch.autograd.grad(experts_forward(experts, x, index, weights, factors).sum(), trained)
    expected = torch.autograd.grad(oracle(experts, x, index, weights, factors).sum(), trained)
    assert_near(found, expected)


def test_dropout_is_undone_in_evaluation_and_drawn_from_the_seed():
    experts = Experts()
    (own,) = random_factors(experts, ["down_proj"]).values()
    dropping = {"down_proj": Factors(own.lora_A, own.lora_B, own.scaling, 0.5)}
    x, index, weights = inputs()

    def outputs(seed):
        torch.manual_seed(seed)
        return experts_forward(experts, x, index, weights, dropping)

    assert torch.equal(outputs(1), outputs(1)) and not torch.equal(outputs(1), outputs(2))
    where = leaves(x, weights, dropping)
    y, step = outputs(1), 1e-6
    grads = torch.autograd.grad(y.sum(), where)
    for leaf, grad in zip(where, grads, strict=True):  # the backward drops what the forward did
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            leaf.add_(direction, alpha=step)
            higher = outputs(1).sum()
            leaf.add_(direction, alpha=-2 * step)
            lower = outputs(1).sum()
            leaf.add_(direction, alpha=step)
        expected = (higher - lower) / (2 * step)
        assert float((grad * direction).sum() - expected) == pytest.approx(
            0, abs=1e-6 * (1 + abs(float(expected)))
        )


def test_saved_memory_and_static_shapes(path):
    """Saved: x, the weights of the routing, the first product's output and z; their shapes do not
    depend on the routing, which checkpointing compares.
    """
    if path == "operators":
        pytest.skip("autograd saves the activations")
    experts = Experts()
    factors = random_factors(experts, [experts.first, "down_proj"])
    x, index, weights = inputs()

    def saved(index):
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            experts_forward(experts, x, index, weights, factors)
        return shapes

    parameters = {tuple(t.shape) for own in factors.values() for t in (own.lora_A, own.lora_B)}
    shapes = [shape for shape in saved(index) if shape not in parameters]
    S = T * K
    assert sorted(shapes) == sorted([(T, H), (T, K), (S, 2 * INNER), (S, R), (S, R)])
    assert saved(torch.zeros_like(index)) == saved(index)


def test_products_are_in_the_dtype_of_the_weights_also_under_autocast():
    experts = Experts().float()
    factors = random_factors(experts, ["down_proj"])
    factors = {n: Factors(f.lora_A.float(), f.lora_B.float(), 1.0) for n, f in factors.items()}
    x, index, weights = (t.float() if t.is_floating_point() else t for t in inputs())
    expected = experts_forward(experts, x, index, weights, factors)
    with torch.autocast("cpu", torch.bfloat16):
        found = experts_forward(experts, x.bfloat16(), index, weights, factors)
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.02


def test_routing_needs_no_histogram():
    index = torch.tensor([[3, 0], [0, 5], [3, 1]])
    routing = Routing.sorted(index, 5)
    assert routing.ends.tolist() == [2, 3, 3, 5, 5] and routing.ends.dtype == torch.int32
    assert routing.experts.tolist() == [0, 0, 1, 3, 3, 5]
    assert routing.tokens.tolist() == [0, 1, 2, 0, 2, 1]
    values = torch.arange(6.0)
    assert torch.equal(routing.to_pairs(values[routing.order]), values)
