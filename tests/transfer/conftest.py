"""The fixtures of transfers."""

from transfer_fixtures import by_queue, device, flying, peer, tiers

__all__ = ["by_queue", "device", "flying", "peer", "tiers"]
