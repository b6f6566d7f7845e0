"""``Complaints``: lines of the log about what others do, a few at a time, and the rest as a number.

Whoever can reach a node can make it refuse connections, thousands a second. Each is counted, and
the first ones of a period are a line of the log each; how many more there were is one line at the
period's end.
"""

from __future__ import annotations

import logging
import time

__all__ = ["Complaints"]

LOGGER = logging.getLogger("kvheap")

LINES = 8
"""Lines in a period."""

PERIOD_S = 10.0
"""Seconds from the first line of a period to its end."""


class Complaints:
    """What a node has to complain of, of one kind. Used by one thread.

    Args:
        node: the node's name.
        what: what it has done with those that it leaves out, behind the node's name: "has refused
            %d more connections".
        level: of the lines.
    """

    def __init__(self, node: str, what: str, level: int = logging.WARNING) -> None:
        self._node = node
        self._what = what
        self._level = level
        self._num_lines = self._num_left_out = 0
        self._ends_at: float | None = None

    def add(self, message: str, *values: object, error: BaseException | None = None) -> None:
        """Complain, or count it.

        Args:
            message: of the line, with the places of its values.
            *values: for the message.
            error: is shown with its traceback.
        """
        self.tell()
        if self._num_lines >= LINES:
            self._num_left_out += 1
            return
        if self._ends_at is None:
            self._ends_at = time.monotonic() + PERIOD_S
        self._num_lines += 1
        LOGGER.log(self._level, message, *values, exc_info=error)

    def tell(self, *, is_last: bool = False) -> None:
        """Say how many were left out, if the period has ended, or nothing comes after this call."""
        if self._ends_at is None or not (is_last or time.monotonic() >= self._ends_at):
            return
        num_left_out = self._num_left_out
        self._num_lines = self._num_left_out = 0
        self._ends_at = None
        if num_left_out:
            LOGGER.log(
                self._level, f"node %r {self._what} in %g s", self._node, num_left_out, PERIOD_S
            )

    @property
    def pause_s(self) -> float | None:
        """Seconds until there is something to :meth:`tell`; None: there is nothing."""
        if self._ends_at is None or not self._num_left_out:
            return None
        return max(self._ends_at - time.monotonic(), 0.0)
