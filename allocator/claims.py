"""``Claim``: who may do something now, without a lock that anybody could wait for.

Foreign code can run in the middle of any operation: a finalizer, at whatever moment the garbage
collector starts; a signal handler, between two bytecodes; a callback. It runs on the thread of the
operation, and a lock that this thread holds would never be released to it. A claim is taken or not
taken, at once; code that does not get it leaves its work to the holder.

A claim is taken and given up by one atomic operation each, and names its holder. So a ``finally``
can give it up without knowing how far an exception let the code before it come:

>>> claim, me = Claim(), object()
>>> try:
...     if claim.take(me):
...         pass  # the work
... finally:
...     claim.give_up(me)
>>> claim.is_taken
False
"""

from __future__ import annotations

__all__ = ["Claim"]


class Claim:
    """A right that one holder has at a time.

    A holder is any object that nobody else passes here, such as a new ``object()``.
    """

    __slots__ = ("_holders",)

    def __init__(self) -> None:
        self._holders: dict[int, object] = {}

    def take(self, me: object) -> bool:
        """Take the claim unless another holder has it; returns whether ``me`` has it now."""
        return self._holders.setdefault(0, me) is me

    def give_up(self, me: object) -> None:
        """Give the claim up; changes nothing unless ``me`` has it."""
        if self._holders.get(0) is me:
            self._holders.pop(0, None)

    @property
    def is_taken(self) -> bool:
        """Whether anybody has the claim."""
        return bool(self._holders)

    @property
    def holder(self) -> object | None:
        """Who has the claim; None if nobody has."""
        return self._holders.get(0)
