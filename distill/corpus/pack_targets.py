"""Soft targets as bytes: what the teacher said of each token, in well under 90 bytes a token.

Shape legend: N answer tokens, K alternatives a position, U distinct ids in the response.

A blob is a header (version, sizes), then one zlib stream of byte planes, each plane alike in itself:

- the sampled token as its rank among the alternatives (RANK_NONE where it is not one of them, or differs from
  it); only then its id and logprob are spelled out;
- the alternatives as indices into the response's sorted table of distinct ids, itself stored as differences,
  so that the price of an id hardly grows with the vocabulary (128k and 256k ids included);
- logprobs as float16, each as the difference of its bit pattern from its neighbour's (they fall along a row,
  so differences are small and positive).

float16 keeps 11 significant bits: a logprob of -8 is off by at most 0.002, one of -0.01 by 4e-6, and anything
below -65,504 becomes -inf. That is the only loss.
"""

import struct
import zlib
from itertools import accumulate

import numpy as np

# np.unique imports this when it is first called, over which several threads at once fall.
import numpy.ma  # pyright: ignore[reportUnusedImport]
from numpy.typing import NDArray

from distill.errors import CorruptFile
from distill.teacher.protocol import TokenTargets

RANK_NONE = 255
_HEADER = struct.Struct("<BBIII")  # version, K, N, U, sampled tokens that are spelled out
_VERSION = 1


def pack_targets(targets: TokenTargets) -> bytes:
    """Exact, but for the rounding of logprobs to float16."""
    n, k = targets.top_ids.shape
    assert k < RANK_NONE
    with np.errstate(over="ignore"):  # below the range of float16 lies -inf
        sampled = targets.logprobs.astype("<f2").view("<u2")
        top = targets.top_logprobs.astype("<f2").view("<u2")
    same = (targets.top_ids == targets.ids[:, None]) & (top == sampled[:, None])
    rank = np.where(same.any(1), same.argmax(1) if k else 0, RANK_NONE).astype(np.uint8)
    spelled = rank == RANK_NONE
    table, indices = np.unique(np.concatenate([targets.ids[spelled], targets.top_ids.ravel()]), return_inverse=True)
    count = int(spelled.sum())
    steps = np.diff(table.astype("<i8"), prepend=0).astype("<i4")
    body = [
        rank.tobytes(),
        np.packbits(targets.soft).tobytes(),
        _planes(steps.view("<u4"), 4),
        _planes(indices[:count].astype("<u4"), 4),
        sampled[spelled].tobytes(),
        _planes(indices[count:].reshape(n, k).T.astype("<u4"), _index_bytes(len(table))),
        _planes(np.diff(top, axis=1, prepend=np.zeros((n, 1), "<u2")).T, 2),
    ]
    return _HEADER.pack(_VERSION, k, n, len(table), count) + zlib.compress(b"".join(body), 6)


def unpack_targets(blob: bytes) -> TokenTargets:
    """The inverse. Raises CorruptFile for bytes that `pack_targets` didn't write."""
    if len(blob) < _HEADER.size or blob[0] != _VERSION:
        raise CorruptFile("soft targets: not of a known format")
    _, k, n, u, count = _HEADER.unpack_from(blob)
    width = _index_bytes(u)
    sizes = [n, -(-n // 8), 4 * u, 4 * count, 2 * count, width * n * k, 2 * n * k]
    try:
        body = zlib.decompress(blob[_HEADER.size :])
    except zlib.error as error:
        raise CorruptFile(f"soft targets: cut short or altered ({error})") from error
    if len(body) != sum(sizes):
        raise CorruptFile("soft targets: cut short or altered (wrong length)")
    ends = accumulate(sizes)
    rank, soft, steps, spelled_ids, spelled_logprobs, indices, top = (
        body[end - size : end] for end, size in zip(ends, sizes, strict=True)
    )
    table = _unplanes(steps, 4).view("<i4").cumsum(dtype=np.int32)
    ranks = np.frombuffer(rank, np.uint8)
    spelled, listed = np.flatnonzero(ranks == RANK_NONE), np.flatnonzero(ranks != RANK_NONE)
    own, others = _unplanes(spelled_ids, 4), _unplanes(indices, width)
    if any(part.size and part.max() >= u for part in (own, others)) or len(spelled) != count:
        raise CorruptFile("soft targets: altered (an index out of range)")
    places = ranks[listed]
    if k and (places >= k).any():
        raise CorruptFile("soft targets: altered (a rank out of range)")
    top_ids = np.ascontiguousarray(table[others].reshape(k, n).T)
    bits = _unplanes(top, 2).reshape(k, n).cumsum(axis=0, dtype="<u2")
    top_logprobs = bits.view("<f2").T.astype(np.float32, order="C")
    ids, logprobs = np.empty(n, np.int32), np.empty(n, np.float32)
    ids[listed], logprobs[listed] = top_ids[listed, places], top_logprobs[listed, places]
    if count:
        ids[spelled], logprobs[spelled] = table[own], np.frombuffer(spelled_logprobs, "<f2")
    certain = np.unpackbits(np.frombuffer(soft, np.uint8), count=n).view(np.bool_)
    return TokenTargets(ids, logprobs, top_ids, top_logprobs, certain)


def logical_bytes(blob: bytes) -> bytes:
    """The same for equal targets whatever zlib compressed them: for digests of content."""
    return blob[: _HEADER.size] + zlib.decompress(blob[_HEADER.size :])


def _index_bytes(table_size: int) -> int:
    return 1 if table_size <= 1 << 8 else 2 if table_size <= 1 << 16 else 4


def _planes(values: NDArray[np.generic], width: int) -> bytes:
    """All lowest bytes, then all second-lowest ones …: `width` planes of little-endian unsigned values."""
    raw = np.ascontiguousarray(values).reshape(-1)
    return raw.view(np.uint8).reshape(-1, raw.itemsize)[:, :width].T.tobytes()


def _unplanes(data: bytes, width: int) -> NDArray[np.unsignedinteger]:
    planes = np.frombuffer(data, np.uint8)
    if width == 1:
        return planes
    return np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1).view(f"<u{width}")
