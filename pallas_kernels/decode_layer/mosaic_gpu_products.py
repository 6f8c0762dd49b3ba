"""Products of bfloat16 matrices and a vector by a thread block: `Product` along the rows, `Columns` down the columns.

A vector times a matrix takes the time of reading the matrix, if enough loads are in flight. So the loads of a product are
issued together, 16 bytes a lane, as many as registers hold; the first of them before the vector is known (`begin`), while
the thread blocks wait at the grid barrier and compute the vector. The vector lies in shared memory as bfloat16.

A layer's matrices [N, K] are read along the rows: a row is one result, whose lanes add up their parts. The experts' matrices
in bfloat16 are stored [K, N], so results are sums down columns: a lane has eight columns of every so many rows, and the
warps' sums are added through shared memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pallas_kernels.hopper import persistent, ptx
from pallas_kernels.hopper.persistent import THREADS, WARPS, Emit, Thread
from pallas_kernels.hopper.ptx import Address, Float, Word

LOADS_IN_FLIGHT = 20  # of 16 bytes, by a lane: 80 of its 128 registers
COLUMN_LOADS_IN_FLIGHT = 16  # fewer, because 8 sums need registers too


class Product:
    """Rows first .. end - 1 (at most `most`) of a matrix [N, K] times a vector: `begin` starts, `finish` ends it.

    A row is read by as many lanes as its length divides into 16 bytes each, up to a whole warp.
    """

    def __init__(
        self,
        thread: Thread,
        matrix: Address,
        width: int,
        first: Word,
        end: Word,
        most: int,
        loads_in_flight: int = LOADS_IN_FLIGHT,
    ):
        self.lanes = next((lanes for lanes in (32, 16, 8, 4) if width % (8 * lanes) == 0), 0)
        if not self.lanes:
            raise ValueError(f"rows of {width} numbers do not divide into pieces of 32")
        self.matrix, self.width, self.first, self.end = matrix, width, first, end
        self.chunks = width // (8 * self.lanes)
        of_warp = 32 // self.lanes
        self.rounds = -(-most // (WARPS * of_warp))
        self.lane = thread.lane & (self.lanes - 1)
        self.first_row = first + thread.warp * of_warp + thread.lane // self.lanes
        self.rows = WARPS * of_warp  # of a round
        self.lane_matrix = ptx.offset(matrix, self.lane, 16)
        pieces = [(r, chunk) for r in range(self.rounds) for chunk in range(self.chunks)]
        self.batches = [pieces[i : i + loads_in_flight] for i in range(0, len(pieces), loads_in_flight)]
        self.in_flight: list[list[Word]] = []

    def row(self, r: int) -> Word:
        return self.first_row + r * self.rows

    def _load(self, batch: int) -> list[list[Word]]:
        loaded = []
        for r, chunk in self.batches[batch]:
            row = self.row(r)
            exists = ptx.select(row.signed < self.end, 1, 0)
            address = ptx.offset(ptx.offset(self.lane_matrix, row, 2 * self.width), ptx.constant(chunk), 16 * self.lanes)
            loaded.append(ptx.load_global_words_or_zeros(address, exists, 4))
        return loaded

    def begin(self) -> None:
        self.in_flight = self._load(0)

    def prefetch(self, thread: Thread) -> None:
        """Copies the rows to L2, where a later `begin` finds them."""
        persistent.prefetch(thread, self.matrix, 2 * self.width, self.first, self.end)

    def finish(self, vector: Callable[[Word], Word], emit: Emit) -> None:
        """Sums the rows' products and passes them on.

        vector(row): the shared address of the vector that this row is multiplied by.
        """
        leads = ptx.select(self.lane.equals(0), 1, 0)
        total = ptx.number(0.0)
        for batch, pieces in enumerate(self.batches):
            words = self.in_flight if batch == 0 else self._load(batch)
            for (r, chunk), piece in zip(pieces, words, strict=True):
                row = self.row(r)
                if chunk == 0:
                    total = ptx.number(0.0)
                at = vector(row) + ((self.lane + chunk * self.lanes) << 4)
                total = ptx.add_dot(total, piece, ptx.load_shared_words(at))
                if chunk == self.chunks - 1:
                    stores = leads & ptx.select(row.signed < self.end, 1, 0)
                    emit(row, persistent.warp_sum(total, self.lanes), stores.differs(0))
        self.in_flight = []


# ---- sums down the columns


@dataclasses.dataclass(frozen=True)
class WeightedRows:
    """Some rows of a column sum: where the columns of the first one begin, and what row i is multiplied by."""

    base: Address
    factor: Callable[[Word], Float]


class Columns:
    """The sum over all rows of factor * row, 8 `lanes` columns wide: `begin` starts it, `finish` ends it.

    Every element of `matrices` has `rows` rows, `row_bytes` from one to the next. `lanes` lanes read a row, a warp reads
    32 / lanes neighbouring rows.
    """

    def __init__(self, thread: Thread, matrices: Sequence[WeightedRows], rows: int, row_bytes: int, lanes: int):
        at_once = THREADS // lanes
        if rows % at_once:
            raise ValueError(f"{rows} rows are not a multiple of {at_once}")
        self.first_row = thread.warp * (32 // lanes) + thread.lane // lanes
        self.row_bytes = row_bytes
        steps = []
        for matrix in matrices:
            address = ptx.offset(ptx.offset(matrix.base, self.first_row, row_bytes), thread.lane & (lanes - 1), 16)
            steps += [(address, matrix.factor, start) for start in range(0, rows, at_once)]
        self.batches = [steps[i : i + COLUMN_LOADS_IN_FLIGHT] for i in range(0, len(steps), COLUMN_LOADS_IN_FLIGHT)]
        self.in_flight: list[list[Word]] = []

    def _load(self, batch: int) -> list[list[Word]]:
        starts = [(address, ptx.constant(start)) for address, _, start in self.batches[batch]]
        return [ptx.load_global_words(ptx.offset(address, start, self.row_bytes)) for address, start in starts]

    def begin(self) -> None:
        self.in_flight = self._load(0)

    def finish(self) -> list[Float]:
        """This lane's 8 sums."""
        totals = [ptx.number(0.0)] * 8
        for i, batch in enumerate(self.batches):
            words = self.in_flight if i == 0 and self.in_flight else self._load(i)
            for (_, factor, start), piece in zip(batch, words, strict=True):
                totals = ptx.add_multiples(totals, piece, factor(self.first_row + start))
        return totals


def store_column_sums(thread: Thread, totals: Sequence[Float], lanes: int, target: Word) -> None:
    """Adds what the lanes of a warp have for the same columns and stores the warp's 8 `lanes` sums in its part of `target`."""
    totals = list(totals)
    distance = 16
    while distance >= lanes:
        totals = [x + ptx.lane_distant(x, distance) for x in totals]
        distance //= 2
    address = target + thread.warp * (32 * lanes) + (thread.lane << 5)
    with ptx.when(thread.lane.signed < lanes):
        for half in range(2):
            words = [ptx.bits_of(x) for x in totals[4 * half : 4 * half + 4]]
            ptx.store_shared_words(address + 16 * half, words)


def load_column_sum(column: Word, lanes: int, source: Word) -> Float:
    """The sum of a column over the warps' sums that `store_column_sums` stored at `source`; needs a barrier between them."""
    address = source + (column << 2)
    return ptx.total([ptx.float_of(ptx.load_shared(address + 32 * lanes * warp)) for warp in range(WARPS)])
