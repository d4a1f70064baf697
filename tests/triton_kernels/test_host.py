"""What a call of the layer makes the host do: counted, never timed (`host`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ..support import ROOT

pytest.importorskip("triton", reason="the kernels need triton (pip install triton)")


@pytest.fixture(scope="module")
def facts() -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernels.host"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("way", "kernels"),
    [
        ("decode", {"shrink_kernel": 1, "decode_kernel": 1}),
        ("reversed", {"shrink_kernel": 1, "reduce_kernel": 1, "expand_kernel": 1}),
        ("fused", {"shrink_kernel": 1, "reduce_kernel": 1, "gemm_kernel": 1}),
        ("fused pair", {"shrink_kernel": 1, "reduce_kernel": 1, "gemm_kernel": 1}),
        ("overlapped", {"shrink_kernel": 1, "gemm_kernel": 1}),
    ],
)
def test_a_further_call_only_launches(way, kernels, facts):
    calls = facts["layer"][way]
    assert calls["first"]["binder"] == calls["first"]["compiled"] == kernels
    for call in (calls["second"], calls["third"]):
        assert call == {"launches": kernels, "binder": {}, "compiled": {}}


def test_a_direct_launch_hands_over_what_triton_does(facts):
    assert facts["arguments"] == {"different": [], "compared": ["reduce_kernel", "gemm_kernel"]}


def test_what_is_compiled_anew(facts):
    assert facts["specialization"] == {
        "same alignment": 1,
        "another alignment": 2,
        "another dtype": 2,
        "another stride": 2,
        "another number of rows": 1,
        "another offset": 1,
        "another p": 1,
    }


def test_launches_are_direct_with_this_triton(facts):
    """With a Triton that launches differently, or while a profiler needs to see them, launches are
    ordinary ones.
    """
    assert facts["paths"] == {"known": True, "usual": 1, "unknown": 3, "watched": 3}


def test_tensors_of_two_devices_are_refused(facts):
    assert "reduce_kernel: a tensor is on" in facts["mixed_devices"]


def test_integers_are_tritons(facts):
    assert facts["integers"]
