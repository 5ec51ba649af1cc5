"""Modules whose state has names of its own, whatever the tensors are stored in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Unshadowed(nn.Module):
    """A module whose parameters may have any name, also that of an attribute, such as "training"."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:  # what is a plain attribute stays one
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class Branch(Unshadowed):
    """Tensors under a name with dots: `named_parameters` goes through it; who planted it saves and loads them."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


Place = tuple[nn.Module, str]
"""A module, and the name of a parameter or buffer in it."""


def at(place: Place) -> Tensor:
    """The tensor there, or what `torch.func.functional_call` has put in its place."""
    module, name = place
    parameter = module._parameters.get(name)
    tensor = module._buffers[name] if parameter is None else parameter
    assert tensor is not None
    return tensor


def planted(module: nn.Module, name: str, tensor: Tensor) -> Place:
    """Gives a module a parameter or (for what is none) a buffer of a name, dots and all.

    Returns:
        Where it is: a module below, and the last part of the name.
    """
    first, dot, rest = name.partition(".")
    if dot:
        branch = module._modules.setdefault(first, Branch())
        assert branch is not None
        return planted(branch, rest, tensor)
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
    return module, name


class NamedState(Unshadowed):
    """A module that saves and loads tensors by names it chooses, dots and all, instead of by its attributes."""

    @abstractmethod
    def named_state(self) -> dict[str, Tensor]:
        """Detached tensors by name: writing to one writes to the module."""

    def optional_state(self) -> dict[str, Tensor]:
        """The same for what is saved, but may be absent or of another kind when it is loaded."""
        return {}

    def assign(self, target: Tensor, saved: Tensor) -> bool:
        """Writes a saved tensor into one of the module's; False if it does not fit."""
        if saved.shape != target.shape:
            return False
        target.copy_(saved)
        return True

    def is_optional(self, name: str) -> bool:
        """Whether a saved name that is not known here may be left aside."""
        return False

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in (self.named_state() | self.optional_state()).items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        required, optional = self.named_state(), self.optional_state()
        for name, target in (required | optional).items():
            saved = state_dict.get(prefix + name)
            if saved is None:
                if name in required:
                    missing_keys.append(prefix + name)
            elif not self.assign(target, saved):
                error_msgs.append(f"{prefix}{name}: saved shape {tuple(saved.shape)}, here {tuple(target.shape)}")
        for key in state_dict:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in required and not self.is_optional(name):
                unexpected_keys.append(key)
