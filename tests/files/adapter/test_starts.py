"""Starts whose adapters are not plain A and B of one rank, on disk: a frozen B (MiCA), a λ (KaSA),
ranks of their own (EVA).
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    disable_adapters,
    hotswap_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
    unload_lora,
)
from lora_kernels.files.adapter.folder import read_adapter
from lora_kernels.model.install import adapted_layers
from lora_kernels.model.lora import adapter_state

from ...support.adapters import peft_config
from ...support.packages import needs_peft, needs_transformers
from ...support.running import TIGHT, logits, move, quiet, start_data, train
from ...support.tiny_models import llama

pytestmark = needs_transformers

TARGETS = ["q_proj", "down_proj"]


def base() -> nn.Module:
    return llama(dtype=torch.float64)


def trained(name: str, seed: int = 2, **options) -> nn.Module:
    """A model with an adapter of that start, after some steps."""
    model = base()
    config = LoRAConfig(r=4, init_lora_weights=name, target_modules=TARGETS, **options)
    torch.manual_seed(seed)
    quiet(model, config, **start_data(model, config))
    train(model, seed=seed)
    return model


def trains(model: nn.Module) -> set[str]:
    """The last parts of the names of all parameters that train."""
    return {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}


@needs_peft
class TestMiCA:
    def of_peft(self, folder) -> torch.Tensor:
        """Writes an adapter that PEFT has made and trained; its logits."""
        import peft

        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="mica")
        model = peft.get_peft_model(llama(), config).eval()
        move(model)
        model.save_pretrained(folder)
        return logits(model)

    def test_of_peft(self, tmp_path):
        want = self.of_peft(tmp_path / "peft")
        assert peft_config(tmp_path / "peft")["init_lora_weights"] == "mica"
        for folder, form in (("peft", "native"), ("native", "peft"), ("peft", "peft")):
            model = llama()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load_adapter(model, tmp_path / folder, progress=False)
            assert (logits(model) - want).abs().max() <= 1e-6
            assert trains(model) == {"lora_A"}
            save_adapter(model, tmp_path / form, format=form)

    def test_trains_on(self, tmp_path):
        """Both formats, by their recipes."""
        model = trained("mica")
        for form in ("native", "peft"):
            save_adapter(model, tmp_path / form, format=form)
            fresh = base()
            load_adapter(fresh, tmp_path / form, progress=False)
            assert trains(model) == trains(fresh) == {"lora_A"}
            train(fresh)
            for name, layer in adapted_layers(model).items():
                assert torch.equal(adapted_layers(fresh)[name].lora_B, layer.lora_B)
                assert not torch.equal(adapted_layers(fresh)[name].lora_A, layer.lora_A)

    def test_takes_anothers_place(self, tmp_path):
        """What trains is that of the adapter that is there now."""
        model, mica = trained("lora"), trained("mica")
        for name, own in (("lora", model), ("mica", mica)):
            save_adapter(own, tmp_path / name)
        hotswap_adapter(model, tmp_path / "mica")
        assert torch.equal(logits(model), logits(mica)) and trains(model) == {"lora_A"}
        hotswap_adapter(model, tmp_path / "lora")
        assert trains(model) == {"lora_A", "lora_B"}

    def test_truncated(self, tmp_path):
        """B of an SVD has nothing of MiCA."""
        save_adapter(trained("mica"), tmp_path, compress_to=2)
        assert {layer.trains for layer in read_adapter(tmp_path).layers.values()} == {"AB"}


@needs_peft
def test_ranks_of_eva(tmp_path):
    import peft

    model = trained("eva", lora_alpha=6, use_rslora=True)
    state = adapter_state(model)
    ranks = {name: layer.r for name, layer in state.layers.items()}
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 4 * 4
    for form in ("native", "peft"):
        save_adapter(model, tmp_path / form, format=form)
        read = read_adapter(tmp_path / form)
        assert read.config == state.config and read.config.rank_pattern
        for name, layer in read.layers.items():
            assert read.config.layer_rank(name) == layer.r == ranks[name]
            assert read.config.layer_alpha(name) == layer.lora_alpha == 6 * layer.r / 4
        fresh = base()
        load_adapter(fresh, tmp_path / form, progress=False)
        assert torch.equal(logits(fresh), logits(model))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    assert (logits(theirs) - logits(model)).abs().max() <= TIGHT


class TestKaSA:
    def test_another_takes_its_place(self, tmp_path):
        model = trained("kasa", residual="implicit")
        other = trained("kasa", 5)
        want = logits(other)
        save_adapter(other, tmp_path / "native", format="native")
        report = save_adapter(other, tmp_path / "peft")
        assert len(report.folded) == 4 and "only format='native' keeps it" in str(report)
        hotswap_adapter(model, tmp_path / "native")
        assert (logits(model) - want).abs().max() <= TIGHT
        for name, layer in adapter_state(model).layers.items():
            own = adapter_state(other).layers[name]
            assert torch.equal(layer.lora_diag, own.lora_diag)
            assert torch.equal(layer.start_A, own.start_A)
        with pytest.raises(ValueError, match="this one has lora_diag, the new one does not"):
            hotswap_adapter(model, tmp_path / "peft")
        assert (logits(model) - want).abs().max() <= TIGHT

    def test_beside_others(self):
        """Each truncates the base by itself."""
        model, plain = base(), logits(base())
        wanted = {}
        for seed, name in enumerate(("kasa", "pissa", "lora")):
            options = {"residual": "implicit", "r": seed + 2, "target_modules": TARGETS}
            config = LoRAConfig(init_lora_weights=name, **options)
            add_lora(model, config, adapter_name=name, progress=False)
            train(model, seed=seed)
            wanted[name] = logits(model)
        for name, want in wanted.items():
            set_adapter(model, name)
            assert torch.equal(logits(model), want)
            with disable_adapters(model):
                assert torch.equal(logits(model), plain)
        set_adapter(model, "kasa")
        assert (logits(merge_lora(copy.deepcopy(model))) - wanted["kasa"]).abs().max() <= TIGHT
        assert torch.equal(logits(unload_lora(model)), plain)

    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    def test_truncated(self, residual, tmp_path):
        """Rank 2r holds s·B diag(λ) A and what is taken away."""
        model = trained("kasa", residual=residual)
        assert save_adapter(model, tmp_path / "all", compress_to=8).error <= 1e-12
        fresh = base()
        load_adapter(fresh, tmp_path / "all", progress=False)
        assert (logits(fresh) - logits(model)).abs().max() <= TIGHT
        small = save_adapter(model, tmp_path / "small", compress_to=4)
        for name, layer in adapter_state(model).layers.items():
            taken = layer.start_B @ layer.start_A
            update = layer.lora_B * layer.lora_diag @ layer.lora_A - taken
            values = torch.linalg.svdvals(update)
            error = float(values[4:].norm() / values.norm())
            assert small.errors[name] == pytest.approx(error, rel=1e-6)
