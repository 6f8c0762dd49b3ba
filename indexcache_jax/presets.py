"""The shapes of released models, as the config.json fields that they ship."""

from __future__ import annotations

import copy
from typing import Any

from indexcache_jax import arguments
from indexcache_jax.config_json import ARCHITECTURES, DEEPSEEK, GLM

_GLM_5: dict[str, Any] = {
    "architectures": [ARCHITECTURES[GLM]],
    "model_type": GLM,
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [154820, 154827, 154829],
    "pad_token_id": 154820,
}

_GLM_5_2 = _GLM_5 | {
    "rope_parameters": {"rope_theta": 8000000.0, "rope_type": "default"},
    "max_position_embeddings": 1048576,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
}

# "30b" is GLM-4.7-Flash with an indexer of our choosing: the paper's own
# 30B checkpoint is not public.
PRESETS: dict[str, dict[str, Any]] = {
    "glm-5": _GLM_5,
    "glm-5.1": _GLM_5,
    "glm-5.2": _GLM_5_2,
    "glm-5.3": _GLM_5_2,
    "deepseek-v3.2": {
        "architectures": [ARCHITECTURES[DEEPSEEK]],
        "model_type": DEEPSEEK,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "30b": _GLM_5
    | {
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "q_lora_rank": 768,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
    },
}


def preset(name: str) -> dict[str, Any]:
    """The config.json fields of a released model, for Config.from_hf and Schedule.from_hf (docs/model.md, Config fields).

    Raises ValueError for a name that is not in PRESETS.
    """
    return copy.deepcopy(PRESETS[arguments.choice("preset", name, sorted(PRESETS))])
