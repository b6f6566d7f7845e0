"""Arguments that have a new name: the old one works for one more release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["renamed"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def renamed(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let a function take arguments by their old names too.

    Args:
        names: the new name of each old one.

    >>> @renamed(timeout="timeout_s")
    ... def wait(timeout_s=None):
    ...     return timeout_s
    >>> with warnings.catch_warnings(record=True) as found:
    ...     warnings.simplefilter("always")
    ...     wait(timeout=3), str(found[0].message)
    (3, 'wait(timeout=) is now wait(timeout_s=): the old name goes with kvheap 0.3')
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **given: Arguments.kwargs) -> Result:
            for old, new in names.items():
                if old not in given:
                    continue
                name = function.__qualname__.removesuffix(".__init__")
                if new in given:
                    raise TypeError(f"{name}() got {new} twice, once by its old name {old}")
                warnings.warn(
                    f"{name}({old}=) is now {name}({new}=): the old name goes with kvheap 0.3",
                    DeprecationWarning,
                    stacklevel=2,
                )
                given[new] = given.pop(old)
            return function(*args, **given)

        return call

    return decorate
