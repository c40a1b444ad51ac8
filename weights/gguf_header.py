"""Check the header of a GGUF file before the gguf library reads it. The library trusts every count, so a damaged one keeps it
busy for hours, and it notices neither overlapping tensors nor holes.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a scalar → bytes
UINT32, TEXT, ARRAY = 4, 8, 9
MAX_VALUES = 1_000_000  # entries of all lists; the library takes 200 bytes for each
MAX_TENSORS = 100_000
MAX_DIMS = 4


def check(file: Path) -> None:
    """ValueError says where the header contradicts itself or the length of the file."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = Cursor(data)
        magic, version = at.numbers("<4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it has version {version}; 2 and 3 are read")
        n_tensors, n_values = at.numbers("<QQ")
        if n_tensors > MAX_TENSORS or n_values > MAX_VALUES:
            raise ValueError(f"it claims {n_tensors} tensors and {n_values} values")
        alignment = 32
        for _ in range(n_values):
            key = at.text()
            (kind,) = at.numbers("<I")
            if key == b"general.alignment" and kind == UINT32:
                (alignment,) = struct.unpack_from("<I", data, at.offset)
            at.skip_value(kind)
        if not 0 < alignment <= 1 << 20:
            raise ValueError(f"its tensors are aligned to {alignment} bytes")
        infos = []
        for _ in range(n_tensors):
            name = at.text()
            (n_dims,) = at.numbers("<I")
            if n_dims > MAX_DIMS:
                raise ValueError(f"a tensor has {n_dims} dimensions")
            dims = at.numbers(f"<{n_dims}Q")
            kind, offset = at.numbers("<IQ")
            infos.append((name, dims, kind, offset))
        start = -(-at.offset // alignment) * alignment
        end = begins = 0  # of a tensor, from `start`
        known = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        for name, dims, kind, offset in infos:
            if kind not in known:
                raise ValueError(f"tensor {name[:80]!r} is of the unknown type {kind}")
            elements, (block, size) = 1, known[kind]
            for n in dims:
                elements *= n
            if offset != begins or not elements or dims[0] % block:
                kind_name = GGMLQuantizationType(kind).name
                raise ValueError(
                    f"tensor {name[:80]!r} of {dims} {kind_name} stands at {offset}, not behind the one before it"
                )
            end = begins + elements // block * size
            begins = -(-end // alignment) * alignment
        if not (start + end if infos else at.offset) <= len(data) <= start + begins:
            raise ValueError(f"it has {len(data)} bytes, and its tensors end at {start + end}")


class Cursor:
    """A place in the header. Each method reads what stands there and moves behind it. ValueError at the file's end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.offset, self.entries = data, 0, 0

    def skip(self, n: int) -> int:
        """Move n bytes on; return where they began."""
        before = self.offset
        if n > len(self.data) - before:
            raise ValueError(f"at byte {before} it claims {n} more bytes than there are")
        self.offset = before + n
        return before

    def numbers(self, form: str) -> tuple:
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))

    def text(self) -> bytes:
        (n,) = self.numbers("<Q")
        at = self.skip(n)
        return self.data[at : at + n]

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == TEXT:
            self.skip(self.numbers("<Q")[0])
        elif kind == ARRAY and depth < 2:
            inner, n = self.numbers("<IQ")
            self.entries += n
            if self.entries > MAX_VALUES:
                raise ValueError(f"its lists have more than {MAX_VALUES} entries")
            if inner in SIZES:
                self.skip(n * SIZES[inner])
                return
            for _ in range(n):
                self.skip_value(inner, depth + 1)
        else:
            raise ValueError(f"a value is of the unknown type {kind}")
