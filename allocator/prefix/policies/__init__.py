"""Eviction policies: which stored chunk goes next when space is needed. No tensor, no device.

>>> from kvheap.prefix.policies import POLICIES
>>> sorted(POLICIES)
['arc', 'gdsf', 'lru', 's3fifo']
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvheap.prefix.policies.arc import ARC
from kvheap.prefix.policies.base import CachedChunk, EvictionPolicy
from kvheap.prefix.policies.gdsf import GDSF
from kvheap.prefix.policies.lru import LRU
from kvheap.prefix.policies.s3fifo import S3FIFO

__all__ = ["ARC", "GDSF", "LRU", "POLICIES", "S3FIFO", "CachedChunk", "EvictionPolicy"]

POLICIES: Mapping[str, type[EvictionPolicy]] = MappingProxyType(
    {policy.name: policy for policy in (LRU, GDSF, S3FIFO, ARC)}
)
"""Every policy by the name that the command line uses; each can be made without arguments."""
