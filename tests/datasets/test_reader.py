import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from embtab.datasets.parquet import read_columns, row_groups
from embtab.datasets.reader import Batch, ParquetBatches
from embtab.datasets.schema import Categorical, Dataset, describe_files, open_writer
from embtab.errors import DataError, UserError

FEATURES = (Categorical("C1", 10_000), Categorical("tags", 50, multi=True), Categorical("C2", 10_000))


def rows_of(start: int, stop: int) -> dict[str, list]:
    """Rows whose every value follows from the row number, which is also the id C1."""
    rows = range(start, stop)
    return {
        "label": [float(i % 2) for i in rows],
        "I1": [i / 2 for i in rows],
        "I2": [-float(i) for i in rows],
        "C1": list(rows),
        "tags": [[(i + j) % 50 for j in range(i % 4)] for i in rows],
        "C2": [9_999 - i for i in rows],
        "who": [i // 3 for i in rows],
    }


def write(folder: Path, files: list[list[int]], split: str = "train", features=FEATURES) -> Path:
    """A dataset folder whose files have row groups of the given sizes."""
    dataset = Dataset("made", tuple(features), dense=("I1", "I2"), user="who")
    schema, start = dataset.arrow_schema(), 0
    for number, groups in enumerate(files):
        with open_writer(folder / split / f"part-{number:03}.parquet", schema) as writer:
            for size in groups:
                columns = rows_of(start, start + size)
                table = pa.table([columns[name] for name in schema.names], schema=schema)
                writer.write_table(table, row_group_size=max(size, 1))
                start += size
    replace(dataset, files=describe_files(folder)).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("made") / "data", [[50, 30, 1], [7], [64, 64, 20, 3], [100]])


TOTAL = 50 + 30 + 1 + 7 + 64 + 64 + 20 + 3 + 100


def ids(batches) -> list[list[int]]:
    return [batch.sparse["C1"].values().tolist() for batch in batches]


def flat(batches) -> list[int]:
    return [i for batch in ids(batches) for i in batch]


def check_rows(batch: Batch) -> None:
    """Every value of the batch belongs to the row that C1 names."""
    rows = batch.sparse["C1"].values().tolist()
    expected = [{name: column[0] for name, column in rows_of(i, i + 1).items()} for i in rows]
    assert batch.label.tolist() == [row["label"] for row in expected]
    assert batch.dense.tolist() == [[row["I1"], row["I2"]] for row in expected]
    assert batch.user.tolist() == [row["who"] for row in expected]
    assert batch.sparse["C2"].values().tolist() == [row["C2"] for row in expected]
    assert batch.sparse["C2"].lengths().tolist() == [1] * len(rows)
    assert batch.sparse["tags"].lengths().tolist() == [len(row["tags"]) for row in expected]
    assert batch.sparse["tags"].values().tolist() == [tag for row in expected for tag in row["tags"]]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 16, 339, 5000])
def test_every_row_once_with_its_own_values(folder, shuffle, prefetch, batch_size):
    dataset = ParquetBatches(folder, "train", batch_size, shuffle=shuffle, prefetch=prefetch)
    batches = list(dataset)
    for batch in batches:
        check_rows(batch)
    rows = flat(batches)
    assert sorted(rows) == list(range(TOTAL))
    assert (rows == list(range(TOTAL))) is not shuffle
    assert len(batches) == len(dataset) == -(-TOTAL // batch_size)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert dataset.rows_dropped == 0


def test_batch_layout(folder):
    batch = next(iter(ParquetBatches(folder, "train", 16)))
    assert batch.dense.shape == (16, 2)
    assert batch.dense.dtype == batch.label.dtype == torch.float32
    assert batch.sparse.keys() == ["C1", "tags", "C2"]
    assert batch.sparse.values().dtype == batch.user.dtype == torch.int64
    assert batch.sparse.stride() == 16
    # What is precomputed is what torchrec would compute.
    plain = type(batch.sparse).from_lengths_sync(batch.sparse.keys(), batch.sparse.values(), batch.sparse.lengths())
    assert batch.sparse._length_per_key == plain.length_per_key() == [16, 24, 16]
    assert batch.sparse._offset_per_key == plain.offset_per_key()
    moved = batch.to("cpu", non_blocking=True)
    assert moved.sparse.values().equal(batch.sparse.values())
    assert moved.user.equal(batch.user)
    on_meta = batch.to("meta")
    devices = {t.device.type for t in (on_meta.dense, on_meta.label, on_meta.user, on_meta.sparse.values())}
    assert devices == {"meta"}


def test_batches_own_their_memory(folder):
    expected = flat(ParquetBatches(folder, "train", 16))
    seen = []
    for batch in ParquetBatches(folder, "train", 16):
        seen += batch.sparse["C1"].values().tolist()
        batch.sparse.values().zero_()
        batch.dense.zero_()
        assert batch.dense.untyped_storage().nbytes() == batch.dense.nbytes
    assert seen == expected


def test_user_column_that_is_a_feature(tmp_path):
    folder = tmp_path / "data"
    dataset = Dataset("made", (Categorical("who", 5),), user="who")
    schema = dataset.arrow_schema()
    with open_writer(folder / "train/a.parquet", schema) as writer:
        writer.write_table(pa.table([[0.0, 1.0], [3, 4]], schema=schema))
    replace(dataset, files=describe_files(folder)).save(folder)
    (batch,) = ParquetBatches(folder, "train", 4)
    assert batch.user.tolist() == batch.sparse.values().tolist() == [3, 4]
    assert batch.dense.shape == (2, 0)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [40, 200])
def test_workers_share_the_batches(folder, workers, batch_size):
    alone = ids(ParquetBatches(folder, "train", batch_size, shuffle=True, seed=5))
    dataset = ParquetBatches(folder, "train", batch_size, shuffle=True, seed=5)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert len(loader) == len(alone)
    shared = list(loader)
    for batch in shared:
        check_rows(batch)
    assert sorted(ids(shared)) == sorted(alone)
    dataset.load_state_dict({**dataset.state_dict(), "batch": 2})
    assert ids(DataLoader(dataset, batch_size=None, num_workers=workers)) == ids(shared)[2:]


def test_spawned_worker(folder):
    dataset = ParquetBatches(folder, "train", 100)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert flat(loader) == list(range(TOTAL))


@settings(max_examples=40, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 30),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_ranks_get_equal_disjoint_shares(tmp_path_factory, files, world_size, batch_size, shuffle, drop_last):
    total = sum(map(sum, files))
    assume(total // world_size >= (batch_size if drop_last else 1))
    folder = write(tmp_path_factory.mktemp("shares") / "data", files)
    ranks = []
    for rank in range(world_size):
        dataset = ParquetBatches(
            folder, "train", batch_size, shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=world_size
        )
        ranks.append(ids(dataset))
        assert len(ranks[-1]) == len(dataset)
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    seen = [i for batches in ranks for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == total - dataset.rows_dropped
    assert set(seen) <= set(range(total))
    if drop_last:
        assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
        assert dataset.rows_dropped < world_size * batch_size
    else:
        assert dataset.rows_dropped == total % world_size
    # Step by step, what the ranks see together is what one process sees that takes their batches as one.
    (alone,) = [ParquetBatches(folder, "train", batch_size * world_size, shuffle=shuffle, rank=0, world_size=1)]
    for together, whole in zip(zip(*ranks, strict=True), ids(alone), strict=False):
        assert [i for batch in together for i in batch] == whole[: world_size * len(together[0])]


@settings(max_examples=40, deadline=None)
@given(
    files=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=6), min_size=1, max_size=4),
    world_size=st.integers(1, 5),
    batch_size=st.integers(1, 30),
)
def test_every_row_is_read_by_some_rank_and_known_by_its_number(tmp_path_factory, files, world_size, batch_size):
    total = sum(map(sum, files))
    assume(total)
    folder = write(tmp_path_factory.mktemp("every") / "data", files)
    ranks = []
    for rank in range(world_size):
        dataset = ParquetBatches(folder, "train", batch_size, every_row=True, rank=rank, world_size=world_size)
        ranks.append(list(dataset))
        assert dataset.rows_dropped == 0
        for batch in ranks[-1]:
            check_rows(batch)
            assert batch.row.tolist() == batch.sparse["C1"].values().tolist()
    assert len({tuple(map(len, batches)) for batches in ranks}) == 1
    together = [row for step in zip(*ranks, strict=True) for batch in step for row in batch.row.tolist()]
    assert together == [min(i, total - 1) for i in range(-(-total // world_size) * world_size)]


def test_epochs_and_seeds_differ_and_repeat(folder):
    def stream(seed, epoch):
        dataset = ParquetBatches(folder, "train", 32, shuffle=True, seed=seed)
        dataset.set_epoch(epoch)
        return flat(dataset)

    streams = [stream(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(rows) for rows in streams}) == 6
    assert streams == [stream(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]


def test_shuffle_mixes_row_groups(tmp_path):
    folder = write(tmp_path / "data", [[100] * 8])
    first = flat(ParquetBatches(folder, "train", 100, shuffle=True, seed=1))[:100]
    assert len({i // 100 for i in first}) == 4


@pytest.mark.parametrize("done", [0, 1, 5, 10, 11])
def test_resume_equals_the_uninterrupted_stream(folder, done):
    def make():
        return ParquetBatches(folder, "train", 16, shuffle=True, seed=3, rank=1, world_size=2)

    whole = make()
    whole.set_epoch(4)
    expected = ids(whole)
    interrupted = make()
    interrupted.set_epoch(4)
    stream = iter(interrupted)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert state["batch"] == done
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert ids(resumed) == expected[done:]
    assert ids(resumed) == expected, "only the first iteration after loading is shortened"


def test_resume_reads_only_what_is_left(folder, monkeypatch):
    import embtab.datasets.reader as reader

    read = []
    original = reader.read_columns
    monkeypatch.setattr(reader, "read_columns", lambda group, columns: read.append(group) or original(group, columns))
    dataset = ParquetBatches(folder, "train", 10)
    dataset.load_state_dict({**dataset.state_dict(), "batch": len(dataset) - 2})
    assert flat(dataset) == list(range(320, TOTAL))
    assert [group.path.name for group in read] == ["part-003.parquet"]


def test_state_of_another_stream_is_refused(folder):
    state = ParquetBatches(folder, "train", 16).state_dict()
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        ParquetBatches(folder, "train", 16, seed=1).load_state_dict(state)
    del state["ranges"]
    with pytest.raises(UserError, match="an older embtab wrote its state"):
        ParquetBatches(folder, "train", 16).load_state_dict(state)


@settings(max_examples=30, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(0, 9)), min_size=1, max_size=4),
    shuffle=st.booleans(),
)
def test_any_number_of_ranks_goes_on_with_what_is_left(folder, runs, shuffle):
    """Each run is (world_size, batch_size, batches until it is stopped), and the last one ends the epoch."""
    seen, state = [], None
    for world_size, batch_size, stop in [*runs, (1, 50, TOTAL)]:
        counts = set()
        for rank in range(world_size):
            dataset = ParquetBatches(folder, "train", batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
            dataset.set_epoch(2)
            if state is not None:
                dataset.load_state_dict(state)
            assert dataset.batches_left() >= 0
            batches = ids(batch for _, batch in zip(range(stop), dataset, strict=False))
            counts.add(tuple(map(len, batches)))
            seen += [i for batch in batches for i in batch]
            after = json.loads(json.dumps(dataset.state_dict()))
        assert len(counts) == 1
        state = after
    assert sorted(seen) == list(range(TOTAL))


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 3), (3, 2)])
def test_another_number_of_workers_goes_on_with_what_is_left(folder, before, after):
    dataset = ParquetBatches(folder, "train", 20, shuffle=True)
    loader = DataLoader(dataset, batch_size=None, num_workers=before)
    first = [batch for batch, _ in zip(loader, range(7), strict=False)]
    state = {**dataset.state_dict(), "batch": 7, "workers": max(before, 1)}
    resumed = ParquetBatches(folder, "train", 20, shuffle=True)
    resumed.load_state_dict(state, max(after, 1))
    rest = list(DataLoader(resumed, batch_size=None, num_workers=after))
    assert sorted(flat(first) + flat(rest)) == list(range(TOTAL))


def test_stopping_early_stops_the_thread(folder):
    import threading

    for _ in ParquetBatches(folder, "train", 5, shuffle=True):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("embtab-reader")]


def rewrite(folder: Path, change) -> Path:
    """Replaces the first training file by a changed table and describes the folder's checksums anew."""
    path = folder / "train/part-000.parquet"
    table = change(pq.read_table(path))
    pq.write_table(table, path, row_group_size=10)
    replace(Dataset.load(folder), files=describe_files(folder)).save(folder)
    return path


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), pa.field(name, values.type), values)


DEFECTS = {
    "column 'C2' is missing": lambda t: t.drop_columns("C2"),
    "column 'I1' is double but must be float": lambda t: with_column(t, "I1", pa.array([0.5] * 30)),
    "column 'C1' is string but must be int64": lambda t: with_column(t, "C1", pa.array(["x"] * 30)),
    "column 'tags' is int64 but must be list": lambda t: with_column(t, "tags", pa.array([1] * 30)),
    "column 'more' is not in dataset.json": lambda t: t.append_column("more", pa.array([1] * 30)),
    "row group 1, column 'C1', row 3: holds a null": lambda t: with_column(
        t, "C1", pa.array([None if i == 13 else i for i in range(30)])
    ),
    "row group 2, column 'tags', row 1: holds a null": lambda t: with_column(
        t, "tags", pa.array([[5, None] if i == 21 else [1] * (i % 3) for i in range(30)], pa.list_(pa.int64()))
    ),
}


@pytest.mark.parametrize("message", DEFECTS)
def test_wrong_columns_and_nulls_are_named(tmp_path, message):
    path = rewrite(write(tmp_path / "data", [[30]]), DEFECTS[message])
    with pytest.raises(DataError) as error:
        list(ParquetBatches(tmp_path / "data", "train", 4))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_nullable_columns_without_nulls_are_read(tmp_path):
    rewrite(write(tmp_path / "data", [[30]]), lambda t: with_column(t, "C1", pa.array(range(30))))
    assert flat(ParquetBatches(tmp_path / "data", "train", 4)) == list(range(30))


def test_truncated_absent_and_changed_files(tmp_path):
    folder = write(tmp_path / "data", [[30], [30]])
    path = folder / "train/part-001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"part-001\.parquet: truncated or not a Parquet file"):
        ParquetBatches(folder, "train", 4)
    path.unlink()
    with pytest.raises(DataError, match=r"part-001\.parquet: .*does not exist"):
        ParquetBatches(folder, "train", 4)
    path.write_bytes((write(tmp_path / "other", [[29]]) / "train/part-000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"part-001\.parquet: has 29 rows but dataset.json says 30"):
        ParquetBatches(folder, "train", 4)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_damaged_pages_are_named_when_reached(tmp_path, prefetch):
    folder = write(tmp_path / "data", [[30] * 4])
    path = folder / "train/part-000.parquet"
    column = pq.read_metadata(path).row_group(2).column(3)
    content = bytearray(path.read_bytes())
    at = column.data_page_offset
    content[at : at + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    batches = iter(ParquetBatches(folder, "train", 30, prefetch=prefetch))
    assert flat([next(batches), next(batches)]) == list(range(60))
    with pytest.raises(DataError, match=r"part-000\.parquet, row group 2, column 'C1'"):
        next(batches)


def test_bad_requests(folder):
    with pytest.raises(UserError, match="unknown split 'dev'; splits are train, valid, test"):
        ParquetBatches(folder, "dev", 4)
    with pytest.raises(DataError, match="the valid split is empty"):
        ParquetBatches(folder, "valid", 4)
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        ParquetBatches(folder, "train", 0)
    with pytest.raises(UserError, match="prefetch must be 0 or more"):
        ParquetBatches(folder, "train", 4, prefetch=-1)
    with pytest.raises(UserError, match="too few for a batch of 340"):
        ParquetBatches(folder, "train", 340, drop_last=True)
    with pytest.raises(UserError, match=r"rank must lie in \[0, 2\), got 2"):
        ParquetBatches(folder, "train", 4, rank=2, world_size=2)


def test_many_ranks_decode_no_more_than_a_window_for_each_of_their_batches(tmp_path, monkeypatch):
    """Where a batch of all ranks is longer than a window, none of them decodes all of it."""
    folder = write(tmp_path / "data", [[20] * 80])  # 20 windows of 80 rows; a batch of 16 ranks is 4 of them
    decoded, read = [], []

    def noted(group, columns):
        decoded.append(group.index)
        return read_columns(group, columns)

    monkeypatch.setattr("embtab.datasets.reader.read_columns", noted)
    for rank in range(16):
        decoded.clear()
        dataset = ParquetBatches(folder, "train", 20, shuffle=True, rank=rank, world_size=16)
        read += flat(dataset)
        assert len(dataset) == 5
        assert len(decoded) == len(set(decoded)) == 4 * 5, "4 row groups for each batch"
    assert sorted(read) == list(range(1600))


def test_a_column_that_stands_twice_is_named(tmp_path):
    folder = write(tmp_path / "data", [[30]])
    rewrite(folder, lambda t: t.rename_columns(["C1" if name == "C2" else name for name in t.column_names]))
    with pytest.raises(DataError, match=r"part-000\.parquet: column 'C1' stands twice"):
        ParquetBatches(folder, "train", 4)


def test_a_footer_that_tells_another_number_of_rows_is_not_believed(tmp_path):
    folder = write(tmp_path / "data", [[30]])
    (group,) = row_groups(folder, Dataset.load(folder), "train")
    with pytest.raises(DataError, match=r"row group 0, column 'C1': holds 30 rows but the footer says 29"):
        read_columns(replace(group, rows=29), ["C1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["files"][0].update(rows="30"), "rows cannot be '30'"),
        (
            lambda d: d["files"][0].update(path="elsewhere/a.parquet"),
            "a.parquet' is no SPLIT/NAME.parquet",
        ),
        (lambda d: d["files"].append(d["files"][0]), "'train/part-000.parquet' is no name, or is listed twice"),
        (lambda d: d.update(dense="I1"), "dense cannot be 'I1'"),
        (lambda d: d.update(dense=["I1", 1.5]), "1.5 is no name"),
        (lambda d: d.update(dense=["I1", "C1"]), "'C1' is no name, or is listed twice"),
        (lambda d: d.update(features=None), "object is not iterable"),
        (lambda d: d["features"].append("C9"), "expected an entry, got 'C9'"),
        (lambda d: d["features"][0].update(multi=1), "multi cannot be 1"),
        (lambda d: d["features"][0].update(unknown=1), "unexpected keyword argument 'unknown'"),
        (lambda d: d.update(user="tags"), "the user column 'tags' must hold one whole number a row"),
        (lambda d: d.update(name=-1), "name cannot be -1"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path, change, message):
    folder = write(tmp_path / "data", [[30]])
    described = json.loads((folder / "dataset.json").read_text())
    change(described)
    (folder / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"/dataset\.json: ") as error:
        ParquetBatches(folder, "train", 4)
    assert message in str(error.value)
