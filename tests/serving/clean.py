"""Whether a program's file says nothing of its maker, and nothing at all when it is loaded."""

import os
import tempfile
from pathlib import Path

import onnxruntime
import torch

ROOT = Path(__file__).parents[2]


def assert_clean(program: Path) -> None:
    """An ONNX file without paths and lines of Python, which ONNX Runtime loads without a warning."""
    content = program.read_bytes()
    for trace in (str(ROOT), torch.__path__[0], ".py", os.path.expanduser("~/")):
        assert trace.encode() not in content, trace
    assert said_while_loading(program) == ""


def said_while_loading(program: Path) -> str:
    """What ONNX Runtime prints at its default level: it writes past Python's streams."""
    with tempfile.TemporaryFile() as said:
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        said.seek(0)
        return said.read().decode()
