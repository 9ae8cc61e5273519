"""Fixtures: a local S3 server, and tiny checkpoints of several architectures."""

from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from helpers import save_tiny_llama
from s3 import S3Server
from tailored_llama.pruning import vocabulary

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "bfloat16": {"dtype": "bfloat16"},
    "qwen3, untied": {"architecture": "qwen3", "tie_word_embeddings": False},
    "gemma2": {"architecture": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3": {"architecture": "gemma3_text", "query_pre_attn_scalar": 8, "sliding_window": 8},
    "phi3": {"architecture": "phi3", "pad_token_id": 0, "sliding_window": None},
}


@cache
def _few_words() -> dict[str, int]:
    return dict(islice(vocabulary.read_general_words().items(), 0, None, 20))


@pytest.fixture
def all_general_words() -> None:
    """For a test of what they decide."""


@pytest.fixture(autouse=True)
def _few_general_words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of the general words, since counting all of them takes a second."""
    if "all_general_words" not in request.fixturenames:
        words = _few_words()
        monkeypatch.setattr(vocabulary, "read_general_words", lambda: words)


@pytest.fixture(params=MODELS, ids=MODELS.keys())
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny checkpoint of each kind that the code must tell apart."""
    return save_tiny_llama(tmp_path / "dense", noise=0.1, **MODELS[request.param])


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
