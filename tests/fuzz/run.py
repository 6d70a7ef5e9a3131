"""Fuzzes each parser in turn, for as long in all as asked; `make fuzz` runs this.

What is new is kept in `.fuzz/`; with `--merge` the inputs that reach more code than the corpus
does are added to it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE.parent.parent / ".fuzz"
sys.path.insert(0, str(HERE))


def main():
    from parsers import PARSERS

    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=int, default=600)
    arguments.add_argument("--merge", action="store_true")
    options = arguments.parse_args()
    failed = []
    for name in PARSERS:
        corpus, new = HERE / "corpus" / name, OUT / name
        new.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "fuzz.py"), name]
        limits = ["-max_len=8192", "-timeout=10", "-rss_limit_mb=3000"]
        if options.merge:
            subprocess.run([*command, "-merge=1", *limits, corpus, new], check=True)
            continue
        seconds = max(1, options.seconds // len(PARSERS))
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
