"""Runs a function in a forked child, for a limited time."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from typing import Any

__all__ = ["in_a_child"]


def in_a_child(task: Callable[[], Any]) -> Any:
    """What ``task`` returns in a forked child; a child that hangs is killed."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            answer = pickle.dumps(("returned", task()))
        except BaseException as error:
            answer = pickle.dumps(("raised", repr(error)))
        os.write(write_end, answer)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFEXITED(status), f"the child hung, or died of signal {os.WTERMSIG(status)}"
    kind, value = pickle.loads(answer)
    assert kind == "returned", value
    return value
