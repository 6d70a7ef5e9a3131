"""Coverage-guided fuzzing of one parser: `python tests/fuzz/fuzz.py NAME [options of libFuzzer]`.

`make fuzz` runs it for every parser. New inputs that reach new code are written into the first
directory given; what is found goes to `crash-…` in the working directory, and ends the run.
"""

import json
import random
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

with atheris.instrument_imports(include=["shardstate"]):
    import parsers

NUMBERS = [0, 1, -1, 2, 3, 4, 7, 8, 63, 64, 255, 2**16, 2**31, 2**32, 2**53, 2**62, 2**63 - 1]
NUMBERS += [2**63, 2**64, 10**30, 0.5, 1e300]
TEXTS = ["", ".", "..", "/", "a/b", "../x", "config.json", "shardstate.json", "F32", "F4", "BF16"]
TEXTS += ["*", "\ud800", "\0", "é", "model-rank-0-part-0.safetensors", "0" * 64, "a" * 300]
VALUES = [*NUMBERS, *TEXTS, None, True, False, [], {}, [0, 0], [[1, 1, 1]]]


def places(value, found):
    """Collect (container, key) of everything inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, dict | list):
            places(inner, found)
    return found


def mutate(data, max_size, seed):
    """Change JSON as JSON half of the time; else, and where it is none, as bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return atheris.Mutate(data, max_size)
    try:
        value = json.loads(data)
        found = places(value, [])
        for _ in range(rng.randint(1, 3)):
            container, key = rng.choice(found)
            change = rng.random()
            if change < 0.5:
                container[key] = rng.choice(VALUES)
            elif change < 0.7:
                other, at = rng.choice(found)
                container[key] = other[at]
            elif change < 0.8 and isinstance(container, list):
                container.append(container[key])
            elif change < 0.9 and isinstance(container, dict):
                container[rng.choice(TEXTS)] = container[key]
            else:
                del container[key]
        text = json.dumps(value, separators=(",", ":")).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return atheris.Mutate(data, max_size)
    return text if len(text) <= max_size else atheris.Mutate(data, max_size)


def main():
    name = sys.argv.pop(1)
    parser = parsers.PARSERS[name]
    more = {} if name == "file" else {"custom_mutator": mutate}
    atheris.Setup(sys.argv, lambda data: parser(bytes(data)) and None, **more)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
