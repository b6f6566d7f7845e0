"""What a driver knows of memory."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from driver_worlds import World, pinned_ranges

from kvheap.kernels.copy_engine import Driver, Location


@pytest.fixture
def world() -> World:
    return World()


def test_adjacent_registrations_are_two_ranges(world: World) -> None:
    world.fake.register(4096, 4096)
    world.fake.register(8192, 12288)
    assert pinned_ranges(world.driver, 5000, 20480).tolist() == [[4096, 8192], [8192, 20480]]
    assert pinned_ranges(world.driver, 8191, 8193).tolist() == [[4096, 8192], [8192, 20480]]
    assert pinned_ranges(world.driver, 4096, 8192).tolist() == [[4096, 8192]]
    # One query a registration, however long it is.
    assert len(world.fake.calls) == 5


def test_a_gap_ends_the_ranges(world: World) -> None:
    world.fake.register(4096, 4096)
    world.fake.register(12288, 4096)
    assert pinned_ranges(world.driver, 4096, 16384).tolist() == [[4096, 8192]]
    world.fake.unregister(4096)
    none = pinned_ranges(world.driver, 4096, 16384)
    assert none.shape == (0, 2)
    assert none.dtype == np.int64


@pytest.mark.parametrize(
    ("kind", "device_address"), [("device", None), ("managed", None), ("pinned", 0x2_04C0_0000)]
)
def test_other_memory_ends_the_ranges(world: World, kind: str, device_address: int | None) -> None:
    world.fake.register(4096, 4096)
    world.fake.register(8192, 4096, kind, device_address=device_address)
    assert pinned_ranges(world.driver, 4096, 12288).tolist() == [[4096, 8192]]


def test_a_range_without_the_address_ends_the_ranges(world: World) -> None:
    """Else the walk would stand still."""
    kinds = {2: (ctypes.c_uint, 1), 3: (ctypes.c_uint64, 4096)}

    def odd(count: int, attributes: int, out: int, address: int) -> int:
        names = (ctypes.c_int * count).from_address(attributes)
        for name, place in zip(names, (ctypes.c_size_t * count).from_address(out), strict=True):
            kind, value = kinds.get(name, (ctypes.c_uint, 0))
            kind.from_address(place).value = value
        return 0

    name = "cuPointerGetAttributes"
    setattr(world.fake, name, world.fake.as_function(name, odd))
    found = Driver(world.fake)
    assert found.locate(4096) == Location("pinned", 0, 0, 0)
    assert pinned_ranges(found, 4096, 8192).shape == (0, 2)


def test_locate_tells_what_memory_is(world: World) -> None:
    high = 0x7F00_0000_0000
    world.fake.register(high, 1 << 40, "device", device=3)
    world.fake.register(4096, 4096)
    world.fake.register(8192, 4096, "managed", device=1)
    world.fake.register(12288, 4096, device_address=0x2_04C0_0000)
    locate = world.driver.locate
    assert locate(high + (1 << 39)) == Location("device", 3, high, high + (1 << 40))
    assert locate(4096) == locate(8191) == Location("pinned", 0, 4096, 8192)
    assert locate(8192) == Location("managed", 1, 8192, 12288)
    assert locate(13000) == Location("aliased", 0, 12288, 16384)
    assert locate(16384) is None
    assert locate(4095) is None
    assert not world.fake.broken
