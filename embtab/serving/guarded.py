"""Compiled programs that look at their inputs: torch writes the checks into each, and leaves them off.

Without them a .pt2 that is run by itself reads past the end of what is too narrow, takes the bits of one type for
another's, and may divide by a number of rows that is none. AOTI_RUNTIME_CHECK_INPUTS=0 leaves them off again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.virtualized import V
from torch.utils._sympy import value_ranges

_LEFT_OFF = "env_var_value != nullptr && env_var_value[0] != '0'"
_DONE = "env_var_value == nullptr || env_var_value[0] != '0'"


@contextmanager
def checked() -> Iterator[None]:
    """Programs that are compiled meanwhile refuse inputs of other types, widths and strides, and no rows at all."""
    written = CppWrapperCpu.generate_input_output_runtime_checks

    def write(wrapper: Any) -> None:
        before = len(wrapper.prefix._lines)
        with patch.object(value_ranges, "bound_sympy", _any_length):
            written(wrapper)
        text = wrapper.prefix._lines[before:]
        if not any(_LEFT_OFF in str(line) for line in text):
            raise RuntimeError("torch writes other checks of inputs than those that are known")
        wrapper.prefix._lines[before:] = [_line(line) for line in text]

    with patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", write):
        yield


def _any_length(*_: Any) -> Any:
    """What inductor knows of open lengths comes from the example, such as two rows at least; a program takes others."""
    return value_ranges.ValueRanges.unknown()


def _line(line: Any) -> Any:
    if not isinstance(line, str) or line.strip() != "if (!_check_aoti_runtime_check_inputs_env()){":
        return line.replace(_LEFT_OFF, _DONE) if isinstance(line, str) else line
    return "".join(_rows_wanted()) + line


def _rows_wanted() -> Iterator[str]:
    """Checks that there are rows, of the inputs whose first length says how many."""
    inputs = [tensor.get_size() for tensor in V.graph.graph_inputs.values()]
    for made in V.graph.graph_outputs:
        length: Any = made.get_size()[0]
        places = [i for i, size in enumerate(inputs) if size and size[0] in length.free_symbols]
        if places:
            least = next(n for n in range(4) if length.subs(inputs[places[0]][0], n) >= 1)
            yield (
                f"if (ConstantHandle(input_handles[{places[0]}]).sizes()[0] < {least}) "
                'throw std::runtime_error("a batch of no rows: a compiled program takes one row or more"); '
            )
            return
