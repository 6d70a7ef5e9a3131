"""Storages that tests put in the place of real ones."""

from shardstate.storage import LocalStorage, Reading


class BufferedStorage(LocalStorage):
    """A local storage whose reader asks `read_into` for everything, whatever is cached."""

    def __init__(self, path, *, create=False, reading=None):
        super().__init__(path, create=create, reading=Reading(direct=False))

    def read_resident(self, name, begin, views):
        return 0
