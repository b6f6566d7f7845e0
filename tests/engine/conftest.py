"""The fixtures of copies that a stand-in for a GPU makes."""

from transfer_fixtures import by_queue, device, tiers

__all__ = ["by_queue", "device", "tiers"]
