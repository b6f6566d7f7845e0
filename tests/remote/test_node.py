"""Nodes of one process: what is read, what is refused, and how reads and nodes end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from forked_child import in_a_child
from remote_nodes import (
    LAYOUT,
    contents,
    fill,
    key_of,
    keys_of,
    lone,
    make_heap,
    need_nixl,
    until,
    wrong_rows,
)
from remote_pairs import failure

from kvheap import (
    BlockInUseError,
    BlockLayout,
    ClosedError,
    HostMemoryAllocator,
    LifetimeError,
    MemoryFormat,
    PrefixStore,
    foreign_transfer,
)

WHY_NOT = need_nixl()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

if WHY_NOT is None:
    from kvheap.remote import MissingKeysError, Node, Offer, PeerError


class World:
    """A node with chunks, and one that reads them."""

    def __init__(self) -> None:
        self.there, self.here = make_heap(512), make_heap(512)
        self.owner, self.reader = Node("owner", self.there), Node("reader", self.here)
        self.batch = fill(self.there, range(128))
        self.owner.publish(keys_of(range(128)), self.batch)
        self.peer = self.reader.connect(self.owner.address)

    def read(self, numbers: Any) -> Any:
        return self.peer.read(keys_of(numbers), into=self.here)

    def close(self) -> None:
        for node in (self.reader, self.owner):
            node.close(20)
        for heap in (self.here, self.there):
            if not heap.closed:
                heap.memcheck()
            heap.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def world(shared: World) -> Iterator[World]:
    """Nothing is left behind of what a test reads."""
    before = shared.here.stats().allocated_bytes
    yield shared
    assert until(lambda: not shared.reader.stats().reads_in_flight)
    assert until(lambda: not shared.owner.stats().leases)
    assert shared.here.stats().allocated_bytes == before


@pytest.fixture
def own() -> Iterator[World]:
    world = World()
    yield world
    world.close()


class TestReads:
    @pytest.mark.parametrize(
        "numbers",
        [[5], range(128), range(127, -1, -1), [3, 3, 9, 3], [*range(0, 128, 2), *range(1, 128, 2)]],
        ids=["one", "all", "reversed", "twice", "strided"],
    )
    def test_chunks_arrive_in_the_order_of_their_keys(self, world: World, numbers: Any) -> None:
        batch = world.read(numbers)
        assert batch.transfer is not None
        assert wrong_rows(numbers, batch) == 0
        world.here.batched_free(batch)

    def test_into_lone_blocks(self, own: World) -> None:
        rest = own.here.batched_allocate([2048], torch.int64, 512 - 128, LAYOUT.fmt)
        whole, holes = lone(own.here, range(64))  # nothing is left
        gaps = [whole[row] for row in range(1, 128, 2)]
        own.here.batched_free(holes)
        batch = own.read(range(64))
        assert batch.num_runs == 64
        assert wrong_rows(range(64), batch) == 0
        assert wrong_rows(range(64), gaps) == 0
        assert rest is not None

    def test_into_a_batch(self, world: World) -> None:
        batch = world.here.batched_allocate([2048], torch.int64, 4, LAYOUT.fmt)
        assert world.peer.read(keys_of([1, 2, 3, 4]), into=batch) is batch
        assert wrong_rows([1, 2, 3, 4], batch) == 0
        world.peer.read(keys_of([9, 8, 7, 6]), into=batch)
        assert wrong_rows([9, 8, 7, 6], batch) == 0
        world.here.batched_free(batch)

    def test_padded_blocks(self, own: World) -> None:
        kv = torch.randn(6, 1000)
        padded = own.there.batched_allocate([1000], torch.float32, 6, source=kv)
        own.owner.publish(keys_of(range(500, 506)), padded)
        batch = own.here.batched_allocate([1000], torch.float32, 6)
        with pytest.raises(ValueError, match="into must have blocks of"):
            own.peer.read(keys_of(range(500, 506)), into=batch)
        own.peer.lookup(keys_of([500]))  # it tells the layout
        own.peer.read(keys_of(range(500, 506)), into=batch)
        assert all(torch.equal(block.tensor, row) for block, row in zip(batch, kv, strict=True))

    def test_two_threads(self, world: World) -> None:
        def some(seed: int) -> int:
            wrong = 0
            for n in range(20):
                numbers = range((seed * 7 + n) % 64, 128 - n)
                batch = world.read(numbers)
                wrong += wrong_rows(numbers, batch)
                assert world.peer.lookup(keys_of([n, 999])).tolist() == [True, False]
                world.here.batched_free(batch)
            return wrong

        with ThreadPoolExecutor(2) as pool:
            assert [*pool.map(some, range(2))] == [0, 0]

    def test_blocks_may_be_freed_at_once(self, world: World) -> None:
        for _ in range(50):
            batch = world.read(range(128))
            if batch is not None:  # else those before are still being filled
                world.here.batched_free(batch)
        assert until(lambda: world.here.stats().pending_bytes == 0)

    def test_a_batch_is_filled_by_one_read_at_a_time(self, world: World) -> None:
        batch = world.read(range(128))
        try:
            world.peer.read(keys_of(range(128)), into=batch)
        except RuntimeError as error:
            assert "still being filled" in str(error)  # noqa: PT017
        batch.transfer.wait()
        world.here.batched_free(batch)

    def test_blocks_that_somebody_reads_are_not_filled(self, world: World) -> None:
        batch, reader = world.read(range(4)), threading.Event()
        batch.transfer.result(20)
        reader.query = reader.is_set  # type: ignore[attr-defined]
        sending = foreign_transfer(reader, source=batch[1:3])
        with pytest.raises(RuntimeError, match="still being read"):
            world.peer.read(keys_of(range(10, 14)), into=batch)
        assert wrong_rows(range(4), batch) == 0
        reader.set()
        sending.result(20)
        world.peer.read(keys_of(range(10, 14)), into=batch)
        assert wrong_rows(range(10, 14), batch) == 0
        world.here.batched_free(batch)

    def test_a_full_heap_reads_nothing(self, own: World) -> None:
        rest = own.here.batched_allocate([2048], torch.int64, 510, LAYOUT.fmt)
        assert own.read(range(3)) is None
        assert own.owner.stats().locks == 0
        assert rest is not None

    def test_connecting_twice_gives_one_peer(self, world: World) -> None:
        assert world.reader.connect(world.owner.address) is world.peer


class TestRefusals:
    def test_missing_keys_are_named(self, world: World) -> None:
        batch = world.read([1, 777, 2, 888])
        cause = failure(batch)
        assert isinstance(cause, MissingKeysError)
        assert cause.missing == (key_of(777), key_of(888))
        world.here.batched_free(batch)

    def test_freed_blocks_are_missing(self, own: World) -> None:
        own.there.batched_free([own.batch[5], own.batch[6]])
        assert own.peer.lookup(keys_of([4, 5, 6, 7])).tolist() == [True, False, False, True]
        assert failure(own.read(range(4, 8))).missing == (key_of(5), key_of(6))  # type: ignore[attr-defined]

    def test_blocks_that_a_failed_transfer_was_to_fill_are_missing(self, own: World) -> None:
        batch = own.here.batched_allocate([2048], torch.int64, 2, LAYOUT.fmt)
        own.peer.read(keys_of([1, 999]), into=batch)
        failure(batch)
        own.reader.publish(keys_of([1, 2]), batch)
        peer = own.owner.connect(own.reader.address)
        assert peer.lookup(keys_of([1, 2])).tolist() == [False, False]

    def test_a_batch_of_another_layout_or_size(self, world: World) -> None:
        other = world.here.batched_allocate([4096], torch.int32, 4, LAYOUT.fmt)
        with pytest.raises(ValueError, match=r"into must have blocks of.*as peer 'owner' has"):
            world.peer.read(keys_of(range(4)), into=other)
        with pytest.raises(ValueError, match="3 keys need as many blocks, got 4"):
            world.peer.read(keys_of(range(3)), into=other)
        assert other.transfer is None
        world.here.batched_free(other)

    def test_chunks_of_another_layout_than_before(self, own: World) -> None:
        layout = BlockLayout.of([64], torch.float32, MemoryFormat.UNDEFINED)
        small = own.there.batched_allocate([64], torch.float32, 1, layout.fmt)
        own.owner.publish([b"small"], small)
        batch = own.peer.read([b"small"], into=own.here)  # as large as the others, it is thought
        assert isinstance(failure(batch), PeerError)
        both = own.peer.read([b"small", key_of(1)], into=own.here)
        assert "several layouts" in str(failure(both))

    def test_arguments(self, world: World) -> None:
        read, here = world.peer.read, world.here
        for keys, into, error, text in [
            ([], here, ValueError, "at least one"),
            ("ab", here, TypeError, "'ab'"),
            (["a"], here, TypeError, "a key must be bytes, got 'a'"),
            ([b""], here, ValueError, "1 to 511 bytes, got 0"),
            ([bytes(512)], here, ValueError, "got 512"),
            ([b"a"] * 65_537, here, ValueError, "at most 65536"),
            ({b"a"}, here, TypeError, "set"),
            ([b"a"], world.there, ValueError, "into must be the node's heap"),
            ([b"a"], [world.batch[0]], ValueError, "into must be"),
            ([key_of(1)], world.batch, ValueError, "into must be of the node's heap"),
        ]:
            with pytest.raises(error, match=text):
                read(keys, into=into)
        for timeout_s in (0, -1, float("nan"), "1", None):
            with pytest.raises((TypeError, ValueError), match="timeout_s must be"):
                read([b"a"], into=here, timeout_s=timeout_s)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"name": ""}, ValueError, "name must have"),
            ({"name": 7}, TypeError, "name must be a text, got 7"),
            ({"heap": 7}, TypeError, "heap must be a heap.*got 7"),
            ({"lookup": 7}, TypeError, "lookup must be a function or None, got 7"),
            ({"bind": "0.0.0.0:0"}, ValueError, "bind is '0.0.0.0'.*pass a secret"),
            ({"bind": 7000}, TypeError, "bind must be a text"),
            ({"secret": ""}, ValueError, "secret must not be empty"),
        ],
        ids=str,
    )
    def test_arguments_of_a_node(
        self, world: World, arguments: dict[str, Any], error: type[Exception], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            Node(**({"name": "x", "heap": world.here} | arguments))  # type: ignore[arg-type]

    def test_connecting_off_loopback_needs_a_secret(self, world: World) -> None:
        with pytest.raises(ValueError, match=r"address is '192.0.2.1'.*pass a secret"):
            world.reader.connect("192.0.2.1:7000")

    def test_a_view_is_served_by_its_owner(self) -> None:
        with HostMemoryAllocator(1 << 20, shared=True) as heap:
            view = HostMemoryAllocator.attach(heap.host_buffer.fd, 1 << 20)
            with pytest.raises(Exception, match="serve blocks to other machines"):
                Node("x", view)
            view.close()


class TestLookup:
    def test_the_blocks_of_a_prefix_store(self) -> None:
        there, here, lock = make_heap(8), make_heap(8), threading.Lock()
        store: PrefixStore[bytes] = PrefixStore(there, LAYOUT)

        def find(keys: list[bytes]) -> list[Any]:
            with lock:
                return [store.chunks([key])[0] if key in store else None for key in keys]

        with Node("owner", there, find) as owner, Node("reader", here) as reader:
            store.store(keys_of(range(4)), contents(range(4)))
            peer = reader.connect(owner.address)
            assert peer.lookup(keys_of([3, 4])).tolist() == [True, False]
            batch = peer.read(keys_of([2, 0]), into=here)
            assert wrong_rows([2, 0], batch) == 0
            here.batched_free(batch)
            assert until(lambda: not owner.stats().leases)
            with lock:  # evicts all of them
                store.store(keys_of(range(10, 18)), contents(range(10, 18)))
            assert isinstance(failure(peer.read(keys_of([2]), into=here)), MissingKeysError)
            store.close()

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (lambda keys: 1 / 0, "lookup failed: ZeroDivisionError"),
            (lambda keys: None, "must return a block or None for each of 1 keys, got None"),
            (lambda keys: [], "for each of 1 keys"),
            (lambda keys: [7], "MemoryObj or None, got 7"),
            (lambda keys: (_ for _ in ()).throw(SystemExit(3)), "SystemExit"),
        ],
        ids=["raises", "none", "too few", "no block", "exits"],
    )
    def test_what_is_wrong_is_told_to_who_asked(self, answer: Any, text: str) -> None:
        there, here = make_heap(8), make_heap(8)
        batch = fill(there, range(2))
        with Node("owner", there, answer) as owner, Node("reader", here) as reader:
            owner.publish(keys_of(range(2)), batch)
            peer = reader.connect(owner.address)
            with pytest.raises(PeerError, match=f"'owner': .*{text}"):
                peer.lookup(keys_of([7]))
            assert peer.lookup(keys_of([1])).tolist() == [True]  # was not asked for
            wrong = peer.read(keys_of([1, 7]), into=here)
            assert isinstance(failure(wrong), PeerError)
            assert owner.stats().failed_requests == 2
            assert owner.stats().leases == 0

    def test_blocks_of_another_heap(self) -> None:
        there, here = make_heap(8), make_heap(8)
        strange = fill(here, range(1))
        with (
            Node("owner", there, lambda keys: [strange[0]]) as owner,
            Node("reader", here) as reader,
            pytest.raises(PeerError, match="blocks of the node's heap"),
        ):
            reader.connect(owner.address).lookup([b"a"])


class TestPublish:
    def test_wrong_blocks(self, world: World) -> None:
        with pytest.raises(ValueError, match="2 keys need as many blocks, got 128"):
            world.owner.publish([b"a", b"b"], world.batch)
        with pytest.raises(Exception, match="another allocator"):
            world.reader.publish([b"a"], [world.batch[0]])
        freed = fill(world.there, [1])
        world.there.batched_free(freed)
        with pytest.raises(LifetimeError):
            world.owner.publish([b"a"], freed)
        assert not world.peer.lookup([b"a", b"b"]).any()

    def test_leased_blocks_are_not_freed(self, own: World) -> None:
        lent = own.owner._lent.lend([(own.batch, 3), (own.batch, 9)], 20.0)
        with pytest.raises(BlockInUseError):
            own.there.batched_free(own.batch)
        with pytest.raises(TimeoutError):
            own.there.close(0.05)
        with pytest.raises(TimeoutError, match=r"0 reads of its own.*hold 1 leases"):
            own.owner.close(0.05)
        own.owner._lent.take_back(lent[0])

    def test_a_lease_ends_by_itself(self, own: World) -> None:
        own.owner._lent.lend([(own.batch, 3)], 0.05)
        assert own.owner.stats().leases == 1
        assert until(lambda: own.owner.stats().leases == 0)
        own.there.batched_free(own.batch)

    def test_offers(self, world: World) -> None:
        assert world.owner.next_offer(0.01) is None
        assert world.peer.offer(keys_of([1, 2]))
        offer = world.owner.next_offer(5)
        assert offer == Offer("reader", world.reader.address, (key_of(1), key_of(2)))


class TestEnd:
    def test_a_closed_node_refuses_everything(self, own: World) -> None:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(own.reader.next_offer)
            own.reader.close()
            with pytest.raises(ClosedError):
                waiting.result(10)
        own.reader.close()
        for call in (
            lambda: own.reader.connect(own.owner.address),
            lambda: own.reader.publish([], []),
            lambda: own.reader.withdraw([]),
            lambda: own.reader.next_offer(0),
            lambda: own.peer.lookup([b"a"]),
            lambda: own.peer.read([b"a"], into=own.here),
            lambda: own.peer.offer([b"a"]),
        ):
            with pytest.raises(ClosedError, match=r"'reader'.*is closed"):
                call()
        assert own.reader.stats().reads_in_flight == 0
        assert not own.here.leaks()

    def test_closing_waits_for_reads(self, own: World) -> None:
        batches = [own.read(range(n, 128)) for n in range(3)]
        own.reader.close(20)
        for n, batch in enumerate(batches):
            assert wrong_rows(range(n, 128), batch) == 0

    def test_a_heap_may_be_closed_before_its_node(self, own: World) -> None:
        batch = own.read(range(8))
        own.here.close()
        own.there.close()
        assert batch.transfer.done()
        with pytest.raises(PeerError, match="closed"):
            own.peer.lookup([key_of(1)])
        with pytest.raises(ClosedError):
            own.read([1])

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    def test_a_forked_child_cannot_use_it_and_the_parent_can(self, own: World) -> None:
        def child() -> bool:
            for call in (
                lambda: own.peer.lookup([key_of(1)]),
                lambda: own.read([1]),
                lambda: own.owner.publish([], []),
            ):
                with pytest.raises(ClosedError, match="belongs to process"):
                    call()
            own.reader.close()
            own.owner.close()
            return True

        assert in_a_child(child)
        batch = own.read(range(128))
        assert wrong_rows(range(128), batch) == 0

    def test_a_child_keeps_no_socket_of_its_parent(self, own: World) -> None:
        """Else a parent that is killed would seem to be alive."""
        inside, outside = os.pipe()
        child = os.fork()
        if not child:
            os.close(outside)
            os.read(inside, 1)
            os._exit(0)
        os.close(inside)
        try:
            own.owner.close(20)
            assert until(lambda: own.peer.is_gone)
        finally:
            os.close(outside)
            os.waitpid(child, 0)

    def test_idle_nodes_take_no_time(self, own: World) -> None:
        own.read([1]).transfer.result()
        time.sleep(0.2)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25  # a progress thread that spins takes 0.4 or more
