"""The layers that are compared: the frozen linear layer alone, ours, and other implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.shapes import Shape
from benchmarks.gpu.timing import rotating
from lora_kernels import LoRALinear

BARE, OURS, NAIVE, ADDMM, PEFT = "bare", "ours", "naive", "addmm_", "PEFT"
PEERS = (NAIVE, ADDMM, PEFT)
NOT_INSTALLED = "not installed (or not importable)"

Layers = dict[str, list[nn.Module]]


class Naive(nn.Module):
    """LoRA written by hand with PyTorch operations; the fp32 factors are cast to x's dtype."""

    def __init__(self, linear: nn.Linear, r: int, dropout: float = 0.0) -> None:
        super().__init__()
        n, k = linear.weight.shape
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.linear, self.dropout, self.scaling = linear, dropout, 1.0
        self.lora_A = nn.Parameter(torch.randn(r, k, **options) / k**0.5)
        self.lora_B = nn.Parameter(torch.randn(n, r, **options) / r**0.5)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A; x itself without dropout."""
        return functional.dropout(x, self.dropout) if self.dropout else x

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ + s · ((x Aᵀ) Bᵀ), computed in x's dtype."""
        lora_A, lora_B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.linear(x) + self.scaling * ((self.dropped(x) @ lora_A.T) @ lora_B.T)


class Addmm(Naive):
    """The fastest version in plain PyTorch: the rank terms are added to y and dx in place."""

    def forward(self, x: Tensor) -> Tensor:
        """y = x Wᵀ, then y += s · z Bᵀ, computed in x's dtype."""
        if self.dropout:  # the rank term of dx is masked, so autograd must add it
            y = self.linear(x)
            z = self.dropped(x) @ self.lora_A.to(x.dtype).T
            return y.addmm_(z, self.lora_B.to(x.dtype).T, alpha=self.scaling)
        return _Addmm.apply(x, self.linear.weight, self.lora_A, self.lora_B, self.scaling)


class _Addmm(torch.autograd.Function):
    """y = x Wᵀ + s · z Bᵀ; saves only the activations x and z."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling):
        z = x @ lora_A.to(x.dtype).T
        y = functional.linear(x, weight)
        y.addmm_(z, lora_B.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight, lora_A, lora_B, z)
        ctx.scaling = scaling
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, z = ctx.saved_tensors
        dz = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scaling)
        dx = dy @ weight
        dx.addmm_(dz, lora_A.to(dy.dtype))
        dB = (dy.T @ z).to(lora_B.dtype).mul_(ctx.scaling)
        return dx, None, (dz.T @ x).to(lora_A.dtype), dB, None


def peft_layer(linear: nn.Linear, r: int, dropout: float = 0.0) -> nn.Module:
    """PEFT's layer with fp32 A and B, the default of `get_peft_model`."""
    from peft import LoraConfig
    from peft.tuners import lora

    settings = {"r": r, "lora_alpha": r, "lora_dropout": dropout}
    config = LoraConfig(init_lora_weights="gaussian", **settings)
    try:
        layer = lora.Linear(linear, "default", config, **settings)
    except TypeError:  # PEFT before 0.21 has no argument `config`
        layer = lora.Linear(linear, "default", init_lora_weights="gaussian", **settings)
    for factors in (layer.lora_A, layer.lora_B):
        factors.float()
    return layer.train()


def frozen(shape: Shape, device: torch.device) -> nn.Linear:
    """A bf16 layer without bias. W is random, because the power that a product draws depends on
    data.
    """
    n, k = shape
    linear = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
    return linear.requires_grad_(False)


def ours(linear: nn.Linear, r: int, dropout: float = 0.0) -> LoRALinear:
    """Our layer. LoRAM's factors are subtracted from the weight of `linear`."""
    return LoRALinear.from_linear(linear, r=r, lora_alpha=r, lora_dropout=dropout)


def builders(r: int, dropout: float = 0.0) -> dict[str, Callable[[nn.Linear], nn.Module] | None]:
    """The functions that create each kind of layer, by name; None if it is not installed."""
    try:
        import peft  # noqa: F401

        peft_builder = lambda linear: peft_layer(linear, r, dropout)  # noqa: E731
    except Exception:  # a broken installation must not prevent measuring the other layers
        peft_builder = None
    return {
        BARE: lambda linear: linear,
        OURS: lambda linear: ours(linear, r, dropout),
        NAIVE: lambda linear: Naive(linear, r, dropout),
        ADDMM: lambda linear: Addmm(linear, r, dropout),
        PEFT: peft_builder,
    }


def build(shape: Shape, r: int, dropout: float, copies: int, device: torch.device) -> Layers:
    """`copies` layers of each kind, each with a different W; ours have copies of these weights."""
    linears = [frozen(shape, device) for _ in range(copies)]
    layers: Layers = {}
    for name, builder in builders(r, dropout).items():
        bases = linears
        if name == OURS:
            bases = [frozen(shape, device) for _ in linears]
            for base, linear in zip(bases, linears, strict=True):
                base.weight.copy_(linear.weight)
        layers[name] = [builder(base) for base in bases] if builder else []
    return layers


def forward(layers: list[nn.Module], x: Tensor) -> Callable[[], object]:
    """A forward call without an autograd graph, as in inference; each call uses the next layer."""
    rotate = rotating([lambda layer=layer: layer(x) for layer in layers])
    return torch.no_grad()(rotate)


def forward_backward(layers: list[nn.Module], x: Tensor, dy: Tensor) -> Callable[[], object]:
    """A call that computes the gradients of x and of all trainable parameters."""
    x = x.detach().requires_grad_()

    def call(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    return rotating([call(layer) for layer in layers])
