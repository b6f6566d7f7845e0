"""The metrics of the transfers of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvheap.metrics.families import Families

if TYPE_CHECKING:
    from kvheap.metrics.transfer_counts import TransferCounts

__all__ = ["add_transfers", "declare_transfers"]

TRANSFERS = {
    "kvheap_transfers": ("num_transfers", "Transfers that were begun."),
    "kvheap_transfer_bytes": ("num_bytes", "Bytes of the transfers that were begun."),
    "kvheap_transfer_runs": (
        "num_runs",
        "Runs of the transfers that were begun: pieces after neighbours were merged.",
    ),
    "kvheap_failed_transfers": ("failed", "Transfers that were found to have failed."),
}


def declare_transfers(families: Families) -> None:
    """Name the metrics of transfers."""
    for name, (_, text) in TRANSFERS.items():
        families.declare(
            name,
            "counter",
            f"{text} By direction (h: host, d: device, f: file; foreign: made by others) and path, "
            f"since anything is watched.",
            ("direction", "path"),
        )
    families.declare(
        "kvheap_transfers_in_flight",
        "gauge",
        "Transfers that are not known to have ended, but for copies between an engine's cache and "
        "a heap on its device, which are launches.",
        (),
    )
    families.declare(
        "kvheap_quarantined_transfers",
        "gauge",
        "Transfers that failed without being known to have ended: their blocks are not reused.",
        (),
    )


def add_transfers(families: Families, counts: TransferCounts) -> None:
    """Add what was counted of transfers."""
    declare_transfers(families)
    for route, of_path in counts.look().items():
        for name, (field, _) in TRANSFERS.items():
            families.add(name, route, getattr(of_path, field))
    families.add("kvheap_transfers_in_flight", (), counts.num_in_flight)
    families.add("kvheap_quarantined_transfers", (), counts.num_quarantined)
