"""The digests of the format: BLAKE3 of blocks, tensors, headers, files and sources.

    block     BLAKE3 of each 4 MiB of a tensor, counted from its first byte
    tensor    BLAKE3 of its blocks' digests; of nothing where the tensor is empty
    rank file BLAKE3 of the header's digest, then the tensors' digests in file order
    any other file: BLAKE3 of its bytes

Where digests are hashed, their 32 raw bytes are concatenated. Text form: 64 lower-case hex digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from blake3 import blake3

BLOCK_BYTES = 4 << 20
SAMPLES = 16  # per source file, for the fingerprint
SAMPLE_BYTES = 4096


def digest_of(data: bytes | memoryview) -> str:
    """Return the BLAKE3 of `data` in text form."""
    return blake3(data).hexdigest()


def tensor_digest(blocks: Iterable[str]) -> str:
    """Return the digest of a tensor from those of its blocks."""
    return digest_of(b"".join(bytes.fromhex(block) for block in blocks))


def rank_file_digest(header: str, blocks: Iterable[Sequence[str]]) -> str:
    """Return the digest of a rank file from those of its header and of its tensors' blocks."""
    tensors = (bytes.fromhex(tensor_digest(each)) for each in blocks)
    return digest_of(bytes.fromhex(header) + b"".join(tensors))


def block_count(nbytes: int) -> int:
    """Return the number of blocks of a tensor of `nbytes` bytes."""
    return -(-nbytes // BLOCK_BYTES)


def sample_ranges(data_begin: int, file_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the [begin, end) of a file that its source's fingerprint samples, lowest first."""
    size = min(SAMPLE_BYTES, file_bytes - data_begin)
    room = file_bytes - data_begin - size
    for i in range(SAMPLES):
        begin = data_begin + room * i // (SAMPLES - 1)
        yield begin, begin + size


def fingerprint(config: bytes, files: Iterable[tuple[str, int, bytes, Iterable[bytes]]]) -> str:
    """Return the fingerprint of a source: `config.json`, then its weight files in name order.

    A file is (name, size in bytes, header with its length prefix, samples). Each item is preceded
    by its length in 8 bytes, so that no two sources run together to the same bytes.
    """
    hasher = blake3()

    def item(data: bytes) -> None:
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)

    item(config)
    for name, size, header, samples in files:
        item(name.encode())
        item(size.to_bytes(8, "little"))
        item(header)
        for sample in samples:
            item(sample)
    return hasher.hexdigest()
