"""Which runs a sweep holds."""

from embtab.compare.sweep import Cell, Sweep


def test_a_method_that_names_its_precision_is_run_once_in_it() -> None:
    own = {"name": "hash", "precision": "int4"}
    mixed = {"user": {"name": "qr", "precision": "int8"}, "*": "dense"}
    cells = Sweep(
        "d", ("dense", "auto", "hash", own, mixed), ("0.1x",), seeds=(5,), precisions=("fp32", "fp16")
    ).cells()
    assert cells == [
        Cell("dense", None, "fp32", 5),
        Cell("hash", "0.1x", "fp32", 5),
        Cell("dense", None, "fp16", 5),
        Cell("hash", "0.1x", "fp16", 5),
        Cell("auto", "0.1x", None, 5),
        Cell(own, "0.1x", None, 5),
        Cell(mixed, "0.1x", None, 5),
        Cell("dense", None, "int8", 5),
    ]
