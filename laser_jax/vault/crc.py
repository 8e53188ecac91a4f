"""CRC-32C inside compiled loops; google_crc32c is as fast, but takes Python's lock for every page."""

import platform

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: The reflected polynomial.
_POLYNOMIAL = 0x82F63B78


def _tables() -> np.ndarray:
    """Tables for eight bytes at a time, uint32 [8, 256]."""
    tables = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        tables[0, byte] = value
    for position in range(1, 8):
        before = tables[position - 1]
        tables[position] = (before >> 8) ^ tables[0][before & 0xFF]
    return tables


_TABLES = _tables()


@intrinsic
def _crc_of_eight(context, crc, word):
    """The processor's own instruction: the CRC, uint64, after eight more bytes."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(64)
        kind = ir.FunctionType(wide, [wide, wide])
        function = builder.module.globals.get("llvm.x86.sse42.crc32.64.64")
        if function is None:
            function = ir.Function(builder.module, kind, "llvm.x86.sse42.crc32.64.64")
        return builder.call(function, arguments)

    return types.uint64(types.uint64, types.uint64), generate


def _by_instruction(data, begin, end):
    """CRC-32C of data[begin:end], uint8."""
    crc = np.uint64(0xFFFFFFFF)
    whole = begin + (end - begin) // 8 * 8
    for at in range(begin, whole, 8):
        word = np.uint64(0)
        for byte in range(8):
            word |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
        crc = _crc_of_eight(crc, word)
    for at in range(whole, end):
        crc = np.uint64(_TABLES[0, (crc ^ np.uint64(data[at])) & np.uint64(0xFF)]) ^ (crc >> np.uint64(8))
    return np.uint32(crc ^ np.uint64(0xFFFFFFFF))


def _by_table(data, begin, end):
    """CRC-32C of data[begin:end], uint8."""
    crc = np.uint32(0xFFFFFFFF)
    whole = begin + (end - begin) // 8 * 8
    for at in range(begin, whole, 8):
        mixed = np.uint32(0)
        low = np.uint32(data[at]) | np.uint32(data[at + 1]) << np.uint32(8)
        low |= np.uint32(data[at + 2]) << np.uint32(16) | np.uint32(data[at + 3]) << np.uint32(24)
        low ^= crc
        for byte in range(4):
            mixed ^= _TABLES[7 - byte, (low >> np.uint32(8 * byte)) & np.uint32(0xFF)]
            mixed ^= _TABLES[3 - byte, data[at + 4 + byte]]
        crc = mixed
    for at in range(whole, end):
        crc = _TABLES[0, (crc ^ np.uint32(data[at])) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return np.uint32(crc ^ np.uint32(0xFFFFFFFF))


#: Every x86-64 processor since 2008 has the instruction.
HAS_INSTRUCTION = platform.machine().lower() in ("x86_64", "amd64")
crc32c_by_table = njit(nogil=True, cache=True)(_by_table)
crc32c_of = njit(nogil=True, cache=True)(_by_instruction) if HAS_INSTRUCTION else crc32c_by_table
