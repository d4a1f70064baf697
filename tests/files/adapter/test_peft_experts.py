"""PEFT's adapters of experts, read in all their dialects: a pair of matrices for each expert, and
those of all experts in one pair, in the layouts of PEFT before and since 0.19 and of Unsloth.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import load_adapter
from lora_kernels._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from lora_kernels.cli import main
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.model.lora import adapter_state

from ...support.packages import needs_peft
from ...support.running import move
from ...support.tiny_experts import EXPERTS, expert_parameters, tiny_experts

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")

R, S = 2, 1.5
IDS = torch.arange(1, 13).view(2, 6)
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
MODULE = "model.layers.0.mlp.experts"
KEY = "base_model.model.{}.lora_{}.weight"
SQUARE = {"moe_intermediate_size": 16}  # gate_up_proj is [2 · 16, 32]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def write(folder: Path, tensors: dict[str, tuple[Tensor, Tensor]], **options) -> Path:
    """A folder as PEFT writes it, from A and B by the names of their layers."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R * S, "target_modules": ["q_proj"]}
    config |= options
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    named = {KEY.format(n, half): t.contiguous() for n, pair in tensors.items()
             for half, t in zip("AB", pair, strict=True)}  # fmt: skip
    safetensors.save_file(named, folder / ADAPTER_FILE)
    return folder


def pair(rows: int, out: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, columns) * 0.3, torch.randn(out, rows) * 0.3


def assert_loads_as(model: nn.Module, folder: Path, update: dict[str, Tensor], **options) -> None:
    """The model with the adapter computes what it does with these updates of its parameters."""
    reference = copy.deepcopy(model)
    bare = logits(model)
    with torch.no_grad():
        for name, delta in update.items():
            reference.get_parameter(name).add_(delta)
    load_adapter(model, folder, progress=False, **options)
    assert set(adapter_state(model).layers) == set(update)
    want = logits(reference)
    assert (logits(model) - want).norm() < 1e-5 * (want - bare).norm()


class TestPeft:
    """Of this version, run."""

    pytestmark = needs_peft

    @pytest.mark.parametrize("parameters", [[DOWN, GATE_UP], [GATE_UP], [DOWN]], ids=str)
    @pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
    @pytest.mark.parametrize("linear", [["q_proj"], []], ids=str)
    def test_stacked(self, family, parameters, linear, tmp_path):
        import peft

        base = tiny_experts(family)
        options = {"r": R, "lora_alpha": 3, "rank_pattern": {"down_proj": 3}, "use_rslora": True}
        config = peft.LoraConfig(target_modules=linear, target_parameters=parameters, **options)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        move(model)
        model.save_pretrained(tmp_path)
        read = copy.deepcopy(base)
        load_adapter(read, tmp_path, progress=False)
        want, bare = logits(model), logits(base)
        assert (logits(read) - want).norm() < 1e-5 * (want - bare).norm()
        ranks = {n.rpartition(".")[2]: s.r for n, s in adapter_state(read).layers.items()}
        assert ranks.get("down_proj", 3) == 3
        assert ranks.get("gate_up_proj", R) == R

    def test_saved_again_after_conversion(self, tmp_path):
        """PEFT converts the pairs of each expert and saves them stacked, with bare names."""
        import peft

        base, names = tiny_experts("Qwen3Moe"), {}
        for e in range(EXPERTS):
            names |= {f"{MODULE}.{e}.{p}": pair(R, 24, 32) for p in ("gate_proj", "up_proj")}
            names[f"{MODULE}.{e}.down_proj"] = pair(R, 32, 24)
        targets = ["gate_proj", "up_proj", "down_proj"]
        write(tmp_path / "each", names, target_modules=targets)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "each")
        loaded.save_pretrained(tmp_path / "again")
        want = logits(loaded)
        for folder in ("each", "again"):
            read = copy.deepcopy(base)
            load_adapter(read, tmp_path / folder, progress=False)
            assert (logits(read) - want).norm() < 1e-5 * (want - logits(base)).norm()


class TestOldPeft:
    """Before 0.19, which took a parameter for [E, in, out] whatever the model does."""

    def files(self, folder: Path, model: nn.Module, parameters: list[str], **options) -> dict:
        """{parameter: update}, by the formula of PEFT 0.18's get_delta_weight."""
        tensors, updates = {}, {}
        for depth, name in enumerate(reversed(parameters)):
            weight = model.get_parameter(f"{MODULE}.{name}")
            experts, rows, columns = weight.shape
            A, B = pair(R * experts, columns, rows)
            left = B.reshape(columns, R, experts)
            right = A.reshape(experts, R, rows)
            updates[f"{MODULE}.{name}"] = S * torch.einsum("ore,eri->eio", left, right)
            tensors[MODULE + ".base_layer" * depth] = A, B
        targets = [f"experts.{name}" for name in parameters]
        write(folder, tensors, target_parameters=targets, target_modules=[], **options)
        return updates

    @pytest.mark.parametrize(
        "parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids=str
    )
    @pytest.mark.parametrize("options", [{}, {"peft_version": "0.18.1"}], ids=str)
    @pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
    def test_shapes_tell(self, family, options, parameters, tmp_path):
        model = tiny_experts(family)
        updates = self.files(tmp_path, model, parameters, **options)
        assert_loads_as(model, tmp_path, updates)

    @pytest.mark.parametrize("version", ["0.18.0", "0.17.1", "0.19.0", "0.21.2"])
    def test_square_matrices(self, version, tmp_path):
        """2I = H: the version tells, and where it is wrong, so is the update."""
        model = tiny_experts("Qwen3Moe", **SQUARE)
        updates = self.files(tmp_path, model, ["gate_up_proj"], peft_version=version)
        if version >= "0.19":
            updates = {name: update.mT for name, update in updates.items()}
        assert_loads_as(model, tmp_path, updates)

    def test_both_tell_of_square_ones(self, tmp_path):
        model = tiny_experts("Qwen3Moe", **SQUARE)
        updates = self.files(tmp_path, model, ["gate_up_proj", "down_proj"])
        assert_loads_as(model, tmp_path, updates)

    @pytest.mark.parametrize("options", [{}, {"peft_version": "0.18.2.dev0@abc"}], ids=str)
    def test_square_matrices_of_an_unknown_version(self, options, tmp_path):
        model = tiny_experts("Qwen3Moe", **SQUARE)
        self.files(tmp_path, model, ["gate_up_proj"], **options)
        with pytest.raises(ValueError, match=r"square.*32, 32.*\"peft_version\": \"0.18.0\" or"):
            load_adapter(model, tmp_path, progress=False)
        transposed = tiny_experts("GptOss", intermediate_size=16)
        updates = self.files(tmp_path, transposed, ["gate_up_proj"], **options)
        assert_loads_as(transposed, tmp_path, updates)  # all versions agree

    def test_llama4(self, tmp_path):
        """A version that knows of is_transposed, and [in, out] all the same."""
        model = tiny_experts("Qwen3Moe")
        self.files(tmp_path, model, ["gate_up_proj", "down_proj"], peft_version="0.21.2")
        with pytest.raises(ValueError, match=r"\[in, out\].*llama4.*load it with PEFT"):
            read_adapter(tmp_path)


class TestUnsloth:
    """Before September 2026: the expert varies slowest in the columns of B."""

    def files(self, folder: Path, **options) -> dict[str, Tensor]:
        A, B = pair(R * EXPERTS, 32, 24)
        right, left = A.reshape(EXPERTS, R, 24), B.reshape(32, EXPERTS, R)
        update = S * torch.einsum("oer,eri->eoi", left, right)
        options = {"target_parameters": [DOWN], "peft_version": "0.21.0"} | options
        write(folder, {MODULE: (A, B)}, target_modules=[], **options)
        return {f"{MODULE}.down_proj": update}

    def test_by_its_mark(self, tmp_path):
        update = self.files(tmp_path, lora_B_layout="grouped_by_expert")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_loads_as(tiny_experts("Qwen3Moe"), tmp_path, update)
        with pytest.raises(ValueError, match=r"expert_order='fastest'.*grouped_by_expert"):
            read_adapter(tmp_path, expert_order="fastest")

    def test_by_the_users_word(self, tmp_path):
        update = self.files(tmp_path)
        assert_loads_as(tiny_experts("Qwen3Moe"), tmp_path, update, expert_order="slowest")

    def test_that_it_may_be_one(self, tmp_path):
        mapping = {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}
        self.files(tmp_path, auto_mapping=mapping)
        with pytest.warns(UserWarning, match=r"Unsloth.*expert_order='slowest'"):
            read_adapter(tmp_path)
        self.files(tmp_path, auto_mapping=mapping, lora_B_layout="rank_major")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_adapter(tmp_path)

    def test_other_words(self, tmp_path):
        self.files(tmp_path, lora_B_layout="expert_major")
        with pytest.raises(ValueError, match="lora_B_layout 'expert_major'"):
            read_adapter(tmp_path)
        self.files(tmp_path)
        with pytest.raises(ValueError, match=r"expert_order 'slow'.*slowest"):
            read_adapter(tmp_path, expert_order="slow")


class TestEach:
    """A pair for each expert, of transformers 4 or of an engine's trainer."""

    def files(self, folder: Path, lost: tuple[str, ...] = (), shared: bool = False, **options):
        """{parameter: update} of Mixtral; without the projections in `lost`."""
        start, tensors = "model.layers.0.block_sparse_moe.experts", {}
        update = {f"{MODULE}.gate_up_proj": torch.zeros(EXPERTS, 48, 32),
                  f"{MODULE}.down_proj": torch.zeros(EXPERTS, 32, 24)}  # fmt: skip
        for e in range(EXPERTS):
            gate, up, down = pair(R, 24, 32), pair(R, 24, 32), pair(R, 32, 24)
            if shared:
                up = (gate[0].clone(), up[1])
            for word, (A, B), parameter, rows in (
                ("w1", gate, "gate_up_proj", slice(24)),
                ("w3", up, "gate_up_proj", slice(24, 48)),
                ("w2", down, "down_proj", slice(32)),
            ):
                if f"{e}.{word}" not in lost and word not in lost:
                    tensors[f"{start}.{e}.{word}"] = A, B
                    update[f"{MODULE}.{parameter}"][e, rows] = S * B @ A
        write(folder, tensors, target_modules=["w1", "w2", "w3"], **options)
        return {name: delta for name, delta in update.items() if delta.any()}

    @pytest.mark.parametrize(
        ("lost", "shared", "rank"),
        [((), False, 2 * R), ((), True, R), (("w1",), False, R), (("w1", "w3"), False, R),
         (("w2", "0.w1", "3.w1", "3.w3"), False, 2 * R)],
    )  # fmt: skip
    @pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": S * R**0.5}])
    def test_joined(self, lost, shared, rank, options, tmp_path):
        """Experts that are missing are not adapted; s and the update stay."""
        model = tiny_experts("Mixtral")
        updates = self.files(tmp_path, lost, shared, **options)
        assert_loads_as(model, tmp_path, updates)
        state = adapter_state(model)
        first = state.layers.get(f"{MODULE}.gate_up_proj", state.layers[next(iter(updates))])
        assert (first.r, first.scaling) == (rank, pytest.approx(S))
        assert all(state.config.layer_rank(n) == s.r for n, s in state.layers.items())

    def test_different_ranks(self, tmp_path):
        self.files(tmp_path)
        file = tmp_path / ADAPTER_FILE
        tensors = safetensors.load_file(file)
        name = "model.layers.0.block_sparse_moe.experts.1.w1"
        A, B = pair(3, 24, 32)
        tensors |= {KEY.format(name, "A"): A, KEY.format(name, "B"): B}
        safetensors.save_file(tensors, file)
        config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
        config["rank_pattern"] = {"1.w1": 3}
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"experts of .*gate_up_proj' have different ranks"):
            load_adapter(tiny_experts("Mixtral"), tmp_path, progress=False)

    def test_another_size(self, tmp_path):
        self.files(tmp_path)
        with pytest.raises(ValueError, match=r"w1' is \[24, 2\], this model has 20 rows there"):
            load_adapter(tiny_experts("Mixtral", intermediate_size=20), tmp_path, progress=False)


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "options", "match"),
        [
            ([MODULE], {}, "one of 4 experts in one tensor.*target_parameters.*experts.down_proj"),
            ([f"{MODULE}.base_layer"], {}, "one of 4 experts in one tensor"),
            ([MODULE], {"target_parameters": [DOWN], "r": 3}, "8 rows, no multiple of r = 3"),
            ([MODULE], {"target_parameters": DOWN}, "not a list of names"),
        ],
    )
    def test_names_and_ranks(self, names, options, match, tmp_path):
        write(tmp_path, {name: pair(R * EXPERTS, 32, 24) for name in names}, **options)
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)

    def test_shapes_of_no_layout(self, tmp_path):
        tensors = {f"{MODULE}.base_layer": pair(R * EXPERTS, 48, 32), MODULE: pair(8, 30, 24)}
        write(tmp_path, tensors, target_parameters=[GATE_UP, DOWN])
        with pytest.raises(ValueError, match=r"\[48, 32\].*\[30, 24\].*do not fit each other"):
            read_adapter(tmp_path)

    def test_both_without_names(self, tmp_path):
        """What vLLM takes them for."""
        model = tiny_experts("Qwen3Moe")
        tensors = {f"{MODULE}.base_layer": pair(8, 48, 32), MODULE: pair(8, 32, 24)}
        write(tmp_path, tensors)
        load_adapter(model, tmp_path, progress=False)
        assert list(adapter_state(model).layers) == expert_parameters(tiny_experts("Qwen3Moe"))

    @pytest.mark.parametrize(("rows", "match"), [(7, "rank 7.*different adapters$"),
                                                 (1, "rank 1.*different adapters$")])  # fmt: skip
    def test_layers_of_other_names(self, rows, match, tmp_path):
        write(tmp_path, {"model.layers.0.block_sparse_moe.input_linear": pair(rows, 64, 32)})
        with pytest.raises(ValueError, match=match):
            read_adapter(tmp_path)

    def test_another_model(self, tmp_path):
        write(tmp_path, {MODULE: pair(8, 32, 30)}, target_parameters=[DOWN], peft_version="0.21.2")
        with pytest.raises(ValueError, match=r"32, 30\].*32, 24\]"):
            load_adapter(tiny_experts("Qwen3Moe"), tmp_path, progress=False)

    def test_commands(self, tmp_path, capsys):
        folder = write(tmp_path / "a", {MODULE: pair(8, 32, 24)})
        assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
        assert "target_parameters" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
