"""Keeps ``torch.compile`` from tracing kvheap.

What kvheap does on the host are changes of its own state and calls of the driver, which a graph
cannot hold. A compiled function that calls kvheap is cut there and goes on behind the call.

``torch.compiler.disable`` would do the same, but imports the compiler, which takes seconds. The
marks that it sets are set here by themselves (torch 2.13.0, ``torch/_dynamo/decorators.py`` and
``torch/_dynamo/eval_frame.py``): one makes the compiler cut its graph at a call, the other one
keeps it from looking at the frames of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

__all__ = ["untraced", "untraced_class"]

Function = TypeVar("Function", bound=Callable[..., object])
Class = TypeVar("Class", bound=type)

REASON = "kvheap changes its own state, which no graph holds"


def untraced(function: Function) -> Function:
    """Mark a function that ``torch.compile`` must call instead of tracing; returns it."""
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = REASON
    try:
        from torch._C._dynamo import eval_frame

        skip = eval_frame._FrameAction.SKIP
        strategy = eval_frame._FrameExecStrategy(skip, skip)
        eval_frame.set_code_exec_strategy(marked.__code__, strategy)
    except (ImportError, AttributeError):  # another torch: it may trace what it can
        return function
    return function


def untraced_class(kind: Class) -> Class:
    """Mark all methods and properties that a class defines; returns the class."""
    for name, value in vars(kind).items():
        for part in (value, *(getattr(value, each, None) for each in ("fget", "__func__"))):
            if isinstance(part, FunctionType) and name != "__init_subclass__":
                untraced(part)
    return kind
