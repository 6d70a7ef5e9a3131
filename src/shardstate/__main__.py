"""`python -m shardstate`: the command line."""

from shardstate.cli import main

if __name__ == "__main__":
    main()
