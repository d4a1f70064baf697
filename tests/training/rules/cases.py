"""Models of random factors with the gradients of a random full gradient G, and the rules' formulas
in float64, as the papers have them.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import solve_sylvester
from torch import nn

from lora_kernels import LoRALinear


def random_model(device, dtype=torch.float32, shapes=((9, 12, 2), (9, 12, 2), (7, 10, 3)), seed=0):
    """A layer for each (out, in, r), with a scaling of its own and random A and B."""
    torch.manual_seed(seed)
    layers = []
    for number, (rows, cols, r) in enumerate(shapes):
        layer = LoRALinear(
            cols, rows, r=r, lora_alpha=r * (number + 1) / 2, init_lora_weights="lora"
        )
        layers.append(layer.to(dtype))
        with torch.no_grad():
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape))
    return nn.ModuleList(layers).to(device)


def set_gradients(model, seed=1) -> list[np.ndarray]:
    """Gives A and B the gradients s·BᵀG and s·GAᵀ; returns the G of every layer."""
    rng = np.random.default_rng(seed)
    found = []
    for layer in model:
        A, B, s = numbers(layer)
        G = rng.standard_normal((B.shape[0], A.shape[1]))
        layer.lora_A.grad = torch.from_numpy(s * B.T @ G).to(layer.lora_A)
        layer.lora_B.grad = torch.from_numpy(s * G @ A.T).to(layer.lora_B)
        found.append(G)
    return found


def as_float64(tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().copy()


def numbers(layer) -> tuple[np.ndarray, np.ndarray, float]:
    """A, B and s."""
    return as_float64(layer.lora_A), as_float64(layer.lora_B), layer.scaling


def gradients(model) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradients of A and B of every layer; an empty array for none."""
    none = torch.zeros(0)

    def grad(parameter):
        return as_float64(none if parameter.grad is None else parameter.grad)

    return [(grad(layer.lora_A), grad(layer.lora_B)) for layer in model]


def lora_pro(A, B, s, grad_A, grad_B, delta=1e-8):
    """Theorems 2.1 and 2.3 of arXiv 2407.18242, with the authors' δ."""
    eye = np.eye(len(A))
    P, Q = np.linalg.inv(B.T @ B + delta * eye), np.linalg.inv(A @ A.T + delta * eye)
    X = solve_sylvester(B.T @ B, A @ A.T, -P @ grad_A @ A.T / s**2)
    complement = np.eye(len(B)) - B @ P @ B.T
    return P @ grad_A / s**2 + X @ A, complement @ grad_B @ Q / s**2 - B @ X


def riemannian(A, B, s, grad_A, grad_B, delta=1e-6):
    """arXiv 2402.02347."""
    eye = np.eye(len(A))
    left, right = np.linalg.inv(B.T @ B + delta * eye), np.linalg.inv(A @ A.T + delta * eye)
    return left @ grad_A, grad_B @ right


def lora_fa(A, B, s, grad_A, grad_B, delta=1e-8):
    """arXiv 2308.03303 with the correction of PEFT's optimizer; A gets no gradient."""
    return np.zeros(0), grad_B @ np.linalg.inv(A @ A.T + delta * np.eye(len(A))) / s**2


def assert_close(got, want, dtype=torch.float32, condition=1.0) -> None:
    """Equal but for 64 roundings, times the condition number of what was inverted."""
    assert got.shape == want.shape
    unit = 64 * condition * torch.finfo(dtype).eps
    assert np.linalg.norm(got - want) <= unit * np.linalg.norm(want)
