"""One site for all tests of deployments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sites import Site, deployed


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with deployed(tmp_path_factory.mktemp("site")) as made:
        yield made
