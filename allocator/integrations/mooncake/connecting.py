"""``connect``: a client of Mooncake Store that is set up for a ``MooncakeTier``."""

from __future__ import annotations

import socket
from importlib import import_module
from typing import Any

from kvheap.addresses.arguments import require_count

__all__ = ["connect"]

REACH_S = 5.0
"""Seconds to reach a master. The client itself tries for 90 s."""


def connect(
    master: str,
    *,
    local_name: str = "127.0.0.1",
    pool_bytes: int = 0,
    metadata: str = "P2PHANDSHAKE",
    protocol: str = "tcp",
    devices: str = "",
) -> Any:
    """Set up a client of Mooncake Store that has no buffer of its own.

    Args:
        master: ``host:port`` of the master.
        local_name: the address at which other machines reach this one.
        pool_bytes: bytes of this machine's memory that the client adds to the store.
        metadata: the metadata server; Mooncake's default needs none.
        protocol: ``tcp`` or ``rdma``; kvheap's tests run ``tcp``.
        devices: the network devices to use for RDMA.

    Returns:
        A ``mooncake.store.MooncakeDistributedStore``. Close it after the tiers that use it.

    Raises:
        ImportError: Mooncake is not installed, or a library that it needs.
        ConnectionError: the master cannot be reached, or does not accept the client.
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    pool_bytes = require_count("pool_bytes", pool_bytes)
    if not isinstance(master, str):
        raise TypeError(f"master must be a text such as '127.0.0.1:50051', got {master!r}")
    host, _, port = master.rpartition(":")
    is_address = "://" not in master  # not the list of a cluster
    if is_address and not (host and port.isdecimal()):
        raise ValueError(f"master must be host:port, such as '127.0.0.1:50051', got {master!r}")
    store = _need_mooncake()
    if is_address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        except OSError as error:
            raise ConnectionError(
                f"no Mooncake master can be reached at {master}: {error}; start one by "
                f"mooncake_master --rpc_port={port}"
            ) from error
    client = store.MooncakeDistributedStore()
    code = client.setup(local_name, metadata, pool_bytes, 0, protocol, devices, master)
    if code:
        raise ConnectionError(
            f"the client of Mooncake Store could not be set up (error {code}): local_name is "
            f"{local_name!r}, master {master!r}, protocol {protocol!r}, pool_bytes {pool_bytes}; "
            f"its log says why"
        )
    return client


def _need_mooncake() -> Any:
    try:
        return import_module("mooncake.store")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Mooncake Store's client is not installed ({error}): "
            f"pip install mooncake-transfer-engine-non-cuda (with CUDA: mooncake-transfer-engine)",
            name=error.name,
        ) from error
    except ImportError as error:
        raise ImportError(
            f"Mooncake Store's client lacks a library ({error}); on Debian and Ubuntu: apt-get "
            f"install libibverbs1 libnl-3-200 libnl-route-3-200",
            name=error.name,
        ) from error
