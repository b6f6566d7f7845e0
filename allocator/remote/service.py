"""``Service``: answers the requests of other nodes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from kvheap.addresses.block_runs import BlockRuns
from kvheap.blocks.block_layout import BlockLayout
from kvheap.errors import ClosedError
from kvheap.remote.catalogue import Catalogue, Place
from kvheap.remote.complaints import Complaints
from kvheap.remote.errors import ProtocolError
from kvheap.remote.leases import MAX_LEASE_S, Account, GivenUpError, LentBlocks
from kvheap.remote.messages import Fields, layout_fields, packed
from kvheap.remote.offers import Offer, Offers

__all__ = ["Service"]

LEND_TRIES = 3
"""How often to look again for blocks that were freed while they were found."""


class Service:
    """Answers requests, on the thread that serves.

    Args:
        name: the node's name.
        catalogue: which blocks there are.
        lent: the blocks that readers have.
        offers: where offers of other nodes go.
    """

    def __init__(self, name: str, catalogue: Catalogue, lent: LentBlocks, offers: Offers) -> None:
        self._name = name
        self._catalogue = catalogue
        self._lent = lent
        self._offers = offers
        self._kinds: dict[str, Callable[[Fields, Account], dict[str, Any]]] = {
            "lookup": self._look_up,
            "lock": self._lock,
            "lease": self._lease,
            "offer": self._take_offer,
        }
        self.complaints = Complaints(name, "could not answer %d more requests", logging.ERROR)
        self.is_closing = False
        self.num_lookups = self.num_locks = self.num_failures = 0

    def answer(self, request: Fields, account: Account) -> bytes | None:
        """The answer to a request; None if it needs none.

        Args:
            request: what was asked.
            account: of the connection that asks.

        Raises:
            ProtocolError: no node sends such a request.
        """
        kind = request.text("kind")
        if kind == "unlock":
            self._lent.give_up(request.integer("lease"))
            return None
        number, call = request.integer("number"), self._kinds.get(kind)
        if call is None:
            raise ProtocolError(f"there are no requests of kind {kind!r}")
        if self.is_closing:
            return packed(number=number, error=f"node {self._name!r} is closing", gone=True)
        try:
            return packed(number=number, **call(request, account))
        except ProtocolError:
            raise
        except (ClosedError, GivenUpError) as error:  # nothing is wrong here
            return packed(number=number, error=f"{error}")
        except BaseException as error:  # the user's function must not end the thread
            self.num_failures += 1
            self.complaints.add("node %r cannot answer a %s", self._name, kind, error=error)
            return packed(number=number, error=f"its {kind} failed: {error!r:.500}")

    def _look_up(self, request: Fields, account: Account) -> dict[str, Any]:
        self.num_lookups += 1
        found, _ = self._catalogue.find(request.keys())
        return {
            "found": _flags_of(found),
            "layout": layout_fields(self._catalogue.layout),
        }

    def _lock(self, request: Fields, account: Account) -> dict[str, Any]:
        """All blocks, or none."""
        places, lent = self._lent_for(request, account, is_partial=False)
        if lent is not None:
            return lent
        missing = [at for at, place in enumerate(places) if place is None]
        return {"missing": np.array(missing, "<i8").tobytes()}

    def _lease(self, request: Fields, account: Account) -> dict[str, Any]:
        """Those blocks that there are."""
        places, lent = self._lent_for(request, account, is_partial=True)
        if lent is None:
            return {"found": bytes(len(places))}
        return {"found": _flags_of(places), **lent}

    def _lent_for(
        self, request: Fields, account: Account, *, is_partial: bool
    ) -> tuple[list[Place | None], dict[str, Any] | None]:
        """What was found for each key, and the lease on that, if there is one."""
        self.num_locks += 1
        keys, ttl = request.keys(), min(request.seconds("ttl"), MAX_LEASE_S)
        number = request.integer("lease") if "lease" in request else None
        if not keys:
            raise ProtocolError("a lease on no keys")
        places: list[Place | None] = []
        for _ in range(LEND_TRIES):
            places, batches = self._catalogue.find(keys)
            known: list[Place] = [*filter(None, places)]
            if not known or (len(known) < len(keys) and not is_partial):
                break
            layouts = {batch.layout for batch in batches}
            if len(layouts) > 1:
                raise ValueError(f"the blocks of these keys have several layouts: {layouts}")
            lent = self._lent.lend(known, ttl, account, batches, number)
            if lent is not None:
                return places, _lease_fields(*lent, ttl, known[0][0].layout)
        return places, None

    def _take_offer(self, request: Fields, account: Account) -> dict[str, Any]:
        offer = Offer(request.text("name"), request.text("address"), tuple(request.keys()))
        return {"taken": int(self._offers.put(offer))}


def _flags_of(places: list[Place | None]) -> bytes:
    """A byte for each place: whether there is one."""
    return bytes([place is not None for place in places])


def _lease_fields(number: int, runs: BlockRuns, ttl: float, layout: BlockLayout) -> dict[str, Any]:
    """A lease as a message has it."""
    return {
        "lease": number,
        "ttl": ttl,
        "layout": layout_fields(layout),
        "starts": runs.starts.astype("<i8").tobytes(),
        "counts": runs.counts.astype("<i8").tobytes(),
        "size_bytes": runs.size_bytes,
        "block_bytes": runs.block_bytes,
    }
