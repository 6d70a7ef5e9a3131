from __future__ import annotations

import inspect
import pickle
import re

import pytest

from shardstate import errors
from shardstate.errors import DamageError, HeaderError, NoRule, ShardStateError, UnevenSplit

TREE = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, ShardStateError)
]


def drawn() -> dict[str, tuple[str, str | None]]:
    """Return class → (parent, other base) as the docstring of the module draws the tree."""
    found: dict[str, tuple[str, str | None]] = {}
    above: list[str] = []
    pattern = r"^    ((?:[│ ]   )*)(?:[├└]── )?([A-Z]\w+)(?: \((\w+)\))?"
    for bars, name, other in re.findall(pattern, errors.__doc__ or "", re.MULTILINE):
        nested = f"─ {name}" in (errors.__doc__ or "")
        depth = len(bars) // 4 + nested
        above[depth:] = [name]
        found[name] = (above[depth - 1] if depth else "Exception", other or None)
    return found


@pytest.mark.parametrize("error", TREE)
def test_the_tree_is_the_one_that_is_drawn(error: type[ShardStateError]) -> None:
    parent, other = drawn()[error.__name__]
    bases = [base.__name__ for base in error.__bases__]
    assert [parent, *([other] if other else [])] == bases


def test_the_drawing_has_no_other_names() -> None:
    assert set(drawn()) == {error.__name__ for error in TREE}


@pytest.mark.parametrize("error", TREE)
def test_an_error_survives_pickling(error: type[ShardStateError]) -> None:
    parameters = inspect.signature(error).parameters
    places = {key: key.upper() for key in ("file", "tensor") if key in parameters}
    made = error("what, where; do this", **places)
    back = pickle.loads(pickle.dumps(made))
    assert type(made) is type(back)
    assert str(back) == str(made) == "what, where; do this"
    assert vars(made) == vars(back)


def test_fields_of_an_error_survive_pickling() -> None:
    uneven = UnevenSplit("m", tensor="t", axis=1, size=6, unit=2, world=4, works=(1, 3))
    for made in (uneven, NoRule("m", names=("a", "b")), DamageError("m", file="f", report=[1])):
        back = pickle.loads(pickle.dumps(made))
        assert vars(made) == vars(back)
    assert NoRule("m", names=("a", "b")).tensor == "a"


def test_a_file_is_located_in_its_folder() -> None:
    assert str(HeaderError("a: wrong", file="a").located("/x")) == "/x/a: wrong"
    assert str(HeaderError("b: wrong", file="a").located("/x")) == "b: wrong"
    assert str(HeaderError("a: wrong").located("/x")) == "a: wrong"


@pytest.mark.parametrize("error", TREE)
def test_kinds_are_those_of_the_command_line(error: type[ShardStateError]) -> None:
    assert error.kind in ("usage", "input", "storage")
    assert issubclass(error, OSError) or error.kind != "storage"
