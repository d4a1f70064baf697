"""Run every operator's tests with every instruction set of this processor, in one process.

A test that takes `device` runs as `cpu-baseline`, `cpu-avx2` ... and, with the best set, as `cpu`;
any other test as `baseline`, `avx2` ... The best set runs everything. A lower one skips tests that
do not depend on it, draws fewer hypothesis examples, and of a sweep over many parameters takes
about every fourth combination, a different selection for each set; LORA_KERNELS_TEST_ALL=1 runs all
of them.
"""

from __future__ import annotations

import os
import zlib

import pytest
from hypothesis import settings

from lora_kernels.ops import cpu_capabilities, set_cpu_capability

from ..support.devices import DEVICES
from ..support.exhaustive import EXHAUSTIVE

SETS = cpu_capabilities()
# The engine for batches on a GPU, built on torch, does not use our instruction sets.
LOWER = [] if os.environ.get("LORA_KERNELS_SVD_ENGINE") == "aten" else SETS[:-1]
SWEEP, PART, EXAMPLES = 8, 4, 10
SET_PARAMETERS = ("device", "instruction_set")

# Tests of code before a kernel runs, of PyTorch, or of the reference.
INDEPENDENT = (
    *("opcheck", "compile", "meta", "bad_argument", "bad_input", "bad_number", "bad_tolerance"),
    *("reference", "inference", "no_weight", "unlike", "empty_list", "defaults", "refused"),
    *(
        "gradcheck",
        "autocast",
        "differentiates",
        "batched_engine",
        "known",
        "plain_integers",
        "every_instruction_set",
    ),
)

# Functions on top of the operators, whose own tests run with every set.
FUNCTIONS = ("test_triplets",)


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.param.partition("-")[0]


@pytest.fixture(scope="session", autouse=True)
def instruction_set(request) -> str | None:
    """For tests without `device`."""
    return getattr(request, "param", None)


def pytest_generate_tests(metafunc) -> None:
    independent = metafunc.module.__name__.endswith(FUNCTIONS) or any(
        part in metafunc.function.__name__ for part in INDEPENDENT
    )
    lower = [] if independent else LOWER
    if "device" in metafunc.fixturenames:
        names = [f"cpu-{name}" for name in lower] + DEVICES
        metafunc.parametrize("device", names, indirect=True, scope="session")
    elif lower:
        metafunc.parametrize("instruction_set", SETS, indirect=True, scope="session")


def lower_set_of(item) -> str | None:
    """The instruction set of this test, if it is not the best one."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = params.get("device", params.get("instruction_set", "")).removeprefix("cpu-")
    return name if name in LOWER else None


def part_of(item) -> int:
    """A number below PART that depends only on the combination, mixed over all its parameters."""
    values = {k: v for k, v in item.callspec.indices.items() if k not in SET_PARAMETERS}
    return zlib.crc32(repr(sorted(values.items())).encode()) % PART


def pytest_collection_modifyitems(items) -> None:
    groups: dict[tuple[object, str], list] = {}
    for item in items:
        if name := lower_set_of(item):
            groups.setdefault((item.function, name), []).append(item)
    left_out = set()
    for (_, name), group in groups.items():
        if len(group) >= SWEEP and not EXHAUSTIVE:
            part = SETS.index(name) % PART
            left_out |= {item for item in group if part_of(item) != part}
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item) -> None:
    name = lower_set_of(item)
    if name is None:
        return
    set_cpu_capability(name)
    usual = getattr(item.obj, "_hypothesis_internal_use_settings", None)
    if usual is not None and not EXHAUSTIVE:
        item.obj._hypothesis_internal_use_settings = settings(
            usual, max_examples=min(usual.max_examples, EXAMPLES)
        )
        item.usual_settings = usual


def pytest_runtest_teardown(item) -> None:
    if lower_set_of(item) is None:
        return
    set_cpu_capability(SETS[-1])
    if hasattr(item, "usual_settings"):
        item.obj._hypothesis_internal_use_settings = item.usual_settings
