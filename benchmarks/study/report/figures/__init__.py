"""The figures of the report. Each figure shows the finished runs, and is left out if there are
none.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.study.report.cells import Study
from benchmarks.study.report.figures.forest import best_losses
from benchmarks.study.report.figures.losses import loss_against_rate, loss_against_step
from benchmarks.study.report.figures.magnitude import loss_against_magnitude
from benchmarks.study.report.figures.predictions import found_and_predicted

FIGURES = {
    "loss_vs_rate.png": loss_against_rate,
    "best_losses.png": best_losses,
    "magnitude.png": loss_against_magnitude,
    "predicted_rates.png": found_and_predicted,
    "curves.png": loss_against_step,
}


def draw(study: Study, folder: Path) -> list[str]:
    """Write the figures that have data; returns their names."""
    return [name for name, figure in FIGURES.items() if figure(study, folder / name)]


__all__ = ["FIGURES", "draw"]
