"""Exported programs, opened: looked at in full before anything of theirs runs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from embtab.errors import UserError, shown
from embtab.reader import Bundle, BundleError
from embtab.reader.manifest import CONFIG, check_files, need, read_signed, refused
from embtab.reader.schema import check_finite, map_tensors
from embtab.serving.exported import FORMAT, VERSION, Arrays, Run, compared, kind_of
from embtab.serving.inputs import check, check_bags, check_described, check_ids, empty


def name_inside(bundle: Bundle) -> str | None:
    """The file of the ONNX program in a bundle's folder, where it has one.

    Raises:
        BundleError: when it is not listed.
    """
    programs = bundle.config.get("programs", {})
    with refused(bundle.path / CONFIG):
        name: str | None = programs.get("onnx")
        need(name is None or name in bundle.config["files"], f"program {shown(name)} is not listed")
    return name


def program_inside(bundle: Bundle) -> Run | None:
    """The ONNX program in a bundle's folder, where it has one.

    Raises:
        BundleError: when it is not listed, or cannot be loaded.
    """
    name = name_inside(bundle)
    return None if name is None else _loaded("onnx", bundle.path / name)


def _loaded(kind: str, path: Path) -> Run:
    try:
        return kind_of(kind).load(path)
    except UserError:
        raise
    except Exception as error:  # runtimes have errors of their own
        raise BundleError(f"{path}: cannot be loaded: {_line(error)}") from None


class Program:
    """An exported program, opened: its files compared with their digests before anything of it runs.

    An AOTInductor package is machine code, and to load it is to run it: load none that you did not make or do not
    trust, digests or not.

    Args:
        path: the folder that `export` or `embtab export --format onnx` wrote.
        load: whether to load the program; without, it is loaded when it is first asked to run.

    Raises:
        BundleError: when it is damaged or not such a folder.
    """

    def __init__(self, path: str | Path, load: bool = True) -> None:
        self.path = Path(path)
        self.config = read_signed(self.path, FORMAT, VERSION, "an exported program")
        check_files(self.path, self.config, verify=True)
        with refused(self.path / CONFIG):
            need(self.config["kind"] in ("onnx", "aoti"), f"kind {self.config['kind']!r}")
            need(self.config["program"] == kind_of(self.config["kind"]).FILE, f"program {self.config['program']!r}")
            for file in (self.config["program"], self.config["golden"]["file"]):
                need(file in self.config["files"], f"{file!r} is not listed")
            for key in ("absolute", "relative"):
                value = self.config["golden"][key]
                need(isinstance(value, float) and 0 <= value < 1e3, f"golden: {key} {value!r}")
            for key in ("inputs", "outputs"):
                check_described(self.config[key], key)
        if load:
            self._run  # noqa: B018 (what cannot be loaded is said now)

    @cached_property
    def _run(self) -> Run:
        return _loaded(self.config["kind"], self.path / self.config["program"])

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs by name.

        Raises:
            UserError: when an input is missing, or is not of the type or shape that `config` says, an id is out of
                range, or offsets are not those of bags.
        """
        lengths = check(self.config["inputs"], inputs)
        check_bags(self.config["inputs"], inputs)
        nothing = empty(self.config["outputs"], lengths)
        if nothing is not None:
            return nothing
        try:
            return self._run(inputs)
        except Exception as error:  # runtimes have errors of their own, which name no feature
            check_ids(self.config["inputs"], inputs)
            raise UserError(f"{self.path}: the program does not run: {_line(error)}") from None

    def difference(self) -> tuple[float, bool]:
        """The largest difference from the golden outputs, and whether all lie within tolerance.

        Raises:
            BundleError: when the golden file lacks an input or output, or the program does not run.
        """
        given, expected = self.golden()
        try:
            return compared(self.run, given, expected, self.config["golden"])
        except Exception as error:
            raise BundleError(f"{self.path}: the program does not run: {_line(error)}") from None

    def golden(self) -> tuple[Arrays, Arrays]:
        """The golden inputs and outputs, which are of the types and shapes that `config` says.

        Raises:
            BundleError: when one is missing, or is not.
        """
        held = map_tensors(self.path / self.config["golden"]["file"])
        check_finite(held, self.path)
        try:
            check({**self.config["inputs"], **self.config["outputs"]}, held)
            check_bags(self.config["inputs"], held)
            check_ids(self.config["inputs"], held)
        except UserError as error:
            raise BundleError(f"{self.path}: golden tensors: {error}") from None
        inputs, outputs = ({name: held[name] for name in self.config[key]} for key in ("inputs", "outputs"))
        return inputs, outputs


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or repr(error)
