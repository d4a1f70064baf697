"""Adapters by PEFT whose rank is larger than min(n, m)."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import (
    hotswap_adapter,
    merge_lora,
    save_adapter,
    unload_lora,
)
from lora_kernels._utils.peft_names import ADAPTER_FILE
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.files.serving.convert import convert

from ...support.packages import needs_peft
from ...support.peft_folders import by_peft, in_peft, loaded, merged_files, verified
from ...support.peft_models import MODELS
from ...support.running import close, logits, same_bits, train, weights_of
from ...support.tiny_models import llama

safetensors = pytest.importorskip("safetensors.torch")
pytestmark = needs_peft


class TestRanksAboveTheSize:
    """r > min(n, m), which adds nothing to a layer but is allowed in PEFT."""

    R = 40

    @pytest.mark.parametrize("kind", MODELS)
    def test_everything(self, kind, tmp_path):
        base = MODELS[kind]()
        model = by_peft(tmp_path / "peft", base, r=self.R)
        want = logits(model)
        assert close(logits(merged_files(base, tmp_path / "peft", tmp_path)), want)
        assert all(verified(tmp_path / "peft", tmp_path / "base").values())
        ours = loaded(base, tmp_path / "peft")
        assert close(logits(ours), want)
        for form in ("peft", "native"):
            save_adapter(ours, tmp_path / form, format=form)
            again = loaded(base, tmp_path / form)
            assert torch.equal(logits(again), logits(ours))
        assert close(logits(in_peft(base, tmp_path / "peft")), want)
        hotswap_adapter(again, tmp_path / "peft")
        assert torch.equal(logits(again), logits(ours))
        convert(tmp_path / "peft", tmp_path / "small", compress_to=32)
        assert close(logits(loaded(base, tmp_path / "small")), want)  # the rank of the update
        before = weights_of(base)
        unload_lora(again)
        assert same_bits(weights_of(again), before)
        assert close(logits(merge_lora(ours)), want)

    def test_trains_as_in_peft(self, tmp_path):
        model = by_peft(tmp_path / "peft", llama(), r=self.R)
        ours = loaded(llama(), tmp_path / "peft")
        assert train(ours) == pytest.approx(train(model), rel=1e-5)

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_starts_for_which_peft_takes_a_smaller_rank_in_silence(self, init, rslora, tmp_path):
        """k_proj has 16 rows: A [16, in], while the configuration says r = 20, as does s."""
        options = {"r": 20, "init_lora_weights": init, "use_rslora": rslora}
        model = by_peft(tmp_path / "peft", llama(), **options)
        state = read_adapter(tmp_path / "peft", residual_base=True)
        assert {layer.r for layer in state.layers.values()} == {16, 20}
        s = 8 / (20**0.5 if rslora else 20)
        for name, layer in state.layers.items():
            assert layer.scaling == pytest.approx(s)
            assert state.config.layer_rank(name) == layer.r
            assert state.config.layer_scaling(name) == pytest.approx(s)
        want = logits(model)
        ours = loaded(model.unload(), tmp_path / "peft", residual_base=True)
        assert close(logits(ours), want)

    def test_another_rank_than_that_is_another_adapter(self, tmp_path):
        by_peft(tmp_path, llama(), r=20, init_lora_weights="pissa")
        tensors = safetensors.load_file(tmp_path / ADAPTER_FILE)
        layer = "base_model.model.model.layers.0.self_attn.k_proj"
        tensors[f"{layer}.lora_A.weight"] = tensors[f"{layer}.lora_A.weight"][:8].clone()
        tensors[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"][:, :8].clone()
        safetensors.save_file(tensors, tmp_path / ADAPTER_FILE)
        with pytest.raises(ValueError, match="rank 8, the configuration says 20"):
            read_adapter(tmp_path, residual_base=True)
