"""The pipeline with tokens as a kind of group: what counts, what is measured, and what is found again."""

import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from compositions import built, compose, folders, read_sweep
from helpers import save_worded_llama, words
from tailored_llama.config import SweepConfig, validate_as, validate_config
from tailored_llama.evaluation import read_metrics, read_recovery
from tailored_llama.models import read_id_table

pytestmark = pytest.mark.usefixtures("all_general_words")


@pytest.fixture
def trimmed_run(own_run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The run on a model with a tokenizer of words, of which it loses tokens; everything that reads ids is on."""
    Path(own_run["calibration"]["source"]).write_text(words(2000, seed=2))
    other = tmp_path / "data" / "other.txt"
    other.write_text(words(400, seed=9))  # other words than those that count
    own_run["perplexity"]["source"] = str(other)
    own_run["model"] = {"source": str(save_worded_llama(tmp_path / "worded")), "dtype": "float32"}
    own_run["pruning"] = {
        "ratios": [0.35],
        "min_channels": 4,
        "kinds": ["attention", "mlp", "vocabulary"],
        "vocabulary": 448,
    }
    return own_run


def test_a_run_that_removes_tokens(trimmed_run: dict[str, Any], tmp_path: Path) -> None:
    trimmed_run["store"]["export"] = str(tmp_path / "finished")
    config = validate_config(trimmed_run)
    report, root = compose("tailor", config), config.store.root
    _, sizes = read_recovery(report)
    dense, pruned = sizes
    assert (dense.vocab_size, pruned.vocab_size) == (704, 448)
    assert dense.body
    assert pruned.body
    assert pruned.body / dense.body > (pruned.parameters or 0) / (dense.parameters or 1)
    assert dense.byte_perplexity
    assert pruned.byte_perplexity
    page = " ".join((report / "report.html").read_text().split())
    assert "448 of 704 tokens are left" in page
    assert "of those outside the embeddings" in page
    assert "only perplexity a byte may be compared" in page
    measured = [read_metrics(folder) for folder in folders(root, "perplexity")]
    bytes_read = {
        round(found["tokens"] * math.log(found["perplexity"]) / math.log(found["byte_perplexity"]))
        for found in measured
    }
    assert len(bytes_read) == 1  # of one text, though the vocabularies differ
    assert dense.whole is None
    assert pruned.whole
    assert 0 < pruned.whole < 1
    assert f"{100 * pruned.whole:.2f}\N{NO-BREAK SPACE}% whole" in (report / "report.html").read_text()
    finished = tmp_path / "finished" / "colours-0.35"
    assert read_id_table(finished)
    card = (finished / "README.md").read_text()
    assert "Of 704 tokens, 448 are left" in card
    assert "of the body without embeddings" in " ".join(card.split())
    assert f"{100 * pruned.whole:.1f}\N{NO-BREAK SPACE}% stay whole" in card
    assert re.search(r"It hardly writes words whose tokens left. The one that was met most often is “\w+”, which", card)
    assert str(tmp_path) not in card

    before = built(root)
    assert compose("tailor", config) == report
    assert built(root) == before


def test_only_the_train_prompts_count(trimmed_run: dict[str, Any]) -> None:
    trimmed_run["pruning"]["vocabulary"] = "auto"
    compose("tailor", validate_config(trimmed_run))
    trimmed_run["scoring"] = {"limit": 5}
    compose("tailor", validate_config(trimmed_run))
    root = trimmed_run["store"]["root"]
    assert len(folders(root, "tokens")) == len(folders(root, "pruned")) == 1
    (counts,) = folders(root, "tokens")
    assert sum(pq.read_table(counts / "tokens.parquet")["prompts"].to_pylist()) > 0


def test_a_sweep_compares_vocabularies_on_one_text(trimmed_run: dict[str, Any]) -> None:
    trimmed_run["pruning"]["ratios"] = [0.2]
    grid = [{"pruning.kinds": [["attention", "mlp"], ["attention", "mlp", "vocabulary"]]}]
    config = validate_as(SweepConfig, trimmed_run | {"grid": grid, "scored": False})
    dense, plain, trimmed = read_sweep(compose("sweep", config))
    assert (plain.error, trimmed.error) == (None, None)
    measured = {m["tokens"]: m for m in map(read_metrics, folders(config.store.root, "perplexity"))}
    own = measured[max(measured)]
    assert own["tokens"] > measured[min(measured)]["tokens"] == 128
    assert trimmed.perplexity == pytest.approx(own["perplexity"] ** (own["tokens"] / 128))
    assert dense.perplexity != plain.perplexity
