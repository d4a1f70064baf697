"""Ranks that a start redistributes over the layers of a model (EVA)."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..._utils.names import pattern_matches
from ...init.base import Initializer, LayerRank
from ...init.fused import Parts, parts_of
from ...init.start import StartRequest
from ...layers.base import BaseLayer
from ...layers.options import DEFAULT_ALPHA
from ..config import LoRAConfig
from ..selection import Selection
from .job import StartJob, naming
from .make import matched


def redistributed(
    config: LoRAConfig, selection: Selection, activations: Mapping[str, Any] | None
) -> tuple[LoRAConfig, Selection]:
    """The configuration and the layers to adapt, with the ranks that the initializer gives them:
    by whole names in `rank_pattern` and `alpha_pattern`, and in `target_modules` if some get none.

    Raises:
        ValueError, TypeError: activations are missing or of no use; the layer is named.

    """
    initializer = config.initializer
    if type(initializer).layer_ranks is Initializer.layer_ranks:
        return config, selection
    jobs = [
        StartJob(
            name,
            base,
            initializer,
            config.layer_rank(name),
            config.layer_scaling(name),
            aliases=selection.aliases[name],
            parts=_parts(config, name, base),
        )
        for name, base in selection.layers.items()
    ]
    measured = matched(jobs, activations, "activations", initializer.needs_activations)
    ranks = initializer.layer_ranks({job.name: _request(job, measured[job.name]) for job in jobs})
    if ranks is None:
        return config, selection
    return _with_ranks(config, ranks), _without(selection, ranks, type(initializer).__name__)


def _parts(config: LoRAConfig, name: str, base: BaseLayer) -> Parts:
    """The parts of a fused layer; the job's r is the rank of each part."""
    sizes = config.layer_parts(name)
    with naming(name):
        return () if sizes is None else parts_of(sizes, base.shape[0])


def _request(job: StartJob, activations: Any) -> StartRequest:
    rows, cols = job.base.shape
    if job.parts:  # all have one rank, which fits the smallest
        rows = min(end - begin for begin, end in job.parts)
    weight = torch.empty(rows, cols, device="meta")
    return StartRequest(weight, job.r, job.scaling, activations=activations)


def _with_ranks(config: LoRAConfig, ranks: Mapping[str, LayerRank]) -> LoRAConfig:
    """The configuration that gives every layer its rank, and its α."""
    kept = {name: rank for name, rank in ranks.items() if rank.r}
    alphas = {name: config.layer_alpha(name) * rank.alpha_factor for name, rank in kept.items()}
    usual = DEFAULT_ALPHA[config.scaling_rule] if config.lora_alpha is None else config.lora_alpha
    # The first matching pattern is used, and a name also matches longer names that end in it.
    longest_first = sorted(kept, key=len, reverse=True)
    inside = {name for name in ranks if _ends_in_another(name, kept)}
    targets = config.target_modules
    if len(kept) < len(ranks):  # a list of names would match the longer ones, a pattern does not
        none_inside = inside <= kept.keys()
        targets = tuple(kept) if none_inside else "|".join(map(re.escape, kept))
    return replace(
        config,
        rank_pattern={
            _pattern(n): kept[n].r for n in longest_first if kept[n].r != config.r or n in inside
        },
        alpha_pattern={
            _pattern(n): alphas[n] for n in longest_first if alphas[n] != usual or n in inside
        },
        target_modules=targets,
    )


def _ends_in_another(name: str, names: Container[str]) -> bool:
    """Whether one of the names is the end of this one: "mlp.fc" of "encoder.mlp.fc"."""
    parts = name.split(".")
    return any(".".join(parts[k:]) in names for k in range(1, len(parts)))


def _pattern(name: str) -> str:
    """The name as a regular expression: itself, where that means the same."""
    return name if pattern_matches(name, name) else re.escape(name)


def _without(selection: Selection, ranks: Mapping[str, LayerRank], title: str) -> Selection:
    """The selection without the layers of rank 0."""
    layers = {name: base for name, base in selection.layers.items() if ranks[name].r}
    none = {name: f"{title} gave it rank 0" for name in selection.layers if name not in layers}
    return replace(selection, layers=layers, skipped={**selection.skipped, **none})
