"""EVA, CorDA, LoRA-Null and QERA against the papers' formulas in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, capture_activations
from lora_kernels.init import EVA, QERA, Activations, CorDA, LoRANull, get_initializer
from lora_kernels.init.quantizers import quantized
from lora_kernels.layers.base import base_of

from ..ops.svd.spectra import with_sigma
from ..support.exhaustive import thinned
from ..support.oracle import to_numpy
from ..support.packages import needs_bitsandbytes, needs_real_model, needs_transformers
from ..support.quantized import linear_4bit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 28), (28, 40), (32, 32)]
MODES = [CorDA("ipm"), CorDA("kpm"), LoRANull(), QERA(), QERA(exact=False)]
R, S = 4, 2.0  # the rank, and the scaling


def inputs(count: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a mean and a decaying spectrum, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, cols, generator=generator, dtype=torch.float64)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    return rows * (1 / (1 + torch.arange(cols)) ** 0.7) @ mixing + mixing[0]


def weight_of(n: int, m: int) -> torch.Tensor:
    """All σ are apart, so that each vector is determined up to its sign."""
    return with_sigma(n, m, np.linspace(3, 0.5, min(n, m)))


def product(start, scaling: float = S) -> np.ndarray:
    return scaling * to_numpy(start.lora_B) @ to_numpy(start.lora_A)


def corda(W: np.ndarray, X: np.ndarray, r: int, s: float, mode: str):
    """A and B as in the authors' code, with its inverse and its doubled damping."""
    C, damping = X.T @ X / len(X), 0.01
    while True:
        damped = C + damping * np.diag(C).mean() * np.eye(len(C))
        inverse = np.linalg.inv(damped)
        if np.linalg.norm(damped @ inverse - np.eye(len(C))) < 0.05:
            break
        damping *= 2
    U, sigma, Vh = np.linalg.svd(W @ damped, full_matrices=False)
    part = slice(0, r) if mode == "ipm" else slice(len(sigma) - r, None)
    root = np.sqrt(sigma[part] / s)
    return root[:, None] * (Vh[part] @ inverse), U[:, part] * root


def null(W: np.ndarray, X: np.ndarray, r: int, s: float):
    N = np.linalg.svd(X.T @ X)[0][:, -r:]
    U, sigma, Vh = np.linalg.svd(W @ N @ N.T, full_matrices=False)
    root = np.sqrt(sigma[:r] / s)
    return root[:, None] * Vh[:r], U[:, :r] * root


def qera(W: np.ndarray, X: np.ndarray, r: int, s: float, exact: bool):
    """With the root of R and its inverse, as in theorem 1; of its diagonal, as in theorem 2."""
    error = W - to_numpy(quantized(torch.from_numpy(W).float()))
    moment = X.T @ X / len(X)
    values, vectors = np.linalg.eigh(moment)
    root = vectors * np.sqrt(values) @ vectors.T if exact else np.diag(np.sqrt(np.diag(moment)))
    U, sigma, Vh = np.linalg.svd(error @ root, full_matrices=False)
    return Vh[:r] @ np.linalg.inv(root), U[:, :r] * sigma[:r] / s


def oracle(initializer, W: np.ndarray, X: np.ndarray, r: int = R, s: float = S):
    if isinstance(initializer, CorDA):
        return corda(W, X, r, s, initializer.corda_method)
    if isinstance(initializer, QERA):
        return qera(W, X, r, s, initializer.exact)
    return null(W, X, r, s)


def difference(got, want: tuple[np.ndarray, np.ndarray]) -> float:
    """The largest relative error of A, B and BA; A and B with the sign of each component that fits
    better.
    """
    A, B = to_numpy(got.lora_A), to_numpy(got.lora_B)
    sign = np.sign((B * want[1]).sum(0))
    pairs = [(A * sign[:, None], want[0]), (B * sign, want[1]), (B @ A, want[1] @ want[0])]
    return max(np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in pairs)


@pytest.mark.parametrize("initializer", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_formulas(shape, initializer, device):
    X = inputs(200, shape[1]).to(device)
    W = weight_of(*shape).to(device)
    W = W.float().double()  # the quantizer reads float32
    start = initializer(W, R, S, activations=Activations.of(X))
    assert start.lora_A.dtype == start.lora_B.dtype == torch.float64
    assert difference(start, oracle(initializer, to_numpy(W), to_numpy(X))) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("initializer", MODES, ids=str)
def test_dtypes(initializer, dtype, device):
    """Of a weight and inputs in another dtype: that of their rounded values. QERA's error of a
    16-bit weight is the one to its quantized values in that dtype.
    """
    X, W = inputs(300, 28).to(device, dtype), weight_of(40, 28).to(device, dtype)
    start = initializer(W, R, S, activations=Activations.of(X))
    assert start.lora_A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if isinstance(initializer, QERA) and dtype in (torch.bfloat16, torch.float16):
        assert np.isfinite(product(start)).all()
        return
    # Sums of squares in float32, and the values of the smallest of 28 eigenvectors.
    bound = 1e-6 if dtype == torch.float64 else 1e-3
    assert difference(start, oracle(initializer, to_numpy(W), to_numpy(X))) <= bound


@pytest.mark.parametrize("initializer", MODES[:3], ids=str)
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
def test_layers_start_as_they_were(residual, initializer, device):
    linear = nn.Linear(28, 40).to(device)
    x = inputs(60, 28).float().to(device)
    want = linear(x)
    activations = Activations.of(x)
    layer = LoRALinear.from_linear(
        linear, r=R, init_lora_weights=initializer, residual=residual, activations=activations
    )
    assert (layer(x) - want).norm() <= 1e-5 * want.norm()


def test_lora_null_does_not_act_on_the_inputs(device):
    """Of inputs in a subspace, s·BA x is zero to rounding: those of less than in − r directions."""
    x = inputs(20, 28).to(device)
    W = weight_of(40, 28).to(device)
    start = LoRANull()(W, R, S, activations=Activations.of(x))
    assert np.linalg.norm(to_numpy(x) @ product(start).T) <= 1e-5 * np.linalg.norm(to_numpy(x))


def test_qera_is_the_best(device):
    """The output error of QERA-exact is that of Eckart and Young, and no other start's is less."""
    X, W = inputs(400, 32).to(device), weight_of(48, 32).to(device).float()
    error = to_numpy(W) - to_numpy(quantized(W))
    sigma = np.linalg.svd(to_numpy(X) @ error.T, compute_uv=False)
    activations = Activations.of(X)
    exact, approximate = (QERA(exact=e)(W, R, S, activations=activations) for e in (True, False))
    left = [np.linalg.norm(to_numpy(X) @ (error - product(s)).T) for s in (exact, approximate)]
    assert left[0] == pytest.approx(np.linalg.norm(sigma[R:]), rel=1e-5)
    assert left[0] <= left[1]


def test_qera_with_a_singular_moment(device):
    """Some inputs are always zero, and there are fewer than 28: R has no inverse, the best BA on
    these inputs exists.
    """
    X, W = inputs(12, 28).to(device), weight_of(40, 28).to(device).float()
    X[:, 5] = 0
    start = QERA()(W, R, S, activations=Activations.of(X))
    error = to_numpy(W) - to_numpy(quantized(W))
    sigma = np.linalg.svd(to_numpy(X) @ error.T, compute_uv=False)
    left = np.linalg.norm(to_numpy(X) @ (error - product(start)).T)
    assert left == pytest.approx(np.linalg.norm(sigma[R:]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [24, 90])
@pytest.mark.parametrize("decay", [0, 2, 5])
def test_qera_where_cholesky_fails(decay, rows, dtype, device):
    """Each way to U and S gives the best BA: of few inputs, and of ones that dwarf the others."""
    X = inputs(20, 28) * torch.logspace(0, -decay, 28, dtype=torch.float64)
    X, W = X.to(device, dtype), weight_of(rows, 28).to(device).float().to(dtype)
    start = QERA()(W, R, S, activations=Activations.of(X))
    error = to_numpy(W) - to_numpy(quantized(W).to(dtype))
    sigma = np.linalg.svd(to_numpy(X) @ error.T, compute_uv=False)
    left = np.linalg.norm(to_numpy(X) @ (error - product(start)).T)
    assert left == pytest.approx(np.linalg.norm(sigma[R:]), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [24, 90])
def test_qera_of_inputs_of_few_directions(rows, dtype, device):
    """Σ xᵀx of many inputs in two directions has rounding errors in the others, which are no start:
    A would be divided by them.
    """
    X = (inputs(200, 2) @ torch.randn(2, 28, dtype=torch.float64)).to(device, dtype)
    W = weight_of(rows, 28).to(device, dtype)
    with pytest.raises(ValueError, match="on the inputs has numerical rank 2, less than r = 4"):
        QERA()(W, R, S, activations=Activations.of(X))
    assert QERA()(W, 2, S, activations=Activations.of(X)).lora_A.abs().max() < 10


@pytest.mark.parametrize("initializer", [QERA(), QERA(exact=False, quantizer="fp4")], ids=str)
def test_qera_rewrites_the_base(initializer, device):
    linear = nn.Linear(64, 32).to(device)
    W = linear.weight.detach().clone()
    activations = Activations.of(inputs(100, 64).to(device))
    layer = LoRALinear.from_linear(
        linear, r=R, init_lora_weights=initializer, activations=activations
    )
    Q = quantized(W, initializer.quantizer)
    assert torch.equal(layer.weight, Q)
    assert torch.equal(quantized(layer.weight, initializer.quantizer), Q)
    with pytest.raises(ValueError, match="rewrites"):
        LoRALinear.from_linear(
            nn.Linear(64, 32),
            init_lora_weights=initializer,
            residual="implicit",
            activations=activations,
        )


def test_qera_toward(device):
    """On a base that is quantized already, the same factors, and the base stays."""
    W = weight_of(64, 32).float().to(device)
    Q = quantized(W)
    activations = Activations.of(inputs(100, 32).to(device))
    want = QERA()(W, R, S, activations=activations)
    start = QERA().toward(lambda: W)(Q, R, S, activations=activations)
    assert torch.equal(start.lora_A, want.lora_A) and torch.equal(start.lora_B, want.lora_B)
    with pytest.raises(ValueError, match="original weight has shape"):
        QERA().toward(lambda: W.T)(Q, R, S, activations=activations)
    with pytest.raises(TypeError, match="does not use the weight before quantization"):
        EVA().toward(lambda: W)


@pytest.mark.parametrize("whiten", [False, True])
def test_eva(whiten, device):
    X = inputs(200, 28).to(device)
    start = EVA(whiten=whiten)(torch.zeros(40, 28, device=device), R, activations=Activations.of(X))
    rows = to_numpy(X)
    _, sigma, Vh = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    want = Vh[:R] / np.sqrt(sigma[:R, None]) if whiten else Vh[:R]
    A = to_numpy(start.lora_A)
    sign = np.sign((A * want).sum(1, keepdims=True))
    assert np.abs(A * sign - want).max() <= 1e-6 * np.abs(want).max()
    pivot = np.take_along_axis(A, np.abs(A).argmax(1)[:, None], 1)
    assert (pivot > 0).all()
    assert not start.lora_B.any() and start.lora_A.dtype == torch.float32


def test_eva_from_a_sketch(device):
    """Inputs of 9 directions and their mean are in a sketch of 12 rows: the axes are exact."""
    X = (inputs(500, 9) @ torch.randn(9, 28, dtype=torch.float64)).to(device)
    whole, sketch = Activations.of(X), Activations.of(X, sketch=12)
    W = torch.zeros(40, 28, dtype=torch.float64, device=device)
    one, other = (EVA()(W, R, activations=own).lora_A for own in (whole, sketch))
    assert (one - other).abs().max() <= 1e-6
    assert float(sketch.variance()) == pytest.approx(float(whole.variance()), rel=1e-9)


@pytest.mark.parametrize("size", [4, 16, 40])
def test_the_sketch_keeps_its_bound(size, device):
    X = inputs(300, 28).to(device)
    parts = [Activations.of(X, sketch=size)]
    halves = [Activations.of(half, sketch=size) for half in (X[:130], X[130:])]
    from lora_kernels.init.data_driven.sketch import FrequentDirections

    merged = FrequentDirections(size, 28, X.dtype, X.device)
    for half in halves:
        assert half.sketch is not None
        merged.merge(half.sketch, half.error)
    found = [(part.sketch, part.error) for part in parts] + [(merged.rows(), merged.error)]
    gram = to_numpy(X.T @ X)
    sigma = np.linalg.svd(to_numpy(X), compute_uv=False)
    for rows, error in found:
        assert rows is not None and len(rows) <= size
        left = np.linalg.eigvalsh(gram - to_numpy(rows.T @ rows))
        assert left[0] >= -1e-9 * gram.max() and left[-1] <= error + 1e-9 * gram.max()
        for j in range(min(size, 28)):
            assert error <= (sigma[j:] ** 2).sum() / (size + 1 - j) + 1e-9 * gram.max()


WRONG = [
    (None, ValueError, "give activations="),
    (torch.zeros(3), TypeError, "must be an Activations"),
    (Activations.of(torch.randn(50, 12)), ValueError, r"inputs \[12\], the weight's are \[28\]"),
    (Activations.of(torch.zeros(50, 28)), ValueError, "all zero"),
    (Activations.of(torch.full((50, 28), torch.nan)), ValueError, "NaN or Inf"),
]


@pytest.mark.parametrize("initializer", [EVA(), *MODES], ids=str)
@pytest.mark.parametrize("activations, error, text", WRONG)
def test_wrong_activations(initializer, activations, error, text):
    with pytest.raises(error, match=text):
        initializer(torch.randn(40, 28), R, S, activations=activations)


def test_other_bad_inputs():
    W, good = torch.randn(40, 28), Activations.of(inputs(100, 28))
    sketch = Activations.of(inputs(100, 28), sketch=3)
    for initializer in MODES[:4]:
        with pytest.raises(ValueError, match="have a sketch"):
            initializer(W, R, S, activations=sketch)
        with pytest.raises(ValueError, match="NaN or Inf"):
            initializer(W * torch.inf, R, S, activations=good)
        with pytest.raises(ValueError, match="exclude_modules"):
            initializer.for_embedding()
    QERA(exact=False)(W, R, S, activations=sketch)
    with pytest.raises(ValueError, match="the sketch has 3 rows, too few for 4"):
        EVA()(W, R, activations=sketch)
    for count in (R - 1, R):
        with pytest.raises(ValueError, match=f"of {count} inputs, which have less than r = 4"):
            EVA()(W, R, activations=Activations.of(inputs(count, 28)))
    with pytest.raises(ValueError, match="all alike"):
        EVA()(W, R, activations=Activations.of(inputs(1, 28).expand(50, 28)))
    with pytest.raises(ValueError, match="vary in less than r"):
        two = inputs(50, 2) @ torch.randn(2, 28, dtype=torch.float64)
        EVA(whiten=True)(W, R, activations=Activations.of(two))
    with pytest.raises(ValueError, match="zero"):
        LoRANull()(torch.zeros(40, 28), R, S, activations=good)
    with pytest.raises(ValueError, match="zero"):
        CorDA()(torch.zeros(40, 28), R, S, activations=good)
    low = torch.randn(40, 3) @ torch.randn(3, 28)
    with pytest.raises(ValueError, match="numerical rank 3, less than r = 4"):
        CorDA()(low, R, S, activations=good)
    with pytest.raises(ValueError, match="does not use activations"):
        LoRALinear.from_linear(nn.Linear(28, 40), init_lora_weights="lora", activations=good)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: EVA(rho=0.5), ValueError, "rho must be at least 1"),
        (lambda: EVA(whiten=1), TypeError, "whiten must be True or False"),
        (lambda: CorDA("ipn"), ValueError, "did you mean 'ipm'"),
        (lambda: CorDA(method="fast"), ValueError, "method"),
        (lambda: QERA(quantizer="nf5"), ValueError, "nf4"),
        (lambda: QERA(exact="yes"), TypeError, "exact must be"),
        (lambda: LoRANull(seed=1.5), TypeError, "seed"),
    ],
)
def test_wrong_options(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "name, kind",
    [("eva", EVA), ("corda", CorDA), ("lora_null", LoRANull), ("qera", QERA)],
)
def test_names(name, kind):
    initializer = get_initializer(name)
    assert type(initializer) is kind and initializer.needs_activations
    assert not initializer.grows_with_scaling
    assert initializer.changes_base == (kind is not EVA)


@needs_bitsandbytes
def test_qera_of_a_quantized_model():
    """Its base stays, and what is left of the error on the inputs is that of the best BA."""
    original = nn.Sequential(nn.Linear(64, 32, bias=False))
    model = nn.Sequential(linear_4bit(original[0]))
    x = inputs(300, 64).float()
    packs = getattr(model[0], "support_avx512bf16_for_cpu", None)
    activations = capture_activations(model, [x], progress=False)
    assert getattr(model[0], "support_avx512bf16_for_cpu", None) == packs
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    config = LoRAConfig(r=R, lora_alpha=2 * R, init_lora_weights="qera")
    Q = to_numpy(base_of(model[0]).weight())
    with pytest.raises(ValueError, match=r"QERA has no quantization error.*original_weights="):
        add_lora(model, config, activations=activations, progress=False)
    weights = {"0.weight": original[0].weight.detach()}
    add_lora(model, config, activations=activations, original_weights=weights, progress=False)
    assert np.array_equal(to_numpy(base_of(model[0].base_layer).weight()), Q)
    error = to_numpy(original[0].weight) - Q
    BA = 2 * to_numpy(model[0].lora_B) @ to_numpy(model[0].lora_A)
    sigma = np.linalg.svd(to_numpy(x) @ error.T, compute_uv=False)
    left = np.linalg.norm(to_numpy(x) @ (error - BA).T)
    assert left == pytest.approx(np.linalg.norm(sigma[R:]), rel=1e-4)


@needs_transformers
@pytest.mark.parametrize("initializer", [EVA(), *MODES], ids=str)
def test_conv1d(initializer, device):
    """GPT-2's layers, which store Wᵀ: their starts are those of W."""
    from ..support.tiny_models import gpt2

    model = gpt2().to(device)
    ids = torch.randint(1, 20, (8, 12), device=device)
    want = model(ids).logits
    activations = capture_activations(model, [ids], progress=False)
    weights = {
        n: m.weight.detach().mT.clone() for n, m in model.named_modules() if n in activations
    }
    add_lora(
        model,
        LoRAConfig(r=R, lora_alpha=R, init_lora_weights=initializer),
        activations=activations,
        progress=False,
    )
    if not isinstance(initializer, QERA):
        assert (model(ids).logits - want).abs().max() <= 1e-4
    for name in activations if not isinstance(initializer, EVA) else ():
        start = initializer(weights[name], R, 1.0, activations=activations[name])
        layer = model.get_submodule(name)
        assert np.abs(to_numpy(layer.lora_A) - to_numpy(start.lora_A)).max() <= 1e-5
        assert np.abs(to_numpy(layer.lora_B) - to_numpy(start.lora_B)).max() <= 1e-5


@needs_real_model
def test_real_weights(real_linears, real_inputs):
    """Of SmolLM2, whose inputs have a few directions that dwarf the others."""
    for index in thinned([0, 1], 2):
        linear, x = real_linears[index], real_inputs[index]
        W, activations = linear.weight.detach(), Activations.of(x)
        X = to_numpy(x)
        for initializer in (CorDA(), CorDA("kpm"), LoRANull(), QERA()):
            start = initializer(W, 8, S, activations=activations)
            A, B = oracle(initializer, to_numpy(W), X, 8)
            want = S * B @ A
            assert np.linalg.norm(product(start) - want) <= 2e-3 * np.linalg.norm(want)
        centered = X - X.mean(0)
        axes = to_numpy(EVA()(W, 8, activations=activations).lora_A)
        sigma = np.linalg.svd(centered, compute_uv=False)
        assert np.linalg.norm(axes @ axes.T - np.eye(8)) <= 1e-5
        # Each axis has the variance of the true one.
        assert np.linalg.norm(centered @ axes.T, axis=0) == pytest.approx(sigma[:8], rel=1e-4)
