"""A reader of GGUF files that takes nothing on trust, and reads a large vocabulary in a moment."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from tailored_llama.errors import InputError, one_line


class StrictReader(GGUFReader):
    """gguf's own reader goes on past the end of the file, for the length that an array claims."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
        values = super()._get(offset, dtype, count, *rest, **named)
        if len(values) < count:
            raise ValueError("the file ends too early")
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """As gguf's own, with an array read at once, not number by number."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, start = GGUFValueType(kind[0]), orig_offs + 12
        if item == GGUFValueType.STRING:
            items, end = self._strings(start, int(length[0]))
        elif item in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[item], length[0])
            items, end = list(np.asarray(values).reshape(-1, 1)), start + values.nbytes
        else:
            raise ValueError(f"an array of {item.name}")
        data = list(range(2, 2 + len(items)))
        return end - orig_offs, [kind, length, *items], data, [GGUFValueType.ARRAY, item]

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """The bytes of `count` strings, and where they end."""
        data, strings = np.asarray(self.data), []
        order: Any = "little" if self.byte_order == "I" else "big"
        for _ in range(count):
            first = start + 8
            start = first + int.from_bytes(data[start:first].tobytes(), order)
            if start > len(data) or first > len(data):
                raise ValueError("the file ends too early")
            strings.append(data[first:start])
        return strings, start


def open_gguf(path: Path, shown: str) -> GGUFReader:
    """A reader of a GGUF file, also of one part that has no tensors; InputError with `shown` if it is not whole."""
    try:
        reader, size = StrictReader(path), path.stat().st_size
        ends = [tensor.data_offset + tensor.n_bytes for tensor in reader.tensors]
        if max(ends, default=0) > size or sum(tensor.n_bytes for tensor in reader.tensors) > size:
            raise ValueError("tensors missing")
    except Exception as error:  # a truncated file raises various errors inside numpy
        raise InputError(f"{shown}: not a complete GGUF file ({one_line(error)})") from None
    return reader
