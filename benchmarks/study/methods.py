"""The methods that the study compares, each a configuration of `add_lora`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_kernels import LoRAConfig
from lora_kernels.init import Initializer, PiSSA
from lora_kernels.init.loram import LoRAM

RANK = 16
FULL = "full"  # full fine-tuning of the same weights
REFERENCE = "lora"  # the method that the others are compared with
LORA_PLUS_RATIO = 16.0  # the paper's λ


@dataclass(frozen=True)
class Method:
    """A start, a rule for s, and the options of its training.

    Attributes:
        title: the name in tables and figures.
        start: the `init_lora_weights` for a seed; None for full fine-tuning.
        scaling: the rule for s; `lora_alpha` is 16 at every rank, and 256 for "alpha_sqrt".
        ratio: B's learning rate as a multiple of A's.

    """

    title: str
    start: Callable[[int], str | Initializer] | None
    scaling: str = "lora"
    ratio: float = 1.0

    def config(self, r: int, seed: int, targets: list[str]) -> LoRAConfig:
        """The configuration for rank r. With the rule "lora", `lora_alpha` is r, so that s is 1."""
        alpha = {"lora": float(r), "rslora": 16.0, "alpha_sqrt": 256.0}[self.scaling]
        return LoRAConfig(
            r=r,
            lora_alpha=alpha,
            scaling=self.scaling,
            target_modules=targets,
            init_lora_weights=self.start(seed),
        )


def _named(name: str) -> Callable[[int], str]:
    return lambda seed: name


def _pissa(seed: int) -> Initializer:
    return PiSSA(method="exact")


METHODS = {
    REFERENCE: Method("LoRA (B = 0)", _named("lora")),
    "loram": Method("LoRAM", _named("loram")),
    "pissa": Method("PiSSA", _pissa),
    "rslora": Method("RsLoRA", _named("lora"), "rslora"),
    "loram_rslora": Method("LoRAM + RsLoRA", _named("loram"), "rslora"),
    "lora_alpha": Method("LoRA-α", _named("lora"), "alpha_sqrt"),
    "init_ab": Method("Init[AB]", _named("init_ab")),
    "lora_plus": Method("LoRA+ (λ = 16)", _named("lora"), ratio=LORA_PLUS_RATIO),
    FULL: Method("full fine-tuning", None),
    "lora_ga": Method("LoRA-GA", _named("lora_ga")),
    "milora": Method("MiLoRA", _named("milora")),
    "olora": Method("OLoRA", _named("olora")),
    "lora_one": Method("LoRA-One", _named("lora_one")),
    "init_ab_plus": Method("Init[AB+]", _named("init_ab_plus")),
    "lora_xs": Method("LoRA-XS", _named("lora_xs")),
    "lora_sb": Method("LoRA-SB", _named("lora_sb")),
    "loram_orthogonal": Method(
        "LoRAM, orthogonal basis", lambda seed: LoRAM(basis="orthogonal", seed=seed)
    ),
    "loram_gaussian": Method(
        "LoRAM, Gaussian basis", lambda seed: LoRAM(basis="gaussian", seed=seed)
    ),
    "loram_log_half": Method("LoRAM, gain ln(r/2)", lambda seed: LoRAM(gain="log_half")),
    "loram_exact": Method("LoRAM, exact gain", lambda seed: LoRAM(gain="exact")),
    "loram_tracks_pissa": Method(
        "LoRAM, tracking PiSSA", lambda seed: LoRAM(track=PiSSA(method="exact"))
    ),
}
# Part 1 of the design; the others are part 2 (rivals) and part 3 (LoRAM's ablations).
CORE = list(METHODS)[:9]
RIVALS = list(METHODS)[9:16]
ABLATIONS = list(METHODS)[16:]
