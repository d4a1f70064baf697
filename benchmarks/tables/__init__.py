"""Every measured number in README and docs, from the CSV files in benchmarks/results/.

`python -m benchmarks.tables` fills the text between the lines `<!-- table NAME -->` and `<!-- end
of table NAME -->` of README.md and docs/. docs/study.md is filled by `benchmarks.study.report`, and
docs/families.md is written by `benchmarks.survey`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import gpu, headline, layers, models, starts, svd
from .results import RESULTS, Results

TABLES: dict[str, Callable[[Results], str]] = {
    "headline": headline.headline,
    "init": starts.init,
    "init_ranks": starts.init_ranks,
    "layer": layers.layer,
    "avx2_init": starts.avx2_init,
    "avx2_svd": svd.avx2_svd,
    "avx2_linear": layers.avx2_linear,
    "model": starts.model,
    "starts": starts.starts,
    "svd": svd.svd,
    "stream": models.stream,
    "dora": layers.dora,
    "gpu_targets": gpu.gpu_targets,
    "demo": starts.demo,
    "families": models.families,
    "experts": layers.experts,
    "sharded": models.sharded,
    "host": gpu.host,
    "portable": models.portable,
    "magnitudes": models.magnitudes,
}


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """All tables in Markdown, by name."""
    return {name: make(Results(folder)) for name, make in TABLES.items()}
