"""The table: every operation has a file here, which says how a case of it is made and at which shapes it is measured.

Published figures are those of one H200 with the L2 cache flushed, by CUDA events.
"""

from __future__ import annotations

from experiments.benchmarks.kernels.cases import Row, Sizes
from experiments.benchmarks.kernels.rows import (
    decode_layer,
    indexer_topk,
    latent_cache,
    permuted,
    products,
    quantised,
    routed_mlp,
    routing,
    sparse_mla,
)

# In the order of the report.
PARTS = (
    indexer_topk.score_rows,
    indexer_topk.selection_rows,
    indexer_topk.indexer_rows,
    sparse_mla.prefill_attention_rows,
    sparse_mla.decode_attention_rows,
    products.expert_rows,
    quantised.activation_rows,
    permuted.permuted_rows,
    latent_cache.latent_cache_rows,
    routing.routing_rows,
    routed_mlp.routed_mlp_rows,
    decode_layer.decode_layer_rows,
)


def table(sizes: Sizes) -> list[Row]:
    """Every row of the report, in its order."""
    return [row for part in PARTS for row in part(sizes)]
