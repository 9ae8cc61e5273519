"""Reports without pictures."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from tailored_llama.reports.figures import Picture


@contextlib.contextmanager
def blank_pictures() -> Iterator[None]:
    """Reports without pictures: drawing is most of their time, and tests/library/reports tests what pictures show."""
    blank = {
        "__post_init__": lambda self: None,
        "__html__": lambda self: "<svg></svg>",
        "save_png": lambda self, path: path.write_bytes(b""),
    }
    with mock.patch.multiple(Picture, **blank):
        yield
