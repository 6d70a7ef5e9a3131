"""What the benchmarks share: rounds in rotating order, and their figures."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from shardstate.storage import adaptive


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of a call, which knows nothing of those before it."""
    adaptive._learnt.clear()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def take_turns(
    ways: Mapping[str, Callable[[], object]],
    *,
    before: Callable[[], object],
    rounds: int,
    after: Callable[[str], object] = lambda _name: None,
    warmups: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of each way, by round; the first `warmups` rounds count for nobody.

    The order rotates, so that each way comes after each other one. `before` and `after` are called
    around each run and are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warmups):
        names = list(ways)
        shift = number * 7 % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            took = timed(ways[name])
            after(name)
            if number >= warmups:
                seconds[name].append(took)
    return seconds


def figures(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def best_of(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> tuple[str, float]:
    """Return which of `names` is the fastest in the even rounds, and its median in the odd ones.

    Who is the best of thirty is so by luck, too: what it is compared with are other rounds.
    """
    chosen = min(names, key=lambda name: statistics.median(seconds[name][::2]))
    return chosen, statistics.median(seconds[chosen][1::2] or seconds[chosen])


def machine() -> str:
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )
