"""Text packed into a stream of tokens, the order of its rows, and work done ahead."""

import os
import threading

import numpy as np
import pytest

from experiments.common import data, text


def documents(tmp_path, sizes):
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * size)
    return text.documents(str(tmp_path / "*.txt"))


def test_packing_joins_all_documents_in_a_seeded_order(tmp_path):
    found = documents(tmp_path, [3, 5, 2, 4])
    packed = data.pack(found, text.Bytes(), 256, tmp_path / "tokens.bin", 1)
    parts = "".join(chr(t) if t < 256 else "|" for t in packed.tolist()).split("|")
    assert sorted(parts) == ["", "AAA", "BBBBB", "CC", "DDDD"] and parts[-1] == ""
    other = data.pack(found, text.Bytes(), 256, tmp_path / "other.bin", 2)
    assert packed.tolist() != other.tolist()


def test_what_is_packed_is_kept_until_a_document_changes(tmp_path):
    found = documents(tmp_path, [3, 5])
    path = tmp_path / "tokens.bin"
    data.pack(found, text.Bytes(), None, path, 0)
    path.write_bytes(path.read_bytes()[:8])  # a mark that another call would remove
    assert data.pack(found, text.Bytes(), None, path, 0).size == 2
    (tmp_path / "0.txt").write_bytes(b"AAAA")
    assert data.pack(found, text.Bytes(), None, path, 0).size == 9
    assert data.pack(found, text.Bytes(), None, path, 1).size == 9
    (tmp_path / "0.txt").write_bytes(b"AAZA")
    assert ord("Z") in data.pack(found, text.Bytes(), None, path, 1)


def test_what_another_tokenizer_packed_is_not_kept(tmp_path):
    found = documents(tmp_path, [3, 5])
    for folder, size in (("one", 257), ("two", 270)):
        (tmp_path / folder).mkdir()
        text.train_tokenizer(found, size, tmp_path / folder / "tokenizer.json", 0)
    one, two = (text.tokenizer(tmp_path / folder, 258) for folder in ("one", "two"))
    before = np.array(data.pack(found, one, 0, tmp_path / "tokens.bin", 0))
    after = data.pack(found, two, 0, tmp_path / "tokens.bin", 0)
    assert one.name == two.name and after.size < before.size


def test_a_kill_while_packing_leaves_nothing_half_written(tmp_path, monkeypatch):
    found, replace = documents(tmp_path, [3, 5]), os.replace
    for last in (1, 2):  # killed before this file is put in its place
        taken = []

        def killed(a, b, last=last, taken=taken):
            taken.append(b)
            if len(taken) == last:
                raise KeyboardInterrupt
            replace(a, b)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            data.pack(found, text.Bytes(), None, tmp_path / "tokens.bin", last)
        monkeypatch.setattr(os, "replace", replace)
        assert data.pack(found, text.Bytes(), None, tmp_path / "tokens.bin", last).size == 8


def test_nothing_to_pack_is_said(tmp_path):
    with pytest.raises(ValueError, match="hold no token"):
        data.pack(documents(tmp_path, [0]), text.Bytes(), None, tmp_path / "tokens.bin", 0)


def test_packing_stops_at_its_limit(tmp_path):
    found = documents(tmp_path, [30, 30, 30, 30])
    packed = data.pack(found, text.Bytes(), 256, tmp_path / "tokens.bin", 1, limit=40)
    assert packed.size == 62
    assert data.pack(found, text.Bytes(), 256, tmp_path / "tokens.bin", 1).size == 124


def test_an_epoch_sees_every_row_once_and_rows_depend_on_their_number_alone():
    rows = data.Rows(np.arange(101), 10, (3, 1))
    assert rows.per_epoch == 9
    epochs = [[rows[9 * epoch + i] for i in range(9)] for epoch in range(2)]
    for epoch in epochs:
        starts = sorted(int(row[0]) for row in epoch)
        assert np.diff(starts).tolist() == [10] * 8 and all(np.diff(row).tolist() == [1] * 10 for row in epoch)
    assert [int(row[0]) for row in epochs[0]] != [int(row[0]) for row in epochs[1]]
    np.testing.assert_array_equal(rows.batch(7, 4), [rows[i] for i in (7, 8, 9, 10)])
    assert not np.array_equal(rows[0], data.Rows(np.arange(101), 10, (3, 2))[0])
    with pytest.raises(ValueError, match="at least 21 are needed"):
        data.Rows(np.arange(20), 10, (0,))


def test_prefetching_keeps_order_works_ahead_and_ends():
    made = []
    ahead = threading.Event()

    def make(i):
        made.append(i)
        if i == 2:
            ahead.set()
        return 10 * i

    items = data.prefetch(make, range(100))
    assert next(items) == 0 and ahead.wait(10)
    assert next(items) == 10
    items.close()
    assert len(made) < 10 and not any(t.name == "prefetch" for t in threading.enumerate())


def test_prefetching_hands_errors_on():
    def make(i):
        if i == 1:
            raise ValueError("no row 1")
        return i

    items = data.prefetch(make, range(3))
    assert next(items) == 0
    with pytest.raises(ValueError, match="no row 1"):
        next(items)
