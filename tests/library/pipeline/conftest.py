"""Fixtures: reports have blank pictures; a run on two benchmarks."""

from collections.abc import Iterator
from typing import Any

import pytest

from pictures import blank_pictures


@pytest.fixture(autouse=True)
def _blank_pictures() -> Iterator[None]:
    with blank_pictures():
        yield


@pytest.fixture
def two(own_run: dict[str, Any]) -> dict[str, Any]:
    """A run on two benchmarks of the same examples."""
    return own_run | {"benchmarks": [*own_run["benchmarks"], {**own_run["benchmarks"][0], "name": "shades"}]}
