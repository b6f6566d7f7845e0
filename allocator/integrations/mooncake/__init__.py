"""Mooncake Store: chunks of a host heap in a pool of memory on several machines.

::

    client = connect("10.0.0.1:50051", local_name="10.0.0.7", pool_bytes=64 << 30)
    with MooncakeTier(client, heap, layout, namespace="a model") as tier:
        tier.put([b"a", b"b"], batch)
        found = tier.get([b"a", b"b"], other)  # also on another machine; bool [2]
    client.close()

Mooncake is imported by :func:`connect` only. Figures are of ``mooncake-transfer-engine-non-cuda``
0.3.13.post1 over TCP on loopback.
"""

from kvheap.integrations.mooncake.codes import MooncakeError
from kvheap.integrations.mooncake.connecting import connect
from kvheap.integrations.mooncake.tier import MAX_KEYS_PER_CALL, MooncakeTier

__all__ = ["MAX_KEYS_PER_CALL", "MooncakeError", "MooncakeTier", "connect"]
