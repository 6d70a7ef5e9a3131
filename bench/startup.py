"""How long does the command line take to answer, beside importing numpy? Prints one JSON line.

python bench/startup.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def seconds(command: list[str], rounds: int) -> float:
    """Return the median wall-clock time of a command."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    numpy = seconds([sys.executable, "-c", "import numpy"], rounds)
    shown = seconds([sys.executable, "-m", "shardstate", "--help"], rounds)
    result = {
        "bench": "startup",
        "import_numpy_seconds": round(numpy, 3),
        "help_seconds": round(shown, 3),
        "limit_seconds": round(3 * numpy + 0.1, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
