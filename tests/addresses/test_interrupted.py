"""AddressManager when an exception strikes inside an operation: undone, or done, never half."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import itertools
import pkgutil
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType, ModuleType

import numpy as np
import pytest
from sortedcontainers import sortedlist

from kvheap import AddressBatch, AddressManager, OutOfMemoryError, addresses
from kvheap.addresses.extent_index import ExtentIndex
from kvheap.addresses.extent_keys import ExtentKeys
from kvheap.addresses.extents import Extents
from kvheap.addresses.free_list import Receipt

PAGE = 4096

Operation = Callable[[AddressManager], object]


def fragmented_heap() -> AddressManager:
    """16 pages, of which 1, 3, 4, 7 to 10 and 15 are free."""
    heap = AddressManager(16 * PAGE)
    heap.batched_allocate(PAGE, 15)
    heap.batched_free([(1 * PAGE, PAGE), (3 * PAGE, 2 * PAGE), (7 * PAGE, 4 * PAGE)])
    return heap


def state(heap: AddressManager) -> tuple[object, list[list[int]]]:
    return heap.stats(), heap.snapshot().tolist()


OPERATIONS: dict[str, Operation] = {
    "allocate a whole extent": lambda heap: heap.allocate(PAGE),
    "allocate part of one": lambda heap: heap.allocate(3 * PAGE),
    "a batch in one run": lambda heap: heap.batched_allocate(PAGE, 4),
    "a batch in three": lambda heap: heap.batched_allocate(PAGE, 7),
    "a partial batch": lambda heap: heap.batched_allocate(2 * PAGE, 9, allow_partial=True),
    "reserve": lambda heap: heap.reserve([8 * PAGE, 3 * PAGE, 15 * PAGE], PAGE),
    "free joins both neighbours": lambda heap: heap.free(2 * PAGE, PAGE),
    "free joins the next": lambda heap: heap.free(0, PAGE),
    "free joins the last": lambda heap: heap.free(5 * PAGE, PAGE),
    "free joins nothing": lambda heap: heap.free(13 * PAGE, PAGE),
    "free many": lambda heap: heap.batched_free(
        [(2 * PAGE, PAGE), (5 * PAGE, PAGE), (14 * PAGE, PAGE)]
    ),
    "free a batch": lambda heap: heap.batched_free(AddressBatch(PAGE, [5 * PAGE], [2])),
    "give back batches": lambda heap: heap.give_back_batches(
        [AddressBatch(PAGE, page * PAGE, 1) for page in (14, 6, 0, 5)],
        [Receipt() for _ in range(4)],
    ),
    "sbrk": lambda heap: heap.sbrk(4 * PAGE),
    "sbrk to wide keys": lambda heap: heap.sbrk(PAGE << 31),
    "trim": lambda heap: heap.trim(),
}


MODULES = [
    sortedlist,
    *(
        importlib.import_module(module.name)
        for module in pkgutil.iter_modules(addresses.__path__, "kvheap.addresses.")
    ),
]


class Interruption:
    """Counts the statements that begin, from one, and raises ``error`` before chosen ones."""

    def __init__(self, error: type[BaseException] = KeyboardInterrupt, *at: int) -> None:
        self.error = error
        self.at = at
        self.statements = 0

    def tick(self) -> None:
        self.statements += 1
        if self.statements in self.at:
            raise self.error

    def strikes(self, operation: Operation, heap: AddressManager) -> bool:
        """Whether ``operation`` was interrupted; else it ended before that statement."""
        for module in MODULES:
            vars(module)["__tick__"] = self.tick
        try:
            operation(heap)
        except self.error:
            return True
        finally:
            for module in MODULES:
                vars(module)["__tick__"] = int
        return False


class Ticking(ast.NodeTransformer):
    """Puts ``__tick__()`` before every statement of every function.

    A trace function would not do: Python switches tracing off once it has raised, so that nothing
    could interrupt the rollback.
    """

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        for part in ast.walk(node):
            for field in ("body", "orelse", "finalbody"):
                statements = getattr(part, field, None)
                if isinstance(statements, list):
                    ticked = [[self.tick(statement), statement] for statement in statements]
                    setattr(part, field, [line for pair in ticked for line in pair])
        return node

    def tick(self, statement: ast.stmt) -> ast.stmt:
        call = ast.Expr(ast.Call(ast.Name("__tick__", ast.Load()), [], []))
        return ast.fix_missing_locations(ast.copy_location(call, statement))


def codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def functions_in(module: ModuleType, owner: object) -> Iterator[FunctionType]:
    for value in vars(owner).values():
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield from functions_in(module, value)
        elif inspect.isfunction(value) and value.__code__.co_filename == module.__file__:
            yield value  # not what a dataclass writes for itself


@functools.cache
def ticking_codes() -> list[tuple[FunctionType, CodeType]]:
    """Every function of the modules, and its code with a tick before each statement."""
    found: dict[FunctionType, CodeType] = {}
    for module in MODULES:
        tree = Ticking().visit(ast.parse(inspect.getsource(module)))
        whole = compile(tree, str(module.__file__), "exec", dont_inherit=True)
        codes = {(code.co_name, code.co_firstlineno): code for code in codes_in(whole)}
        for function in functions_in(module, module):
            key = function.__code__.co_name, function.__code__.co_firstlineno
            found[function] = codes[key]
    return list(found.items())


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function of the modules calls ``__tick__`` before each of its statements."""
    for module in MODULES:
        monkeypatch.setattr(module, "__tick__", int, raising=False)  # does nothing
    for function, code in ticking_codes():
        monkeypatch.setattr(function, "__code__", code)


@pytest.fixture(params=["run by run", "rebuilding", "short lists"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "rebuilding":
        monkeypatch.setattr("kvheap.addresses.bulk.max_steps", lambda free_list: 0)
    if request.param == "short lists":  # so short that every list splits or joins
        monkeypatch.setattr(ExtentKeys, "DEFAULT_LOAD_FACTOR", 1)
        monkeypatch.setattr(ExtentKeys, "check", lambda self: None)


@pytest.mark.usefixtures("_ticking", "_way")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_exception_before_any_statement_undoes_the_operation(
    name: str, error: type[BaseException]
) -> None:
    done = fragmented_heap()
    OPERATIONS[name](done)
    before, after = state(fragmented_heap()), state(done)
    undone, number = 0, 1
    while True:
        heap = fragmented_heap()
        if not Interruption(error, number).strikes(OPERATIONS[name], heap):
            break
        heap.check()
        # Only when the last change is made does the operation stand.
        assert state(heap) in (before, after)
        undone += state(heap) == before
        number += 1
    assert undone > 5
    assert undone >= number - 8


@pytest.mark.usefixtures("_ticking", "_way")
@pytest.mark.parametrize(
    "name", sorted(OPERATIONS.keys() - {"reserve"})
)  # which rolls nothing back
def test_an_exception_in_the_rollback_is_made_good_by_the_next_operation(name: str) -> None:
    done = fragmented_heap()
    OPERATIONS[name](done)
    possible = [state(fragmented_heap()), state(done)]
    moments: list[tuple[int, int]] = []
    for first in itertools.count(1):
        once = Interruption(KeyboardInterrupt, first)
        if not once.strikes(OPERATIONS[name], fragmented_heap()):
            break
        moments += [(first, second) for second in range(first + 1, once.statements + 1)]
    assert moments
    for first, second in random.Random(name).sample(moments, min(len(moments), 500)):
        heap = fragmented_heap()
        twice = Interruption(KeyboardInterrupt, first, second)
        assert twice.strikes(OPERATIONS[name], heap)
        assert twice.statements >= second
        heap.check()
        assert state(heap) in possible


@pytest.mark.parametrize("call", ["add", "remove"])
def test_what_one_undoing_leaves_does_not_mislead_the_next(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extents = [(0, 1), (4, 2), (8, 3)]
    starts, sizes = np.array(extents, np.int64).T
    index = ExtentIndex(Extents(starts, sizes), end=16)
    bits = index.bits

    def interrupt(key: int) -> None:
        raise KeyboardInterrupt

    def damage(old: int, new: int) -> None:
        index.by_size.clear()  # as between two steps of a list that is split
        raise KeyboardInterrupt

    start, size = {"add": (12, 1), "remove": (4, 2)}[call]
    with monkeypatch.context() as patch:
        patch.setattr(index.by_start, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            getattr(index, call)(start << bits | size, size << bits | start)
    index.restore()
    index.log.clear()
    with monkeypatch.context() as patch:
        patch.setattr(index.by_size, "replace", damage)
        with pytest.raises(KeyboardInterrupt):
            index.reshape(8 << bits | 3, 9 << bits | 2, 3 << bits | 8, 2 << bits | 9)
    index.restore()
    index.log.clear()
    assert list(index) == extents


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="needs the main thread"
)
def test_real_signals_at_random_moments_lose_no_byte() -> None:
    """A timer that raises, as often as it can, into a heap at work; what is whose is known."""

    class AlarmError(Exception):
        pass

    def raise_alarm(number: int, frame: FrameType | None) -> None:
        if is_armed:  # another thread may have taken the signal, and be late
            raise AlarmError

    heap = AddressManager(512 * PAGE)
    source = random.Random(7)
    is_armed, alarms = False, 0
    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        deadline = time.monotonic() + 60
        while alarms < 500 and time.monotonic() < deadline:
            live = sorted(allocated_pages(heap))
            freed = source.sample(live, len(live) // 3) if source.random() < 0.6 else []
            wanted = source.randint(1, 40)
            owned = set(live)
            try:
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, source.uniform(1e-6, 400e-6))
                with contextlib.suppress(OutOfMemoryError):
                    if freed:
                        heap.batched_free([(page * PAGE, PAGE) for page in freed])
                    else:
                        heap.batched_allocate(PAGE, wanted, allow_partial=True)
                        heap.allocate(3 * PAGE)
                is_armed = False
            except AlarmError:
                is_armed = False
                alarms += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            heap.check()
            now = allocated_pages(heap)
            if freed:
                assert now in (owned, owned - set(freed))
            else:
                assert now >= owned
                assert len(now - owned) in (0, 3, wanted, wanted + 3, 512 - len(owned))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert alarms > 20


def allocated_pages(heap: AddressManager) -> set[int]:
    pages = set(range(heap.get_heap_size() // PAGE))
    for start, size in heap.snapshot().tolist():
        pages -= set(range(start // PAGE, (start + size) // PAGE))
    return pages
