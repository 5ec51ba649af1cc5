"""Criteo display advertising logs: raw TSV to the columns label, I1..I13, C1..C26.

The raw format is that of the Kaggle challenge of 2014 (and of the terabyte logs): no header, tab separated, one
impression a line in time order: the click (0 or 1), 13 integers (blank or negative at times) and 26 categories
(hashes in hexadecimal, blank at times).

Memory stays flat in the number of rows, not in the number of values: the text is read in blocks, checked, and put
down as columns in a staging folder; polars then counts the values and joins their ids on, streaming over that folder.
Only the vocabularies are held. The staging folder lies inside the unfinished output and takes about a third of the
size of the text; it is removed at the end, also after an error.
"""

from __future__ import annotations

import gzip
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
from tqdm import tqdm

from embtab.datasets import vocabulary
from embtab.datasets.estimate import Distinct
from embtab.datasets.schema import Categorical, Dataset, describe_files
from embtab.datasets.splits import check_fractions, split_sizes, write_split
from embtab.errors import DataError, UserError, shown
from embtab.files import new_folder

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
BLANK_ID = -1
"""The id of a blank category whose ids are hashed; no number in the text is negative."""
FLOAT32_MAX = 3.4028234663852886e38
DENSE_TRANSFORMS = ("log", "log1p", "none")

_COLUMNS = ("label", *INTEGERS, *CATEGORIES)
_RAW_SCHEMA = dict.fromkeys(("label", *INTEGERS), pl.Int64) | dict.fromkeys(CATEGORIES, pl.String)
_BLOCK_BYTES = 8 << 20  # of text; streaming holds some thirty blocks, so larger ones only cost memory


def prepare(
    raw: Sequence[Path],
    out: Path,
    *,
    min_count: int = 2,
    dense_transform: str = "log",
    valid: float = 0.1,
    test: float = 0.1,
    blank: float = 0.0,
    hashed: bool = False,
) -> Dataset:
    """Turns raw Criteo files into a dataset folder.

    The splits follow time: the first rows are train, the next valid, the last test. C1..C26 become contiguous int64
    ids by descending count in train (ties in the order of the values); id 0 stands for values that are rare in train
    or do not occur there. A blank category is the value "" and is treated like any other value: it gets an id of its
    own where it is frequent enough. I1..I13 become float32 through `dense_transform`:

    - "log": z = ln(x)^2 for x > 2, else z = x; the transform of the challenge's winners (3 Idiots, 2014), which
      AutoInt also uses. They cut z to an integer; here it is kept.
    - "log1p": z = sign(x) ln(1 + |x|).
    - "none": z = x.

    Args:
        raw: files, plain or gzip (told by their content), in time order; a folder stands for its files, numbers in
            their names in numeric order (day_2 before day_10).
        out: the folder to make; it must not exist, or be empty.
        min_count: categories that occur less often in train share id 0.
        dense_transform: one of DENSE_TRANSFORMS.
        valid: fraction of the rows that becomes the validation split.
        test: fraction of the rows that becomes the test split.
        blank: what a blank integer becomes, after the transform. At 0, the default, it cannot be told from a true 0
            and adds nothing where the value multiplies a vector; -0.5 is a value that no integer takes under any of
            the transforms. How many blanks each column has is written to `dataset.json`.
        hashed: C1..C26 are ids as they stand, their hexadecimal digits read as a number and a blank as -1. Nothing is
            counted or numbered (`min_count` does not matter), and only methods that hash take such ids.

    Raises:
        UserError: for an unknown option value, or an output folder that is not empty.
        DataError: for a bad file, naming file, line and column. No output is left behind.
    """
    check_fractions(valid, test)
    if min_count < 1:
        raise UserError(f"min_count must be 1 or more, got {min_count}")
    if dense_transform not in DENSE_TRANSFORMS:
        raise UserError(f"unknown dense_transform {dense_transform!r}; choose one of {', '.join(DENSE_TRANSFORMS)}")
    if not abs(blank) <= FLOAT32_MAX:
        raise UserError(f"blank must be a finite float32 number, got {blank}")
    files = _expand(raw)
    with new_folder(out) as folder:
        staging = folder / "staging"
        distinct = {name: Distinct() for name in CATEGORIES} if hashed else {}
        rows, blanks = _stage(files, staging, dense_transform, blank, distinct)
        sizes = split_sizes(rows, valid, test)
        staged = pl.scan_parquet(staging / "*.parquet")
        train = staged.head(sizes["train"])
        progress = tqdm([] if hashed else CATEGORIES, desc="counting", unit="column", disable=hashed)
        vocabularies = {name: vocabulary.fit(train.select(name), min_count) for name in progress}
        vocabulary.save(vocabularies, folder)
        num_ids = {name: table.height for name, table in vocabularies.items()}
        num_ids |= {name: found.count for name, found in distinct.items()}
        dataset = Dataset(
            name="criteo",
            features=tuple(Categorical(name, size, hashed=hashed) for name, size in num_ids.items()),
            dense=INTEGERS,
            source={
                "kind": "criteo",
                "files": [file.name for file in files],
                "rows": rows,
                "blanks": blanks,
                "options": {
                    "min_count": min_count,
                    "dense_transform": dense_transform,
                    "valid": valid,
                    "test": test,
                    "blank": blank,
                    "hashed": hashed,
                },
            },
        )
        with tqdm(total=rows, desc="encoding", unit="row", unit_scale=True) as bar:
            start = 0
            for split, size in sizes.items():
                encoded = vocabulary.encode(staged.slice(start, size), vocabularies)
                write_split(folder, split, dataset, _stream(encoded, bar))
                start += size
        shutil.rmtree(staging)
        dataset = replace(dataset, files=describe_files(folder))
        dataset.save(folder)
    return dataset


def _stream(rows: pl.LazyFrame, bar: tqdm) -> Iterator[pl.DataFrame]:
    for batch in rows.collect_batches(engine="streaming"):
        bar.update(batch.height)
        yield batch


def _expand(raw: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in raw:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        files += sorted(_visible_files(path), key=lambda file: numeric_order(file.name)) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{', '.join(map(str, raw)) or 'raw'}: holds no files; give the raw Criteo files or their folder"
        )
    return files


def _visible_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]


def numeric_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts day_2 before day_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _stage(
    files: Sequence[Path], staging: Path, dense_transform: str, blank: float, distinct: Mapping[str, Distinct]
) -> tuple[int, dict[str, int]]:
    """Checks the text and puts it down as Parquet, one file a block, with the integers transformed.

    Args:
        files: of text.
        staging: the folder to make.
        dense_transform: of the integers.
        blank: for blank integers.
        distinct: of the columns that become ids at once; takes note of them.

    Returns:
        The number of rows, and the number of blanks of each of I1..I13.
    """
    staging.mkdir()
    dense = [transformed(pl.col(name), dense_transform).fill_null(blank).cast(pl.Float32) for name in INTEGERS]
    rows, blanks = 0, dict.fromkeys(INTEGERS, 0)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True) as bar:
        for number, (file, first_line, block) in enumerate(_blocks(files, bar)):
            table = _parse(file, first_line, block, list(distinct))
            rows += table.height
            for name, count in table.select(INTEGERS).null_count().row(0, named=True).items():
                blanks[name] += count
            for name, found in distinct.items():
                found.add(table[name].to_numpy())
            texts = [pl.col(name).fill_null("") for name in CATEGORIES if name not in distinct]
            table = table.with_columns(pl.col("label").cast(pl.Float32), *dense, *texts)
            table.write_parquet(staging / f"{number:08}.parquet", compression="lz4", statistics=False)
    return rows, blanks


def transformed(x: pl.Expr, transform: str) -> pl.Expr:
    """Numbers after one of DENSE_TRANSFORMS, Float64; see `prepare`."""
    x = x.cast(pl.Float64)
    if transform == "log":
        return pl.when(x > 2).then(x.log() ** 2).otherwise(x)
    return x.sign() * x.abs().log1p() if transform == "log1p" else x


def _blocks(files: Sequence[Path], bar: tqdm) -> Iterator[tuple[Path, int, bytes]]:
    """Yields (file, number of the block's first line, whole lines that each end in a line feed)."""
    for file in files:
        line, rest = 1, b""
        for chunk in _chunks(file, bar):
            cut = chunk.rfind(b"\n") + 1
            if not cut and len(rest) > _BLOCK_BYTES:
                raise DataError(f"{file}: line {line}: longer than {_BLOCK_BYTES} bytes; not a Criteo text file")
            if cut:
                block = rest + chunk[:cut]
                yield file, line, block
                line, rest = line + block.count(b"\n"), b""
            rest += chunk[cut:]
        if rest:
            yield file, line, rest + b"\n"
        elif line == 1:
            raise DataError(f"{file}: is empty; remove it from the list or fetch it again")


def _chunks(file: Path, bar: tqdm) -> Iterator[bytes]:
    """The bytes of a file, uncompressed; the bar advances by what was read from disk."""
    try:
        with file.open("rb") as disk:
            compressed = disk.read(2) == b"\x1f\x8b"
            disk.seek(0)
            text = gzip.GzipFile(fileobj=disk) if compressed else disk
            seen = 0
            while chunk := text.read(_BLOCK_BYTES):
                bar.update(disk.tell() - seen)
                seen = disk.tell()
                yield chunk
    except EOFError as error:
        raise DataError(f"{file}: the gzip data ends too early; the file is truncated, fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: the gzip data is damaged ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _parse(file: Path, first_line: int, block: bytes, hashed: Sequence[str]) -> pl.DataFrame:
    """Parses whole lines; polars is quick but fills short lines with nulls, so the tabs and lines are counted too.

    Categories become text, those that are `hashed` Int64.
    """
    try:
        table = pl.read_csv(block, has_header=False, separator="\t", quote_char=None, schema=_RAW_SCHEMA)
    except (pl.exceptions.PolarsError, OSError) as error:  # the latter where gzip data was packed a second time
        raise _explanation(file, first_line, block) from error
    lines = block.count(b"\n")
    rectangular = table.height == lines and block.count(b"\t") == lines * (len(_COLUMNS) - 1)
    rectangular = rectangular and block.count(b"\r") == block.count(b"\r\n")  # polars takes them off any column's end
    if not rectangular or not table["label"].is_in([0, 1]).fill_null(False).all():
        raise _explanation(file, first_line, block)
    if not hashed:
        return table
    numbers = table.select(pl.col(hashed).str.to_integer(base=16, strict=False))
    negative = numbers.select(pl.any_horizontal((pl.all() < 0).any())).item()
    if negative or numbers.null_count().row(0) != table.select(hashed).null_count().row(0):
        raise _explanation(file, first_line, block, hashed)
    return table.with_columns(numbers.fill_null(BLANK_ID))


def _explanation(file: Path, first_line: int, block: bytes, hashed: Sequence[str] = ()) -> DataError:
    """Finds the first bad line of a block that failed; slow, but it runs once."""
    for number, line in enumerate(block.split(b"\n")[:-1], first_line):
        wrong = _what_is_wrong(line.removesuffix(b"\r"), hashed)
        if wrong:
            return DataError(f"{file}: line {number}: {wrong}")
    return DataError(f"{file}: line {first_line} or below cannot be read as Criteo text")


def _what_is_wrong(line: bytes, hashed: Sequence[str]) -> str | None:
    fields = line.split(b"\t") if line else []
    if len(fields) != len(_COLUMNS):
        return f"has {len(fields)} columns, not {len(_COLUMNS)} (label, 13 integers, 26 categories; tab separated)"
    if b"\r" in line:
        return "holds a carriage return that does not end the line"
    for name, field in zip(_COLUMNS, fields, strict=True):
        text = field.decode(errors="replace")
        if name == "label" and text.strip() not in ("0", "1"):
            return f"column label: must be 0 or 1, got {shown(text)}"
        if name in INTEGERS and text and not _is_int64(text):
            return f"column {name}: must be a whole number or blank, got {shown(text)}"
        if name in CATEGORIES and "\ufffd" in text and not _is_utf8(field):
            return f"column {name}: is not valid UTF-8: {shown(field)}"
        if name in hashed and text and not _is_hexadecimal(text):
            return f"column {name}: must be hexadecimal and below 2^63, or blank, to be hashed, got {shown(text)}"
    return None


def _is_int64(text: str) -> bool:
    return re.fullmatch(r" *[+-]?[0-9]{1,19} *", text) is not None and -(2**63) <= int(text) < 2**63


def _is_hexadecimal(text: str) -> bool:
    return re.fullmatch(r"\+?[0-9a-fA-F]+", text) is not None and int(text, 16) < 2**63


def _is_utf8(field: bytes) -> bool:
    try:
        field.decode()
    except UnicodeDecodeError:
        return False
    return True
