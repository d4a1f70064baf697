"""Loss curves of several methods, as CSV rows and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.report import COLORS
from examples.demo.finetune import Curve

# Chosen so that both of two coinciding curves are visible: a wide line below a narrow dashed one.
STYLES = (
    {"linestyle": "-", "linewidth": 3.5, "alpha": 0.55, "marker": "o", "markersize": 9},
    {"linestyle": "-", "linewidth": 1.6, "marker": "s", "markersize": 5},
    {"linestyle": "--", "linewidth": 1.4, "marker": "D", "markersize": 4},
)


def curve_rows(curves: Mapping[str, Curve]) -> list[dict[str, object]]:
    """One row per method and step; empty where a loss was not measured at that step."""
    return [
        {
            "method": method,
            "step": step,
            "train_loss": curve.train.get(step, ""),
            "validation_loss": curve.validation.get(step, ""),
        }
        for method, curve in curves.items()
        for step in sorted({*curve.train, *curve.validation})
    ]


def draw_curves(path: Path, title: str, curves: Mapping[str, Curve]) -> None:
    """Plot the training losses on the left and the validation losses on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for index, (method, curve) in enumerate(curves.items()):
        style = {**STYLES[index % len(STYLES)], "color": COLORS[index], "label": method}
        axes[0].plot(list(curve.train), list(curve.train.values()), **(style | {"marker": ""}))
        axes[1].plot(list(curve.validation), list(curve.validation.values()), **style)
    axes[0].set_title("training loss, one batch per step", fontsize=10, loc="left")
    axes[1].set_title("validation loss", fontsize=10, loc="left")
    for axis in axes:
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("cross-entropy per token")
    axes[1].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
