"""The processes that write a folder together, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Variables of torchrun that tell the processes of one launch from those of another.
_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Ranks:
    """A process: number `rank` of `world_size`, and on its machine number `local_rank` of
    `local_world_size`. `launch` is the same for all processes that were started together.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launch: tuple[str, ...] = ()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """The ranks that torchrun, or another launcher, has put into the environment: RANK and
        WORLD_SIZE; with several machines also LOCAL_RANK and LOCAL_WORLD_SIZE. One process if
        WORLD_SIZE is missing or 1.

        Raises:
            ValueError: the variables are not numbers, or contradict each other.

        """
        world_size = _number(environment, "WORLD_SIZE", 1)
        if world_size == 1:
            return ALONE
        rank = _number(environment, "RANK", -1)
        local_rank = _number(environment, "LOCAL_RANK", rank)
        local_size = local_rank + 1 if "LOCAL_RANK" in environment else world_size
        local_size = _number(environment, "LOCAL_WORLD_SIZE", local_size)
        if not (0 <= rank < world_size and 0 <= local_rank < local_size):
            given = {name: environment[name] for name in _NUMBERS if name in environment}
            shown = ", ".join(f"{name} = {value}" for name, value in given.items())
            raise ValueError(
                f"the environment has {shown}, which are not the ranks of several processes: start "
                "them with torchrun, or unset WORLD_SIZE for one process"
            )
        launch = tuple(environment.get(name, "") for name in _LAUNCH)
        return cls(rank, world_size, local_rank, local_size, launch)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which completes the folder and prints."""
        return self.rank == 0


ALONE = Ranks()


def _number(environment: Mapping[str, str], name: str, missing: int) -> int:
    text = environment.get(name)
    if text is None:
        return missing
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {text!r}: it must be the integer that torchrun "
            "sets, or be unset"
        ) from None


def shares(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank gets which file: {name: rank} for {name: bytes}.

    Files are distributed from the largest on, each to the rank with the fewest bytes so far.
    """
    loads = [0] * world_size
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners
