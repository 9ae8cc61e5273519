"""One site for all tests of deployments."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import services
from sites import Site, deployed


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with deployed(tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def tailor_here(site: Site) -> Callable[[dict[str, Any]], None]:
    """Flow `tailor` in this process, on the site's server."""
    return partial(services.tailor_here, url=site.server.url)
