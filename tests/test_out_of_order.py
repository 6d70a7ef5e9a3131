"""Plans that leave the order of their sources, written to rank files: compared with numpy."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shardstate.catalog import Catalog, Tensors, catalog_of
from shardstate.coalesce import ASSEMBLY_BYTES, Piece, Read, Segment, plan_reads
from shardstate.digest import BLOCK_BYTES
from shardstate.dtypes import DTYPES, cast_array, numpy_dtype
from shardstate.engine import Counters, execute
from shardstate.errors import StorageError
from shardstate.header import PREFIX_BYTES, parse_header, serialise_header
from shardstate.layout import Move, Region, canonical, runs
from shardstate.manifest import PartEntry
from shardstate.names import Pattern
from shardstate.parts import PartFile, plan_parts
from shardstate.plan import Copy, Fill, Literal, Plan, make_plan
from shardstate.storage import LocalStorage
from shardstate.targets import FilesTarget
from shardstate.targets.base import Assembly
from storages import BufferedStorage

FLOATS = ("F64", "F32", "F16", "BF16")
SECONDS = 60  # no run here needs more than a few
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of runs, each with fsync

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Limits:
    """What is asked of `plan_reads` and of a target."""

    piece: int = BLOCK_BYTES
    read: int = 2 * BLOCK_BYTES
    gap: int = 256 << 10
    room: int = ASSEMBLY_BYTES
    threads: int = 2


@dataclass
class Rank:
    """A plan while it is made, and what numpy makes of it."""

    made: list[np.ndarray] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)

    def tensor(self, tag: str, *shape: int) -> np.ndarray:
        """Return a new tensor, full of what must not stay."""
        raw = np.full(prod(shape) * DTYPES[tag].itemsize, 0xA5, np.uint8)
        self.made.append(raw.view(numpy_dtype(tag)).reshape(shape))
        self.tags.append(tag)
        return self.made[-1]

    def copy(
        self, number: int, source: np.ndarray, taken: np.ndarray, tag: str, view: np.ndarray
    ) -> None:
        """Note, and do, that `view` of the last tensor is `taken`, a view of source `number`."""
        view[...] = cast_array(np.ascontiguousarray(taken), self.tags[-1])
        here, there = place_of(source, taken), place_of(self.made[-1], view)
        loops = canonical(zip(taken.shape, here[1], there[1], strict=True))
        row, own = len(self.made) - 1, self.tags[-1]
        self.copies.append(Copy(number, row, tag, own, Move(here[0], there[0], loops)))

    def as_bytes(self) -> None:
        """Say the last copy in bytes."""
        copy = self.copies.pop()
        width = DTYPES[copy.source_dtype].itemsize
        scaled = [(n, s * width, d * width) for n, s, d in copy.move.loops]
        loops = canonical([*scaled, (width, 1, 1)])
        move = Move(copy.move.source * width, copy.move.dest * width, loops)
        self.copies.append(Copy(copy.source, copy.dest, "U8", "U8", move))

    def fill(self, value: np.ndarray, view: np.ndarray) -> None:
        view[...] = value
        offset, strides = place_of(self.made[-1], view)
        loops = canonical((n, 0, d) for n, d in zip(view.shape, strides, strict=True))
        region = Region(offset, tuple((n, d) for n, _, d in loops))
        self.fills.append(Fill(len(self.made) - 1, self.tags[-1], region, value.tobytes()))

    def literal(self, values: np.ndarray, view: np.ndarray) -> None:
        view[...] = values
        offset, strides = place_of(self.made[-1], view)
        width, flat = view.dtype.itemsize, self.made[-1].reshape(-1).view(np.uint8)
        for begin, end in runs(Region(offset, tuple(zip(view.shape, strides, strict=True)))):
            data = flat[begin * width : end * width].tobytes()
            self.literals.append(Literal(len(self.made) - 1, begin * width, data))

    def plan(self, catalog: Catalog) -> Plan:
        names = tuple(f"t{i}" for i in range(len(self.made)))
        tensors = Tensors(names, tuple(self.tags), tuple(each.shape for each in self.made))
        return make_plan(catalog, tensors, self.copies, self.fills, self.literals)


def place_of(whole: np.ndarray, view: np.ndarray) -> tuple[int, list[int]]:
    """Return where the first element of `view` lies in `whole`, and its strides; in elements."""
    width = whole.dtype.itemsize
    offset = view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    strides = (s for n, s in zip(view.shape, view.strides, strict=True))
    return offset // width, [s // width for s in strides]


def stored(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]], *, files: int = 1) -> Catalog:
    """Write {name: (tag, array)} as safetensors files; return their catalog."""
    found = []
    for i in range(files):
        mine = dict(list(tensors.items())[i::files])
        rows = [(name, tag, array.shape, array.nbytes) for name, (tag, array) in mine.items()]
        header = serialise_header(rows, metadata={}, align=8)
        file = path / f"{i}.safetensors"
        with file.open("wb") as out:
            out.write(header)
            for _, array in mine.values():
                out.write(array.reshape(-1).view(np.uint8).data)
        size = file.stat().st_size
        found.append((file.name, size, parse_header(header[8:], file=file.name, file_bytes=size)))
    assert PREFIX_BYTES == 8
    return catalog_of(found, weight_map=None)


def reads_of(plans: Sequence[Plan], limits: Limits) -> list[Read]:
    return plan_reads(
        plans,
        in_dest_order=True,
        piece_bytes=limits.piece,
        read_bytes=limits.read,
        max_gap_bytes=limits.gap,
        assembly_bytes=limits.room,
    )


def ends_in_time(work: Callable[[], Counters]) -> Counters:
    """Return what `work` returns; a failure where it does not end."""
    found: list[Counters] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]
    return found[0]


def write(
    plans: Sequence[Plan],
    path: Path,
    limits: Limits,
    *,
    storage: type[LocalStorage] = LocalStorage,
    part_bytes: int = 1 << 40,
) -> tuple[list[Read], Counters, list[list[tuple[PartFile, PartEntry]]]]:
    """Carry out `plans` into rank files at `path`/out."""
    reads = reads_of(plans, limits)
    parts = [
        plan_parts(
            plan.tensors,
            rank=rank,
            set_id="set",
            pattern=Pattern("{rank}-{part}.safetensors"),
            max_part_bytes=part_bytes,
        )
        for rank, plan in enumerate(plans)
    ]
    entries: dict[str, PartEntry] = {}

    def finished(part: PartFile, entry: PartEntry) -> None:
        assert part.name not in entries, "a part was finished twice"
        entries[part.name] = entry

    with storage(path) as source, LocalStorage(path / "out", create=True) as out:
        with FilesTarget(out, parts, finished, limits.room) as target:
            counters = ends_in_time(
                lambda: execute(
                    reads,
                    storage=source,
                    target=target,
                    threads=limits.threads,
                    progress=None,
                    fills_memory=False,
                )
            )
            if limits.room:
                assert not any(each._memory or each._missing for each in target._assemblies)
    return reads, counters, [[(part, entries[part.name]) for part in each] for each in parts]


def check_files(
    path: Path, ranks: Sequence[Rank], written: Sequence[Sequence[tuple[PartFile, PartEntry]]]
) -> None:
    """Assert that files and digests are what numpy makes."""
    for rank, parts in zip(ranks, written, strict=True):
        for part, entry in parts:
            data = np.fromfile(path / "out" / part.name, np.uint8)
            assert len(data) == part.nbytes == entry.bytes
            assert part.header == data[: len(part.header)].tobytes()
            for row, begin, blocks in zip(part.rows, part.begins, entry.blocks, strict=True):
                expected = rank.made[row].reshape(-1).view(np.uint8)
                assert np.array_equal(expected, data[begin : begin + len(expected)])
                assert blocks == tuple(
                    blake3(expected[at : at + BLOCK_BYTES].data).hexdigest()
                    for at in range(0, len(expected), BLOCK_BYTES)
                )


def check_reads(reads: Sequence[Read], plans: Sequence[Plan], limits: Limits) -> None:
    """Assert that each tensor is one stream of runs and segments, which keep to their limits."""
    room = limits.room // len(plans)
    at: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # slot → tensor, byte
    missing: Counter[int] = Counter()  # slot → bytes that its latest segment waits for
    assembled: Counter[int] = Counter()
    latest: dict[int, Segment] = {}
    for read in reads:
        largest = max(max(piece.end - piece.begin, piece.nbytes) for piece in read.pieces)
        assert read.nbytes <= max(limits.read + 2 * limits.piece, largest)
        for piece in read.pieces:
            assert piece.nbytes <= max(limits.piece, 8)
            assert piece.value is not None or piece.end - piece.begin <= max(limits.piece, 8)
            dest, byte = at[piece.slot]
            if piece.segment is not None and missing[piece.slot]:
                assert piece.segment == latest[piece.slot], "segments take turns"
            else:
                assert not missing[piece.slot]
                if dest != piece.dest:
                    assert piece.dest > dest
                    byte = 0
                run = piece.dest_run
                if piece.segment is not None:
                    segment = latest[piece.slot] = piece.segment
                    assert segment.at == assembled[piece.slot]
                    assert segment.nbytes <= max(room, 8)
                    assembled[piece.slot] += segment.nbytes
                    missing[piece.slot] = segment.nbytes
                    run = segment.begin, segment.end
                assert run is not None
                assert byte == run[0]
                at[piece.slot] = piece.dest, run[1]
            if piece.segment is not None:
                low, high = piece.dest_span
                assert piece.segment.begin <= low < high <= piece.segment.end
                missing[piece.slot] -= piece.nbytes
                assert missing[piece.slot] >= 0
    assert not any(missing.values())


# -- random plans -------------------------------------------------------------------------------


# Mostly such as can be transposed.
shapes = st.one_of(
    st.lists(st.integers(3, 12), min_size=2, max_size=3), st.lists(st.integers(1, 12), max_size=3)
)


def source_arrays(draw: st.DrawFn) -> list[tuple[str, np.ndarray]]:
    random = np.random.default_rng(draw(st.integers(0, 9)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        tag = draw(st.sampled_from([*FLOATS, "F32", "BF16", "U8", "I32"]))
        shape = draw(shapes.filter(bool))
        if tag in FLOATS:
            found.append((tag, random.standard_normal(shape).astype(numpy_dtype(tag))))
        else:
            raw = random.integers(0, 256, prod(shape) * DTYPES[tag].itemsize, dtype=np.uint8)
            found.append((tag, raw.view(numpy_dtype(tag)).reshape(shape)))
    return found


def taken_from(
    draw: st.DrawFn, source: np.ndarray, shape: Sequence[int], ranks: int
) -> list[np.ndarray]:
    """Return a view of `source` with `shape` for each rank: permuted, stepped, broadcast."""
    left = list(range(source.ndim))
    chosen: list[int | None] = [None] * len(shape)
    for axis in draw(st.permutations(range(len(shape)))):
        fitting = [a for a in left if source.shape[a] >= shape[axis]]
        if fitting and draw(st.integers(0, 7)):
            chosen[axis] = draw(st.sampled_from(fitting))
            left.remove(chosen[axis])
    moving = draw(st.sampled_from([None, *range(source.ndim)]))  # where ranks differ
    begins: list[list[slice]] = []
    for a, n in enumerate(source.shape):
        if a in left:
            size, step = 1, 1
        else:
            size = shape[chosen.index(a)]
            step = draw(st.integers(1, max(1, (n - 1) // max(1, size - 1)))) if size > 1 else 1
        reach = (size - 1) * step + 1
        begin = draw(st.integers(0, n - reach))
        shift = size * step if draw(st.booleans()) else 1
        each = [
            (begin + r * shift) % (n - reach + 1) if a == moving else begin for r in range(ranks)
        ]
        begins.append([slice(b, b + reach, step) for b in each])
    found = []
    for rank in range(ranks):
        part = source[tuple(slices[rank] for slices in begins)]
        order = [a for a in chosen if a is not None]
        part = part.transpose([*order, *left])[(..., *(0 for _ in left))]
        index = (*(slice(None) if a is not None else None for a in chosen), ...)
        found.append(np.broadcast_to(part[index], shape))
    return found


def cover(
    draw: st.DrawFn,
    sources: Sequence[tuple[str, np.ndarray]],
    ranks: Sequence[Rank],
    views: Sequence[np.ndarray],
    depth: int,
) -> None:
    """Write all of `views`, one for each rank and of one shape."""
    shape = views[0].shape
    wide = [axis for axis, n in enumerate(shape) if n > 1]
    if depth and wide and draw(st.integers(0, 3)):
        axis = draw(st.sampled_from(wide))
        parts: list[tuple[int | None, int | None, int]]
        if draw(st.booleans()):
            cut = draw(st.integers(1, shape[axis] - 1))
            parts = [(None, cut, 1), (cut, None, 1)]
        else:
            step = draw(st.integers(2, min(3, shape[axis])))
            parts = [(i, None, step) for i in range(step)]
        for part in draw(st.permutations(parts)):
            index = (*(slice(None) for _ in range(axis)), slice(*part))
            cover(draw, sources, ranks, [view[index] for view in views], depth - 1)
        return
    tag = ranks[0].tags[-1]
    fitting = [i for i, (t, _) in enumerate(sources) if t == tag or (t in FLOATS and tag in FLOATS)]
    kind = draw(st.integers(0, 9))
    if kind < 8 and fitting:
        number = draw(st.sampled_from(fitting))
        source_tag, source = sources[number]
        as_bytes = source_tag == tag and kind == 7
        taken = taken_from(draw, source, shape, len(ranks))
        for rank, view, each in zip(ranks, views, taken, strict=True):
            rank.copy(number, source, each, source_tag, view)
            if as_bytes:
                rank.as_bytes()
        return
    value = np.frombuffer(b"\x01\x02\x03\x04\x05\x06\x07\x08", numpy_dtype(tag))[:1]
    for rank, view in zip(ranks, views, strict=True):
        if kind % 2:
            rank.literal(value[0], view)
        else:
            rank.fill(value[0], view)


@st.composite
def random_ranks(draw: st.DrawFn) -> tuple[list[tuple[str, np.ndarray]], list[Rank]]:
    sources = source_arrays(draw)
    ranks = [Rank() for _ in range(draw(st.integers(1, 4)))]
    alike = draw(st.booleans())
    for group in [ranks] if alike else [[rank] for rank in ranks]:
        for _ in range(draw(st.integers(1, 3))):
            tags = [tag for tag, _ in sources]
            tag = draw(st.sampled_from([*tags, *tags, "F32", "BF16"]))
            shape = draw(shapes)
            views = [rank.tensor(tag, *shape) for rank in group]
            cover(draw, sources, group, views, draw(st.integers(0, 4)))
    return sources, ranks


limits_of = st.builds(
    Limits,
    piece=st.sampled_from([16, 64, 256, 1 << 20]),
    read=st.sampled_from([16, 256, 1 << 20]),
    gap=st.sampled_from([0, 8, 100, 1 << 10]),
    room=st.sampled_from([0, 32, 256, 2048, 1 << 20]),
    threads=st.integers(1, 4),
)


@settings(max_examples=300)
@given(random_ranks(), limits_of, st.sampled_from([64, 1 << 20]), st.integers(1, 2))
def test_any_plan_is_written(
    made: tuple[list[tuple[str, np.ndarray]], list[Rank]],
    limits: Limits,
    part_bytes: int,
    files: int,
) -> None:
    sources, ranks = made
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = Path(folder)
        catalog = stored(path, {f"s{i}": each for i, each in enumerate(sources)}, files=files)
        order = [int(name[1:]) for name in catalog.names]
        for rank in ranks:
            rank.copies = [
                Copy(order.index(c.source), c.dest, c.source_dtype, c.dest_dtype, c.move)
                for c in rank.copies
            ]
        plans = [rank.plan(catalog) for rank in ranks]
        reads, _, written = write(plans, path, limits, part_bytes=part_bytes)
        check_reads(reads, plans, limits)
        check_files(path, ranks, written)


# -- large examples: tensors of several digest blocks --------------------------------------------


def noise(*shape: int) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .integers(0, 1 << 16, shape, dtype=np.uint16)
        .view(numpy_dtype("BF16"))
    )


def written_and_checked(
    path: Path, sources: Sequence[np.ndarray], ranks: Sequence[Rank], limits: Limits
) -> tuple[list[Read], Counters]:
    """Write what `ranks` make of BF16 `sources`; compare files and digests with numpy."""
    catalog = stored(path, {f"s{i}": ("BF16", each) for i, each in enumerate(sources)})
    plans = [rank.plan(catalog) for rank in ranks]
    reads, counters, written = write(plans, path, limits)
    check_reads(reads, plans, limits)
    check_files(path, ranks, written)
    return reads, counters


def segments(reads: Sequence[Read]) -> list[int]:
    """Return the bytes of each segment, in order; of one slot."""
    found = {piece.segment for read in reads for piece in read.pieces}
    return [each.nbytes for each in sorted(found - {None}, key=lambda segment: segment.at)]


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_a_stack_of_transposed_experts(tmp_path: Path, threads: int) -> None:
    experts = noise(3, 2048, 1536)
    rank = Rank()
    view = rank.tensor("BF16", 3, 1536, 2048)
    rank.copy(0, experts, experts.swapaxes(1, 2), "BF16", view)
    reads, counters = written_and_checked(tmp_path, [experts], [rank], Limits(threads=threads))
    assert segments(reads) == [6 << 20] * 3
    assert (counters.bytes_read, counters.requests) == (experts.nbytes, 3)


@pytest.mark.parametrize("axis", [1, 2])
def test_two_ranks_share_a_stack_of_transposed_experts(tmp_path: Path, axis: int) -> None:
    experts = noise(3, 2048, 1536)
    ranks = [Rank(), Rank()]
    for rank, own in zip(ranks, np.split(experts, 2, axis), strict=True):
        turned = own.swapaxes(1, 2)
        rank.copy(0, experts, turned, "BF16", rank.tensor("BF16", *turned.shape))
    reads, counters = written_and_checked(tmp_path, [experts], ranks, Limits())
    assert counters.bytes_read == experts.nbytes
    assert counters.requests == 3  # where the ranks hold columns, too
    assert sum(len(read.pieces) for read in reads) <= 12


def test_two_stacks_become_the_halves_of_one(tmp_path: Path) -> None:
    gate, up = noise(8, 1024, 512), noise(8, 1024, 512)
    rank = Rank()
    view = rank.tensor("BF16", 8, 2048, 512)
    rank.copy(0, gate, gate, "BF16", view[:, :1024])
    rank.copy(1, up, up, "BF16", view[:, 1024:])
    reads, counters = written_and_checked(tmp_path, [gate, up], [rank], Limits())
    assert counters.bytes_read == gate.nbytes + up.nbytes
    assert counters.requests <= 16
    assert sum(len(read.pieces) for read in reads) <= 16


def test_a_narrow_column_beside_a_wide_one(tmp_path: Path) -> None:
    left, right = noise(20000, 512), noise(20000, 64)
    rank = Rank()
    view = rank.tensor("BF16", 20000, 576)
    rank.copy(0, left, left, "BF16", view[:, :512])
    rank.copy(1, right, right, "BF16", view[:, 512:])
    reads, counters = written_and_checked(tmp_path, [left, right], [rank], Limits())
    assert counters.bytes_read == left.nbytes + right.nbytes
    assert counters.requests == sum(len(read.pieces) for read in reads) == 12


@pytest.mark.parametrize("threads", [1, 4])
def test_columns_side_by_side(tmp_path: Path, threads: int) -> None:
    left, right = noise(13000, 1100), noise(13000, 76)  # 30 MiB; rows of 2352 bytes
    rank = Rank()
    view = rank.tensor("BF16", 13000, 1176)
    rank.copy(0, left, left, "BF16", view[:, :1100])
    rank.copy(1, right, right, "BF16", view[:, 1100:])
    reads, counters = written_and_checked(tmp_path, [left, right], [rank], Limits(threads=threads))
    assert max(segments(reads)) <= BLOCK_BYTES
    assert counters.bytes_read == left.nbytes + right.nbytes
    assert counters.requests == 2 * len(segments(reads)) == 16


@pytest.mark.parametrize("threads", [1, 4])
def test_a_transpose_that_exceeds_the_assembly(tmp_path: Path, threads: int) -> None:
    array = noise(10240, 5120)
    rank = Rank()
    rank.copy(0, array, array.T, "BF16", rank.tensor("BF16", 5120, 10240))
    reads, counters = written_and_checked(tmp_path, [array], [rank], Limits(threads=threads))
    # 100 MiB in 64 MiB: two passes over whole rows.
    assert len(segments(reads)) == 2
    assert counters.bytes_read <= 2 * array.nbytes
    assert counters.requests <= 2 * (array.nbytes // BLOCK_BYTES + 1)
    assert counters.peak_extra_bytes < ASSEMBLY_BYTES + threads * 3 * 2 * BLOCK_BYTES


@pytest.mark.parametrize("tag", ["BF16", "F32"])
def test_ranks_transpose_their_columns_in_step(tmp_path: Path, tag: str) -> None:
    experts = noise(2, 1024, 6144)
    ranks = [Rank() for _ in range(8)]
    for i, rank in enumerate(ranks):
        own = experts[:, :, i * 768 : (i + 1) * 768]
        rank.copy(0, experts, own.swapaxes(1, 2), "BF16", rank.tensor(tag, 2, 768, 1024))
    _, counters = written_and_checked(tmp_path, [experts], ranks, Limits(threads=4))
    assert counters.bytes_read == experts.nbytes


# -- waiting and giving up -----------------------------------------------------------------------


class Failing(BufferedStorage):
    """The third large read fails, while others wait for what it would bring."""

    reads = 0

    def read_into(self, name: str, begin: int, views: Sequence[memoryview]) -> None:
        self.reads += 1
        if self.reads == 3:
            time.sleep(0.1)
            raise StorageError(f"{name}: the disk is gone")
        super().read_into(name, begin, views)


def test_an_error_ends_all_waiting(tmp_path: Path) -> None:
    array = noise(16, 1536, 1536)
    rank = Rank()
    rank.copy(0, array, array.swapaxes(1, 2), "BF16", rank.tensor("BF16", 16, 1536, 1536))
    plan = rank.plan(stored(tmp_path, {"s0": ("BF16", array)}))
    before = threading.active_count()
    limits = Limits(read=BLOCK_BYTES, room=5 << 20, threads=6)
    with pytest.raises(StorageError, match="the disk is gone"):
        write([plan], tmp_path, limits, storage=Failing)
    assert threading.active_count() == before
    assert list((tmp_path / "out").iterdir()) == []


def test_an_assembly_keeps_to_its_room() -> None:
    assembly = Assembly(10)
    three = [Segment(0, 4, 0), Segment(4, 8, 4), Segment(8, 12, 8)]

    def half(segment: Segment, second: bool) -> np.ndarray | None:
        move = Move(0, segment.begin + 2 * second, ((2, 1, 1),))
        piece = Piece(0, 0, move, "U8", "U8", -1, 0, b"ab", segment)
        return assembly.put(piece, Read(None, 0, 0, (piece,)), None)

    assert half(three[0], False) is None
    assert half(three[1], True) is None
    waiting = threading.Thread(target=half, args=(three[2], False), daemon=True)
    waiting.start()
    complete = half(three[1], False)
    assert complete is not None
    assert complete.tobytes() == b"abab"
    assembly.release(three[1])  # out of turn: what is counted begins with the first one
    waiting.join(0.1)
    assert waiting.is_alive()
    assert half(three[0], True) is not None
    assembly.release(three[0])
    waiting.join(SECONDS)
    assert not waiting.is_alive()
    assert half(three[2], True) is not None
