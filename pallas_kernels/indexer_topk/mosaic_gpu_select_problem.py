"""A selection's static facts: how threads share the rows, and where a row's part of shared memory holds what.

Two rows of 512 threads share a thread block because the compiler then keeps to 64 registers and all 1024 fit on a SM. Scores
in flight wait in shared memory, because registers for them would spill. Few rows (decoding) get 1024 threads each, which
shortens the chain of dependent loads that bounds them.

A row's shared memory is, one after the other: the histogram, lines of one word a warp, the buffer of candidates, the list of
blocks, and where chunks under way arrive. The values that the threshold is found from lie in the buffer, where candidates
come later; a row that is short enough lies whole from the buffer on.
"""

from __future__ import annotations

import dataclasses

BLOCK = 16  # scores per block maximum
MAX_K = 4096
MAX_KEYS = 2**20  # block numbers are 16 bits
LOG_BINS = 11
BINS = 1 << LOG_BINS
SAMPLE = 4096  # scores the threshold is guessed from, in lines of 32
SLACK = 256  # blocks too many that end the search for the threshold
SHARED_BYTES = 228_000  # of 232448, less what Mosaic reserves
WARP_SUMS = 32  # words of a line: one for each warp
LINES = 8  # of one word a warp; `mosaic_gpu_select_row` says for what


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """threads: of one row; rows: of one thread block; loads: 16-byte loads of a thread in one chunk.

    leave_out: only for measuring what stages cost, the positions are without meaning then. "search" ends a row after its
    stream, "append" reads and compares in the stream but keeps nothing.
    """

    threads: int = 512
    rows: int = 2
    loads: int = 2
    leave_out: str = ""

    def __post_init__(self) -> None:
        if self.threads not in (128, 256, 512, 1024):
            raise ValueError(f"SelectConfig: threads {self.threads} is not one of 128, 256, 512, 1024")
        if not 1 <= self.rows * self.threads <= 1024:
            raise ValueError(f"SelectConfig: {self.rows} rows of {self.threads} threads exceed a thread block of 1024")
        if self.loads not in (1, 2, 3, 4):
            raise ValueError(f"SelectConfig: loads {self.loads} is not within 1 to 4")
        if self.leave_out not in ("", "search", "append"):
            raise ValueError(f"SelectConfig: leave_out {self.leave_out!r} is neither 'search' nor 'append'")


def default_config(rows: int) -> SelectConfig:
    """Few rows leave SMs idle either way, so each gets as many threads as there can be."""
    return SelectConfig() if rows > 132 else SelectConfig(threads=1024, rows=1)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static facts of a launch, and where a row's shared memory holds what (in bytes from the row's start).

    rows of `batch_rows` queries each share a length; `pitch` rows of scores lie between two batches.
    width: scores in a row of the buffer, of which `keys` are some key's.
    clean: no score is NaN, and hidden ones in a row's last block are -inf.
    """

    rows: int
    batch_rows: int
    pitch: int
    width: int
    keys: int
    k: int
    has_maxima: bool
    clean: bool
    config: SelectConfig

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MAX_K:
            raise ValueError(f"top-k: k {self.k} is not within 1 to {MAX_K}")
        if self.width % (4 * BLOCK) or not 0 < self.width <= MAX_KEYS:
            raise ValueError(f"top-k: row width {self.width} is not a multiple of {4 * BLOCK} up to {MAX_KEYS}")
        if not 1 <= self.keys <= self.width:
            raise ValueError(f"top-k: {self.keys} keys are not within a row of {self.width}")

    @property
    def chunk(self) -> int:
        """Scores read between two barriers."""
        return self.config.threads * 4 * self.config.loads

    @property
    def capacity(self) -> int:
        """Candidates the buffer holds: k and one chunk, and enough for what a sampled threshold lets pass."""
        return -(-max(self.k + self.chunk, 2 * self.k, SAMPLE) // self.config.threads) * self.config.threads

    @property
    def list_capacity(self) -> int:
        """Entries of 2 bytes, in whole pieces of 16: what comes after them arrives in such pieces."""
        return -(-(2 * self.k + 2 * SLACK) // 8) * 8 if self.has_maxima else 0

    @property
    def keeps_values(self) -> bool:
        """Whether the block maxima of a row fit where the candidates go later; else each pass reads them again."""
        room = self._room - self._fixed_bytes - 16 * self.config.threads - self.stage_bytes
        return 4 * self.width // BLOCK <= room

    @property
    def _room(self) -> int:
        """Bytes of shared memory for one row."""
        return SHARED_BYTES // self.config.rows // 16 * 16

    @property
    def _fixed_bytes(self) -> int:
        return 4 * BINS + 2 * self.list_capacity + 4 * LINES * WARP_SUMS

    @property
    def buffer_bytes(self) -> int:
        """Candidates of 8 bytes; before there are any, the values the threshold is found from."""
        values = max(SAMPLE, self.width // BLOCK) if self.keeps_values else 0
        round = 4 * self.config.threads  # all threads read whole rounds
        return max(8 * self.capacity, 4 * -(-values // round) * round)

    @property
    def sums(self) -> int:
        return 4 * BINS

    @property
    def buffer(self) -> int:
        return self.sums + 4 * LINES * WARP_SUMS

    @property
    def block_list(self) -> int:
        return self.buffer + self.buffer_bytes

    @property
    def staging(self) -> int:
        return self.block_list + 2 * self.list_capacity

    @property
    def stage_bytes(self) -> int:
        return 4 * self.chunk

    @property
    def stages(self) -> int:
        """Chunks under way at the same time, a power of two: as many as there is room for."""
        fitting = (self._room - self.staging) // self.stage_bytes
        return next(stages for stages in (4, 2, 1) if stages <= max(1, fitting))

    @property
    def resident(self) -> int:
        """Scores of a row that is read whole: what fits where buffer, list and chunks are, in whole rounds of 16 bytes for
        each thread. Of a row long enough for its block maxima less is read."""
        fitting = (self.row_bytes - self.buffer) // (16 * self.config.threads) * 4 * self.config.threads
        return min(fitting, BLOCK * self.fewest_maxima) if self.has_maxima else fitting

    @property
    def fewest_maxima(self) -> int:
        """With no more maxima the k-th largest would let most of the row pass."""
        return self.k + self.k // 4

    @property
    def row_bytes(self) -> int:
        return self.staging + self.stages * self.stage_bytes
