"""The benchmarks say which kernels they ran, at a tiny size."""

from __future__ import annotations

import csv

import pytest

for package in ("rich", "matplotlib", "sklearn", "peft"):
    pytest.importorskip(package, reason="the benchmarks need what `make test` installs")

import torch  # noqa: E402

from benchmarks.common.harness import environment  # noqa: E402
from benchmarks.cpu import instruction_sets  # noqa: E402
from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability  # noqa: E402


@pytest.mark.parametrize("capability", cpu_capabilities())
def test_the_environment_names_the_kernels(capability, monkeypatch):
    before = cpu_capability()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    try:
        set_cpu_capability(capability)
        about = environment()
    finally:
        set_cpu_capability(before)
    assert about["kernels"] == capability
    assert about["processor"] == cpu_capabilities()[-1]
    assert "oneDNN AVX2" in about["torch_kernels"]


def test_a_row_for_every_set(tmp_path):
    threads, before = torch.get_num_threads(), cpu_capability()
    argv = ["--size", "256", "--only", "thin_qr", "linear", "--rounds", "1", "--out", str(tmp_path)]
    try:
        assert instruction_sets.main(argv) == 0
    finally:
        torch.set_num_threads(threads)
    assert cpu_capability() == before
    with (tmp_path / "instruction_sets.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for operator in ("thin_qr", "linear"):
        named = {row["variant"] for row in rows if row["operator"] == operator}
        assert named >= {*cpu_capabilities(), instruction_sets.YARDSTICK}
    assert not any(row["failure"] for row in rows)
