"""Random numbers that depend on the seed, the epoch and a document's token ids (int64) and on nothing else."""

import hashlib

import numpy as np

from minillm.data.span_masking import Draw


def uniform_draw(seed: int, epoch: int, ids: np.ndarray) -> float:
    """A number in [0, 1)."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=8, key=f"{seed}:{epoch}".encode())
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53


def draws(seed: int, epoch: int, ids: np.ndarray) -> Draw:
    """A stream of uniform numbers.

    It is built on the raw bits of PCG64, whose sequence numpy promises to keep between versions.
    """
    bits = np.random.PCG64(int(uniform_draw(seed, epoch, ids) * 2**53))
    return lambda count: (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53
