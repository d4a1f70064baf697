"""SmolLM2-135M in PEFT."""

from __future__ import annotations

import copy

import torch

from ..support.packages import needs_peft, needs_real_model
from ..support.peft_models import accelerate, initialize


@needs_real_model
@needs_peft
def test_real_model(real_model, tmp_path):
    """Initialized, disabled, trained, saved, and loaded by plain PEFT onto the original base."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = copy.deepcopy(real_model)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        want = base(ids).logits
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config)
    report = initialize(model, "loram")
    assert len(report.layers) == 210
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    fused = accelerate(model)
    assert len(fused.layers) == 210 and not fused.left
    with torch.no_grad():
        # Roundings of 30 blocks in float32, of logits up to 20.
        assert float((model(ids).logits - want).abs().max()) <= 1e-3

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, want)
        loaded = PeftModel.from_pretrained(copy.deepcopy(real_model), tmp_path)
        assert float((loaded(ids).logits - trained).abs().max()) <= 1e-3
    assert float((trained - want).abs().max()) > 0.1
