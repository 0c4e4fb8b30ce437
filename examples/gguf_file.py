"""A GGUF file read in parts: its metadata, and any rectangle of a tensor as float32.

Runs in the driver (metadata: the tokenizer) and in every worker (weights: only that rank's shard). The file is
mapped, so pages outside the rectangles asked for are never read. ``gguf.GGUFReader`` would do too, but it makes
several NumPy arrays for each of the 98,000 strings of the vocabulary: 3 s a process, against 0.1 s here.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. ``shape`` is (rows, columns); a vector has one row."""

    shape: tuple[int, int]
    quantization: GGMLQuantizationType
    offset: int  # bytes from the start of the file


class GgufFile:
    """Metadata and tensors of the file at ``path``.

    Raises:
        OSError: the file is missing or cannot be mapped. ValueError: it is no GGUF file of version 2 or 3.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0  # parse position in bytes; used while constructing only
        magic, version, tensors, pairs = self._scalars("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3 (magic {magic!r}, version {version})")
        self.metadata: dict[str, Any] = {self._string(): self._value(self._scalar("I")) for _ in range(pairs)}
        self.tensors = self._tensor_infos(tensors)

    def read(self, name: str, rows: slice | list[int] = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """Dequantize part of a tensor.

        Args:
            name: the tensor's name in the file.
            rows: which rows: a slice, or row numbers in any order.
            columns: which columns; bounds must be multiples of the quantization's block (32 for Q4_1).

        Returns:
            float32, shape (rows, columns), memory of its own.
        """
        info = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[info.quantization]
        count, width = info.shape
        start, stop, _ = columns.indices(width)
        if start % block or stop % block:
            raise ValueError(
                f"columns {start}:{stop} of {name} cut a block of {block} values ({info.quantization.name}): "
                "choose a number of workers that splits it into whole blocks"
            )
        row_bytes = width // block * block_bytes
        raw = np.frombuffer(self._map, np.uint8, count * row_bytes, info.offset).reshape(count, row_bytes)
        part = raw[rows, start // block * block_bytes : stop // block * block_bytes]
        if info.quantization is GGMLQuantizationType.F32:  # dequantize() would return a view of the mapping
            return np.ascontiguousarray(part).view(np.float32).copy()
        return dequantize(np.ascontiguousarray(part), info.quantization).astype(np.float32, copy=False)

    def _tensor_infos(self, count: int) -> dict[str, TensorInfo]:
        found = []
        for _ in range(count):
            name, dimensions = self._string(), self._scalar("I")
            columns, *others = self._scalars(f"{dimensions}Q")  # the file gives the innermost dimension first
            quantization, offset = self._scalars("IQ")
            found.append((name, (prod(others), columns), GGMLQuantizationType(quantization), offset))
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-self._at // alignment) * alignment
        return {name: TensorInfo(shape, kind, data + offset) for name, shape, kind, offset in found}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        inner, length = self._scalars("IQ")
        if inner in _SCALARS:
            return list(self._scalars(f"{length}{_SCALARS[inner]}"))
        return [self._value(inner) for _ in range(length)]

    def _string(self) -> str:
        start = self._at + 8
        self._at = start + self._scalar("Q")
        return self._map[start : self._at].decode()

    def _scalar(self, code: str) -> Any:
        return self._scalars(code)[0]

    def _scalars(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{codes}", self._map, self._at)
        self._at += struct.calcsize(f"<{codes}")
        return values
