from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels.ops.loram_init import loram_init_ref

from ..support.oracle import ROUNDING, TINY, dst_basis, loram_beta, to_numpy
from ..support.packages import needs_real_model
from .strides import LAYOUTS, lay_out

op = torch.ops.lora.loram_init
foreach = torch.ops.lora.loram_init_foreach
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check_start(before, after, lora_A, lora_B, beta, rank, scaling) -> None:
    n, m = before.shape
    W = to_numpy(before)
    want = loram_beta(W, rank)
    assert beta.dtype == torch.float64 and beta.shape == ()
    assert float(beta) == pytest.approx(want, rel=1e-12)
    factor = torch.float64 if before.dtype == torch.float64 else torch.float32
    assert lora_A.dtype == lora_B.dtype == factor
    assert lora_A.shape == (rank, m) and lora_B.shape == (n, rank)
    assert lora_A.is_contiguous() and lora_B.is_contiguous()
    eps = ROUNDING[factor]
    np.testing.assert_allclose(to_numpy(lora_A), want * dst_basis(m, rank).T, atol=4 * eps * want)
    np.testing.assert_allclose(to_numpy(lora_B), want * dst_basis(n, rank), atol=4 * eps * want)
    # W_res + s B A is W to one rounding of the residual and these of sum_k |B_ik| |A_kj|. Float32:
    # A, B and the correction once each. Float64: they share the sines, but not β (A, B, β² twice,
    # s β², its product: 6), and `rank` additions in the product, which add up like √rank / 3 (their
    # partial sums grow to the whole one): 6 times that.
    # Checked in long double, so that float64's own rounding is visible.
    A, B = to_numpy(lora_A).astype(np.longdouble), to_numpy(lora_B).astype(np.longdouble)
    product = scaling * (B @ A)
    roundings = 6 + 2 * math.sqrt(rank) if before.dtype == torch.float64 else 4
    absolute = abs(scaling) * (np.abs(B) @ np.abs(A))
    residual = to_numpy(after).astype(np.longdouble)
    bound = (
        1.01 * (ROUNDING[before.dtype] + eps) * np.abs(residual)
        + roundings * eps * absolute
        + 1e-12 * eps / ROUNDING[torch.float32] * np.abs(product).max()
        + TINY[before.dtype]
    )
    assert (np.abs(residual + product - W) <= bound).all()


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.data(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)
def test_matches_the_paper(device, n, m, data, dtype, layout):
    rank = data.draw(st.integers(1, min(n, m)))
    scaling = data.draw(st.sampled_from([1.0, 2.0, 0.25]))
    before = (torch.randn(n, m) * 0.1 + 0.01).to(device, dtype)
    weight = lay_out(before, layout)
    check_start(before, weight, *op(weight, rank, scaling), rank, scaling)


@given(st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=5))
def test_foreach_is_each(device, shapes):
    dtypes = [DTYPES[k % 4] for k in range(len(shapes))]
    before = [torch.randn(*s).to(device, d) for s, d in zip(shapes, dtypes, strict=True)]
    together = [w.clone() for w in before]
    lora_A, lora_B, beta = foreach(together, 4, 0.5)
    for k, weight in enumerate(before):
        alone = weight.clone()
        A, B, b = op(alone, 4, 0.5)
        assert torch.equal(alone, together[k])
        assert torch.equal(A, lora_A[k]) and torch.equal(B, lora_B[k]) and b == beta[k]


def test_reference_agrees_with_the_kernel(device):
    before = torch.randn(65, 43).to(device)
    A, B, beta = (
        torch.full((6, 43), math.nan, device=device),
        torch.full((65, 6), math.nan, device=device),
        torch.zeros(1, dtype=torch.float64, device=device),
    )
    weight = before.clone()
    loram_init_ref([weight], [A], [B], beta, 6, 2.0, True)
    check_start(before, weight, A, B, beta[0], 6, 2.0)


def test_energy_of_the_start(device):
    """‖B₀A₀‖² = Q ‖W‖²: the magnitude after which the method is named."""
    weight = torch.randn(256, 512).to(device)
    norm = weight.double().norm()
    A, B, _ = op(weight, 16)
    gain = math.log(16) / math.log(256)
    energy = float((B.double() @ A.double()).norm()) ** 2
    assert energy == pytest.approx(gain * float(norm) ** 2, rel=1e-6)


@pytest.mark.sanitize
@pytest.mark.parametrize("n,m", [(1, 1), (1, 7), (2, 2), (2, 9), (64, 64)])
def test_rank_one_can_train(n, m, device):
    A, B, beta = op(torch.randn(n, m).to(device), 1)
    assert beta > 0 and A.abs().max() > 0 and B.abs().max() > 0


@pytest.mark.sanitize
def test_on_every_device(device):
    before = torch.randn(300, 200).to(device)
    weight = before.clone()
    result = op(weight, 16, 2.0)
    assert all(t.device == weight.device for t in result)
    check_start(before.cpu(), weight.cpu(), *(t.cpu() for t in result), 16, 2.0)


@needs_real_model
def test_on_real_weights(real_model, device):
    for layer in (0, 15, 29):
        block = real_model.model.layers[layer]
        for linear in (block.self_attn.k_proj, block.mlp.down_proj):
            before = linear.weight.detach().to(device)
            weight = before.clone()
            check_start(before, weight, *op(weight, 16), 16, 1.0)


def test_bits_do_not_depend_on_threads():
    before = [torch.randn(400, 300), torch.randn(300, 511).bfloat16()]

    def run():
        weights = [w.clone() for w in before]
        A, B, beta = foreach(weights, 32)
        return [*weights, *A, *B, beta]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(3)
        many = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    with ThreadPoolExecutor(2) as pool:  # two Python threads at once
        for result in pool.map(lambda _: run(), range(4)):
            assert all(torch.equal(a, b) for a, b in zip(one, result, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "zero"])
def test_bad_values_change_nothing(bad, device):
    good = torch.randn(40, 30).to(device)
    broken = torch.randn(50, 20).to(device)
    if bad == "zero":
        broken.zero_()
    else:
        broken[49, 19] = bad
    copies = good.clone(), broken.clone()
    with pytest.raises(ValueError, match=r"weight 1 (holds NaN or Inf|is zero)"):
        foreach([good, broken], 4)
    for now, before in zip((good, broken), copies, strict=True):
        assert torch.equal(now.nan_to_num(7.0), before.nan_to_num(7.0))
    weights = [good, broken]
    factors = [torch.empty(4, w.shape[1], device=device) for w in weights]
    others = [torch.empty(w.shape[0], 4, device=device) for w in weights]
    beta = torch.empty(2, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="weight 1"):
        loram_init_ref(weights, factors, others, beta, 4, 1.0, True)


@pytest.mark.parametrize(
    "make,rank,scaling,error,match",
    [
        (lambda: torch.ones(4, 6), 5, 1.0, ValueError, "rank 5 is larger than min"),
        (lambda: torch.ones(4, 6), 0, 1.0, ValueError, "at least 1"),
        (lambda: torch.ones(0, 6), 1, 1.0, ValueError, "larger"),
        (lambda: torch.ones(6), 1, 1.0, ValueError, "2-D"),
        (lambda: torch.ones(4, 6, dtype=torch.int8), 2, 1.0, TypeError, "int8"),
        (lambda: torch.ones(4, 6, dtype=torch.complex64), 2, 1.0, TypeError, "complex64"),
        (lambda: torch.ones(4, 6), 2, float("nan"), ValueError, "finite"),
        (lambda: torch.ones(4, 1).expand(4, 6), 2, 1.0, ValueError, "expanded"),
    ],
)
def test_bad_arguments(make, rank, scaling, error, match, device):
    with torch.device(device):
        weight = make()
    with pytest.raises(error, match=match):
        op(weight, rank, scaling)
    assert (weight == 1).all()


@pytest.mark.parametrize(
    "dtype,size,scaling", [(torch.float16, 20000.0, 4.0), (torch.float32, 1.0, 1e38)]
)
def test_a_residual_that_would_overflow(dtype, size, scaling, device):
    weight = (torch.randn(32, 40).clamp(-3, 3) * size).to(device, dtype)
    before = weight.clone()
    with pytest.raises(ValueError, match="could overflow"):
        op(weight, 32, scaling)
    assert torch.equal(weight, before)
    A, B = torch.empty(32, 40, device=device), torch.empty(32, 32, device=device)
    beta = torch.empty(1, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="could overflow"):
        loram_init_ref([weight], [A], [B], beta, 32, scaling, True)
    op(
        torch.full((32, 40), 30000.0, dtype=torch.float16, device=device), 2, 0.01
    )  # large, and fits


def test_the_same_weight_twice(device):
    weight = torch.randn(6, 6).to(device)
    before = weight.clone()
    with pytest.raises(ValueError, match="0 and 1 share memory"):
        foreach([weight, weight], 2)
    assert torch.equal(weight, before)


def test_empty_list():
    assert foreach([], 4)[:2] == ([], [])


def test_opcheck(device):
    opcheck(op, (torch.randn(9, 7).to(device), 3, 2.0))
    weights = [torch.randn(9, 7).to(device), torch.randn(5, 6).to(device).T]
    opcheck(foreach, (weights, 3))


def test_kernel_takes_the_statistics_or_makes_them(device):
    """Code that torch.compile cached before they became an argument still runs."""
    results = []
    before = torch.randn(20, 30).to(device)
    for known in ((), (torch.ops.lora.frobenius_stats([before]),)):
        weight = before.clone()
        A, B = torch.empty(4, 30, device=device), torch.empty(20, 4, device=device)
        beta = torch.empty(1, dtype=torch.float64, device=device)
        torch.ops.lora._loram_init_([weight], [A], [B], beta, 4, 1.0, True, *known)
        results.append((weight, A, B, beta))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compile(device):
    def start(weight):
        weight = weight * 1.0
        A, B, beta = op(weight, 4, 2.0)
        return weight + 2.0 * B @ A, beta

    weight = torch.randn(20, 30).to(device)
    merged, beta = torch.compile(start, fullgraph=True)(weight)
    torch.testing.assert_close(merged, weight)
    assert float(beta) == pytest.approx(loram_beta(to_numpy(weight), 4))


def test_meta():
    A, B, beta = op(torch.empty(20, 30, device="meta"), 4)
    assert A.shape == (4, 30) and B.shape == (20, 4) and beta.is_meta
