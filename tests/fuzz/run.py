"""Fuzzes each parser in turn, for as long in all as asked; `make fuzz` runs this.

What is new is kept in `.fuzz/`; with `--merge` the inputs that reach lines which the corpus does
not reach, or end in another error, are added to it.
"""

import argparse
import hashlib
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent.parent / ".fuzz"
sys.path.insert(0, str(HERE))

import parsers  # noqa: E402


def reached(parser, data):
    """Return the lines of shardstate that an input reaches, and what its error is like."""
    found = set()

    def trace(frame, event, _):
        if "shardstate" not in frame.f_code.co_filename:
            return None
        found.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    errors = []
    original = parsers.refused
    parsers.refused = lambda error: errors.append(str(error)) or original(error)
    sys.settrace(trace)
    try:
        parser(data)
    finally:
        sys.settrace(None)
        parsers.refused = original
    return found | {re.sub(r"'[^']*'|[0-9]+|`[^`]*`", "", error)[:60] for error in errors}


def merge(parser, corpus, new):
    """Add to `corpus` the inputs of `new` that reach more, the short ones first."""
    known = set()
    for path in sorted(corpus.iterdir()):
        known |= reached(parser, path.read_bytes())
    added = 0
    for data in sorted((path.read_bytes() for path in new.iterdir()), key=len):
        if more := reached(parser, data) - known:
            known |= more
            added += 1
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    print(f"{corpus.name}: {added} added", flush=True)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=int, default=600)
    arguments.add_argument("--merge", action="store_true")
    options = arguments.parse_args()
    failed = []
    for name in parsers.PARSERS:
        corpus, new = HERE / "corpus" / name, OUT / name
        new.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "fuzz.py"), name]
        limits = ["-max_len=8192", "-timeout=10", "-rss_limit_mb=3000"]
        if options.merge:
            merge(parsers.PARSERS[name], corpus, new)
            continue
        seconds = max(1, options.seconds // len(parsers.PARSERS))
        done = subprocess.run(
            [*command, new, corpus, f"-max_total_time={seconds}", *limits],
            cwd=OUT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        print(f"{name}: exit status {done.returncode}; {' '.join(last)}", flush=True)
        if done.returncode:
            (OUT / f"{name}.log").write_text(done.stderr)
            failed.append(name)
    if failed:
        sys.exit(f"found something: {', '.join(failed)}; see {OUT}")


if __name__ == "__main__":
    main()
