"""The rewritten gradients against the papers' formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_kernels import LoRAConfig, add_lora, optim
from lora_kernels.training.rules import blocks

from ...support.tiny_experts import tiny_experts
from . import cases

RULES = {
    "lora_pro": (optim.LoRAPro(), cases.lora_pro),
    "riemannian": (optim.Riemannian(), cases.riemannian),
    "lora_fa": (optim.LoRAFA(), cases.lora_fa),
}
FLOATS = (torch.float32, torch.float64)


def wanted(model, formula):
    pairs = zip(model, cases.gradients(model), strict=True)
    return [formula(*cases.numbers(layer), *grads) for layer, grads in pairs]


def condition(model) -> float:
    """The largest condition number of an A or B."""
    return max(np.linalg.cond(factor) for layer in model for factor in cases.numbers(layer)[:2])


def check(model, name, dtype) -> None:
    rule, formula = RULES[name]
    want = wanted(model, formula)
    optim.precondition_gradients_(model, rule)
    for got, expected in zip(cases.gradients(model), want, strict=True):
        for one, other in zip(got, expected, strict=True):
            cases.assert_close(one, other, dtype, condition(model) ** 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", RULES)
def test_two_ranks_and_two_shapes(name, dtype, device):
    model = cases.random_model(device, dtype)
    cases.set_gradients(model)
    check(model, name, dtype)


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4)).map(
    lambda s: (s[0] + s[2], s[1] + s[2], s[2])
)


@given(st.lists(sizes, min_size=1, max_size=3), st.sampled_from(sorted(RULES)), st.integers(0, 9))
def test_random_shapes(shapes, name, seed):
    model = cases.random_model("cpu", torch.float64, shapes, seed)
    cases.set_gradients(model, seed)
    check(model, name, torch.float64)


@pytest.mark.parametrize("name", RULES)
def test_gradients_that_come_from_no_full_gradient(name):
    """As after `clip_grad_value_`: the formulas hold for any gradients."""
    model = cases.random_model("cpu", torch.float64)
    cases.set_gradients(model)
    nn.utils.clip_grad_value_(model.parameters(), 0.5)
    check(model, name, torch.float64)


def test_lora_pro_is_nearest_to_the_full_gradient(device):
    """s(B g_A + g_B A) against the least-squares solution over all (g_A, g_B)."""
    model = cases.random_model(device, torch.float64)
    full = cases.set_gradients(model)
    optim.precondition_gradients_(model, optim.LoRAPro())
    for layer, G, (grad_A, grad_B) in zip(model, full, cases.gradients(model), strict=True):
        A, B, s = cases.numbers(layer)
        # vec(B g_A) = (B ⊗ I) vec(g_A) and vec(g_B A) = (I ⊗ Aᵀ) vec(g_B), by rows.
        system = s * np.hstack([np.kron(B, np.eye(A.shape[1])), np.kron(np.eye(len(B)), A.T)])
        nearest = system @ np.linalg.lstsq(system, G.ravel(), rcond=None)[0]
        got = s * (B @ grad_A + grad_B @ A)
        np.testing.assert_allclose(got.ravel(), nearest, rtol=0, atol=1e-6)  # δ is 1e-8
        gap = np.linalg.norm(got - G)
        assert gap < np.linalg.norm(s * (B @ (s * B.T @ G) + (s * G @ A.T) @ A) - G)


def test_lora_pro_changes_the_gradients_least():
    """X of theorem 2.3: no other X brings g_A and g_B nearer to LoRA's."""
    model = cases.random_model("cpu", torch.float64, ((9, 12, 3),))
    cases.set_gradients(model)
    ((before_A, before_B),) = cases.gradients(model)
    A, B, _ = cases.numbers(model[0])
    optim.precondition_gradients_(model, optim.LoRAPro())
    ((grad_A, grad_B),) = cases.gradients(model)

    def change(X):
        new_A, new_B = grad_A + X @ A, grad_B - B @ X
        return np.sum((new_A - before_A) ** 2) + np.sum((new_B - before_B) ** 2)

    rng = np.random.default_rng(0)
    least = change(np.zeros((3, 3)))
    assert all(change(1e-3 * rng.standard_normal((3, 3))) > least for _ in range(20))


def test_lora_fa_is_nearest_to_the_full_gradient():
    """s·g_B·A against the projection of G on the rows of A."""
    model = cases.random_model("cpu", torch.float64)
    full = cases.set_gradients(model)
    optim.precondition_gradients_(model, optim.LoRAFA())
    for layer, G, (_, grad_B) in zip(model, full, cases.gradients(model), strict=True):
        A, _, s = cases.numbers(layer)
        rows = np.linalg.svd(A, full_matrices=False)[2]
        np.testing.assert_allclose(s * grad_B @ A, G @ rows.T @ rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_zero_B(name, device):
    """The first step of noise and zeros: A has a gradient of 0, and B's is preconditioned."""
    model = cases.random_model(device, torch.float64)
    for layer in model:
        nn.init.zeros_(layer.lora_B)
    cases.set_gradients(model)
    want = wanted(model, cases.lora_fa)
    optim.precondition_gradients_(model, RULES[name][0])
    for layer, (grad_A, grad_B), (_, fa) in zip(model, cases.gradients(model), want, strict=True):
        assert not grad_A.any() and np.isfinite(grad_B).all()
        expected = fa * layer.scaling**2 if name == "riemannian" else fa
        np.testing.assert_allclose(grad_B, expected, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_factors_that_lack_a_rank(name):
    """Two equal rows of A and columns of B: finite, and LoRA-Pro still projects."""
    model = cases.random_model("cpu", torch.float32, ((9, 12, 3),))
    with torch.no_grad():
        model[0].lora_A[1] = model[0].lora_A[0]
        model[0].lora_B[:, 1] = model[0].lora_B[:, 0]
    (G,) = cases.set_gradients(model)
    optim.precondition_gradients_(model, RULES[name][0])
    ((grad_A, grad_B),) = cases.gradients(model)
    assert np.isfinite(grad_A).all() and np.isfinite(grad_B).all()
    if name == "lora_pro":
        A, B, s = cases.numbers(model[0])
        U = np.linalg.svd(B)[0][:, :2]
        V = np.linalg.svd(A)[2][:2]
        left = U @ U.T @ G
        want = left + (G - left) @ V.T @ V
        np.testing.assert_allclose(s * (B @ grad_A + grad_B @ A), want, rtol=0, atol=1e-4)


def test_float32_does_not_square_the_condition_number():
    """B of condition 300: Gram matrices of float32 have an error of 300² roundings."""
    model = cases.random_model("cpu", torch.float32, ((40, 50, 4),))
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(model[0].lora_B, full_matrices=False)
        model[0].lora_B.copy_(U @ torch.diag(torch.tensor([3.0, 1.0, 0.1, 0.01])) @ Vh)
    (G,) = cases.set_gradients(model)
    optim.precondition_gradients_(model, optim.LoRAPro(damping=0))
    ((grad_A, grad_B),) = cases.gradients(model)
    A, B, s = cases.numbers(model[0])
    left = B @ np.linalg.pinv(B) @ G
    want = left + (G - left) @ np.linalg.pinv(A) @ A
    error = np.linalg.norm(s * (B @ grad_A + grad_B @ A) - want) / np.linalg.norm(want)
    assert error < 8 * 300 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", RULES)
def test_experts_count_as_layers(name):
    """A stack [E, r, in] is rewritten as E layers are."""
    model = tiny_experts("Mixtral")
    add_lora(model, LoRAConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    stack = model.model.layers[0].mlp.experts.down_proj_lora
    torch.manual_seed(0)
    for factor in (stack.lora_A, stack.lora_B):
        nn.init.normal_(factor)
        factor.grad = torch.randn_like(factor)
    before = (stack.lora_A, stack.lora_B, stack.lora_A.grad, stack.lora_B.grad)
    A, B, grad_A, grad_B = map(cases.as_float64, before)
    assert A.ndim == 3
    optim.precondition_gradients_(model, RULES[name][0])
    for e in range(len(A)):
        want = RULES[name][1](A[e], B[e], stack.scaling, grad_A[e], grad_B[e])
        cases.assert_close(cases.as_float64(stack.lora_B.grad[e]), want[1], condition=100)
        if name != "lora_fa":
            cases.assert_close(cases.as_float64(stack.lora_A.grad[e]), want[0], condition=100)


class Kinds(nn.Module):
    """Layers of other kinds, of which the weight as a matrix has the update s·BA."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.conv(x.mT)


@pytest.mark.parametrize("name", RULES)
def test_layers_of_other_kinds(name):
    """With gradients of the layers' own backward."""
    model = Kinds()
    targets = ["embed", "conv", "attention", "attention.out_proj"]
    add_lora(model, LoRAConfig(r=2, target_modules=targets))
    model(torch.arange(10).view(2, 5)).square().mean().backward()
    layers = [model.embed, model.conv, model.attention, model.attention.out_proj]
    want = wanted(layers, RULES[name][1])
    optim.precondition_gradients_(model, RULES[name][0])
    for got, expected in zip(cases.gradients(layers), want, strict=True):
        for one, other in zip(got, expected, strict=True):
            cases.assert_close(one, other, condition=condition(layers) ** 2)


@pytest.mark.parametrize("name", RULES)
def test_dora(name):
    """A and B are rewritten as those of any update; the magnitude keeps its gradient."""
    model = nn.Sequential(nn.Linear(12, 9))
    add_lora(model, LoRAConfig(r=2, use_dora=True, target_modules=["0"]))
    model(torch.randn(5, 12)).square().mean().backward()
    magnitude = model[0].active().lora_magnitude
    before = magnitude.grad.clone()
    check(model, name, torch.float32)
    assert before.any() and torch.equal(magnitude.grad, before)


@pytest.mark.parametrize("name", RULES)
def test_values_that_are_not_finite_raise_nothing(name):
    """One layer's gradient or factor is not finite: the others are rewritten as ever.

    LAPACK raises an error for a NaN in a 3 × 3 matrix.
    """
    clean, model = (cases.random_model("cpu", shapes=((9, 12, 3),) * 3) for _ in range(2))
    cases.set_gradients(clean)
    cases.set_gradients(model)
    with torch.no_grad():
        model[0].lora_B.grad[0, 0] = torch.inf
        model[1].lora_A[0, 0] = torch.nan
    for net in (clean, model):
        optim.precondition_gradients_(net, RULES[name][0])
    assert not torch.isfinite(model[0].lora_B.grad).all()
    assert torch.isnan(model[1].lora_B.grad).all()
    for got, want in zip(cases.gradients(model[2:]), cases.gradients(clean[2:]), strict=True):
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_blocks_of_a_limited_size(monkeypatch):
    one, many = cases.random_model("cpu"), cases.random_model("cpu")
    cases.set_gradients(one)
    cases.set_gradients(many)
    optim.precondition_gradients_(one, optim.LoRAPro())
    monkeypatch.setattr(blocks, "_BYTES", 1)
    optim.precondition_gradients_(many, optim.LoRAPro())
    for got, want in zip(cases.gradients(many), cases.gradients(one), strict=True):
        cases.assert_close(got[0], want[0])
        cases.assert_close(got[1], want[1])
