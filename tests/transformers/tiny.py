"""Any model of transformers in a few thousand parameters.

A default configuration is turned into a dictionary, its numbers are shrunk by the names of their
keys, recursively, and the configuration is built again. What that cannot know is in ``overrides``.
"""

import importlib
import re
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

from tests.transformers.overrides import OVERRIDES

VOCAB = 211  # no other size here equals it, so a dimension of this size is the vocabulary
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
BATCH, TIME = 2, 37
FIRST_TEXT_ID = 100  # ids below belong to special tokens

LAYERS = r"(num|n)_(hidden_)?(layers?|blocks)|n_layers?|num_layers?|depth|.*_layers$"
NO_LAYERS = r"(num|n)_kv_shared_layers|num_nextn_predict_layers"

# Key pattern and value; the first that matches wins.
RULES: tuple[tuple[str, Any], ...] = (
    (r".*(dropout|drop_rate|drop_path|dropout_prob|pdrop|layerdrop|dropout_rate)(_.*)?", 0.0),
    # Small enough for the logits of random weights to feel it, and no scale that does nothing.
    (r"(final|output|lm_head)?_?logits?_soft_?cap(ping)?", 0.5),
    (r"logit_scale|logits_scaling|output_multiplier|lm_head_multiplier|.*width_multiplier", 0.7),
    (r"(router_)?jitter_noise|router_jitter_noise|input_jitter_noise", 0.0),
    (r".*vocab_size(_per_layer_input)?|n_vocab", VOCAB),
    (NO_LAYERS, 0),
    (LAYERS, 2),
    (
        r"num_key_value_heads|num_kv_heads|n_kv_heads?|num_query_groups|multi_query_group_num",
        KV_HEADS,
    ),
    (
        r"(num_)?(attention_)?(num_)?heads|(index_|indexer_)?n_heads?|.*num_attention_heads|.*_attention_heads",
        HEADS,
    ),
    (
        r"head_dim|kv_channels|attention_head_(dim|size)|.*head_dim|.*_head_size|head_size|d_kv",
        HEAD_DIM,
    ),
    (r"rotary_dim|rotary_ndims|index_head_dim", 8),
    (r"(q|kv|o|.*)_lora_rank|.*_low_rank_dim", 16),
    (
        r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|width|text_hidden_size|.*hidden_size|hidden_size_global",
        HIDDEN,
    ),
    (
        r".*hidden_dim|(word_)?embed_proj_dim|embedding_size|out_hidden_size|.*_embed_dim|projection_dim",
        HIDDEN,
    ),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|n_inner|ffn_hidden_size|d_inner|mlp_dim|.*ffn_hidden.*",
        96,
    ),
    (r"image_size|img_size|input_size", 32),
    (r"patch_size|temporal_patch_size|spatial_patch_size", None),
    (r"zero_expert_num", 0),
    (r"encoder_hash_byte_group_vocab|num_embeddings|codebook_size", 64),
    (r"base_channels|latent_channels", 32),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_local_experts", 4),
    (r"(num_experts_per_tok(en)?|moe_top_?k|num_experts_per_token|top_k_experts|moe_k)", 2),
    (
        r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts",
        1,
    ),
    (r"max_position_embeddings|n_positions|max_sequence_length|seq_length|max_seq_len|n_ctx", 128),
    (r"sliding_window.*|attention_chunk_size|chunk_size|local_attention_window|window_size", 16),
    (r"num_query_tokens|num_queries", 4),
    (r"mamba_d_state|state_size|ssm_state_size|d_state", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads|.*mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|time_step_rank|mamba_dt_rank|lru_width|.*rnn_width", HEAD_DIM),
    (r"n_groups|mamba_n_groups", 1),
)
IF_NONE: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "decoder_vocab_size": VOCAB,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
DROPPED = ("per_layer_config",)  # by index of a layer that is gone


def classes() -> dict[str, str]:
    """Every class of the causal and image-text mappings, and a model type that it belongs to."""
    found: dict[str, str] = {}
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                # Several types may share a class; it says itself which configuration is its own.
                found.setdefault(name, model_type)
    return found


def config_class_of(model_class: Any, model_type: str) -> Any:
    """The configuration that the class is built from."""
    own = getattr(model_class, "config_class", None)
    return own or configuration_auto.CONFIG_MAPPING[model_type]


def tiny_config(model_class: Any, model_type: str) -> PretrainedConfig:
    """A configuration of ``model_class`` with two layers and a vocabulary of ``VOCAB``."""
    config_class = config_class_of(model_class, model_type)
    changes = OVERRIDES.get(model_class.__name__, {}).get("config", {})
    default = config_class(**OVERRIDES.get(model_class.__name__, {}).get("build", {}))
    values = shrink(default.to_dict())
    merge(values, changes)
    values = number_special_tokens(values)
    config = config_class.from_dict(values)
    for path, value in OVERRIDES.get(model_class.__name__, {}).get("set", {}).items():
        *parents, last = path.split(".")
        part: Any = config
        for parent in parents:
            part = getattr(part, parent)
        setattr(part, last, value)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return config


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with small numbers."""
    result: dict[str, Any] = {}
    layers_before = {
        value for key, value in values.items() if isinstance(value, int) and _is_layers(key)
    }
    picked = _picked_layers(values, layers_before)
    for key, value in values.items():
        if not isinstance(key, str):
            result[key] = value
        elif key in DROPPED or key in (
            "architectures",
            "transformers_version",
            "id2label",
            "label2id",
            "torch_dtype",
        ):
            continue
        elif isinstance(value, dict):
            result[key] = _shrink_rope(value) if "rope" in key else shrink(value)
        elif isinstance(value, list) and len(value) in layers_before and value:
            result[key] = [_smaller(value[i], key) for i in picked]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            result[key] = len(picked) if _is_layers(key) else _number(key, value)
        elif value is None and key in IF_NONE:
            result[key] = IF_NONE[key]
        else:
            result[key] = value
    if "kv_lora_rank" in values:  # latent attention has a key for each head
        result["num_key_value_heads"] = HEADS
    return result


def _is_layers(key: Any) -> bool:
    return (
        isinstance(key, str)
        and re.fullmatch(LAYERS, key) is not None
        and not re.fullmatch(NO_LAYERS, key)
    )


def _picked_layers(values: dict[str, Any], layers_before: set[int]) -> list[int]:
    """Return the layers to keep: two, or one of each kind."""
    kinds: dict[Any, int] = {}
    for key in ("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern"):
        listed = values.get(key)
        if isinstance(listed, list) and len(listed) in layers_before:
            for index, kind in enumerate(listed):
                kinds.setdefault(str(kind), index)
            break
    picked = sorted(kinds.values())
    return picked if len(picked) >= 2 else [0, 1]


def _smaller(value: Any, key: str) -> Any:
    return min(value, 8) if isinstance(value, int) and not isinstance(value, bool) else value


def _number(key: str, value: Any) -> Any:
    if value == 0:  # switched off
        return value
    for pattern, small in RULES:
        if re.fullmatch(pattern, key):
            return value if small is None else type(value)(small)
    return value


def _shrink_rope(value: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, item in value.items():
        if key == "mrope_section" and isinstance(item, list):
            item = [4, 2, 2] if len(item) == 3 else [4, 4]
        elif key in ("long_factor", "short_factor"):
            item = [1.0] * (HEAD_DIM // 2)
        elif isinstance(item, dict):
            item = _shrink_rope(item)
        result[key] = item
    return result


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put ``changes`` into ``values``; dictionaries are merged."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def number_special_tokens(
    values: dict[str, Any], seen: dict[str, int] | None = None
) -> dict[str, Any]:
    """Give every special token an id of its own below ``FIRST_TEXT_ID``."""
    seen = {} if seen is None else seen
    for key, value in values.items():
        if isinstance(value, dict):
            number_special_tokens(value, seen)
        elif re.fullmatch(r".*token_(id|index)", str(key)) and (
            value is None or isinstance(value, int)
        ):
            if value is not None or key == "pad_token_id":
                values[key] = seen.setdefault(key, 1 + len(seen))
        elif key == "eos_token_id" and isinstance(value, list):
            values[key] = seen.setdefault(key, 1 + len(seen))
    return values


def tiny_model(model_class: Any, model_type: str) -> torch.nn.Module:
    """A model in training mode without any randomness."""
    torch.manual_seed(0)
    config = tiny_config(model_class, model_type)
    size = _parameters_on_meta(model_class, config)
    if size > 30_000_000:
        raise ValueError(f"the tiny configuration has {size / 1e6:.0f} million parameters")
    model = model_class(config)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for parameter in model.parameters():
        empty = not bool(torch.isfinite(parameter).all())  # left so by an initialiser
        if empty or not parameter.any():  # a bias of zeros would hide that it is forgotten
            torch.nn.init.normal_(parameter, std=0.02)
    return model.float().train()


def _parameters_on_meta(model_class: Any, config: Any) -> int:
    import copy

    with torch.device("meta"):
        try:
            model = model_class(copy.deepcopy(config))
        except (NotImplementedError, RuntimeError):  # code that needs real tensors
            return 0
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_inputs(model: torch.nn.Module) -> dict[str, Any]:
    """Token ids, labels with some tokens ignored, and what the class needs beyond."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_TEXT_ID, VOCAB, (BATCH, TIME), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    inputs["attention_mask"] = torch.ones_like(ids)
    extra = OVERRIDES.get(type(model).__name__, {}).get("inputs")
    if extra is not None:
        inputs = extra(model, inputs)
    return {key: value for key, value in inputs.items() if value is not None}


def model_class(name: str) -> Any:
    """The class of transformers with this name."""
    return getattr(transformers, name)


def module_of(model_type: str) -> Any:
    """The modelling module of a type."""
    name = configuration_auto.model_type_to_module_name(model_type)
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")
