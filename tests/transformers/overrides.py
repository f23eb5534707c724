"""Settings that a tiny configuration of a class needs in addition to its defaults.

Per class: ``build`` are arguments of the default configuration; ``config`` is merged into the
shrunk configuration; ``set`` are attributes of the result; ``inputs`` takes the model and the usual
inputs and returns those to use.
"""

from typing import Any

import torch
import transformers

Inputs = dict[str, Any]


_IS_4 = transformers.__version__.startswith("4.")


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": list(sections)}
    if _IS_4:
        return {"rope_scaling": rope, **more}
    return {"rope_parameters": {**rope, "rope_theta": 10000.0, **more}}


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def _pixels(model: Any, usual: Inputs) -> Inputs:
    return usual | {"pixel_values": _random(usual["input_ids"].shape[0], 3, 32, 32)}


def _encoder_pixels(model: Any, usual: Inputs) -> Inputs:
    """Only an image and labels: the decoder makes its inputs of the labels."""
    return {"pixel_values": _pixels(model, usual)["pixel_values"], "labels": usual["labels"]}


def _idefics(model: Any, usual: Inputs) -> Inputs:
    batch, time = usual["input_ids"].shape
    mask = torch.ones(batch, time, 1, dtype=torch.long)
    return usual | {"pixel_values": _random(batch, 1, 3, 32, 32), "image_attention_mask": mask}


def _kosmos2(model: Any, usual: Inputs) -> Inputs:
    """Marks the places in the text that the image takes."""
    mask = torch.zeros_like(usual["input_ids"])
    mask[:, 1 : 1 + model.config.latent_query_num] = 1
    return _pixels(model, usual) | {"image_embeds_position_mask": mask}


def _pix2struct(model: Any, usual: Inputs) -> Inputs:
    size = model.config.vision_config.patch_embed_hidden_size
    patches = _random(usual["labels"].shape[0], 6, 2 + size)
    patches[..., :2] = torch.arange(12).reshape(6, 2) % 4
    return {"flattened_patches": patches, "labels": usual["labels"]}


def _udop(model: Any, usual: Inputs) -> Inputs:
    return usual | {"bbox": _random(*usual["input_ids"].shape, 4)}


def _molmo2(model: Any, usual: Inputs) -> Inputs:
    return usual | {"mm_token_type_ids": torch.zeros_like(usual["input_ids"])}


def _musicgen(model: Any, usual: Inputs) -> Inputs:
    """A row for each codebook."""
    books = model.config.num_codebooks
    ids = usual["input_ids"].repeat_interleave(books, dim=0)
    labels = usual["labels"][..., None].expand(-1, -1, books).contiguous()
    return {"input_ids": ids, "labels": labels}


def _with_query_tokens(token: str, more: Any = None) -> Any:
    """An image, and the places in the text that its queries take."""

    def inputs(model: Any, usual: Inputs) -> Inputs:
        ids = usual["input_ids"].clone()
        ids[:, : model.config.num_query_tokens] = getattr(model.config, token)
        usual = usual | {"input_ids": ids, "pixel_values": _random(ids.shape[0], 3, 32, 32)}
        return usual | (more(usual) if more else {})

    return inputs


def _qformer(usual: Inputs) -> Inputs:
    return {"qformer_input_ids": usual["input_ids"][:, 10:20]}


def _qformer_video(usual: Inputs) -> Inputs:
    return _qformer(usual) | {"pixel_values": usual["pixel_values"][:, None].repeat(1, 4, 1, 1, 1)}


_TWO_KINDS = ["sliding_attention", "full_attention"]
_SLIDING_ROPE = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in _TWO_KINDS
    }
}
_COMPASS = {"layer_types": _TWO_KINDS, **_SLIDING_ROPE}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
_INKLING_LAYERS = {"layer_types": ["hybrid_sliding", "hybrid"], "rel_extent": 64}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "ngram_vocab_size_base": 100,
}
_MOE_GEMMA = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_VOCABULARY_MAP = {"<image>": 90, "<|extra_200|>": 91, "<|image token|>": 92}

OVERRIDES: dict[str, dict[str, Any]] = {
    "BltForCausalLM": {"config": {"patcher_config": {"vocab_size": 220}}},  # logits of its own
    "BailingHybridForCausalLM": {"config": {"linear_head_dim": 16, "linear_num_heads": 4}},
    "CohereCompassForCausalLM": {"config": _COMPASS},
    "CohereCompassForConditionalGeneration": {"config": {"text_config": _COMPASS}},
    "DbrxForCausalLM": {"set": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0}},
    "FalconH1ForCausalLM": {"config": {"mamba_d_ssm": 128, "mamba_n_heads": 8}},
    "GitForCausalLM": {"inputs": _pixels},
    "InklingForCausalLM": {"config": _INKLING},
    "Inkling2ForCausalLM": {"config": _INKLING},
    "InklingForConditionalGeneration": {"config": {"text_config": _INKLING}},
    "Inkling2ForConditionalGeneration": {"config": {"text_config": _INKLING}},
    "Lfm2MoeForCausalLM": {"config": {"layer_types": ["conv", "full_attention"]}},
    "LongcatFlashForCausalLM": {"config": {"qk_head_dim": 32}},
    "Mamba2ForCausalLM": {"config": {"num_heads": 8}},
    "MusicgenForCausalLM": {"inputs": _musicgen},
    "MusicgenMelodyForCausalLM": {"inputs": _musicgen},
    "Qwen4ExpForCausalLM": {"config": _QWEN4},
    "Qwen4ExpForConditionalGeneration": {"config": {"text_config": _QWEN4}},
    "ReformerModelWithLMHead": {"config": {"is_decoder": True, "axial_pos_embds": False}},
    "XLNetLMHeadModel": {"config": {"d_head": 16}},
    "xLSTMForCausalLM": {"config": {"embedding_dim": 64, "ffn_round_up_to_multiple_of": 8}},
    "XmodForCausalLM": {"config": {"default_language": "en_XX", "is_decoder": True}},
    "ZambaForCausalLM": {
        "config": {
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
        }
    },
    "Zamba2ForCausalLM": {
        "config": {
            "mamba_headdim": 16,
            "attention_hidden_size": 128,
            "attention_head_dim": 32,
            "num_key_value_heads": 4,
            "num_query_groups": 4,
            "hybrid_layer_ids": [1],
            "num_hidden_layers": 2,
            "layers_block_type": ["linear_attention", "hybrid"],
        }
    },
    "ZayaForCausalLM": {"config": {"num_experts_per_tok": 1}},
    "Gemma4AssistantForCausalLM": {
        "build": {
            "text_config": {
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "model_type": "gemma4_text",
            }
        },
        "config": {"text_config": {"vocab_size_per_layer_input": 0}},
    },
    "Mistral4ForCausalLM": {
        "config": {"rope_parameters": {"partial_rotary_factor": 0.5}, "head_dim": 32}
    },
    "BlipForConditionalGeneration": {"inputs": _pixels},
    "Blip2ForConditionalGeneration": {
        "config": {"image_token_index" if _IS_4 else "image_token_id": 90},
        "inputs": _with_query_tokens("image_token_index" if _IS_4 else "image_token_id"),
    },
    "InstructBlipForConditionalGeneration": {
        "config": {"image_token_index" if _IS_4 else "image_token_id": 90},
        "inputs": _with_query_tokens("image_token_index" if _IS_4 else "image_token_id", _qformer),
    },
    "InstructBlipVideoForConditionalGeneration": {
        "config": {"video_token_id": 90},
        "inputs": _with_query_tokens("video_token_id", _qformer_video),
    },
    "ChameleonForConditionalGeneration": {
        "config": {"vocabulary_map": _VOCABULARY_MAP, "vq_config": {"resolution": 32}}
    },
    "Emu3ForConditionalGeneration": {"config": {"vocabulary_map": _VOCABULARY_MAP}},
    "DeepseekOcr2ForConditionalGeneration": {
        "config": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}}
    },
    "DiffusionGemmaForBlockDiffusion": {"config": {"text_config": _MOE_GEMMA}},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "config": {"text_config": _rope(3, 3, 2) | {"moe_intermediate_size": [32, 32]}}
    },
    "Florence2ForConditionalGeneration": {
        "config": {
            "vision_config": {
                "embed_dim": [16, 16, 32, 32],
                "num_heads": [2, 2, 2, 2],
                "num_groups": [2, 2, 2, 2],
                "depths": [1, 1, 1, 1],
            }
        }
    },
    "Glm46VForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "Glm4vForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "Glm4vMoeForConditionalGeneration": {
        "config": {"text_config": _rope(2, 1, 1, partial_rotary_factor=0.5)}
    },
    "GlmImageForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "GlmOcrForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "HunYuanVLForConditionalGeneration": {"config": {"text_config": _rope(2, 2, 2, 2)}},
    "Granite4VisionForConditionalGeneration": {
        "config": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"}
    },
    "JanusForConditionalGeneration": {
        "config": {"vision_config": {"num_image_tokens": 4}, "vq_config": {"embed_dim": 8}}
    },
    "Kosmos2ForConditionalGeneration": {
        "config": {"latent_query_num": 4},
        "inputs": _kosmos2,
    },
    "IdeficsForVisionText2Text": {"inputs": _idefics},
    "Molmo2ForConditionalGeneration": {
        "config": {"adapter_config": {"vision_feature_layer": [1, 0]}},
        "inputs": _molmo2,
    },
    "PaddleOCRVLForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "Qwen2_5_VLForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "Qwen2VLForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "config": {"text_config": _rope(4, 2, 2)},
        "set": {"vision_start_token_id": 80, "vision_end_token_id": 81},
    },
    "Qwen3OmniMoeThinkerForConditionalGeneration": {
        "config": {"text_config": _rope(4, 2, 2)},
        "set": {"vision_start_token_id": 80, "vision_end_token_id": 81},
    },
    "Step3p7ForConditionalGeneration": {"set": {"text_config.sliding_window": 16}},
    "UdopForConditionalGeneration": {
        "set": {"decoder_start_token_id": 3},
        "inputs": _udop,
    },
    "Pix2StructForConditionalGeneration": {
        "set": {"decoder_start_token_id": 3},
        "inputs": _pix2struct,
    },
    "PPFormulaNetForConditionalGeneration": {"inputs": _pixels},
    "VisionEncoderDecoderModel": {
        "build": {
            "encoder": {"model_type": "vit"},
            "decoder": {"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        },
        "set": {"decoder_start_token_id": 3, "pad_token_id": 0},
        "inputs": _encoder_pixels,
    },
}

if _IS_4:
    _ZAMBA_LAYERS = ["mamba", "hybrid", "mamba", "hybrid"]
    OVERRIDES |= {
        "DeepseekV3ForCausalLM": {"config": {"qk_head_dim": 32}},
        "GPTNeoForCausalLM": {"config": {"attention_types": [[["global", "local"], 1]]}},
        "JambaForCausalLM": {"config": {"use_mamba_kernels": False}},
        "MllamaForCausalLM": {"config": {"text_config": _rope()}},
        "MllamaForConditionalGeneration": {"config": {"text_config": _rope()}},
        "Qwen3VLForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
        "Qwen3VLMoeForConditionalGeneration": {"config": {"text_config": _rope(4, 2, 2)}},
        "xLSTMForCausalLM": {
            "config": {"chunk_size": 37, **OVERRIDES["xLSTMForCausalLM"]["config"]}
        },
    }
    OVERRIDES["ZambaForCausalLM"]["config"]["layers_block_type"] = _ZAMBA_LAYERS
    OVERRIDES["Zamba2ForCausalLM"]["config"]["layers_block_type"] = _ZAMBA_LAYERS[:2]
