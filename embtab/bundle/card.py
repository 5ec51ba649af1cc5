"""What a bundle says of itself in words: the decoder's rules in config.json, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from embtab.hashing import MAX_ROWS, hash_rows
from embtab.planning import Plan
from embtab.text import fenced, markdown, printable

_EXAMPLES = [(0, 0, 1000), (1, 0, 1000), (-1, 7, 1000), (2**63 - 1, -(2**63), MAX_ROWS), (2**53 + 1, 12345, 97)]


def _hashed(i: int, seed: int, num_rows: int) -> int:
    import numpy as np

    with np.errstate(over="ignore"):
        return int(hash_rows(np.array([i]), np.int64(seed), np.int64(num_rows))[0])


RULES: dict[str, Any] = {
    "documentation": "docs/bundle.md of embtab describes every method's decoder",
    "byte_order": "little",
    "ids": "int64; an unsigned id is the int64 of the same 64 bits",
    "hash": {
        "name": "splitmix64-top31-multiply-shift",
        "steps": [
            "x = uint64(id) + uint64(seed), modulo 2^64",
            "x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9, modulo 2^64",
            "x = (x ^ (x >> 27)) * 0x94D049BB133111EB, modulo 2^64",
            "x = x ^ (x >> 31)",
            "row = ((x >> 33) * num_rows) >> 31",
        ],
        "shifts": [30, 27, 31, 33, 31],
        "multipliers": ["0xBF58476D1CE4E5B9", "0x94D049BB133111EB"],
        "examples": [{"id": i, "seed": s, "num_rows": n, "row": _hashed(i, s, n)} for i, s, n in _EXAMPLES],
    },
    "out_of_range": "an encoding whose num_ids is null takes any int64; else an id outside [0, num_ids) is an error",
    "pooling": {
        "sum": "the sum over the bag of weight * vector; weight 1 where none is given",
        "mean": "that sum divided by the number of ids in the bag, whatever the weights",
        "none": "not pooled: a vector per id",
        "empty_bag": "zeros",
    },
    "row_layout": {
        "fp32": "rows.TABLE F32 [num_rows, width]",
        "fp16": "rows.TABLE F16 [num_rows, width]",
        "int8": "rows.TABLE U8 [num_rows, width]; x = q * scales.TABLE[row] + offsets.TABLE[row] (F16), in float32",
        "int4": "as int8, but rows.TABLE U8 [num_rows, (width + 1) / 2]: number 2k is the low four bits of byte k",
    },
}


def _facts(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {markdown(key)}: {markdown(json.dumps(value, ensure_ascii=False))}" for key, value in facts.items()]


def model_card(plan: Plan, about: Mapping[str, Any]) -> str:
    """README.md of a bundle."""
    methods = ", ".join(sorted({encoding.method for encoding in plan.encodings.values()}))
    facts = _facts(about["provenance"])
    quality = _facts(about["quality"])
    first = plan.features[0].name
    return "\n".join(
        [
            "---",
            "library_name: embtab",
            "tags: [recommender, embedding-tables]",
            "---",
            "",
            "# Embedding tables",
            "",
            f"{len(plan.features)} features, vectors of {plan.dim} numbers, methods: {methods}. "
            f"{plan.nbytes} bytes where dense fp32 tables take {plan.dense_nbytes}.",
            "",
            *fenced(plan.describe()),
            "",
            "## Quality",
            "",
            *(quality or ["Nothing was recorded."]),
            "",
            "## Origin",
            "",
            f"- written by {about['producer']}, {about['created']}",
            f"- seed of the hashes: {plan.seed}",
            *facts,
            "",
            "## Reading it",
            "",
            *fenced(
                "from embtab.reader import Bundle  # NumPy only\n\n"
                f'vectors = Bundle("path/to/this/folder").vectors({printable(repr(first))}, [0])',
                "python",
            ),
            "",
            "`embtab verify` recomputes the golden vectors; `embtab inspect` shows what is inside. `config.json` holds",
            "the rules for a reader in any language, and embtab's docs/bundle.md explains them.",
            "",
        ]
    )
