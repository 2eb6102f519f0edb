"""The records of TensorBoard's event files. Its own writer takes 0.2 s for a run's pictures."""

from __future__ import annotations

import functools
import struct

import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78  # of CRC-32C, bits reversed
_LANE = 256  # bytes


def record(content: bytes) -> bytes:
    """Returns a record: the length of its content, a checksum, the content, a checksum."""
    length = struct.pack("<Q", len(content))
    return b"".join((length, _masked(length), content, _masked(content)))


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """Returns the CRC-32C, the Castagnoli checksum: of lanes of bytes at once, which are joined."""
    table, start = _table().tolist(), len(content) % _LANE
    crc = 0xFFFFFFFF
    for byte in content[:start]:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    if start < len(content):
        lanes = np.frombuffer(content, np.uint8, offset=start).reshape(-1, _LANE)
        first, second, third, fourth = _past_a_lane()
        for lane in _divided(np.zeros(len(lanes), np.uint32), lanes).tolist():
            low = first[crc & 0xFF] ^ second[crc >> 8 & 0xFF]
            crc = low ^ third[crc >> 16 & 0xFF] ^ fourth[crc >> 24] ^ lane
    return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> npt.NDArray[np.uint32]:
    """Returns the remainder of each byte, (256,)."""
    table: npt.NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return table


def _divided(crc: npt.NDArray[np.uint32], lanes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Returns the remainders after `lanes`, (N, bytes), from those before, (N,)."""
    for column in lanes.T:
        crc = _table()[(crc ^ column) & 0xFF] ^ (crc >> 8)
    return crc


@functools.cache
def _past_a_lane() -> list[list[int]]:
    """Returns what each byte of a remainder, the lowest first, becomes after a lane of zeros."""
    parts = [np.arange(256, dtype=np.uint32) * np.uint32(256**i) for i in range(4)]
    zeros = np.zeros((256, _LANE), np.uint8)
    return [_divided(part, zeros).tolist() for part in parts]
