"""Fixtures: a local S3 server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from s3 import S3Server


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[S3Server]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        server = S3Server()
        for name, value in {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
        server.stop()


@pytest.fixture
def s3(_s3_server: S3Server) -> Iterator[S3Server]:
    yield _s3_server
    _s3_server.fault = lambda method, path: None
