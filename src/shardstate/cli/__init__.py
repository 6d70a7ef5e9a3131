"""The command line: `shardstate COMMAND`. Commands call `shardstate.api` and nothing below it."""

from shardstate.cli.main import main

__all__ = ["main"]
