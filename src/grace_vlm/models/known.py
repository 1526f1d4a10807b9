"""Configurations of the published models, by hub id: what ``grace plan`` and ``--dry-run`` need where no hub is.

Only what decides shapes and names is here, in the words of each model's config.json; the rest are Transformers'
defaults. Weights always come from the hub or a folder, with the configuration that lies beside them.
"""

from __future__ import annotations

from typing import Any

_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _qwen3_vl(
    hidden: int, intermediate: int, layers: int, heads: int, tied: bool, tower: tuple[int, int, int, tuple[int, ...]]
) -> dict[str, Any]:
    depth, vision_hidden, vision_intermediate, deepstack = tower
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        **_QWEN_IDS,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(deepstack),
        },
    }


def _qwen2_vl(hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": tied,
        **_QWEN_IDS,
        "text_config": {
            "model_type": "qwen2_vl_text",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "hidden_size": hidden,
        },
    }


def _qwen2_5_vl(hidden: int, intermediate: int, layers: int, heads: tuple[int, int], tied: bool) -> dict[str, Any]:
    config = _qwen2_vl(hidden, intermediate, *heads, 151936 if tied else 152064, tied)
    config["model_type"] = "qwen2_5_vl"
    config["text_config"] |= {"model_type": "qwen2_5_vl_text", "num_hidden_layers": layers}
    config["vision_config"] = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "out_hidden_size": hidden,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return config


CLIP_L_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llava(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": 32000,
        "vision_config": CLIP_L_336,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32064,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    }


_SMALL_TOWER = (24, 1024, 4096, (5, 11, 17))
_LARGE_TOWER = (27, 1152, 4304, (8, 16, 24))

KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 6144, 28, 16, True, _SMALL_TOWER),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, 36, 32, True, _SMALL_TOWER),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 12288, 36, 32, False, _LARGE_TOWER),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3_vl(5120, 25600, 64, 64, False, _LARGE_TOWER),
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 8960, 12, 2, 151936, True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 18944, 28, 4, 152064, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, (16, 2), True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, (28, 4), False),
    "llava-hf/llava-1.5-7b-hf": _llava(4096, 11008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": _llava(5120, 13824, 40, 40),
}
for _released in ("BF16", "W8G128", "W4G128"):
    KNOWN[f"ForeverBlue/Qwen3-VL-2B-GRACE-{_released}"] = KNOWN["Qwen/Qwen3-VL-2B-Instruct"]
for _size in ("7b", "13b"):
    KNOWN[f"liuhaotian/llava-v1.5-{_size}"] = KNOWN[f"llava-hf/llava-1.5-{_size}-hf"]
KNOWN["ForeverBlue/LLaVA-1.5-7B-GRACE-W4G128"] = KNOWN["llava-hf/llava-1.5-7b-hf"]

LICENCES = {
    **{name: "apache-2.0" for name in KNOWN if name.startswith(("Qwen/", "ForeverBlue/Qwen"))},
    "Qwen/Qwen2.5-VL-3B-Instruct": "other",
    **{name: "llama2" for name in KNOWN if "llava" in name.lower()},
}
"""As the hub's cards state them."""
