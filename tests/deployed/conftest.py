"""One site for all tests of deployments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from sites import Site, deployed
from tailored_llama.config import validate_config


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with deployed(tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def tailor_here(site: Site) -> Callable[[dict[str, Any]], None]:
    """Flow `tailor` in this process, on the site's server: no Python has to start."""
    from flows.tailor import tailor

    def run(own_run: dict[str, Any]) -> None:
        with temporary_settings({PREFECT_API_URL: site.server.url}):
            tailor(validate_config(own_run))

    return run
