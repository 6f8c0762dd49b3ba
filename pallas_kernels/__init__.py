"""Kernels of DeepSeek sparse attention. They know arrays only, nothing of models.

Every operation is a folder: `api.py` checks its arguments and picks an implementation, `reference.py` is the "xla" one
that runs anywhere and defines the result, and every other file is one backend, held against the reference.
"""

from pallas_kernels.attention_denominators.api import attention_denominators
from pallas_kernels.attention_target.api import attention_target
from pallas_kernels.grouped_matmul.api import grouped_matmul, grouped_mlp, grouped_swiglu
from pallas_kernels.index_cross_entropy.api import index_cross_entropy
from pallas_kernels.index_divergence.api import index_divergence
from pallas_kernels.indexer_topk.api import indexer_topk, select_topk
from pallas_kernels.latent_cache.api import append_latents
from pallas_kernels.permuted.api import gather_rows, sum_rows
from pallas_kernels.quantised.api import normalise_rows, quantise_index_queries, quantise_rows, quantise_swiglu
from pallas_kernels.routed_mlp.api import routed_mlp
from pallas_kernels.routing.api import choose, route, sort_by_group
from pallas_kernels.scaled_matmul.api import scaled_matmul
from pallas_kernels.selected_attention.api import selected_attention
from pallas_kernels.sparse_mla.api import sparse_mla

__all__ = [
    "append_latents",
    "attention_denominators",
    "attention_target",
    "choose",
    "gather_rows",
    "grouped_matmul",
    "grouped_mlp",
    "grouped_swiglu",
    "index_cross_entropy",
    "index_divergence",
    "indexer_topk",
    "normalise_rows",
    "quantise_index_queries",
    "quantise_rows",
    "quantise_swiglu",
    "route",
    "routed_mlp",
    "scaled_matmul",
    "select_topk",
    "selected_attention",
    "sort_by_group",
    "sparse_mla",
    "sum_rows",
]
