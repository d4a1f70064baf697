"""docs/guide/starts.md: its tables have all starts, and say of each what its class says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.layers.options import DEFAULT_ALPHA

from ...support import ROOT
from ...support.tiny_models import llama

PAGE = ROOT / "docs/guide/starts.md"


def names(folder: Path) -> dict:
    return {"model": llama()}


def check(names: dict, output: str, folder: Path) -> None:
    starts = {name: get_initializer(name) for name in initializer_names()}
    # Without those that other pages register.
    starts = {n: s for n, s in starts.items() if type(s).__module__.startswith("lora_kernels.")}
    rows = re.findall(r'^\| `"(\w+)"` `(\w+)` \|.*\| (.+) \| [^|]+ \|$', PAGE.read_text(), re.M)
    assert {name: kind for name, kind, _ in rows} == {
        name: type(start).__name__ for name, start in starts.items()
    }
    for name, _, changes in rows:
        assert (changes != "no") == starts[name].changes_base, name
    assert _options() == {
        type(start).__name__: {f.name: f.default for f in fields(start)}
        for start in starts.values()
    }
    refused = {type(start).__name__ for start in starts.values() if start.grows_with_scaling}
    assert refused == {"LoRAM", "OLoRA", "InitAB", "InitABPlus", "LoRAGA", "LoRAOne"}
    for rule, alpha in DEFAULT_ALPHA.items():
        assert re.search(rf'^\| `"{rule}"`.*\| {alpha:g} \|', PAGE.read_text(), re.M), rule
    # LoRA+ gives B 16 times the rate.
    model = names["model"]
    groups = names["optimizer"].param_groups
    assert [round(group["lr"] / 1e-4) for group in groups] == [1, 16]
    factors = {id(p) for name, p in model.named_parameters() if name.endswith("lora_B")}
    assert factors == {id(p) for p in groups[1]["params"]}


def _options() -> dict[str, dict]:
    """The table of options: {class: {option: default}}."""
    table = PAGE.read_text().split("## Options")[1].split("\n- ")[0]
    found = {}
    for kinds, options in re.findall(r"^\| (`.+?`) \| (.+) \|$", table, re.M):
        pairs = re.findall(r"`(\w+)=(.+?)`", options)
        for kind in re.findall(r"`(\w+)`", kinds):
            found[kind] = {name: eval(value) for name, value in pairs}
    return found
