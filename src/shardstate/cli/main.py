"""Entry point: exit status, one-line errors, `--json` errors. See docs/architecture.md.

0 done · 1 damage or differences found · 2 bad usage or input · 3 storage · 4 our bug · 130 Ctrl-C
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from shardstate.cli.commands import cli
from shardstate.errors import DamageError, ShardStateError, StorageError

DONE, DAMAGE, BAD_INPUT, STORAGE, BUG, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit status."""
    status = run(sys.argv[1:])
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command and return its exit status; errors are printed, not raised."""
    # Looked at by hand: an error in the arguments themselves must come out as JSON too.
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        # Not cli.main: it turns a broken pipe into exit status 1, which means damage here.
        with cli.make_context("shardstate", list(arguments)) as called:
            status = cli.invoke(called)
        sys.stdout.flush()
        return status if isinstance(status, int) else DONE
    except click.exceptions.Exit as error:
        return error.exit_code
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted", "interrupted", as_json)
    except click.exceptions.NoArgsIsHelpError:
        commands = ", ".join(cli.commands)
        text = f"no command given, expected one of {commands}; see shardstate --help"
        return _fail(BAD_INPUT, "usage", text, as_json)
    except click.ClickException as error:
        text = " ".join(error.format_message().split())
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context is not None else ""
        return _fail(BAD_INPUT, "usage", text.rstrip(".") + hint, as_json)
    except DamageError as error:
        if as_json:
            click.echo(json.dumps(error.report.json()))
        _print_error(str(error))
        return DAMAGE
    except ShardStateError as error:
        if debug:
            traceback.print_exc()
        status = STORAGE if isinstance(error, StorageError) else BAD_INPUT
        return _fail(status, error.kind, str(error), as_json, file=error.file, tensor=error.tensor)
    except BrokenPipeError:
        # Whoever read our output has left; keep the interpreter from saying so at its exit.
        _silence_stdout()
        return STORAGE
    except OSError as error:
        _silence_stdout()
        return _fail(STORAGE, "storage", f"I/O failed: {error.strerror or error}", as_json)
    except MemoryError:
        return _fail(STORAGE, "storage", "out of memory: the tensors do not fit here", as_json)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = (
            f"{type(error).__name__}: {error}: this is a bug in shardstate; please report it with "
            f"what --debug prints"
        )
        return _fail(BUG, "bug", text, as_json)


def _fail(
    status: int,
    kind: str,
    message: str,
    as_json: bool,
    *,
    file: str | None = None,
    tensor: str | None = None,
) -> int:
    _print_error(message)
    if as_json:
        fault = {"kind": kind, "message": message, "file": file, "tensor": tensor}
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"error": fault}))
    return status


def _silence_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes at its exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(f"shardstate: {' '.join(message.split())}", err=True)
