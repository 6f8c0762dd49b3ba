"""Writes the tables of docs/tpu.md: `python -m experiments.benchmarks.tpu_estimates`, minutes on a CPU, no TPU needed.

What a stage moves and multiplies follows from shapes, except how many pages the selections of neighbouring queries touch.
That is counted on the shipped checkpoint, reading 4096 bytes of Python source with as many selected keys as give the context
the length it has in selections: a context of N and 2048 selected keys becomes one of 4096 and 4096 x 2048 / N.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from checkpoints_convert import load
from experiments.common.report import markdown_table
from indexcache_jax.config import Config
from indexcache_jax.model import selections
from indexcache_jax.presets import preset
from pallas_kernels import tpu
from pallas_kernels.indexer_topk import mosaic_tpu as indexer_kernel
from pallas_kernels.sparse_mla import mosaic_tpu as attention_kernel
from pallas_kernels.tpu import sets

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "tpu.md"
DEMO = pathlib.Path(__file__).parents[1] / "assets" / "demo"
FILES = ("argparse.py", "typing.py")
READ, SEEN_FROM = 4096, 3072  # tokens of a text, and the first query that counts: before it contexts are much shorter
CHUNK = 2048  # queries of a prefill chunk, the last of a context
CONTEXTS = (61_440, 204_800)
MODELS = ("30b", "glm-5")
CHIPS = ("TPU v5 lite", "TPU v5")
PASSES = 12  # of the threshold search, as simulated on Gaussian scores of 128K keys (mosaic_tpu.py)
VECTOR_SLOTS = 4  # vector operations a cycle and core: assumed, Google publishes no figure
LANES_A_CYCLE = tpu.LANES * tpu.SUBLANES
PADDED = 640  # 576 in whole lanes


def vector_rate(chip: tpu.Chip) -> float:
    """32-bit vector operations a second: the clock is what four 128 x 128 matrix units need for the published rate."""
    clock = chip.bf16 / (chip.cores * 4 * 2 * 128 * 128)
    return clock * chip.cores * VECTOR_SLOTS * LANES_A_CYCLE


def masks(k: int) -> np.ndarray:
    """Which keys the last queries of both texts select in every layer: [layers x texts, queries, READ] bool."""
    config, schedule, params = load(DEMO)
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    tokens = np.stack([np.frombuffer((library / name).read_bytes()[:READ], np.uint8) for name in FILES])
    chosen = np.asarray(selections(params, jnp.asarray(tokens, jnp.int32), dataclasses.replace(config, index_topk=k), schedule))
    chosen = chosen[:, :, SEEN_FROM:].reshape(-1, READ - SEEN_FROM, k)
    out = np.zeros((*chosen.shape[:2], READ + 1), bool)
    np.put_along_axis(out, np.where(chosen < 0, READ, chosen), True, axis=2)
    return out[..., :READ]


def touched(mask: np.ndarray, block: int, page: int) -> float:
    """The share of all pages of `page` keys that a block of `block` queries touches, on average."""
    union = mask.reshape(mask.shape[0], -1, block, READ).any(axis=2)
    return float(union.reshape(*union.shape[:2], READ // page, page).any(axis=-1).mean())


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    multiplied: float = 0.0  # operations of the matrix units
    vector: float = 0.0  # of the vector units
    moved: float = 0.0  # bytes of HBM

    def times(self, chip: tpu.Chip) -> dict[str, float]:
        rates = {"matrix": chip.bf16, "vector": vector_rate(chip), "HBM": chip.bandwidth}
        return {unit: n / rates[unit] for unit, n in zip(rates, (self.multiplied, self.vector, self.moved), strict=True)}


def prefill(config: Config, keys: int, chip: tpu.Chip, small: float, whole: float) -> Iterator[Stage]:
    """The stages of a chunk's F layer; `small` and `whole` are the shares of pages touched."""
    k, heads, index_heads, width = config.index_topk, config.num_heads, config.index_n_heads, config.index_head_dim
    rows = indexer_kernel.rows_for(CHUNK, index_heads, keys, k, chip.vmem)
    pairs = CHUNK * keys
    yield Stage("index scores", 2 * pairs * index_heads * width, 3 * pairs * index_heads, CHUNK / rows * keys * width * 2)
    lists = 2 * CHUNK * (keys / sets.SPAN + 144) * tpu.LANES * k
    yield Stage(f"selection, {PASSES} passes", lists, 3 * PASSES * pairs, CHUNK * k * 4)
    words = CHUNK * keys / 8
    yield Stage("union of a block", 2 * CHUNK * keys / sets.SPAN * tpu.LANES * k, 0, CHUNK * k * 4 + words)
    block = attention_kernel.queries_per_block(heads, CHUNK)
    for name, share in ((f"attention, pages of {attention_kernel.PAGE}", small), ("attention, masked dense", whole)):
        attended = share * pairs * heads
        moved = share * CHUNK / block * keys * PADDED * 2 + words + CHUNK * heads * (PADDED + config.kv_lora_rank) * 2
        yield Stage(name, 2 * attended * (PADDED + config.kv_lora_rank), 8 * attended, moved)


def decode(config: Config, keys: int) -> Iterator[Stage]:
    """The stages of one step's F layer, batch 1."""
    k, index_heads, width = config.index_topk, config.index_n_heads, config.index_head_dim
    rows = tpu.SUBLANES  # of which one counts
    yield Stage("index scores", 2 * rows * keys * index_heads * width, 3 * rows * keys * index_heads, keys * width * 2)
    yield Stage(f"selection, {PASSES} passes", 2 * (keys / sets.SPAN + 144) * tpu.LANES * k, 3 * PASSES * rows * keys, 0)
    heads = -(-config.num_heads // 16) * 16
    yield Stage("attention, rows", 4 * heads * k * (PADDED + config.kv_lora_rank), 16 * heads * k, 2 * k * PADDED * 2)


def stage_rows(stages: list[Stage], chip: tpu.Chip, scale: float) -> Iterator[list[str]]:
    for stage in stages:
        times = stage.times(chip)
        bound = max(times, key=lambda unit: times[unit])
        amounts = [f"{stage.multiplied / 1e9:,.1f}", f"{stage.vector / 1e9:,.1f}", f"{stage.moved / 1e6:,.1f}"]
        yield [stage.name, *amounts, *(f"{scale * t:.3g}" for t in times.values()), bound]


def tables() -> dict[str, str]:
    """The tables of the page by name."""
    found: dict[str, str] = {}
    blocks = {name: attention_kernel.queries_per_block(Config.from_hf(preset(name)).num_heads, CHUNK) for name in MODELS}
    ratios = {8: 512, 16: 256, 60: 68}
    ratios |= {round(keys / 2048): round(READ * 2048 / keys) for keys in CONTEXTS}
    shares, rows = {}, []
    small, tile = attention_kernel.PAGE, attention_kernel.TILE
    for ratio, k in sorted(ratios.items()):
        mask = masks(k)
        neighbours = (mask[:, 1:] & mask[:, :-1]).sum() / mask[:, 1:].sum()
        row = [f"{ratio} k", k, f"{neighbours:.0%}"]
        for block in blocks.values():
            shares[ratio, block] = tuple(touched(mask, block, page) for page in (1, small, tile))
            row += [f"{share:.0%}" for share in shares[ratio, block]]
        rows.append(row)
    header = ["context", "k here", "shared with the query before"]
    header += [
        f"{name}, {block} queries: {what}" for name, block in blocks.items() for what in ("keys", f"pages of {small}", "tiles")
    ]
    found["unions"] = markdown_table(header, rows)

    stage_header = ["stage", "Gop matrix", "Gop vector", "MB moved"]
    for name in MODELS:
        config = Config.from_hf(preset(name))
        for kind in CHIPS:
            chip = tpu.CHIPS[kind]
            parts = []
            for keys in CONTEXTS:
                _, pages, whole = shares[round(keys / 2048), blocks[name]]
                stages = list(prefill(config, keys, chip, pages, whole))
                part = markdown_table(
                    [*stage_header, *(f"ms {unit}" for unit in stages[0].times(chip)), "bound by"],
                    list(stage_rows(stages, chip, 1e3)),
                )
                step = markdown_table(
                    [*stage_header, *(f"us {unit}" for unit in stages[0].times(chip)), "bound by"],
                    list(stage_rows(list(decode(config, keys)), chip, 1e6)),
                )
                parts.append(f"{keys:,} keys, a chunk of {CHUNK} queries, one F layer:\n\n{part}\n\nOne decode step:\n\n{step}")
            found[f"{name} {chip.name}"] = "\n\n".join(parts)
    return found


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{PAGE}: no place for the table {name!r}")
        head, _, rest = text.partition(begin)
        text = head + begin + "\n" + table + "\n\n" + end + rest.partition(end)[2]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
