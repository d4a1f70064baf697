"""A sample of the survey (`benchmarks/survey`): a class of each kind of model, with `add_lora`,
files, PEFT and the command line. `make survey` runs all of them.
"""

from __future__ import annotations

import pytest

from ..support.exhaustive import EXHAUSTIVE

pytest.importorskip("transformers")
pytest.importorskip("peft")

CLASSES = (
    "LlamaForCausalLM",
    "GPT2LMHeadModel",  # Conv1D
    "BertForTokenClassification",
    "AlbertForMaskedLM",  # a linear layer with "embedding" in its name
    "T5ForConditionalGeneration",  # tied embeddings, reads the dtype of a weight
    "EncoderDecoderModel",
    "WhisperForConditionalGeneration",
    "Wav2Vec2ForXVector",  # reads weights past their layers
    "WavLMModel",
    "MobileBertForMaskedLM",
    "DetrForSegmentation",
    "OneFormerModel",  # keeps layers in lists
    "MambaForCausalLM",
    "JambaForCausalLM",
    "ViTModel",  # renamed by loading
    "SwinModel",
    "Dinov2Model",
    "Qwen2VLForConditionalGeneration",
    "SiglipModel",  # nn.MultiheadAttention
    "GteModel",  # layers that loading computes
    "Qwen2MoeForCausalLM",  # a layer of one output
    "GraniteMoeForCausalLM",
    "DeepseekV3ForCausalLM",  # layers with the names of experts
    "VitsModel",  # the length of the output depends on the weights
)
MORE = (
    "BloomForCausalLM",
    "BartForSequenceClassification",
    "BeitModel",
    "ASTModel",
    "CLIPModel",
    "DeiTModel",
    "DebertaV2Model",
    "DPTModel",
    "ElectraForMaskedLM",
    "FalconForCausalLM",
    "FalconH1ForCausalLM",
    "FalconMambaForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GPTNeoXForCausalLM",
    "GptOssForCausalLM",
    "LayoutLMv3Model",
    "LlavaForConditionalGeneration",
    "Mamba2ForCausalLM",
    "Mask2FormerModel",
    "MixtralForCausalLM",
    "MusicgenForConditionalGeneration",
    "NemotronHForCausalLM",
    "OPTForCausalLM",
    "PaliGemmaForConditionalGeneration",
    "Phi3ForCausalLM",
    "Qwen3ForSequenceClassification",
    "Qwen3NextForCausalLM",
    "ReformerModelWithLMHead",
    "RwkvForCausalLM",
    "SegformerForImageClassification",
    "TimeSeriesTransformerModel",
    "ViTMAEModel",
    "Zamba2ForCausalLM",
)
WARNED = ("DeepseekV3ForCausalLM", "Qwen3NextForCausalLM")


@pytest.mark.parametrize("name", CLASSES + MORE if EXHAUSTIVE else CLASSES[::2])
def test_no_family_is_wrong_silently(name):
    from benchmarks.survey.checks import survey_class
    from benchmarks.survey.families import family_classes

    families = family_classes()
    if name not in families:
        pytest.skip(f"this version of transformers has no {name}")
    row = survey_class(name, families[name])
    assert row.built == "ok", row.built
    failed = {check: text for check, text in row.checks.items() if text.startswith("FAIL")}
    assert not failed
    assert row.checks["start"].startswith(("ok", "left out"))
    assert row.checks["peft"].startswith("warned" if name in WARNED else ("ok", "left out"))
