"""Adapters of experts in engines, by both layouts; and what `convert` makes of each dialect."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lora_kernels import load_adapter, save_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.adapter.peft_format.experts.naming import stored_experts
from lora_kernels.files.serving.check import Result, check
from lora_kernels.files.serving.convert import convert
from lora_kernels.files.serving.engines.verdict import REFUSED, RIGHT, WRONG
from lora_kernels.model.lora import adapter_state

from ...support.packages import needs_peft
from ...support.tiny_experts import EXPERTS, tiny_experts
from ..adapter.test_experts import adapted, logits
from ..adapter.test_peft_experts import DOWN, GATE_UP, MODULE, R, pair, write

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")

LINEAR = {"target_modules": ["q_proj", "v_proj"]}
TO_EACH, TO_STACKED = "--experts each --base BASE", "--experts stacked --base BASE"


def saved_base(folder: Path, family: str, **config) -> Path:
    tiny_experts(family, **config).save_pretrained(folder)
    return folder


def one(adapter: Path, engine: str, base: Path | None = None) -> Result:
    return check(adapter, base, [engine])[0]


def without(folder: Path, *parts: str) -> Path:
    """The folder without the tensors that have one of these in their names, and its recipe."""
    tensors = safetensors.load_file(folder / ADAPTER_FILE)
    kept = {name: t for name, t in tensors.items() if not any(part in name for part in parts)}
    assert len(kept) < len(tensors)
    safetensors.save_file(kept, folder / ADAPTER_FILE)
    return folder


@pytest.mark.parametrize(
    ("family", "layout", "outcomes"),
    [
        ("Mixtral", "each", {"vllm": RIGHT, "sglang": RIGHT, "llama.cpp": RIGHT, "peft": RIGHT}),
        ("Qwen3Moe", "each", {"vllm": RIGHT, "sglang": RIGHT, "llama.cpp": RIGHT, "peft": RIGHT}),
        ("Qwen3Moe", "stacked",
         {"vllm": RIGHT, "sglang": WRONG, "llama.cpp": REFUSED, "peft": RIGHT}),
        ("Qwen2Moe", "each", {"vllm": RIGHT, "sglang": RIGHT, "llama.cpp": RIGHT, "peft": WRONG}),
        ("Qwen2Moe", "stacked", {"sglang": WRONG, "llama.cpp": REFUSED, "peft": RIGHT}),
        ("GptOss", "stacked", {"vllm": RIGHT, "sglang": WRONG, "llama.cpp": REFUSED,
                               "ollama": REFUSED, "peft": RIGHT}),
        ("NemotronH", "each", {"vllm": RIGHT, "peft": WRONG}),
        ("NemotronH", "stacked", {"vllm": RIGHT, "peft": RIGHT}),
    ],
)  # fmt: skip
def test_engines(family, layout, outcomes, tmp_path):
    _, model = adapted(family, **LINEAR)
    with pytest.warns() if outcomes["peft"] == WRONG else nullcontext():
        save_adapter(model, tmp_path / "adapter", experts=layout)
    base = saved_base(tmp_path / "base", family)
    results = {r.engine: r for r in check(tmp_path / "adapter", base, list(outcomes))}
    assert {engine: results[engine].outcome for engine in outcomes} == outcomes
    each = all(stored.parts for stored in stored_experts(model).values())
    for engine, result in results.items():
        if result.outcome != RIGHT and engine != "ollama":
            remedy = (TO_EACH if each else "merge") if layout == "stacked" else TO_STACKED
            assert any(remedy in found for found in result.remedies), (engine, result.remedies)
    vllm = results.get("vllm")
    if vllm is not None:
        mixed = layout == "stacked" and family != "GptOss"
        assert any("mixed-moe" in flag for flag in vllm.verdict.flags) == mixed
        assert any(TO_EACH in note for note in vllm.verdict.notes) == mixed


class TestMissing:
    """vLLM and llama.cpp's script stack all experts; PEFT does, too, without a word where gate and
    up stand alone.
    """

    def folder(self, path: Path, *parts: str, family: str = "Qwen3Moe") -> Path:
        _, model = adapted(family, init_lora_weights="lora", **LINEAR)
        save_adapter(model, path, experts="each")
        return without(path, *parts)

    @pytest.mark.parametrize(
        ("parts", "peft"),
        [(("gate_proj", "up_proj"), RIGHT), (("down_proj",), RIGHT), (("experts.2.",), REFUSED),
         ((f"experts.{EXPERTS - 1}.",), REFUSED), (("up_proj",), REFUSED)],
        ids=str,
    )  # fmt: skip
    def test_parts(self, parts, peft, tmp_path):
        folder = self.folder(tmp_path / "adapter", *parts)
        base = saved_base(tmp_path / "base", "Qwen3Moe")
        for engine in ("vllm", "llama.cpp"):
            result = one(folder, engine, base)
            assert result.outcome == REFUSED
            assert "all projections of every expert" in result.verdict.refusals[-1].rule
            assert any("adds factors of zeros" in remedy for remedy in result.remedies)
        assert one(folder, "peft", base).outcome == peft
        # The remedy, without which PEFT is as the rules say.
        convert(folder, tmp_path / "whole", base=base)
        for engine in ("vllm", "llama.cpp", "sglang", "peft"):
            assert one(tmp_path / "whole", engine, base).outcome == RIGHT

    @needs_peft
    @pytest.mark.parametrize(
        ("parts", "targets", "outcome"),
        [(("gate_proj", "up_proj"), ["down_proj"], RIGHT),
         (("down_proj",), ["gate_proj", "up_proj", "down_proj"], RIGHT),
         (("down_proj",), ["gate_proj", "up_proj"], WRONG)],
        ids=str,
    )  # fmt: skip
    def test_as_peft_does(self, parts, targets, outcome, tmp_path):
        """The names that PEFT gives gate and up depend on whether it adapts down."""
        import peft

        folder = self.folder(tmp_path / "adapter", *parts)
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        config["target_modules"] = [*LINEAR["target_modules"], *targets]
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        base, ours = tiny_experts("Qwen3Moe"), tiny_experts("Qwen3Moe")
        bare = logits(base)
        load_adapter(ours, folder, progress=False)
        loaded = peft.PeftModel.from_pretrained(base, folder)
        error = (logits(loaded) - logits(ours)).norm() / (logits(ours) - bare).norm()
        assert (error < 1e-5) == (outcome == RIGHT)
        folder_of_base = saved_base(tmp_path / "base", "Qwen3Moe")
        assert one(folder, "peft", folder_of_base).outcome == outcome

    def test_without_a_base(self, tmp_path):
        """The experts that are there tell how many there are at least."""
        folder = self.folder(tmp_path / "adapter", "experts.1.down_proj")
        assert one(folder, "vllm").outcome == REFUSED
        folder = self.folder(tmp_path / "last", f"experts.{EXPERTS - 1}.")
        assert one(folder, "vllm").outcome == RIGHT

    def test_one_stacked_parameter(self, tmp_path):
        folder = write(tmp_path / "a", {MODULE: pair(R * EXPERTS, 32, 24)},
                       target_parameters=[DOWN], peft_version="0.21.2")  # fmt: skip
        result = one(folder, "vllm")
        assert result.outcome == REFUSED
        assert any("adds factors of zeros" in remedy for remedy in result.remedies)
        convert(folder, tmp_path / "whole")
        assert one(tmp_path / "whole", "vllm").outcome == RIGHT
        tensors = safetensors.load_file(tmp_path / "whole" / ADAPTER_FILE)
        sizes = {n.removeprefix(f"base_model.model.{MODULE}."): list(t.shape)
                 for n, t in tensors.items()}  # fmt: skip
        assert sizes == {
            "base_layer.lora_A.weight": [8, 32], "base_layer.lora_B.weight": [48, 8],
            "lora_A.weight": [8, 24], "lora_B.weight": [32, 8],
        }  # fmt: skip


class TestDialects:
    """Files that PEFT and engines of today read wrongly, or not at all."""

    def stacked(self, folder: Path, shapes: list[tuple[int, int]], **options) -> Path:
        names = [f"{MODULE}.base_layer", MODULE][-len(shapes) :]
        tensors = {n: pair(R * EXPERTS, *s) for n, s in zip(names, shapes, strict=True)}
        parameters = [GATE_UP, DOWN][-len(shapes) :] if len(shapes) > 1 else [GATE_UP]
        options = {"target_parameters": parameters, "target_modules": []} | options
        return write(folder, tensors, **options)

    @pytest.mark.parametrize("engine", ["vllm", "peft"])
    @pytest.mark.parametrize(
        ("shapes", "options", "based"),
        [([(32, 48), (24, 32)], {}, False), ([(32, 48)], {}, True),
         ([(32, 48)], {"peft_version": "0.18.0"}, False)],
        ids=str,
    )  # fmt: skip
    def test_before_019(self, shapes, options, based, engine, tmp_path):
        folder = self.stacked(tmp_path / "a", shapes, **options)
        base = saved_base(tmp_path / "base", "Qwen3Moe")
        result = one(folder, engine, base if based else None)
        assert result.outcome == REFUSED
        assert any("exchanged, as PEFT before 0.19" in r.rule for r in result.verdict.refusals)
        assert any("convert ADAPTER OUT --base BASE" in remedy for remedy in result.remedies)
        if not options and not based:  # the two parameters tell
            convert(folder, tmp_path / "new")
        else:
            with pytest.raises(ValueError, match=r"only the model tells.*--base"):
                convert(folder, tmp_path / "new")
            convert(folder, tmp_path / "new", base=base)
        assert one(tmp_path / "new", "peft", base).outcome == RIGHT

    @pytest.mark.parametrize(("version", "outcome"), [("0.18.0", WRONG), ("0.19.1", RIGHT)])
    def test_square(self, version, outcome, tmp_path):
        folder = self.stacked(tmp_path / "a", [(32, 32)], peft_version=version)
        base = saved_base(tmp_path / "base", "Qwen3Moe", moe_intermediate_size=16)
        result = one(folder, "peft", base)
        assert result.outcome == outcome
        convert(folder, tmp_path / "new", base=base)
        assert one(tmp_path / "new", "peft", base).outcome == RIGHT

    def test_another_base(self, tmp_path):
        folder = self.stacked(tmp_path / "a", [(48, 32), (32, 24)])
        base = saved_base(tmp_path / "base", "Qwen3Moe", moe_intermediate_size=20)
        result = one(folder, "peft", base)
        assert result.outcome == REFUSED
        assert "experts have other shapes" in result.verdict.refusals[-1].rule

    def test_unsloth(self, tmp_path):
        options = {"lora_B_layout": "grouped_by_expert", "peft_version": "0.21.0"}
        shapes = [(48, 32), (32, 24)]
        folder = self.stacked(tmp_path / "a", shapes, **options)
        for engine in ("vllm", "peft"):
            result = one(folder, engine)
            assert result.outcome == WRONG
            assert all("Unsloth" in layer.reason for layer in result.layers)
            assert result.remedies == ["lora-kernels convert ADAPTER OUT"]
        convert(folder, tmp_path / "new")
        assert one(tmp_path / "new", "peft").outcome == RIGHT
        options = {"auto_mapping": {"unsloth_fixed": True}}
        result = one(self.stacked(tmp_path / "b", shapes, **options), "peft")
        assert any("--expert-order slowest" in note for note in result.verdict.notes)

    def test_the_users_word(self, tmp_path, capsys):
        marked = self.stacked(tmp_path / "a", [(48, 32), (32, 24)], lora_B_layout="rank_major")
        plain = tmp_path / "plain"
        shutil.copytree(marked, plain)
        config = json.loads((plain / ADAPTER_CONFIG).read_text())
        config["lora_B_layout"] = "grouped_by_expert"
        (marked / ADAPTER_CONFIG).write_text(json.dumps(config))
        config.pop("lora_B_layout")
        (plain / ADAPTER_CONFIG).write_text(json.dumps(config))
        outs = [tmp_path / "x", tmp_path / "y"]
        assert main(["convert", str(marked), str(outs[0])]) == 0
        words = ["--expert-order", "slowest"]
        assert main(["convert", str(plain), str(outs[1]), *words]) == 0
        same = [safetensors.load_file(out / ADAPTER_FILE) for out in outs]
        assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
        assert "2 layers of rank 2" in capsys.readouterr().out

    @needs_peft
    def test_targets_that_peft_takes_for_experts(self, tmp_path):
        """It doubles the rank of the experts' parameter, and refuses the file."""
        import peft

        base = tiny_experts("DeepseekV3", n_shared_experts=1)
        shared = f"{MODULE.removesuffix('.experts')}.shared_experts"
        tensors = {f"{shared}.gate_proj": pair(R, 24, 32), f"{shared}.up_proj": pair(R, 24, 32)}
        tensors |= {f"{MODULE}.base_layer": pair(8, 48, 32), MODULE: pair(8, 32, 24)}
        folder = write(tmp_path / "a", tensors, target_modules=["gate_proj", "up_proj"],
                       target_parameters=[GATE_UP, DOWN], peft_version="0.21.2")  # fmt: skip
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        base.save_pretrained(tmp_path / "base")
        result = one(folder, "peft", tmp_path / "base")
        assert result.outcome == REFUSED
        assert any("doubles the rank" in refusal.rule for refusal in result.verdict.refusals)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe"])
def test_from_one_layout_to_the_other(family, tmp_path):
    """The same update, and for this package the same bits."""
    base, model = adapted(family)
    folder = saved_base(tmp_path / "base", family)
    save_adapter(model, tmp_path / "stacked", experts="stacked")
    convert(tmp_path / "stacked", tmp_path / "each", experts="each")  # whose names it knows
    convert(tmp_path / "each", tmp_path / "again", experts="stacked")
    convert(tmp_path / "each", tmp_path / "small", experts="stacked", compress_to=1)
    convert(tmp_path / "small", tmp_path / "small each", experts="each", base=folder)
    files = [safetensors.load_file(tmp_path / name / ADAPTER_FILE) for name in ("stacked", "again")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    states = []
    for name in ("stacked", "each", "small", "small each"):
        fresh = copy.deepcopy(base)
        load_adapter(fresh, tmp_path / name, progress=False)
        states.append(adapter_state(fresh).layers)
    for name, layer in adapter_state(model).layers.items():
        for state in states[:2]:
            assert torch.equal(state[name].lora_A, layer.lora_A)
            assert torch.equal(state[name].lora_B, layer.lora_B)
        first, second = (state[name] for state in states[2:])
        assert torch.equal(first.lora_B @ first.lora_A, second.lora_B @ second.lora_A)
        assert first.r == 1


def test_no_gguf(tmp_path):
    pytest.importorskip("gguf")
    _, model = adapted("Qwen3Moe")
    save_adapter(model, tmp_path / "a")
    base = saved_base(tmp_path / "base", "Qwen3Moe")
    with pytest.raises(ValueError, match=r"experts .*not written to GGUF.*--experts each"):
        convert(tmp_path / "a", tmp_path / "a.gguf", format="gguf", base=base)


@pytest.mark.parametrize("form", ["each", "stacked", "native"])
def test_inspect(form, tmp_path):
    """One row for each expert, with the norm of its update."""
    pytest.importorskip("rich")
    _, model = adapted("Qwen3Moe")
    options = {"format": "native"} if form == "native" else {"experts": form}
    save_adapter(model, tmp_path / "a", **options)
    out = tmp_path / "out.csv"
    assert main(["inspect", str(tmp_path / "a"), "--quiet", "--csv", str(out)]) == 0
    with out.open() as file:
        norms = {row["name"]: float(row["norm_update"]) for row in csv.DictReader(file)}
    layer = adapter_state(model).layers[f"{MODULE}.down_proj"]
    right, left = layer.update_factors()
    for e in range(EXPERTS):
        norm = layer.scaling * float((left[e].double() @ right[e].double()).norm())
        assert norms[f"{MODULE}.down_proj[{e}]"] == pytest.approx(norm, rel=1e-4)
    assert len(norms) == 2 * EXPERTS + 1
