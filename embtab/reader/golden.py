"""Golden vectors: ids and bags of every feature with the vectors they must give, whoever decodes the bundle.

The ids hold what ports get wrong: both ends of the range, repeats, negative ids and ids above 2^31 and 2^53 where the
method takes any int64. Bags hold one id, several, the same one twice, and none; weights are of both signs. NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embtab.reader.manifest import BundleError
from embtab.reader.read import Bundle
from embtab.reader.schema import check_finite, map_tensors

FILE = "golden.safetensors"
EXTREMES = (0, -1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63))
NUM_IDS = 256
INPUTS = ("ids", "bag_ids", "offsets", "weights")
OUTPUTS = ("vectors", "pooled", "weighted")

Arrays = Mapping[str, np.ndarray]
Inputs = Mapping[str, Arrays]
Outputs = dict[str, dict[str, np.ndarray]]
Answer = Callable[[Inputs], Outputs]
"""Inputs by feature -> outputs by feature."""


def inputs(plan: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """By feature: ids [N]; bag_ids [M], offsets [B + 1] and weights [M] of some bags."""
    generator = np.random.default_rng(plan["seed"] % 2**63)
    return {entry["name"]: _inputs(plan, entry, generator) for entry in plan["features"]}


def _inputs(plan: Mapping[str, Any], entry: Mapping[str, Any], generator: np.random.Generator) -> dict[str, np.ndarray]:
    n = entry["num_ids"]
    bounded = plan["encodings"][entry["id_space"] or entry["name"]]["num_ids"] is not None
    edges = [0, n - 1, n // 2] if bounded else [*EXTREMES, n - 1, n]
    drawn = generator.integers(0, n, min(n, NUM_IDS - len(edges)))
    ids = np.concatenate([np.array(edges, np.int64), drawn])
    some = generator.choice(ids, 8)
    bag_ids = np.concatenate([ids[: len(edges)], some, some[-1:]])  # the last bag holds one id twice
    offsets = np.array([0, 1, 1, len(edges), len(bag_ids) - 2, len(bag_ids), len(bag_ids)], np.int64)
    weights = generator.uniform(-2, 2, len(bag_ids)).astype(np.float32)
    return {"ids": ids, "bag_ids": bag_ids, "offsets": offsets, "weights": weights}


def read(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """The golden inputs and outputs inside a bundle, by feature.

    Raises:
        BundleError: when one is missing.
    """
    folder = bundle.deltas[-1].path if bundle.deltas else bundle.path
    held = map_tensors(folder / FILE)
    check_finite(held, folder)
    pooled = {entry["name"]: entry["pooling"] != "none" for entry in bundle.plan["features"]}
    try:
        return {
            name: {key: held[f"{key}.{name}"] for key in (*INPUTS, *(OUTPUTS if pooled[name] else OUTPUTS[:1]))}
            for name in bundle.features
        }
    except KeyError as error:
        raise BundleError(f"{folder}: no golden tensor {error}") from None


def reader_answers(bundle: Bundle) -> Answer:
    """What embtab.reader gives."""
    pooling = {entry["name"]: entry["pooling"] for entry in bundle.plan["features"]}

    def of(feature: str, given: Arrays) -> dict[str, np.ndarray]:
        found = {"vectors": bundle.vectors(feature, given["ids"])}
        if pooling[feature] != "none":
            bags = feature, given["bag_ids"], given["offsets"]
            found |= {"pooled": bundle.lookup(*bags), "weighted": bundle.lookup(*bags, given["weights"])}
        return found

    return lambda given: {feature: of(feature, inputs) for feature, inputs in given.items()}


def tolerance(outputs: Mapping[str, Arrays]) -> dict[str, float]:
    """How far a decoder may be off: sums in another order differ by a few units in the last place of their terms."""
    largest = max(float(np.abs(a).max(initial=0)) for each in outputs.values() for a in each.values())
    return {"absolute": 1e-6 * max(1.0, largest), "relative": 1e-5}


def differences(bundle: Bundle, answer: Answer) -> dict[str, tuple[float, bool]]:
    """By feature, the largest absolute difference from the golden vectors, and whether all lie within tolerance."""
    allowed = (bundle.deltas[-1] if bundle.deltas else bundle).config["golden"]
    golden = read(bundle)
    try:
        answered = answer(golden)
    except BundleError:
        raise
    except (IndexError, ValueError) as error:
        raise BundleError(f"{bundle.path}: the golden ids do not fit these tables: {error}") from None
    found = {}
    for feature in golden:
        worst, fine = 0.0, True
        for key, got in answered[feature].items():
            expected = golden[feature][key]
            if got.shape != expected.shape:
                raise BundleError(
                    f"{bundle.path}: feature {feature!r}: {key} have shape {got.shape}, not {expected.shape}"
                )
            worst = max(worst, float(np.abs(got - expected).max(initial=0)))
            fine &= within(got, expected, allowed)
        found[feature] = (worst, fine)
    return found


def within(got: np.ndarray, expected: np.ndarray, allowed: Mapping[str, float]) -> bool:
    """Whether no number is off by more than `absolute + relative * |expected|`."""
    off = np.abs(got - expected)
    return bool((off <= allowed["absolute"] + allowed["relative"] * np.abs(expected)).all())
