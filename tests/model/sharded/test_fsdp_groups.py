"""Parameters that join and leave the groups of FSDP2: one process and torch's own order of
things (adapt, then shard) are the oracles.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels.model.install.sharded import fsdp

from ...support import ROOT
from ...support.ranks import needs_ranks, on_ranks
from .fsdp_cases import (
    ACCUMULATED,
    AS_ALONE,
    FOUR,
    ORDERS,
    OTHERS,
    exchanged,
    places_of,
    switched,
    with_two,
)
from .fsdp_models import (
    Model,
    adapt,
    train,
)

pytestmark = needs_ranks


def run_all(cases: dict[str, Callable[[int, int], Any]], world: int) -> list[dict[str, Any]]:
    """The results of all cases on all ranks, in one set of processes; errors are texts."""
    # What FSDP2 and DTensor import at their first use: once here, not in each process.
    import torch._dynamo
    import torch.distributed._composable.replicate_with_fsdp
    import torch.distributed.tensor.debug
    import torch.distributed.tensor.parallel  # noqa: F401

    def work(rank: int) -> dict[str, Any]:
        results = {}
        for name, case in cases.items():
            try:
                results[name] = case(rank, world)
            except Exception:
                results[name] = traceback.format_exc()
        return results

    return on_ranks(world, work)


@pytest.fixture(scope="module")
def two() -> Any:
    return functools.partial(_case, run_all({**AS_ALONE, **ACCUMULATED, **ORDERS, **OTHERS}, 2))


@pytest.fixture(scope="module")
def four() -> Any:
    return functools.partial(_case, run_all(FOUR, 4))


def _case(results: list[dict[str, Any]], name: str) -> list[Any]:
    found = [result[name] for result in results]
    for result in found:
        assert not isinstance(result, str), result
    return found


@functools.cache
def alone(accumulate: int = 1) -> dict[str, Tensor]:
    model = Model()
    adapt(model)
    return train(model, accumulate=accumulate)


def check_same(results: Sequence[Any], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, atol=atol, rtol=0)
            assert torch.equal(result[name], results[0][name]), f"{name} differs between ranks"


@pytest.mark.parametrize("case", AS_ALONE)
def test_joined_parameters_train_as_in_one_process(two, case):
    check_same(two(case), alone())


@pytest.mark.parametrize("case", ACCUMULATED)
def test_gradients_are_accumulated_as_in_one_process(two, case):
    check_same(two(case), alone(accumulate=2))


@pytest.mark.parametrize("case", FOUR)
def test_four_ranks_train_as_one_process(four, case):
    check_same(four(case), alone())


@pytest.mark.parametrize("case", ORDERS)
def test_joined_parameters_train_as_if_adapted_before_sharding(two, case):
    results = two(case)
    for at_once, later, expected in results:
        check_same([at_once, later], expected, atol=0)
    check_same([result[0] for result in results], results[0][2], atol=0)


def test_joining_and_leaving_change_no_collective(two):
    for counts in two("counts"):
        _, scatters, reduces = counts["joined"]
        assert counts["expected"] == counts["joined"]
        assert (scatters, reduces) == (2, 0)
        assert counts["joining"] == counts["leaving"] == (0, 0, 0)
        assert counts["base"] == counts["left"] == (3, 0, 0)
        assert counts["kinds"] == {True} and counts["numbers"] == [3, 4, 4]
        assert counts["same"]


@pytest.mark.parametrize("case", sorted(OTHERS.keys() & {"left and back", "emptied"}))
def test_adapter_after_one_that_left(two, case):
    check_same(two(case), alone())


def test_switched_adapters_train_as_in_one_process(two):
    check_same(two("switching"), switched(with_two(Model())))


@pytest.mark.parametrize("case", sorted(OTHERS.keys() & {"exchanged before", "exchanged after"}))
def test_exchanged_parameter_is_gathered(two, case):
    check_same(two(case), exchanged(Model(torch.bfloat16)), atol=2e-3)


def test_joined_parameters_in_state_dicts(two):
    for result in two("stored"):
        assert result == {
            "sharded": [True, True],
            "changed": True,
            "back": True,
            "names": True,
        }


def test_requires_grad_survives_resharding(two):
    assert two("flags") == [([], ["lm_head.weight"])] * 2


def test_errors_say_what_to_do(two):
    for found in two("errors"):
        assert (
            "ValueError: the parameters of 'Linear' are sharded by an FSDP2 module outside"
            in (found["outside"])
        )
        assert (
            "the parameter 'weight' of a Linear is not within an FSDP2 module"
            in (found["unmanaged"])
        )
        assert found["unchanged"]
        assert "a parameter 'weight' is not sharded by FSDP2" in found["unmanaged replica"]
        assert (
            "ValueError: parameters of torch.bfloat16, torch.float64 train in one FSDP2"
            in (found["dtypes"])
        )
        assert "RuntimeError: FSDP2 still holds unsharded" in found["interrupted"]
        assert "ValueError: a parameter 'weight' that FSDP2 shards was exch" in found["exchanged"]
        assert "stay replicated on all ranks" in found["warning"]


def test_layouts_tell_managed_from_unmanaged(two):
    managed = {name for name in places_of(Model())}
    for known, other in two("layouts"):
        assert known == other == dict.fromkeys(managed)


def test_models_without_fsdp2():
    model = Model()
    assert not fsdp.is_managed(model) and fsdp.unsharded_layouts(model) == {}
    fsdp.reshard(model)
    fsdp.sync_trainable(model)
    fsdp.leave(model, [model.embed])
    with pytest.raises(ValueError, match="not within an FSDP2 module"):
        fsdp.join(model, {(model.embed, "weight"): (model.lm_head, "weight")})


def test_only_one_file_names_private_things_of_fsdp2():
    private = re.compile(r"_fully_shard\b|_fsdp_param|_get_fsdp_state|fsdp_params|FSDPParam")
    files = (ROOT / "lora_kernels").rglob("*.py")
    found = [file.name for file in files if private.search(file.read_text())]
    assert found == ["fsdp.py"]
