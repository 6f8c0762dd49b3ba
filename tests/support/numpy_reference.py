"""An independent forward of both families in float64 NumPy, straight from the formulas and from raw checkpoint names.

It shares no code with the library, reads config.json fields and checkpoint tensors as they are, expands every head's
keys and values, and attends with a dense mask. It is what the library is held against where transformers has nothing to
say: a DeepSeek model with shared layers. Slow and plain on purpose; where transformers runs the same model, the tests
hold this file against it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MIN_GAP = 2e-5  # far above float32's error of a score: beyond it any two right programs choose the same


@dataclasses.dataclass
class Trace:
    """What a forward computed, and how close its closest choices were to going the other way."""

    logits: np.ndarray  # [B, S, V]; zeros at padded positions
    indices: list[np.ndarray]  # per full layer [B, S, min(topk, S)]: ascending positions, -1 in the tail
    index_gap: float  # smallest distance between the k-th and the (k+1)-th index score of a row
    expert_gap: float  # the same for the choice of experts and of groups


class _Model:
    def __init__(self, state: Mapping[str, np.ndarray], fields: Mapping[str, Any], is_full: Sequence[bool]) -> None:
        self.state = {name: np.asarray(array, np.float64) for name, array in state.items()}
        self.f = fields
        self.is_full = is_full
        self.glm = fields["model_type"] == "glm_moe_dsa"
        self.eps = fields.get("rms_norm_eps", 1e-5 if self.glm else 1e-6)
        self.index_gap = self.expert_gap = math.inf

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def rms(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        return self.state[f"{name}.weight"] * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def rope_table(self, length: int) -> tuple[np.ndarray, np.ndarray, float]:
        """cos and sin [length, dr/2], and what yarn multiplies the softmax scale by."""
        dr = self.f["qk_rope_head_dim"]
        rope = self.f.get("rope_scaling") or self.f.get("rope_parameters") or {}
        theta = float(rope.get("rope_theta") or self.f.get("rope_theta") or 10000.0)
        inverse = theta ** (-2.0 * np.arange(dr // 2) / dr)
        gain = softmax_gain = 1.0
        if (rope.get("rope_type") or rope.get("type")) == "yarn":
            factor, original = rope["factor"], rope["original_max_position_embeddings"]

            def corr(turns: float) -> float:
                return dr * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

            def g(m: float) -> float:
                return 0.1 * m * math.log(factor) + 1

            low = max(math.floor(corr(rope.get("beta_fast", 32))), 0)
            high = min(math.ceil(corr(rope.get("beta_slow", 1))), dr - 1)
            ramp = np.clip((np.arange(dr // 2) - low) / (high + (0.001 if low == high else 0) - low), 0, 1)
            inverse = inverse / factor * ramp + inverse * (1 - ramp)
            both = rope.get("mscale") and rope.get("mscale_all_dim")
            gain = g(rope["mscale"]) / g(rope["mscale_all_dim"]) if both else g(1)
            if rope.get("mscale_all_dim"):
                softmax_gain = g(rope["mscale_all_dim"]) ** 2
        angle = np.arange(length)[:, None] * inverse
        return np.cos(angle) * gain, np.sin(angle) * gain, softmax_gain

    def rotate(self, x: np.ndarray, interleaved: bool) -> np.ndarray:
        """x [B, S, heads, dr]: pair j is (2j, 2j+1) or (j, j + dr/2)."""
        dr = x.shape[-1]
        first = np.arange(0, dr, 2) if interleaved else np.arange(dr // 2)
        second = first + (1 if interleaved else dr // 2)
        cos, sin = self.cos[:, None], self.sin[:, None]
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    def choose(self, scores: np.ndarray, k: int) -> tuple[np.ndarray, float]:
        """The k best of a row of scores, ties to the lowest position, and the gap to the best that is left out."""
        order = np.argsort(-scores, kind="stable")
        gap = scores[order[k - 1]] - scores[order[k]] if k < len(order) else math.inf
        return np.sort(order[:k]), gap

    def select(self, x: np.ndarray, q_latent: np.ndarray, prefix: str, lengths: Sequence[int]) -> np.ndarray:
        b, s, _ = x.shape
        heads, width, dr = self.f["index_n_heads"], self.f["index_head_dim"], self.f["qk_rope_head_dim"]
        interleaved = self.f.get("indexer_rope_interleave", self.glm)
        q = self.linear(q_latent, f"{prefix}.wq_b").reshape(b, s, heads, width)
        k = self.layer_norm(self.linear(x, f"{prefix}.wk"), f"{prefix}.k_norm")[:, :, None]
        q, k = (np.concatenate([self.rotate(t[..., :dr], interleaved), t[..., dr:]], axis=-1) for t in (q, k))
        w = self.linear(x, f"{prefix}.weights_proj") * heads**-0.5
        dots = np.einsum("bshd,btd->bsht", q, k[:, :, 0]) * width**-0.5
        scores = np.einsum("bsh,bsht->bst", w, np.maximum(dots, 0))
        indices = np.full((b, s, min(self.f["index_topk"], s)), -1)
        for row in range(b):
            for position in range(lengths[row]):
                chosen, gap = self.choose(scores[row, position, : position + 1], min(indices.shape[2], position + 1))
                indices[row, position, : len(chosen)] = chosen
                self.index_gap = min(self.index_gap, gap)
        return indices

    def attention(self, x: np.ndarray, indices: np.ndarray | None, layer: int, lengths: Sequence[int]) -> tuple:
        b, s, _ = x.shape
        f, prefix = self.f, f"model.layers.{layer}.self_attn"
        h, c = f["num_attention_heads"], f["kv_lora_rank"]
        dn, dr, dv = f["qk_nope_head_dim"], f["qk_rope_head_dim"], f["v_head_dim"]
        q_latent = self.rms(self.linear(x, f"{prefix}.q_a_proj"), f"{prefix}.q_a_layernorm", 1e-6)
        q = self.linear(q_latent, f"{prefix}.q_b_proj").reshape(b, s, h, dn + dr)
        q = np.concatenate([q[..., :dn], self.rotate(q[..., dn:], True)], axis=-1)
        kv = self.linear(x, f"{prefix}.kv_a_proj_with_mqa")
        rope_key = self.rotate(kv[:, :, None, c:], True)
        expanded = self.linear(self.rms(kv[..., :c], f"{prefix}.kv_a_layernorm", 1e-6), f"{prefix}.kv_b_proj")
        expanded = expanded.reshape(b, s, h, dn + dv)
        k = np.concatenate([expanded[..., :dn], np.broadcast_to(rope_key, (b, s, h, dr))], axis=-1)
        if self.is_full[layer]:
            indices = self.select(x, q_latent, f"{prefix}.indexer", lengths)
        attended = (indices[..., None] == np.arange(s)).any(axis=2)  # [B, S, T]
        logits = np.einsum("bshd,bthd->bhst", q, k) * (dn + dr) ** -0.5 * self.softmax_gain
        logits = np.where(attended[:, None], logits, -np.inf)
        weights = np.exp(logits - np.where(attended.any(-1), logits.max(axis=(1, 3)), 0)[:, None, :, None])
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
        out = np.einsum("bhst,bthd->bshd", weights, expanded[..., dn:]).reshape(b, s, h * dv)
        return self.linear(out, f"{prefix}.o_proj"), indices

    def swiglu(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate = self.linear(x, f"{prefix}.gate_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, f"{prefix}.up_proj"), f"{prefix}.down_proj")

    def experts(self, x: np.ndarray, prefix: str, valid: np.ndarray) -> np.ndarray:
        f, experts = self.f, self.f["n_routed_experts"]
        groups, kept = f.get("n_group", 1), f.get("topk_group", 1)
        scores = 1 / (1 + np.exp(-x @ self.state[f"{prefix}.gate.weight"].T))
        choice = scores + self.state[f"{prefix}.gate.e_score_correction_bias"]
        out = np.zeros_like(x)
        for row, position in np.argwhere(valid):
            by_group = choice[row, position].reshape(groups, -1)
            best_groups, group_gap = self.choose(np.sort(by_group, axis=1)[:, -2:].sum(axis=1), kept)
            allowed = np.isin(np.arange(groups), best_groups).repeat(experts // groups)
            best, gap = self.choose(np.where(allowed, choice[row, position], -np.inf), f["num_experts_per_tok"])
            self.expert_gap = min(self.expert_gap, group_gap, gap)
            weights = scores[row, position, best]
            if f.get("norm_topk_prob", True):
                weights = weights / (weights.sum() + 1e-20)
            for expert, weight in zip(best, weights * f.get("routed_scaling_factor", 2.5), strict=True):
                out[row, position] += weight * self.swiglu(x[row, position], f"{prefix}.experts.{expert}")
        return out + self.swiglu(x, f"{prefix}.shared_experts")

    def forward(self, tokens: np.ndarray, lengths: Sequence[int]) -> Trace:
        f = self.f
        valid = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        self.cos, self.sin, self.softmax_gain = self.rope_table(tokens.shape[1])
        types = f.get("mlp_layer_types")
        x = self.state["model.embed_tokens.weight"][tokens]
        indices, selections = None, []
        for layer in range(f["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            out, indices = self.attention(self.rms(x, f"{prefix}.input_layernorm", self.eps), indices, layer, lengths)
            if self.is_full[layer]:
                selections.append(indices)
            x = x + out
            h = self.rms(x, f"{prefix}.post_attention_layernorm", self.eps)
            sparse = types[layer] == "sparse" if types else layer >= f["first_k_dense_replace"]
            x = x + (self.experts(h, f"{prefix}.mlp", valid) if sparse else self.swiglu(h, f"{prefix}.mlp"))
        head = "model.embed_tokens" if f.get("tie_word_embeddings") else "lm_head"
        logits = self.linear(self.rms(x, "model.norm", self.eps), head)
        return Trace(np.where(valid[..., None], logits, 0), selections, self.index_gap, self.expert_gap)


def forward(
    state: Mapping[str, np.ndarray],
    fields: Mapping[str, Any],
    is_full: Sequence[bool],
    tokens: np.ndarray,
    lengths: Sequence[int],
) -> Trace:
    """tokens [B, S], right-padded, under a schedule: `state` by checkpoint name, `fields` of a config.json."""
    return _Model(state, fields, is_full).forward(tokens, lengths)
