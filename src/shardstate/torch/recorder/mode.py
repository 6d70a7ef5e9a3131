"""The recorder: a dispatch mode that sees every operation of the loading code.

The code is handed stand-ins. Views of them stay stand-ins; data movement gives *virtual* ones,
defined by copies; copying one into a tensor is noted, and nothing is read. Whatever needs values
reads them then (*materialised*). An operation that reads memory with writes that are still pending
has those carried out first.

Offline there is no memory at all: tensors that a model creates lie on the meta device, and what is
written to them is only noted. An operation whose values nothing defines runs on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from shardstate.catalog import Catalog, Tensors
from shardstate.dtypes import DTYPES
from shardstate.errors import NotNested, PlanError
from shardstate.layout import Move, strides_of
from shardstate.plan import Copy, Plan
from shardstate.targets import MemoryTarget, Target
from shardstate.torch.recorder.assembly import Value, assemble
from shardstate.torch.recorder.memory import (
    WRITTEN,
    Memory,
    loops_between,
    stored_copy,
    unit_of,
    value_source,
)
from shardstate.torch.recorder.standins import (
    Geometry,
    RecordingError,
    Standin,
    geometry_of,
    twin_of,
)
from shardstate.torch.staging import target_for
from shardstate.torch.tensors import TAGS

LITERAL_BYTES = 4096  # values of one tensor that a plan may hold
_CPU = torch.device("cpu")
_META = torch.device("meta")
_MISSES = (NotNested, PlanError)

aten = torch.ops.aten
_EMPTY = {
    aten.empty, aten.empty_strided, aten.empty_permuted, aten.empty_like, aten.new_empty,
    aten.new_empty_strided, aten.rand, aten.randn, aten.randint, aten.rand_like, aten.randn_like,
    aten.randint_like,
}  # fmt: skip
_FILLED = {
    aten.zeros: 0, aten.zeros_like: 0, aten.new_zeros: 0, aten.ones: 1, aten.ones_like: 1,
    aten.new_ones: 1, aten.full: None, aten.full_like: None, aten.new_full: None,
}  # fmt: skip
_RANDOM = {
    aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_, aten.exponential_,
    aten.log_normal_, aten.cauchy_, aten.geometric_,
}  # fmt: skip


def _slice(
    x: torch.Tensor, dim: int, start: int | None, end: int | None, step: int = 1
) -> torch.Tensor:
    if type(start) is int and type(end) is int and step == 1 and 0 <= start <= end <= x.size(dim):
        return x.narrow(dim, start, end - start)
    made: torch.Tensor = aten.slice.Tensor(x, dim, start, end, step)
    return made


# Views of a model's own tensors, many for each weight, by the bindings of torch that are quick.
_DIRECT: dict[Any, Callable[..., torch.Tensor]] = {
    aten.detach.default: torch.Tensor.detach,
    aten.select.int: torch.Tensor.select,
    aten.slice.Tensor: _slice,
}
_PLAIN = {torch.Tensor, torch.nn.Parameter}  # no Python code of a subclass comes between

Read = Callable[[Plan, Target], None]
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


@dataclass
class Materialised:
    """What had to be read while recording."""

    tensors: int = 0
    nbytes: int = 0
    operations: set[str] = field(default_factory=set)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what loading code does with the tensors of `catalog`; use it as a context around it.

    `read` carries out a plan over `catalog` into a target. `offline`: nothing that the model
    creates inside the context gets memory. `names` is what errors call the storages.
    """

    def __init__(self, catalog: Catalog, read: Read, *, offline: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.catalog, self.offline = catalog, offline
        self.materialised = Materialised()
        self._read = read
        self._values: list[Value] = []
        self._memories: dict[int, Memory] = {}  # by storage
        self._computed: dict[int, tuple[torch.Tensor, str]] = {}  # by storage: from weights
        self.views: dict[Any, Any] = {}
        self._handlers: dict[Any, Callable[[Any, _Args, _Kwargs], Any]] = {}

    # What the caller uses

    def offer(self, row: int) -> Standin:
        """Return a new stand-in for a stored tensor."""
        tag, shape = self.catalog.dtypes[row], self.catalog.shapes[row]
        dtype = _TORCH.get(tag)
        if dtype is None:
            name = self.catalog.names[row]
            raise RecordingError(f"{name}: torch has no dtype for {tag}", tensor=name)
        if DTYPES[tag].packed:
            shape = (*shape[:-1], shape[-1] // 2)  # torch counts pairs
        return self.standin(Memory(row=row), _packed(shape, dtype), _CPU)

    def redirect(self, catalog: Catalog, read: Read) -> None:
        """Offer other tensors from now on; none was offered before."""
        self.catalog, self._read = catalog, read

    def flush(self, memories: Iterable[Memory] | None = None) -> int:
        """Carry out what is pending for real memory, and return how many bytes that filled.

        `memories` limits it to some storages.
        """
        due = []
        for memory in self._memories.values() if memories is None else memories:
            memory.resolve()
            if memory.log and memory.anchor is not None and not memory.anchor.is_meta:
                due.append(memory)
        if not due:
            return 0
        goals = [_whole(memory.anchor) for memory in due if memory.anchor is not None]
        tensors = Tensors(
            tuple(f"storage {i}" for i in range(len(due))),
            ("U8",) * len(due),
            tuple((goal.numel(),) for goal in goals),
        )
        plan = assemble(self.catalog, tensors, [memory.log for memory in due], self._values)
        self._read(plan, target_for(goals, None))
        filled = 0
        for memory in due:
            filled += sum(c.move.size * DTYPES[c.dest_dtype].itemsize for c in memory.log)
            memory.flushed()
        return filled

    def plan_of(self, state: Mapping[str, torch.Tensor], *, literal_bytes: int | None) -> Plan:
        """Return the plan that makes the tensors of `state`, in the order of rank files.

        Raises `PlanError` for an element that nothing defined, and for more than `literal_bytes`
        values of one tensor that neither came from weights nor are all the same.
        """
        made: dict[str, list[Copy]] = {}
        for name, tensor in state.items():
            try:
                made[name] = self._define(tensor)
            except _MISSES as error:
                raise PlanError(f"{name}: {error}", tensor=name) from None
        tags = {name: TAGS[tensor.dtype] for name, tensor in state.items()}

        def place(name: str) -> tuple[int, int, str]:
            row = min((c.source for c in made[name] if c.source >= 0), default=len(self.catalog))
            return -DTYPES[tags[name]].bits, row, name

        names = sorted(state, key=place)
        tensors = Tensors(
            tuple(names),
            tuple(tags[name] for name in names),
            tuple(_stored_shape(state[name]) for name in names),
        )
        plan = assemble(self.catalog, tensors, [made[name] for name in names], self._values)
        if literal_bytes is not None:
            sizes: dict[int, int] = {}
            for literal in plan.literals:
                if literal.opaque is None:
                    sizes[literal.dest] = sizes.get(literal.dest, 0) + len(literal.data)
            for dest, size in sizes.items():
                if size > literal_bytes:
                    raise PlanError(
                        f"{names[dest]}: {size} bytes of it are set by the model's code and come "
                        f"from no weight; a plan holds {literal_bytes}",
                        tensor=names[dest],
                    )
        return plan

    def _define(self, tensor: torch.Tensor) -> list[Copy]:
        """Return the copies that make a tensor of the model, row-major, in one of its own."""
        geometry = geometry_of(tensor)
        memory = self._memories.get(_key(tensor))
        known = memory.read(geometry) if memory is not None else None
        if known is not None:
            return known
        if tensor.is_meta:
            raise PlanError("the loading code does not write all of it")
        goal = _packed(geometry.size, geometry.dtype)
        whole = Memory()
        whole.write(self._value_entry(goal, tensor, self._origin(tensor)))
        if memory is not None:
            for copy in memory.view(geometry, goal):
                whole.write(copy)
        whole.resolve()
        return whole.log

    # Dispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in here; torch's guard against that costs a tenth of recording.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: _Args = (), kwargs: _Kwargs | None = None
    ) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        """Carry out one operation of the loading code."""
        handler = self._handlers.get(func)
        if handler is None:
            handler = self._handlers[func] = self._handler_of(func)
        return handler(func, args, kwargs)

    def _handler_of(self, func: Any) -> Callable[[Any, _Args, _Kwargs], Any]:
        packet = getattr(func, "overloadpacket", None)
        known: dict[Any, Callable[[Any, _Args, _Kwargs], Any]] = {
            aten.copy_: self._copy,
            aten.fill_: self._fill,
            aten.zero_: self._fill,
            aten.clone: self._clone,
            aten._to_copy: self._clone,
            aten.cat: self._cat,
            aten.stack: self._stack,
            aten.repeat: self._repeat,
            aten.constant_pad_nd: self._pad,
            aten._unsafe_view: self._view,  # of what `reshape` has just cloned
        }
        if packet in known:
            return known[packet]
        if packet in _EMPTY or packet in _FILLED:
            return self._create
        if hasattr(func, "_can_decompose") and func._can_decompose():
            return self._decompose
        if packet in _RANDOM:
            return self._randomise
        if not _writes(func) and any(each.alias_info is not None for each in _returns(func)):
            return self._view
        return self._compute

    def _decompose(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        """Carry out an operation that arrives whole in inference mode, and else as its parts."""
        with self:
            return func.decompose(*args, **kwargs)

    def _view(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        base = args[0]
        if not isinstance(base, Standin):
            if not kwargs and type(base) in _PLAIN and (direct := _DIRECT.get(func)) is not None:
                return direct(*args)
            unsafe = func is aten._unsafe_view.default
            return self._compute(func, args, kwargs) if unsafe else func(*args, **kwargs)
        geometry = base.geometry
        rest = args[1:]
        for each in rest:
            if isinstance(each, list):
                rest = tuple(tuple(x) if isinstance(x, list) else x for x in rest)
            elif isinstance(each, torch.Tensor):  # view_as, expand_as
                return self._compute(func, args, kwargs)
        key = (func, geometry, rest, tuple(kwargs.items()) if kwargs else ())
        found = self.views.get(key)
        if found is None:
            made = func(self._roomy_twin(base), *args[1:], **kwargs)
            single = isinstance(made, torch.Tensor)
            found = geometry_of(made) if single else [geometry_of(each) for each in made]
            self.views[key] = found
        if isinstance(found, Geometry):
            return self.standin(base.memory, found, base.device)
        return [self.standin(base.memory, each, base.device) for each in found]

    def _roomy_twin(self, base: Standin) -> torch.Tensor:
        """Return a twin in a storage as large as the stand-in's memory, for `as_strided`."""
        geometry = geometry_of(base)
        end = geometry.end
        if (row := base.memory.row) is not None:
            end = max(end, self.catalog.nbytes(row) // geometry.dtype.itemsize)
        whole = torch.empty(end, dtype=geometry.dtype, device=_META)
        return whole.as_strided(geometry.size, geometry.stride, geometry.offset)

    def _copy(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        dest, source = args[0], args[1]
        standin = isinstance(dest, Standin)
        if not standin and dest.is_meta and not self.offline:
            return dest  # a layer that is loaded later; modes above have counted the copy
        if not isinstance(source, Standin) and not self.offline and not standin:
            memory, origin = self._memories.get(_key(dest)), self._memories.get(_key(source))
            if origin is None or not origin.log:
                if memory is not None:
                    memory.write(_region(geometry_of(dest), WRITTEN))
                return func(*args, **kwargs)
        if not dest.numel():
            return dest
        geometry, memory = geometry_of(dest), self._owned(dest)
        if not self._put(memory, geometry, source, "copy_"):
            values = self._values_of(source, "copy_")
            assert values is not None
            memory.write(_region(geometry, WRITTEN))
            return func(dest, values.to(dest.device), **kwargs)
        return dest

    def _put(
        self,
        memory: Memory,
        goal: Geometry,
        source: torch.Tensor,
        operation: str,
        view: Geometry | None = None,
    ) -> bool:
        """Note that `goal`, in `memory`, receives `source` (as `view` sees it), perhaps cast.

        False where values would have to be written and the memory is real.
        """
        geometry = _expanded(view or geometry_of(source), goal.size)
        origin = self._memory(source)
        known = origin if _casts_exactly(geometry.dtype, goal.dtype) else None
        if known is not None and known.row is not None:  # all of a stored tensor is known
            memory.write(stored_copy(known.row, geometry, goal))
            return True
        real = memory.anchor is not None and not memory.anchor.is_meta
        if known is not None:
            try:
                made = list(known.view(geometry, goal))
            except _MISSES:
                made = None
            if made is not None:
                width = goal.dtype.itemsize
                filled = sum(c.move.size * DTYPES[c.dest_dtype].itemsize for c in made)
                if filled == goal.numel * width:
                    memory.log.extend(made)
                    return True
                if not real:
                    memory.write(_region(goal, WRITTEN))
                    memory.log.extend(made)
                    return True
        elif origin is None and source.is_meta:
            memory.write(_region(goal, WRITTEN))
            return True
        if real:
            return False
        values = self._values_of(source, operation)
        if values is None:
            memory.write(_region(goal, WRITTEN))
            return True
        origin_name = self._origin(source) if origin is None else f"aten.{operation}"
        if view is not None:
            values = values.as_strided(view.size, _packed_strides(view, geometry_of(source)))
        memory.write(self._value_entry(goal, values, origin_name))
        return True

    def _fill(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        dest = args[0]
        value = args[1] if len(args) > 1 else 0
        if isinstance(value, torch.Tensor) and self._memory(value) is not None:
            return self._copy(aten.copy_.default, (dest, value), {})
        if isinstance(dest, Standin) or dest.is_meta:
            if not isinstance(dest, Standin) and not self.offline:
                return dest
            geometry = geometry_of(dest)
            if geometry.numel:
                if isinstance(value, torch.Tensor) and value.is_meta:
                    self._owned(dest).write(_region(geometry, WRITTEN))
                else:
                    self._owned(dest).write(self._constant(geometry, value))
            return dest
        memory = self._memories.get(_key(dest))
        if memory is not None and dest.numel():
            memory.write(_region(geometry_of(dest), WRITTEN))
        return func(*args, **kwargs)

    def _clone(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        source = args[0]
        if self._lazy(source) and _casts_exactly(source.dtype, kwargs.get("dtype") or source.dtype):
            device = kwargs.get("device") or source.device
            if isinstance(source, Standin) or torch.device(device).type in ("meta", "cpu"):
                result = func(_twin(source), *args[1:], **_on_meta(kwargs, func))
                return self._made(source, geometry_of(result), device, [(None, source)], func)
        return self._compute(func, args, kwargs)

    def _cat(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        parts = list(args[0])
        if not (lazy := [part for part in parts if self._lazy(part)]):
            return self._compute(func, args, kwargs)
        result = func([_twin(part) for part in parts], *args[1:], **kwargs)
        axis = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
        pieces, at = [], 0
        for part in parts:
            if part.dim() == result.dim():  # an empty one-dimensional tensor goes anywhere
                size = part.shape[axis]
                pieces.append((geometry_of(result.narrow(axis, at, size)), part))
                at += size
        return self._made(lazy[0], geometry_of(result), lazy[0].device, pieces, func)

    def _stack(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        parts = list(args[0])
        if not (lazy := [part for part in parts if self._lazy(part)]):
            return self._compute(func, args, kwargs)
        result = func([_twin(part) for part in parts], *args[1:], **kwargs)
        axis = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
        pieces = [(geometry_of(result.select(axis, i)), part) for i, part in enumerate(parts)]
        return self._made(lazy[0], geometry_of(result), lazy[0].device, pieces, func)

    def _repeat(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        source, times = args[0], list(args[1])
        if not self._lazy(source) or not source.numel() or 0 in times:
            return self._compute(func, args, kwargs)
        result = geometry_of(func(_twin(source), times))
        own = _expanded(geometry_of(source), (*[1] * (len(times) - source.dim()), *source.shape))
        size: list[int] = []
        strides: list[int] = []
        goal: list[int] = []
        for n, s, count, step in zip(own.size, own.stride, times, result.stride, strict=True):
            size += [count, n]
            strides += [0, s]
            goal += [n * step, step]
        view = Geometry(tuple(size), tuple(strides), own.offset, own.dtype)
        to = Geometry(tuple(size), tuple(goal), 0, own.dtype)
        return self._made(source, result, source.device, [(to, source)], func, view=view)

    def _pad(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        source, pads = args[0], list(args[1])
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        if not self._lazy(source) or min(pads) < 0:
            return self._compute(func, args, kwargs)
        result = func(_twin(source), pads)
        inner = result
        for i in range(len(pads) // 2):
            axis = source.dim() - 1 - i
            inner = inner.narrow(axis, pads[2 * i], source.shape[axis])
        return self._made(
            source, geometry_of(result), source.device, [(geometry_of(inner), source)], func,
            fill=value,
        )  # fmt: skip

    def _create(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        standin = isinstance(like, Standin)
        packet = func.overloadpacket
        if not standin and not self._creates(packet, kwargs, like):
            return func(*args, **kwargs)
        first = (_twin(like),) if like is not None else args[:1]
        made = func(*first, *args[1:], **_on_meta(kwargs, func))
        value = None
        if packet in _FILLED:
            value = _FILLED[packet]
            if value is None:
                value = args[1] if packet is not aten.new_full else args[2]
            small = made.numel() * made.element_size() <= LITERAL_BYTES
            if not standin and small and (like is None or not like.is_meta):
                return func(*args, **kwargs)  # real: it may be asked for values at once
        if like is not None and standin:
            device = kwargs.get("device") or like.device
            return self._made(like, geometry_of(made), device, [], func, fill=value)
        if value is not None and made.numel():
            self._owned(made).write(self._constant(geometry_of(made), value))
        return made

    def _creates(self, packet: Any, kwargs: _Kwargs, like: torch.Tensor | None) -> bool:
        """Whether a new tensor is to lie on the meta device instead."""
        device = kwargs.get("device")
        where = torch.device(device).type if device is not None else None
        if where is None:
            where = like.device.type if like is not None else "cpu"
        return self.offline and where in ("cpu", "cuda", "meta")

    def _randomise(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        dest = args[0]
        if isinstance(dest, Standin) or not dest.is_meta:
            return self._compute(func, args, kwargs)
        if (memory := self._memories.get(_key(dest))) is not None and dest.numel():
            memory.write(_region(geometry_of(dest), WRITTEN))
        return dest

    def _compute(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        """Carry out an operation that needs values, or none of ours."""
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in flat if self._concerns(x)]
        if not ours:
            return func(*args, **kwargs)
        self.flush(
            [m for x in ours if not isinstance(x, Standin) and not x.is_meta
             if (m := self._memories.get(_key(x))) is not None]
        )  # fmt: skip
        operation = str(getattr(func, "overloadpacket", func))
        values: dict[int, torch.Tensor] = {}
        for each in ours:
            if isinstance(each, Standin) or each.is_meta:
                found = self._values_of(each, operation)
                if found is None:
                    return self._unknown(func, args, kwargs)
                values[id(each)] = found
        origin = next((o for x in ours if (o := self._origin(x)) is not None), None)
        if any(isinstance(x, Standin) for x in ours) or values:
            origin = origin or (operation if self._from_weights(ours) else None)

        def real(x: torch.Tensor) -> torch.Tensor:
            return values.get(id(x), x)

        real_args, real_kwargs = tree_map_only(torch.Tensor, real, (args, kwargs))
        made = func(*real_args, **real_kwargs)
        back = {id(real(x)): x for x in ours}
        for x in _written(func, args, kwargs):
            self._wrote(x, values.get(id(x)), origin)

        def result(x: torch.Tensor) -> torch.Tensor:
            if id(x) in back:
                return back[id(x)]
            if origin is not None:
                self._computed[_key(x)] = x, origin
            return x

        return tree_map_only(torch.Tensor, result, made)

    def _unknown(self, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        """Carry out, on the meta device, an operation some of whose values nothing defines."""
        written = {id(x): x for x in _written(func, args, kwargs)}
        twins: dict[int, torch.Tensor] = {}

        def twin(x: torch.Tensor) -> torch.Tensor:
            return twins.setdefault(id(x), x if x.is_meta else _twin(x))

        meta_args, meta_kwargs = tree_map_only(torch.Tensor, twin, (args, kwargs))
        made = func(*meta_args, **_on_meta(meta_kwargs, func))
        back = {id(twins[i]): x for i, x in written.items()}
        for x in written.values():
            if not isinstance(x, Standin) and not x.is_meta:
                raise RecordingError(f"{func} writes what nothing defined to real memory")
            self._owned(x).write(_region(geometry_of(x), WRITTEN))
        return tree_map_only(torch.Tensor, lambda x: back.get(id(x), x), made)

    def _wrote(self, x: torch.Tensor, values: torch.Tensor | None, origin: str | None) -> None:
        """Note that an operation wrote to `x`; `values` is what stood in for it."""
        if values is not None:
            self._owned(x).write(self._value_entry(geometry_of(x), values, origin))
        elif (memory := self._memories.get(_key(x))) is not None and x.numel():
            memory.write(_region(geometry_of(x), WRITTEN))
            memory.resolve()

    # What is known of a tensor

    def _concerns(self, x: torch.Tensor) -> bool:
        if isinstance(x, Standin):
            return True
        key = _key(x)
        return key in self._memories or key in self._computed or (self.offline and x.is_meta)

    def _lazy(self, x: torch.Tensor) -> bool:
        """Whether moving `x` can be noted instead of done."""
        return isinstance(x, Standin) or (self.offline and x.is_meta)

    def _memory(self, x: torch.Tensor) -> Memory | None:
        """Return what is pending or known of `x`; None for an ordinary tensor."""
        if isinstance(x, Standin):
            return x.memory
        memory = self._memories.get(_key(x))
        return memory if memory is not None and (x.is_meta or memory.log) else None

    def _owned(self, x: torch.Tensor) -> Memory:
        """Return the memory of `x`, to write to."""
        if isinstance(x, Standin):
            if (row := x.memory.row) is not None:
                size = self.catalog.nbytes(row)
                x.memory.own(Copy(row, 0, "U8", "U8", Move(0, 0, ((size, 1, 1),))))
            return x.memory
        key = _key(x)
        if (memory := self._memories.get(key)) is None:
            memory = self._memories[key] = Memory(anchor=x.detach())
        return memory

    def _origin(self, x: torch.Tensor) -> str | None:
        """Return the operation that computed an ordinary tensor from weights, if one did."""
        if isinstance(x, Standin):
            return None
        found = self._computed.get(_key(x))
        return None if found is None else found[1]

    def _from_weights(self, tensors: Sequence[torch.Tensor]) -> bool:
        for x in tensors:
            memory = self._memory(x)
            if memory is None:
                continue
            if memory.row is not None:
                return True
            for entry in (*memory.past, *memory.log):
                if entry.source >= 0:
                    return True
                if entry.source != WRITTEN and self._values[value_source(entry.source)].origin:
                    return True
        return False

    def _values_of(self, x: torch.Tensor, operation: str) -> torch.Tensor | None:
        """Return the values of `x` as an ordinary tensor; None where some are not defined."""
        memory = self._memory(x)
        if memory is None:
            return None if x.is_meta else x
        geometry = geometry_of(x)
        if not isinstance(x, Standin) and not x.is_meta:
            self.flush([memory])
            return x
        if not geometry.numel:
            return torch.empty(geometry.size, dtype=geometry.dtype)
        flat: Geometry | None = None
        try:
            copies = memory.read(geometry)
        except _MISSES:  # all of the memory, then; views nest in it whatever their strides
            flat = Geometry((geometry.end,), (1,), 0, geometry.dtype)
            copies = memory.read(flat)
        if copies is None:
            return None
        wanted = flat or geometry
        found = self._fetch(copies, wanted, operation)
        if flat is None:
            return found.view(geometry.size)
        return found.as_strided(geometry.size, geometry.stride, geometry.offset).contiguous()

    def _fetch(self, copies: list[Copy], geometry: Geometry, operation: str) -> torch.Tensor:
        """Read what `copies` make, now."""
        nbytes = geometry.numel * geometry.dtype.itemsize
        made = torch.empty(nbytes, dtype=torch.uint8)
        plan = assemble(self.catalog, Tensors(("",), ("U8",), ((nbytes,),)), [copies], self._values)
        if len(plan):
            self.materialised.tensors += 1
            self.materialised.nbytes += nbytes
            self.materialised.operations.add(operation)
        self._read(plan, MemoryTarget([made.numpy()], digests=None))
        return made.view(geometry.dtype)

    # Making things

    def standin(self, memory: Memory, geometry: Geometry, device: torch.device) -> Standin:
        if torch.is_inference_mode_enabled():  # where views of other tensors cannot be inference's
            with torch.inference_mode(False):
                return Standin(memory, geometry, device, self)
        return Standin(memory, geometry, device, self)

    def _made(
        self,
        like: torch.Tensor,
        geometry: Geometry,
        device: torch.device | str,
        pieces: Sequence[tuple[Geometry | None, torch.Tensor]],
        func: Any,
        *,
        fill: Any = None,
        view: Geometry | None = None,
    ) -> torch.Tensor:
        """Return a virtual tensor that `pieces` define: where in it, and what goes there.

        It is a stand-in, or lies on the meta device, as `like` does.
        """
        made: torch.Tensor
        if isinstance(like, Standin):
            made = self.standin(Memory(), geometry, torch.device(device))
        else:
            made = twin_of(geometry)
        if not geometry.numel:
            return made
        memory = self._owned(made)
        if fill is not None:
            memory.write(self._constant(geometry, fill))
        for goal, source in pieces:
            if source.numel():
                name = str(func.overloadpacket).removeprefix("aten.")
                self._put(memory, goal or geometry, source, name, view)
        return made

    def _value_entry(self, goal: Geometry, values: torch.Tensor, origin: str | None) -> Copy:
        """Keep values, as `goal`'s dtype, and return the entry that puts them there."""
        packed = values.detach().to(device=_CPU, dtype=goal.dtype).expand(goal.size).contiguous()
        raw = packed.reshape(-1).view(torch.uint8).numpy().copy()
        self._values.append(Value(raw, origin))
        unit = unit_of(goal.dtype)
        loops = loops_between(goal.size, strides_of(goal.size), goal.stride)
        source = value_source(len(self._values) - 1)
        return Copy(source, 0, unit, unit, Move(0, goal.offset, loops))

    def _constant(self, goal: Geometry, value: Any) -> Copy:
        """Keep one value, and return the entry that fills `goal` with it."""
        one = torch.empty((), dtype=goal.dtype)
        one.copy_(value) if isinstance(value, torch.Tensor) else one.fill_(value)
        origin = self._origin(value) if isinstance(value, torch.Tensor) else None
        self._values.append(Value(one.view(-1).view(torch.uint8).numpy().copy(), origin))
        return _region(goal, value_source(len(self._values) - 1))


_TORCH = {tag: dtype for dtype, tag in TAGS.items()}


@lru_cache(maxsize=4096)
def _packed(shape: tuple[int, ...], dtype: torch.dtype) -> Geometry:
    """Return how a tensor lies row-major in a memory of its own."""
    return Geometry(shape, strides_of(shape), 0, dtype)


def _key(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """Return all bytes of the storage of `x`."""
    raw = torch.empty(0, dtype=torch.uint8, device=x.device)
    return raw.set_(x.untyped_storage())


def _twin(x: torch.Tensor) -> torch.Tensor:
    return twin_of(geometry_of(x))


def _region(goal: Geometry, source: int) -> Copy:
    """Return an entry that writes one and the same thing all over `goal`."""
    unit = unit_of(goal.dtype)
    loops = loops_between(goal.size, (0,) * len(goal.size), goal.stride)
    return Copy(source, 0, unit, unit, Move(0, goal.offset, loops))


def _expanded(geometry: Geometry, size: tuple[int, ...]) -> Geometry:
    """Return `geometry` broadcast to `size`, as `copy_` does it."""
    if geometry.size == size:
        return geometry
    ahead = len(size) - len(geometry.size)
    stride = [0] * ahead
    own = geometry.size
    while ahead < 0 and own and own[0] == 1:  # leading ones may be dropped
        own, ahead = own[1:], ahead + 1
    strides = geometry.stride[len(geometry.size) - len(own) :]
    if ahead < 0 or any(n not in (1, m) for n, m in zip(own, size[ahead:], strict=True)):
        raise RuntimeError(f"a tensor of shape {list(geometry.size)} cannot fill {list(size)}")
    stride += [
        0 if n == 1 and m != 1 else s for n, s, m in zip(own, strides, size[ahead:], strict=True)
    ]
    return Geometry(size, tuple(stride), geometry.offset, geometry.dtype)


def _packed_strides(view: Geometry, source: Geometry) -> tuple[int, ...]:
    """Return the strides of `view` where the elements of `source` lie row-major."""
    step = dict(zip(source.stride, strides_of(source.size), strict=True))
    return tuple(step.get(s, 0) if s else 0 for s in view.stride)


@lru_cache(maxsize=1024)
def _casts_exactly(source: torch.dtype, dest: torch.dtype) -> bool:
    """Whether the engine converts between two types as torch does."""
    if source == dest:
        return True
    a, b = TAGS.get(source), TAGS.get(dest)
    return a is not None and b is not None and DTYPES[a].floating and DTYPES[b].floating


def _stored_shape(x: torch.Tensor) -> tuple[int, ...]:
    from shardstate.torch.tensors import stored_shape

    return stored_shape(x)


def _on_meta(kwargs: _Kwargs, func: Any) -> _Kwargs:
    """Return `kwargs` with the meta device in them, where `func` takes one."""
    takes = any(each.name == "device" for each in func._schema.arguments)
    rest = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    return {**rest, "device": _META} if takes else rest


def _returns(func: Any) -> Sequence[Any]:
    return getattr(getattr(func, "_schema", None), "returns", ())


def _writes(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    arguments = () if schema is None else schema.arguments
    return any(each.alias_info is not None and each.alias_info.is_write for each in arguments)


def _written(func: Any, args: _Args, kwargs: _Kwargs) -> list[torch.Tensor]:
    """Return the tensors that `func` writes to."""
    found: list[torch.Tensor] = []
    for i, each in enumerate(func._schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(each.name)
            flat = value if isinstance(value, list | tuple) else [value]
            found.extend(x for x in flat if isinstance(x, torch.Tensor))
    return found
