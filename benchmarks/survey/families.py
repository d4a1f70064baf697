"""A tiny random model of nearly every architecture in transformers' AutoModel mappings.

`tiny_model` shrinks a configuration by the names of its fields; `_OVERRIDES` has the fields for
which these rules fail. `inputs_for` finds the inputs that a model accepts, and `outputs` returns
its outputs.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
WIDTH = 32
LABELS = 5  # more than the adapters' rank
SECONDS = 20
PARAMETERS = 100_000_000


class CannotBuildError(Exception):
    """No tiny model of the class can be built; the text gives the reason."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the block if the block takes longer. Works only in the main
    thread.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left = max(outer - (time.monotonic() - began), 0.001) if outer else 0
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def family_classes() -> dict[str, str]:
    """{name of a model class: its model type} for all classes of the AutoModel mappings."""
    from transformers.models.auto import modeling_auto

    classes: dict[str, list[str]] = {}
    for name, mapping in vars(modeling_auto).items():
        if not name.endswith("_MAPPING_NAMES") or name == "CONFIG_MAPPING_NAMES":
            continue
        for model_type, found in mapping.items():
            for class_name in (found,) if isinstance(found, str) else found:
                classes.setdefault(class_name, []).append(model_type)
    return {name: _family(name, types) for name, types in classes.items()}


def _family(class_name: str, model_types: list[str]) -> str:
    """The class's own model type, if several model types share the class."""
    import transformers

    if len(set(model_types)) > 1:
        config_class = getattr(getattr(transformers, class_name, None), "config_class", None)
        return getattr(config_class, "model_type", "") or model_types[0]
    return model_types[0]


# --- configurations -------------------------------------------------------------------------------

# (pattern of a field's whole name, new value of an integer); the first match is used.
_Rule = tuple[str, int | Callable[[int], int]]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _keep(value: int) -> int:
    return value


_RULES: tuple[_Rule, ...] = (
    (r".*(seed|sampling_rate|sample_rate|theta|temperature|factor|stride|padding|kernel.*)", _keep),
    (r"num_encoder_blocks", _keep),
    (r"(.*_)?n_groups", _at_most(1)),
    (r"type_vocab_size", _at_most(2)),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"num_dense_layers|first_k_dense_replace|num_kv_shared_layers", _at_most(1)),
    (
        r"(.*_)?layers|n_layer|(.*_)?depth|(.*_)?num_layers|num_.*blocks|depth_decoder.*",
        _at_most(2),
    ),
    (r"(.*_)?(num_key_value_heads|n_kv_heads|num_kv_heads)(_.*)?", _at_most(1)),
    (r"n_mamba_heads", _keep),
    (r"(.*_)?(heads|n_head|num_heads)", _at_most(2)),
    (r"qk_(rope|nope)_head_dim", _at_most(8)),
    (r"(.*_)?(head_dim|dim_head|head_size)|d_kv|d_head|kv_channels|(.*_)?lora_rank", _at_most(16)),
    (r"n_shared_experts|n_group|topk_group", _at_most(1)),
    (r"(.*_)?(num_|n_).*experts", _at_most(4)),
    (r"(.*_)?(experts_per_tok(en)?|moe_k|top_k|moe_topk|router_top_k)", _at_most(2)),
    (r"moe_.*(size|dim)|.*expert.*(size|dim)", _at_most(32)),
    (r"(.*_)?(intermediate|ffn|feedforward|mlp|inner)_?(hidden_)?(size|dim)", _at_most(48)),
    (r"(.*_)?ffn_dim|d_ff|d_inner|n_inner|dim_feedforward|d_ffn", _at_most(48)),
    (r"image_size|input_size|img_size|max_image_size|max_img_size|crop_size", _at_most(32)),
    (r"patch_size", _at_most(8)),
    (r"rotary_dim", _at_most(8)),
    (r"(.*_)?(num_mel_bins|n_mels|mel_bins|feature_size|mel_dim|num_mels|mel_channels)", 16),
    (r"max_source_positions", 32),
    (r"sliding_window(_size)?|attention_window|local_attention|attention_chunk_size", _at_most(4)),
    (r"window_size", _at_most(4)),
    (r"num_conv_pos_embeddings", _at_most(16)),
    (r"num_conv_pos_embedding_groups", _at_most(2)),
    (r"num_queries|num_query_tokens|num_latents|latent_query_num|.*n_latents", _at_most(8)),
    (r"num_quantizers|num_codebooks", _at_most(4)),
    (r".*(position|positions|position_embeddings|n_ctx|seq_len|seq_length)(_.*)?", _at_most(64)),
    (r"state_size|.*d_state|ssm_state_size", _at_most(8)),
)
_LARGE = 64  # fields without a rule that are at least this large become WIDTH
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
# Fields that have no default and that some models need.
_NEEDED = {
    "head_dim": 16,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_TOKEN = re.compile(r".*(token_id|token_index|token_idx|_token)|(pad|bos|eos|unk|mask)_index")
_DEPTHS = re.compile(r"depths?|.*blocks?|.*layers|num_block_repeats|.*_of_layers|block_sizes")


def _shrunk_list(name: str, value: Any) -> Any:
    if not value or not all(type(item) is int for item in value):
        return value
    if name in ("encode_proj_layers", "extract_layers"):
        return value
    if re.fullmatch(r".*(kernel|stride|padding|dilation|ratio|scale|index|indices|rate).*", name):
        return value
    if _DEPTHS.fullmatch(name):
        return [1 for _ in value]
    if "heads" in name:
        return [min(item, 2) for item in value]
    return [min(item, WIDTH) if item >= _LARGE / 2 else item for item in value]


class _Shrinker:
    """Makes tiny configurations; token ids of the same name agree in the whole tree."""

    def __init__(self) -> None:
        self._tokens = dict(_TOKENS)

    def config(
        self, config_class: Any, given: dict[str, Any], changes: dict[str, Any] | None = None
    ) -> Any:
        """`given` has the values that the class containing this configuration sets by default."""
        from transformers import AutoConfig

        default = config_class(**given)
        own = _own_fields(config_class) | given
        changed = {name: self._value(name, value, own) for name, value in own.items()}
        subs = {name: getattr(default, name, None) for name in config_class.sub_configs}
        changed |= {n: self.config(type(s), _given(s)) for n, s in subs.items() if _is_config(s)}
        rope = getattr(default, "rope_parameters", None)
        if isinstance(rope, dict) and (smaller := _shrunk_rope(rope)) != rope:
            changed["rope_parameters"] = smaller
        changed = {n: v for n, v in changed.items() if n in given or v is not own.get(n)}
        changed |= _layer_types(default, own)
        for name, value in _NEEDED.items():
            if name in own and own[name] is None and _attribute(default, name) is None:
                changed[name] = value
        changed |= _few_indices(default, given, own)
        changed |= _OVERRIDES.get(config_class.model_type, {}) | (changes or {})
        for name, value in changed.items():
            if isinstance(value, _Part):
                part_class = type(AutoConfig.for_model(value.model_type))
                changed[name] = self.config(part_class, {}, value.changes)
        return config_class(**changed)

    def _value(self, name: str, value: Any, own: dict[str, Any]) -> Any:
        if isinstance(value, (list, tuple)):
            return _shrunk_list(name, value)
        if type(value) is not int:
            return value
        if _TOKEN.fullmatch(name):
            return self._tokens.setdefault(name, VOCABULARY - 1 - len(self._tokens))
        heads = own.get("num_attention_heads")
        if name == "num_key_value_heads" and value == heads:
            return min(value, 2)
        for pattern, rule in _RULES:
            if re.fullmatch(pattern, name):
                return rule if isinstance(rule, int) else rule(value)
        return WIDTH if value >= _LARGE else value


def _layer_types(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """One layer of each type that the model has, but at least two layers."""
    names = [n for n in own if n.endswith("layer_types") and getattr(default, n, None)]
    if not names:
        return {}
    columns = [list(getattr(default, name)) for name in names]
    if len({len(column) for column in columns}) > 1:
        return {}
    kinds = list(dict.fromkeys(zip(*columns, strict=True)))
    kinds = kinds if len(kinds) > 1 else kinds * 2
    found: dict[str, Any] = {
        n: list(c) for n, c in zip(names, zip(*kinds, strict=True), strict=True)
    }
    layers = [n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in own]
    return found | {name: len(kinds) for name in layers[:1]}


def _is_config(value: object) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _own_fields(config_class: Any) -> dict[str, Any]:
    """The defaults of the fields that the class adds to those of every configuration."""
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    found = {}
    for field in dataclasses.fields(config_class):
        if field.name in common or not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _given(config: Any) -> dict[str, Any]:
    """The fields in which a configuration differs from the default of its class."""
    default = type(config)()
    names = [name for name in _own_fields(type(config)) if name not in config.sub_configs]
    pairs = {name: _attribute(config, name) for name in names if not name.endswith("_types")}
    simple = (int, float, str, list, tuple)
    found = {
        name: value
        for name, value in pairs.items()
        if isinstance(value, simple)
        and not name.startswith("_")
        and value != _attribute(default, name)
    }
    indices = _attribute(config, "out_indices")
    if indices and indices != _attribute(default, "out_indices"):
        found["out_indices"] = list(indices)
    return found


def _attribute(config: Any, name: str) -> Any:
    """None for a value that differs from layer to layer, because configurations raise an error for
    it.
    """
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters for heads of size 16, of which a part may be rotated."""
    half = max(1, int(8 * (rope.get("partial_rotary_factor") or 1)))
    changed = dict(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            changed[name] = _shrunk_rope(value)
        elif name == "mrope_section":
            first = max(1, half // len(value))
            rest = [(half - first) // (len(value) - 1)] * (len(value) - 1)
            changed[name] = [half - sum(rest), *rest]
        elif name in ("long_factor", "short_factor"):
            changed[name] = [1.0] * half
        elif name == "original_max_position_embeddings":
            changed[name] = 32
    return changed


def _few_indices(default: Any, given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A backbone whose stages are its layers gets as many layers as the model reads."""
    wanted = given.get("out_indices")
    if not wanted:
        return {}
    layers = _attribute(default, "num_hidden_layers")
    if len(getattr(default, "stage_names", ())) == (layers or 0) + 1:
        layers = len(wanted)
        return {"num_hidden_layers": layers, "out_indices": list(range(1, layers + 1))}
    return {"out_indices": list(wanted)}


def _parts(config: Any) -> Iterator[Any]:
    """The configuration and all configurations within it."""
    yield config
    for name in config.sub_configs:
        if _is_config(sub := getattr(config, name, None)):
            yield from _parts(sub)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tiny configuration of another model type, as a value in `_OVERRIDES`."""

    model_type: str
    changes: dict[str, Any]


def _resnet(*stages: str) -> dict[str, Any]:
    return {"backbone_config": _Part("resnet", {"out_features": list(stages)})}


def _mrope(*section: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"rope_parameters": rope}


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_SWIN = {"embed_dim": 16, "image_size": 64, "window_size": 2}
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3]}
_ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
_EFFICIENT = {"width_coefficient": 1.0, "depth_coefficient": 1.0}
_FOUR_LAYERS = {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]}

# {model type: fields that the rules get wrong}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": _EFFICIENT | {"hidden_dim": 1280},
    "autoformer": _SERIES | {"label_length": 4},
    "beit": _FOUR_LAYERS,
    "bit": {"num_groups": 8},
    "blip-2": {"image_token_index": 95},
    "bridgetower": {"hidden_size": 64},
    "bridgetower_text_model": {"hidden_size": 64},
    "bridgetower_vision_model": {"hidden_size": 64},
    "bros": {"hidden_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 95}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "conditional_detr": _resnet(*_STAGES)
    | {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "cvt": {"depth": [1, 2, 3]},
    "dab-detr": _resnet("stage4"),
    "data2vec-vision": _FOUR_LAYERS,
    "dbrx": {"attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deformable_detr": _resnet("stage2", "stage3", "stage4"),
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": (1, 0),
        "intermediate_feature_dims": (32, 32),
        "scaled_images_feature_dims": (32, 32, 32),
    },
    "detr": _resnet(*_STAGES) | {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "global_head_dim": 16,
    },
    "dinov3_convnext": {"hidden_sizes": [32, 32, 32, 32], "depths": [1, 1, 1, 1]},
    "donut-swin": _SWIN,
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
    "efficientloftr": {"stage_num_blocks": [1, 1, 1, 1], "out_features": [32, 32, 32, 32]},
    "efficientnet": _EFFICIENT | {"hidden_dim": 1280},
    "emu3": {"vocabulary_map": {"<image>": 95, "<|extra_200|>": 94}},
    "ernie4_5_vl_moe_text": _mrope(3, 3, 2),
    "exaone4_5_vision": {"window_size": 32},
    "fastspeech2_conformer_hifigan": {"model_in_dim": 16},
    "fun_asr_nano_adaptor": {"intermediate_size": 8},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_moe_text": _mrope(1, 1, 2),
    "glm4v_text": _mrope(2, 3, 3),
    "glm_image_text": _mrope(2, 3, 3),
    "glm_ocr_text": _mrope(2, 3, 3),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "hy_v4_vl_text": _mrope(2, 1, 1),
    "informer": _SERIES,
    "instructblip": {"image_token_index": 95},
    "instructblipvideo": {"video_token_index": 95},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "levit": {"image_size": 128, "patch_size": 16, "num_attention_heads": [2, 2, 2]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "llama4_vision_model": {
        "intermediate_size": 128,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
    "longcat_flash": {"head_dim": 8},
    "lw_detr_vit": {"num_windows": 4, "patch_size": 4},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "mask2former": {"feature_size": 32},
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32},
    "maskformer-swin": _SWIN,
    "mobilevitv2": {"image_size": 64},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron3_5_transcribe_audio": {"chunk_right_context": 8},
    "nemotron3_diarization": {"chunk_right_context": 8},
    "nystromformer": {"segment_means_seq_len": 10, "num_landmarks": 2},
    "paddleocr_vl_text": _mrope(2, 3, 3),
    "perceiver": {
        "d_model": 32,
        "d_latents": 32,
        "num_self_attention_heads": 2,
        "num_self_attends_per_block": 1,
    },
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "qwen2_5_omni_text": _mrope(2, 3, 3),
    "qwen2_5_omni_talker": _mrope(2, 3, 3),
    "qwen2_5_vl_text": _mrope(2, 3, 3),
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": _mrope(2, 3, 3),
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "hash_seed": 0},
    "sam2_hiera_det_model": {
        "embed_dim_per_stage": [32, 32, 32, 32],
        "num_attention_heads_per_stage": [1, 2, 2, 2],
        "blocks_per_stage": [1, 1, 1, 1],
        "image_size": [64, 64],
        "global_attention_blocks": [2],
        "window_size_per_stage": [8, 4, 2, 2],
    },
    "sam_hq_vision_model": {"num_pos_feats": 16},
    "sam_vision_model": {"num_pos_feats": 16},
    "seamless_m4t": {"t2u_pad_token_id": 1, "t2u_bos_token_id": 0, "t2u_eos_token_id": 2},
    "seamless_m4t_v2": {"t2u_pad_token_id": 1, "t2u_bos_token_id": 0, "t2u_eos_token_id": 2},
    "shieldgemma2": {"yes_token_index": 90, "no_token_index": 91},
    "siglip2_vision_model": {"num_patches": 16},
    "step3p5": {"sliding_window": 4},
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": _SWIN,
    "table-transformer": _resnet("stage4"),
    "time_series_transformer": _SERIES,
    "tvp": {"visual_prompt_size": 4, "num_frames": 4},
    "vitmatte": {
        "backbone_config": _Part(
            "vitdet",
            {"patch_size": 16, "image_size": 64, "num_channels": 4, "out_features": ["stage2"]},
        )
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
}
# {class: fields}, for families whose classes need different fields
_CLASS_OVERRIDES: dict[str, dict[str, Any]] = {
    "Blip2ForImageTextRetrieval": {"use_qformer_text_input": True},
    "ReformerModelWithLMHead": {"is_decoder": True},
}


def tiny_config(class_name: str) -> Any:
    import transformers

    config_class = getattr(transformers, class_name).config_class
    if config_class is None:
        raise CannotBuildError("the class has no configuration class")
    config = _Shrinker().config(config_class, {}, _CLASS_OVERRIDES.get(class_name, {}))
    for part in _parts(config):
        if _attribute(part, "pad_token_id") is None:
            part.pad_token_id = 0
    if config.is_encoder_decoder and _attribute(config, "decoder_start_token_id") is None:
        config.decoder_start_token_id = 2
    config.num_labels = 2 if "QuestionAnswering" in class_name else LABELS
    return config


# --- models ---------------------------------------------------------------------------------------


def tiny_model(class_name: str, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode, in float32, with weights large enough to affect the outputs.

    Raises:
        CannotBuildError: with the reason.

    """
    import transformers

    try:
        with time_limit(SECONDS):
            model_class = getattr(transformers, class_name)
            config = tiny_config(class_name)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > PARAMETERS:
                raise CannotBuildError(f"{size:,} parameters")
            torch.manual_seed(seed)
            model = model_class(tiny_config(class_name)).float().eval()
            _randomize(model, seed)
    except CannotBuildError:
        raise
    except Exception as error:
        raise CannotBuildError(one_line(error)) from error
    return model


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Makes matrices and biases large enough that an error in them is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # fixed sines, recomputed when the model is loaded
            continue
        if parameter.dim() == 2:
            parameter.normal_(std=0.15, generator=generator)
        elif name.endswith("bias") and parameter.dim() == 1:
            parameter.normal_(std=0.05, generator=generator)
    for module in model.modules():  # zero in every model of this kind, also after loading
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0


def one_line(error: BaseException, limit: int = 200) -> str:
    """The kind of the error and the beginning of its text, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:limit]


# --- inputs ---------------------------------------------------------------------------------------


def _find(config: Any, *names: str) -> Any:
    """The first of these attributes that a configuration, or one inside it, has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not _is_config(value):
            return value
    for sub in getattr(config, "sub_configs", {}):
        inner = getattr(config, sub, None)
        if _is_config(inner) and (value := _find(inner, *names)) is not None:
            return value
    return None


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tokens(config: Any, rows: int = 2, length: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    eos = _find(config, "eos_token_id")
    if isinstance(eos, int) and eos < VOCABULARY:
        ids[:, -1] = eos  # BART's classifier reads this token
    return ids


def _image(config: Any, rows: int = 2) -> Tensor:
    size = _find(config, "image_size", "img_size", "input_size")
    size = size if isinstance(size, (list, tuple)) else (size or 64, size or 64)
    channels = _find(config, "num_channels", "in_channels", "in_chans")
    return _normal(rows, channels if isinstance(channels, int) else 3, *size[-2:])


def _video(config: Any, rows: int = 2) -> Tensor:
    frames = _find(config, "num_frames", "frames_per_clip") or 4
    return torch.stack([_image(config, rows)] * frames, dim=1)


def _mel(config: Any) -> int:
    names = ("num_mel_bins", "mel_bins", "n_mels", "feature_size", "input_feat_per_channel")
    value = _find(config, *names)
    return value if isinstance(value, int) else 16


# The value of an argument with this name, for every forward that has the argument.
_OPTIONAL: dict[str, Callable[[Any], Any]] = {
    "input_ids": _tokens,
    "decoder_input_ids": lambda config: _tokens(config, 2, 6),
    "pixel_values": _image,
    "input_values": lambda config: _normal(2, 4000),
    "bbox": lambda config: torch.tensor([1, 2, 11, 12]).repeat(2, 10, 1),
}
# The same, only for a forward that requires the argument.
_NECESSARY: dict[str, Callable[[Any], Any]] = {
    "aspect_ratio_ids": lambda config: torch.ones(2, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda config: torch.ones(2, 1, 4, dtype=torch.long),
    "audio_mel": lambda config: _normal(2, 64, config.input_feat_size),
    "audio_mel_mask": lambda config: torch.zeros(2, 64, dtype=torch.bool),
    "hidden_states": lambda config: _normal(2, 10, WIDTH),
    "input_features": lambda config: _normal(2, _mel(config), 64),
    "input_features_mask": lambda config: torch.ones(2, 64, dtype=torch.long),
    "inputs": lambda config: _normal(2, 16, config.d_model),
    "inputs_embeds": lambda config: _normal(2, 10, WIDTH),
    "past_values": lambda config: _normal(2, _find(config, "context_length"), 1),
    "pixel_attention_mask": lambda config: torch.ones(2, 16, dtype=torch.long),
    "pixel_values_videos": _video,
    "prompt_masks": _image,
    "prompt_pixel_values": _image,
    "qformer_input_ids": _tokens,
    "query_embeds": lambda config: _normal(2, 4, WIDTH),
    "spatial_shapes": lambda config: torch.tensor([[4, 4], [4, 4]]),
    "task_inputs": lambda config: _tokens(config, 2, _find(config, "task_seq_len") or 77),
}


def _series(config: Any) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    future = config.prediction_length
    return {
        "past_values": _normal(2, past),
        "past_time_features": torch.zeros(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": _normal(2, future),
        "future_time_features": torch.zeros(2, future, config.num_time_features),
    }


def _trajectory(config: Any) -> dict[str, Any]:
    return {
        "states": _normal(2, 4, config.state_dim),
        "actions": _normal(2, 4, config.act_dim),
        "rewards": _normal(2, 4, 1),
        "returns_to_go": _normal(2, 4, 1),
        "timesteps": torch.arange(4).repeat(2, 1),
        "attention_mask": torch.ones(2, 4),
    }


def _codes(config: Any, rows: int = 2) -> Tensor:
    return _tokens(config, rows * (_find(config, "num_codebooks") or 4), 6)


# {model type: the inputs of its models}
_SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "autoformer": _series,
    "clap": lambda c: {"input_ids": _tokens(c), "input_features": _normal(2, 1, 64, _mel(c))},
    "clap_audio_model": lambda c: {"input_features": _normal(2, 1, 64, _mel(c))},
    "decision_transformer": _trajectory,
    "depth_pro": lambda c: {"pixel_values": _normal(1, 3, 128, 128)},
    "idefics": lambda c: {
        "input_ids": _tokens(c),
        "pixel_values": _image(c)[:, None],
        "image_attention_mask": torch.ones(2, 10, 1),
    },
    "informer": _series,
    "kyutai_speech_to_text": lambda c: {"input_ids": _tokens(c).repeat(5, 1, 1).permute(1, 2, 0)},
    "lightglue": lambda c: {"pixel_values": _normal(1, 2, 3, 64, 64)},
    "lxmert": lambda c: {
        "input_ids": _tokens(c),
        "visual_feats": _normal(2, 4, c.visual_feat_dim),
        "visual_pos": _normal(2, 4, 4),
    },
    "mllama_vision_model": lambda c: {
        "pixel_values": _normal(2, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
    },
    "musicgen": lambda c: {"input_ids": _tokens(c), "decoder_input_ids": _codes(c)},
    "musicgen_decoder": lambda c: {"input_ids": _codes(c)},
    "musicgen_melody": lambda c: {"input_ids": _tokens(c), "decoder_input_ids": _codes(c)},
    "musicgen_melody_decoder": lambda c: {"input_ids": _codes(c)},
    "pix2struct": lambda c: {
        "flattened_patches": torch.nn.functional.pad(
            _normal(2, 16, c.vision_config.patch_embed_hidden_size), (2, 0), value=1.0
        ),
        "decoder_input_ids": _tokens(c, 2, 6),
    },
    "seggpt": lambda c: {
        "pixel_values": _normal(2, 3, 16, 32),
        "prompt_pixel_values": _normal(2, 3, 16, 32),
        "prompt_masks": _normal(2, 3, 16, 32),
    },
    "siglip2": lambda c: {
        "input_ids": _tokens(c),
        "pixel_values": _normal(2, 16, 3 * c.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "siglip2_vision_model": lambda c: {
        "pixel_values": _normal(2, 16, 3 * c.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    },
    "splinter": lambda c: {
        "input_ids": _tokens(c).index_fill(1, torch.tensor([3]), c.question_token_id)
    },
    "superglue": lambda c: {"pixel_values": _normal(1, 2, 3, 64, 64)},
    "time_series_transformer": _series,
    "timesfm": lambda c: {
        "past_values": _normal(2, 32),
        "past_values_padding": torch.zeros(2, 32, dtype=torch.long),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda c: {"past_values": _normal(2, 32)},
    "tvp": lambda c: {"input_ids": _tokens(c), "pixel_values": _normal(2, 4, 3, 32, 32)},
    "vitmatte": lambda c: {"pixel_values": _normal(2, 4, 64, 64)},
    "xclip": lambda c: {"input_ids": _tokens(c), "pixel_values": _video(c)},
}


def _patches(config: Any, name: str, grid_name: str) -> Iterator[dict[str, Any]]:
    """An image of 4 x 4 patches, for vision towers without a fixed image size."""
    config = getattr(config, "vision_config", config)
    patch = _find(config, "patch_size")
    if not isinstance(patch, int):
        return
    frames = _find(config, "temporal_patch_size", "patch_temporal") or 1
    channels = _find(config, "in_channels", "in_chans", "num_channels", "in_dim") or 3
    for shape in (
        (channels * frames * patch**2,),
        (channels * patch**2,),
        (channels, patch, patch),
    ):
        yield {name: _normal(16, *shape), grid_name: torch.tensor([[1, 4, 4]])}


def _with_placeholders(model: Any, parameters: Any) -> Iterator[dict[str, Any]]:
    """Text that contains an image or a sound, with as many tokens as the tower returns rows."""
    config = model.config
    kinds = (
        ("get_image_features", "pixel_values", ("image_token_id", "image_token_index")),
        ("get_audio_features", "input_features", ("audio_token_id", "audio_token_index")),
        ("get_audio_features", "input_values", ("audio_token_id", "audio_token_index")),
    )
    for method, name, token_names in kinds:
        token = next((t for n in token_names if (t := getattr(config, n, None)) is not None), None)
        owner = next(
            (m for m in (model, getattr(model, "model", None)) if hasattr(m, method)), None
        )
        if token is None or owner is None or name not in parameters:
            continue
        for media in _media(config, name, parameters):
            count = _feature_rows(owner, method, media, config)
            if count:
                ids = _tokens(config, 1, 8)
                middle = torch.full((1, count), token)
                ids = torch.cat([ids[:, :4], middle, ids[:, 4:]], dim=1)
                kinds_of_tokens = {"mm_token_type_ids": (ids == token).long()}
                yield {"input_ids": ids} | media | kinds_of_tokens
                yield {"input_ids": ids} | media


def _media(config: Any, name: str, parameters: Any) -> Iterator[dict[str, Any]]:
    if name == "pixel_values":
        yield {name: _image(config, 1)}
        if "image_grid_thw" in parameters:
            yield from _patches(config, name, "image_grid_thw")
    elif name == "input_features":
        length = 2 * (_find(config, "max_source_positions") or WIDTH)
        masks = [n for n in parameters if re.fullmatch(r"(input_)?features?_.*mask", n)]
        for shape in ((1, _mel(config), length), (1, length, _mel(config))):
            yield {name: _normal(*shape)}
            yield {name: _normal(*shape)} | {n: torch.ones(1, length).long() for n in masks}
    else:
        yield {name: _normal(1, 4000)}
        yield {name: _normal(1, 1, 4000)}


@torch.no_grad()
def _feature_rows(owner: Any, method: str, media: dict[str, Any], config: Any) -> int:
    """The number of token embeddings of an image or a sound; 0 if the tower does not accept it."""
    try:
        found = getattr(owner, method)(**media)
    except Exception:
        return 0
    found = getattr(found, "pooler_output", found)
    width = _find(config.get_text_config(), "hidden_size", "d_model", "n_embd")
    return sum(t.numel() for t in _floating(found)) // width


def _features(config: Any) -> Iterator[dict[str, Any]]:
    mel = _mel(config)
    long = 2 * (_find(config, "max_source_positions") or WIDTH)
    for rows, columns in ((mel, long), (64, mel), (64, 2 * mel), (mel, 256)):
        features = {"input_features": _normal(2, rows, columns)}
        yield features
        for length in {rows, columns} - {mel, 2 * mel}:
            yield features | {"input_features_mask": torch.ones(2, length, dtype=torch.long)}


def _values(config: Any) -> Iterator[dict[str, Any]]:
    long = _find(config, "max_length")
    long = long if isinstance(long, int) and long > 20 else 64
    mel = _mel(config)
    for shape in ((2, 4000), (2, 1, 4000), (2, long, mel), (2, 1, 64, mel), (1, 20_000)):
        yield {"input_values": _normal(*shape)}


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs that a model may accept, the best first, with all arguments that it requires."""
    parameters = dict(inspect.signature(model.forward).parameters)
    known = _OPTIONAL | _NECESSARY
    needed = [n for n, p in parameters.items() if p.default is p.empty and n in known]
    for inputs in _suggestions(model, parameters, needed):
        inputs = {name: value for name, value in inputs.items() if name in parameters}
        missing = [name for name in needed if name not in inputs]
        yield inputs | {name: known[name](model.config) for name in missing}


def _suggestions(model: Any, parameters: Any, needed: list[str]) -> Iterator[dict[str, Any]]:
    config = model.config
    if type(model).__name__.endswith("ForMultipleChoice"):
        yield {"input_ids": torch.stack([_tokens(config), _tokens(config)], dim=1)}
        return
    if config.model_type in _SPECIAL:
        yield _SPECIAL[config.model_type](config)
    full = {name: value(config) for name, value in _OPTIONAL.items() if name in parameters}
    if "input_ids" in parameters:
        yield from _with_placeholders(model, parameters)
    if "grid_thw" in parameters:
        first = next((n for n in needed if n != "grid_thw"), "pixel_values")
        for inputs in _patches(config, first, "grid_thw"):
            yield inputs | {"merge_sizes": torch.tensor([1])}
    main = [model.main_input_name] if isinstance(model.main_input_name, str) else []
    yield full
    yield {n: v for n, v in full.items() if n in (*main, *needed)}
    text = {n: full[n] for n in ("input_ids", "decoder_input_ids") if n in full}
    video = "pixel_values" if "pixel_values" in parameters else "pixel_values_videos"
    if video in parameters and video in (*main, *needed):
        yield {video: _video(config)}
    sources = [_features(config)] if "input_features" in parameters else []
    sources += [_values(config)] if "input_values" in parameters else []
    for source in sources:
        for inputs in source:
            yield inputs | {n: v for n, v in text.items() if n in needed or n != "input_ids"}
            yield inputs | text
    yield text
    yield {n: v for n, v in text.items() if n == "input_ids"}


def inputs_for(model: Any) -> dict[str, Any]:
    """Inputs with which the forward runs and returns floating-point outputs.

    Raises:
        CannotBuildError: with the first error.

    """
    reasons = []
    tried = set()
    for inputs in _candidates(model):
        shapes = str(sorted((name, tuple(t.shape)) for name, t in inputs.items()))
        if shapes in tried:
            continue
        tried.add(shapes)
        try:
            with time_limit(SECONDS):
                found = outputs(model, inputs)
        except Exception as error:
            reasons.append(one_line(error))
            continue
        if found and all(t.numel() == 0 or t.isfinite().any() for t in found):
            return inputs
        reasons.append("no finite floating-point output")
    telling = [reason for reason in reasons if "missing" not in reason] + reasons
    raise CannotBuildError("forward: " + (telling[0] if telling else "no inputs known"))


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if not re.search(r"past_key|cache|state_dict|loss_dict", str(name)):
                yield from _floating(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floating(item)


def forward(model: Any, inputs: dict[str, Any], like: Any = None) -> list[Tensor]:
    """The floating-point outputs, with gradients. Every call draws the same random numbers.

    `like` is the model whose signature is used if `model` wraps it.
    """
    torch.manual_seed(0)
    parameters = inspect.signature((like or model).forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if "return_dict" in parameters:
        extra["return_dict"] = True
    return list(_floating(model(**inputs, **extra)))


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, Any], like: Any = None) -> list[Tensor]:
    """The floating-point outputs, without caches."""
    return forward(model, inputs, like)
