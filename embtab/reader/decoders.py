"""How each method's vectors are computed, written out in NumPy from the definitions.

Nothing here shares code with the training side: it is the oracle of the tests, and what a port to another language
copies. A decoder takes an encoding as plain data (an entry of `Plan.to_dict()["encodings"]`), the physical tables
[R, W] by name, the encoding's further arrays by name, and ids [N]; it gives vectors [N, D].

    N ids   D dimension   R rows of a physical table   W its width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Encoding = Mapping[str, Any]
Tables = Mapping[str, np.ndarray]


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, uint64 -> uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_rows(ids: np.ndarray, seed: int, num_rows: int) -> np.ndarray:
    """int64 [N]: the top 31 bits of the hash of `id + seed`, scaled to [0, num_rows)."""
    mixed = splitmix64(ids.astype(np.int64).view(np.uint64) + np.uint64(seed % 2**64))
    return (((mixed >> np.uint64(33)) * np.uint64(num_rows)) >> np.uint64(31)).astype(np.int64)


def dense(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """Row `id` of the table."""
    return tables[e["tables"][0]][ids]


def hashed(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The hashed row of the table."""
    return tables[e["tables"][0]][hash_rows(ids, e["seed"], e["num_rows"])]


def unified(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """One hashed row per chunk, side by side."""
    chunks = zip(e["tables"], e["seeds"], strict=True)
    return np.concatenate([tables[name][hash_rows(ids, seed, e["num_rows"])] for name, seed in chunks], axis=1)


def quotient_remainder(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The quotient's and the remainder's row, combined by `op`."""
    quotient, remainder = (tables[name] for name in e["tables"])
    q, r = quotient[ids // e["collisions"]], remainder[ids % e["collisions"]]
    if e["op"] == "concat":
        return np.concatenate([q, r], axis=1)
    return q + r if e["op"] == "sum" else q * r


def clustered(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """In every chunk, the row that the id's pointer names plus the hashed row; chunks side by side."""
    pointed, hashed = tables[e["tables"][0]], tables[e["tables"][-1]]
    chunks = []
    for j in range(e["chunks"]):
        centroid = pointed[j * e["centroids"] : (j + 1) * e["centroids"]][arrays["pointers"][ids, j]]
        rest = hashed[j * e["num_rows"] : (j + 1) * e["num_rows"]]
        chunks.append(centroid + rest[hash_rows(ids, int(arrays["seeds"][j]), e["num_rows"])])
    return np.concatenate(chunks, axis=1)


def hot_or_shared(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The row of the slot that holds the id; a hashed row behind the slots for the other ids."""
    buckets = arrays["slots"].reshape(e["num_buckets"], 4)
    bucket = hash_rows(ids, e["seeds"][0], e["num_buckets"])
    found = buckets[bucket] == ids[:, None]
    shared = buckets.size + hash_rows(ids, e["seeds"][1], e["num_rows"])
    return tables[e["tables"][0]][np.where(found.any(axis=1), 4 * bucket + found.argmax(axis=1), shared)]


def summed(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The sum of hashed rows; where weighted, each times its number in a hashed row of scalars."""
    read = zip(e["tables"], e["seeds"], e["num_rows"], strict=True)
    parts = [tables[name][hash_rows(ids, seed, num_rows)] for name, seed, num_rows in read]
    if not e["weighted"]:
        return np.sum(parts, axis=0)
    return np.einsum("knd,nk->nd", np.stack(parts[:-1]), parts[-1])


def frequency_cut(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """Row `id` for the first `hot` ids, for others a hashed row behind those."""
    hot = e["hot"]
    behind = hot + hash_rows(ids, e["seed"], e["num_rows"] - hot)
    return tables[e["tables"][0]][np.where((ids >= 0) & (ids < hot), ids, behind)]


def scaled(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The hashed row times the id's own number."""
    rows, scalars = (tables[name] for name in e["tables"])
    return rows[hash_rows(ids, e["seed"], e["num_rows"])] * scalars[ids]


def robe(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """Chunks of one flat array, each from a hashed place that is a multiple of the table's width."""
    table = tables[e["tables"][0]]
    flat, width = table.reshape(-1), table.shape[1]
    chunk = e["window"] * width
    _need(chunk > 0 and chunk * len(e["seeds"]) == e["dim"], "chunks do not make a vector")
    starts = [width * hash_rows(ids, seed, e["num_rows"] - e["window"] + 1) for seed in e["seeds"]]
    return np.concatenate([flat[start[:, None] + np.arange(chunk)] for start in starts], axis=1)


def tensor_train(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """Three rows of three cores, contracted over the two ranks."""
    (q1, q2, q3), (r1, r2) = e["q"], e["ranks"]
    rows = [tables[name][i] for name, i in zip(e["tables"], np.unravel_index(ids, e["p"]), strict=True)]
    cores = rows[0].reshape(-1, q1, r1), rows[1].reshape(-1, r1, q2, r2), rows[2].reshape(-1, r2, q3)
    return np.einsum("nar,nrbs,nsc->nabc", *cores).reshape(len(ids), q1 * q2 * q3)


def partitions(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """A row per modulus, by the digits of the id in a mixed radix (the first the least) or by its residues."""
    rows, rest = [], ids
    for name, modulus in zip(e["tables"], e["moduli"], strict=True):
        rows.append(tables[name][rest % modulus])
        rest = rest // modulus if e["kind"] == "radix" else ids
    if e["op"] == "concat":
        return np.concatenate(rows, axis=1)
    return np.sum(rows, axis=0) if e["op"] == "sum" else np.prod(rows, axis=0)


def low_rank(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The narrow row, projected, and the bias if there is one."""
    vectors = tables[e["tables"][0]][ids] @ arrays["projection"]
    return vectors + arrays["bias"] if e["bias"] else vectors


def mixed_dim(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The row of the block that holds the id (or its rank), projected unless it is wide enough."""
    at = arrays["ranks"][ids] if e["mapped"] else ids
    block = np.searchsorted(e["starts"], at, side="right") - 1
    vectors = np.zeros((len(ids), e["dim"]), dtype=np.float32)
    for b, name in enumerate(e["tables"]):
        rows = tables[name][at[block == b] - e["starts"][b]]
        vectors[block == b] = rows if e["widths"][b] == e["dim"] else rows @ arrays[f"projection{b}"]
    return vectors


def decoded(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """Hashes of the id, scaled to [-1, 1], through a network; below zero, a hidden number counts a hundredth."""
    buckets, step = 1_000_000, 0x9E3779B97F4A7C15
    _need(e["hashes"] == arrays["weight0"].shape[1], "the decoder reads another number of hashes")
    hashes = [hash_rows(ids, e["seed"] + k * step, buckets) for k in range(e["hashes"])]
    x = (2 * np.stack(hashes, axis=1) / (buckets - 1) - 1).astype(np.float32)
    for k in range(e["layers"] + 1):
        x = (np.maximum(x, x / 100) if k else x) @ arrays[f"weight{k}"].T + arrays[f"bias{k}"]
    return x


def before(bits: np.ndarray, starts: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of places [N] of a bitmap (64 to a word, lowest bit first): whether each is set, and how many are before it."""
    words = np.ascontiguousarray(bits[at // 64], dtype="<i8")
    spread = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    inside = np.arange(64) < (at % 64)[:, None]
    return spread[np.arange(len(at)), at % 64] == 1, starts[at // 64] + (spread * inside).sum(axis=1, dtype=np.int64)


def row_of(e: Encoding, arrays: Tables, ids: np.ndarray, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Which ids [N] have a row, and which row it is."""
    if e["mapped"]:
        return before(arrays[f"{prefix}bits"], arrays[f"{prefix}starts"], ids)
    return ids < e["num_rows"], ids


def pruned(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The row of an id that has one, filled up with zeros; zeros for the others."""
    has_row, row = row_of(e, arrays, ids)
    vectors = np.zeros((len(ids), e["dim"]), dtype=np.float32)
    vectors[has_row, : e["width"]] = tables[e["tables"][0]][row[has_row]]
    return vectors


def sparse(e: Encoding, tables: Tables, arrays: Tables, ids: np.ndarray) -> np.ndarray:
    """The values of an id's row at their columns, zeros elsewhere."""
    dim, values = e["dim"], tables[e["tables"][0]].reshape(-1)
    has_row, row = row_of(e, arrays, ids, "row_")
    owner, row = np.flatnonzero(has_row), row[has_row]
    vectors = np.zeros((len(ids), dim), dtype=np.float32)
    if e["form"] == "bitmap":
        at = row[:, None] * dim + np.arange(dim)
        there = before(arrays["bits"], arrays["starts"], at.ravel())[0].reshape(at.shape)
        first = before(arrays["bits"], arrays["starts"], at[:, 0])[1] if len(row) else row
        which, column = np.nonzero(there)
        place = first[which] + (np.cumsum(there, axis=1) - 1)[which, column]
    else:
        first, end = arrays["first"][row], arrays["first"][row + 1]
        _need((first >= 0).all() and (first <= end).all() and (end - first <= dim).all(), "rows have too many values")
        which = np.repeat(np.arange(len(row)), end - first)
        place = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)] or [row]).astype(np.int64)
        column = arrays["columns"][place]
    vectors[owner[which], column] = values[place]
    return vectors


def _need(condition: object, what: str) -> None:
    """A check of what a file claims, where a wrong number would cost work or memory without bound."""
    if not condition:
        raise ValueError(what)


DECODERS: dict[str, Callable[[Encoding, Tables, Tables, np.ndarray], np.ndarray]] = {
    "dense": dense,
    "hash": hashed,
    "unified": unified,
    "qr": quotient_remainder,
    "partitions": partitions,
    "lowrank": low_rank,
    "mixed_dim": mixed_dim,
    "cce": clustered,
    "cafe": hot_or_shared,
    "multihash": summed,
    "freqcut": frequency_cut,
    "memcom": scaled,
    "robe": robe,
    "tt": tensor_train,
    "dhe": decoded,
    "pruned": pruned,
    "sparse": sparse,
}
