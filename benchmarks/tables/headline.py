"""The four numbers of README."""

from __future__ import annotations

from .markdown import number, page, table, times
from .results import Results, value

LAYER = {"shape": "4096×4096", "r": 16}


def headline(results: Results) -> str:
    """A start, a model, a layer and an SVD, each beside its peers."""
    init, model = results.rows("init.csv"), results.rows("model.csv")
    layer, svd = results.rows("layer.csv"), results.rows("svd_speedups.csv")

    def ms(variant: str) -> str:
        return number(value(init, "median_ms", variant=variant, dtype="fp32", **LAYER))

    def whole(variant: str) -> str:
        return f"{(value(model, 'median_ms', variant=variant) or 0) / 1e3:.2g}"

    def step(variant: str) -> str:
        case = {"dtype": "bf16", "pass": "forward + backward", **LAYER}
        return times(value(layer, "ratio", variant=variant, **case))

    def faster(peer: str) -> str:
        case = {"dtype": "fp32", "ours": "ours", "peer": peer, **LAYER}
        return times(value(svd, "times_faster", **case), 1)

    engine = value(svd, "ours_ms", dtype="fp32", ours="ours", peer="scikit-learn", **LAYER)
    lines = [
        [
            "a LoRAM start of one layer, 4096 × 4096, fp32",
            f"{ms('LoRAM')} ms; reading and rewriting W: {ms('norm + mul_')}",
            f"PEFT's `pissa_niter_4`: {ms('PEFT pissa_niter_4')} ms; `pissa`: {ms('PEFT pissa')}",
        ],
        [
            "`add_lora` on SmolLM2-135M in memory, 210 layers",
            f"LoRAM: {whole('add_lora loram')} s; PiSSA: {whole('add_lora pissa')}",
            f"PEFT's plain LoRA: {whole('PEFT lora')} s; `pissa`: {whole('PEFT pissa')}",
        ],
        [
            "forward + backward of a layer, bf16, 512 tokens",
            f"{step('LoRALinear absorb')} × the bare layer",
            f"PEFT: {step('PEFT lora.Linear')} ×",
        ],
        [
            "16 leading triplets of 4096 × 4096, fp32",
            f"{number(engine)} ms",
            f"{faster('svd_lowrank niter 16')} × as fast as `svd_lowrank` (niter 16), "
            f"{faster('scikit-learn')} × as fast as scikit-learn",
        ],
    ]
    files = ["init.csv", "model.csv", "layer.csv", "svd_speedups.csv"]
    return page(table(["r = 16", "here", "elsewhere"], lines), results.caption(files))
