"""Stand-ins: tensors with a name, a dtype and a shape, but no bytes.

A stand-in is a wrapper subclass, so that everything done to it arrives in the recorder at the level
of dispatch. It says that it lies on the CPU (loading code branches on the device), and holds the
`Memory` that it is a view of. Sizes, strides and offset are its own; what a view op makes of them
is asked of a twin on the meta device, once for each op and geometry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import torch

from shardstate.errors import InputError

if TYPE_CHECKING:
    from shardstate.torch.recorder.memory import Memory


class RecordingError(InputError):
    """What the loading code does cannot be recorded."""


class Geometry(NamedTuple):
    """How a tensor lies in its memory; strides and offset count elements of `dtype`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        count = 1
        for n in self.size:
            count *= n
        return count

    @property
    def end(self) -> int:
        """One past the last element, from the memory's first."""
        if not self.numel:
            return self.offset
        pairs = zip(self.size, self.stride, strict=True)
        return self.offset + sum((n - 1) * s for n, s in pairs) + 1


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """Return how `tensor` lies in its storage."""
    if isinstance(tensor, Standin):
        return tensor.geometry
    return Geometry(
        tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()), tensor.dtype
    )


def twin_of(geometry: Geometry) -> torch.Tensor:
    """Return a meta tensor that lies in a storage of its own as `geometry` says."""
    whole = torch.empty(geometry.end, dtype=geometry.dtype, device="meta")
    return whole.as_strided(geometry.size, geometry.stride, geometry.offset)


class Dispatcher(Protocol):
    """What carries out the operations on stand-ins."""

    views: dict[Any, Any]  # what a view op makes of a geometry

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def standin(self, memory: Memory, geometry: Geometry, device: torch.device) -> Standin: ...


class Standin(torch.Tensor):
    """A view of a `Memory`. A view of it, `detach` included, has none of its Python attributes."""

    memory: Memory
    geometry: Geometry
    recorder: Dispatcher

    @staticmethod
    def __new__(
        cls, memory: Memory, geometry: Geometry, device: torch.device, recorder: Dispatcher
    ) -> Standin:
        size, stride, offset, dtype = geometry
        # By position: that is a fifth faster. The two between are memory format and layout.
        made: Standin = torch.Tensor._make_wrapper_subclass(
            cls, size, stride, offset, None, dtype, torch.strided, device
        )
        made.memory, made.geometry, made.recorder = memory, geometry, recorder
        return made

    # A checkpoint has tens of thousands of tensors of a few shapes: what these made of a shape
    # once they make of it again, and torch need not be asked.

    def narrow(self, *args: Any, **kwargs: Any) -> Any:
        return _again(self, torch.Tensor.narrow, args, kwargs)

    def unsqueeze(self, *args: Any, **kwargs: Any) -> Any:
        return _again(self, torch.Tensor.unsqueeze, args, kwargs)

    def unbind(self, *args: Any, **kwargs: Any) -> Any:
        return _again(self, torch.Tensor.unbind, args, kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Only where the recorder's mode is off; inside it the mode is asked first.
        standin = next(each for each in _flat(args, kwargs) if isinstance(each, Standin))
        return standin.recorder.dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Standin({list(self.size())}, {self.dtype})"

    def numpy(self, **kwargs: Any) -> Any:
        return _values(self).numpy(**kwargs)

    def tolist(self) -> Any:
        return _values(self).tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return _values(self).numpy().__array__(*args, **kwargs)

    def data_ptr(self) -> NoReturn:
        raise RecordingError("a weight has no address while loading is recorded")

    def untyped_storage(self) -> NoReturn:
        raise RecordingError("a weight has no storage while loading is recorded")

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise RecordingError("a weight cannot be copied out while loading is recorded")


_INTS = frozenset({int})


def _again(base: Standin, view: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what `view`, a method that only makes views, makes of a stand-in."""
    if kwargs or not _INTS.issuperset(map(type, args)):
        return view(base, *args, **kwargs)
    recorder, key = base.recorder, (view, base.geometry, args)
    found = recorder.views.get(key)
    if found is None:
        made = view(base, *args)
        single = isinstance(made, torch.Tensor)
        recorder.views[key] = (
            geometry_of(made) if single else tuple(geometry_of(each) for each in made)
        )
        return made
    if isinstance(found, Geometry):
        return recorder.standin(base.memory, found, base.device)
    return tuple(recorder.standin(base.memory, each, base.device) for each in found)


def _values(standin: Standin) -> torch.Tensor:
    """Return the values of a stand-in as an ordinary tensor."""
    aten = torch.ops.aten
    found: torch.Tensor = standin.recorder.dispatch(aten.mul.Scalar, (standin, 1), {})
    return found


def _flat(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[Any]:
    flat: list[Any] = []
    for each in (*args, *(kwargs or {}).values()):
        if isinstance(each, list | tuple):
            flat.extend(each)
        else:
            flat.append(each)
    return flat
