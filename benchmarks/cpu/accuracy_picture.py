"""Accuracy plotted against time on logarithmic axes, one line per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common.report import COLORS

EXACT = 1e-8  # smaller errors are drawn at this value


def accuracy_picture(path: Path, points: Sequence[Mapping[str, object]], device: str) -> None:
    """Plot points that have the keys `method`, `median_ms`, `residual` and `worst_sigma`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    methods = dict.fromkeys(str(point["method"]) for point in points)
    titles = {
        "residual": "residual: ‖W − USVᵀ‖ / least possible − 1",
        "worst_sigma": "worst relative error of a singular value",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for color, method in zip(COLORS, methods, strict=False):
            mine = sorted(
                (float(p["median_ms"]), max(float(p[key]), EXACT))
                for p in points
                if p["method"] == method
            )
            axis.plot(*zip(*mine, strict=True), "o-", color=color, label=method, markersize=4)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("ms")
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    where = f"{points[0]['shape']}, r = {points[0]['r']}, {device}"
    figure.suptitle(f"Leading singular triplets, {where}; lower left is better", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
