"""Scores against lm-evaluation-harness 0.4.13 on SmolLM2 and real documents, float32.

Every log-likelihood within 2e-3, every prediction the same, on evenly spaced documents of each benchmark: with --full
(`make test-full`) 200 of them, otherwise 10 (dense) or 2 (tailored) zero-shot and fewer at 5-shot:
- dense, zero-shot and 5-shot: against lm-eval's scores (its stock tasks, its HFLM, batch 16) as recorded in
  `harness_scores.parquet` by `tests/performance/equality.py CHECKPOINT --out FOLDER --limit 200 --record …`, without
  and with `--num-fewshot 5` (of HellaSwag's 5-shot documents every other one); a few are asked of lm-eval again;
- pruned and tailored, zero-shot and (few documents) 5-shot: against what lm-eval says now of the merged checkpoint,
  which it loads by itself; this library merges the adapter when it loads the pruned one.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import harness
from equality import TOLERANCE, compare, our_scores
from helpers import CPU, load_and_render, tune
from tailored_llama.config import BenchmarkConfig, PerplexityConfig, RunConfig, Work
from tailored_llama.data import find_text, load_texts
from tailored_llama.data.builtin import SEVEN
from tailored_llama.evaluation import PerplexitySettings, measure_perplexity, read_metrics
from tailored_llama.models import load_model, load_tokenizer, merge_adapter

pytestmark = pytest.mark.real
RECORDED = Path(__file__).parent / "harness_scores.parquet"


@pytest.fixture(scope="session")
def adapter(plain_smollm2: Path, quickstart: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for ARC-easy that nobody could miss, and no larger: a very large one multiplies rounding errors."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("adapter")
    prompts = load_and_render(BenchmarkConfig(name="arc_easy"), data, split="train", shots=16)
    tune(plain_smollm2, prompts, quickstart.tuning.model_copy(update={"epochs": 2}), out)
    return out


@pytest.fixture(scope="session")
def tailored(plain_smollm2: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tailored")
    merge_adapter(plain_smollm2, adapter, out=out)
    return out


def harness_model(checkpoint: Path) -> Any:
    """What `lm_eval --model hf --model_args pretrained=CHECKPOINT` builds."""
    from lm_eval.api.registry import get_model

    arguments = f"pretrained={checkpoint},dtype=float32"
    return get_model("hf").create_from_arg_string(arguments, {"batch_size": 16, "device": "cpu"})


def harness_says(model: Any, name: str, shots: int, count: int) -> pd.DataFrame:
    """lm-eval's scores of `count` evenly spaced documents."""
    task = harness.stock_task(name, harness.draw_shots(name, shots)[1] or harness.train_rows(name)[:1], shots)
    size = len(task.eval_docs) - (shots if name == "hellaswag" else 0)
    found = harness.evaluate(model, task, [i * size // count for i in range(count)])
    return pd.DataFrame([{"example": index, **scores} for index, scores in found.items()]).sort_values("example")


def assert_equal(name: str, theirs: pd.DataFrame, model: Any, tokenizer: Any, shots: int) -> None:
    row = compare(name, theirs, *our_scores(model, tokenizer, name, shots, theirs["example"].tolist()))
    assert row["largest_difference"] < TOLERANCE
    assert {key: value for key, value in row.items() if key.endswith("parted") and value} == {}
    assert row["acc_ours"] == row["acc_harness"]
    assert ("acc_norm_parted" in row) == (name not in ("boolq", "winogrande"))


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", SEVEN)
def test_dense_scores_equal_what_the_harness_recorded(
    name: str, shots: int, smollm2: Path, dense: Any, full: bool
) -> None:
    table = pd.read_parquet(RECORDED).query("benchmark == @name and num_fewshot == @shots").dropna(axis=1)
    assert len(table) == (100 if (name, shots) == ("hellaswag", 5) else 200)
    some = table.iloc[:: 1 if full else 20 if shots == 0 else 50].reset_index(drop=True)
    assert_equal(name, some, dense, load_tokenizer(smollm2), shots)


@pytest.mark.parametrize(("name", "shots"), [("openbookqa", 0), ("winogrande", 5)])
def test_the_record_is_what_the_harness_says(name: str, shots: int, smollm2: Path) -> None:
    recorded = pd.read_parquet(RECORDED).query("benchmark == @name and num_fewshot == @shots").set_index("example")
    said = harness_says(harness_model(smollm2), name, shots, 4).set_index("example")
    both = recorded.index.intersection(said.index)
    assert len(both) >= 4
    for example in both:
        assert np.allclose(recorded.loc[example, "loglikelihoods"], said.loc[example, "loglikelihoods"], atol=TOLERANCE)


def test_the_adapter_changes_scores(plain_smollm2: Path, attached: Any) -> None:
    models, tokenizer = (load_model(plain_smollm2), attached), load_tokenizer(plain_smollm2)
    scores = [our_scores(model, tokenizer, "arc_easy", 0, [0])[1][0] for model in models]
    assert min(abs(a - b) for a, b in zip(*scores, strict=True)) > 100 * TOLERANCE


@pytest.fixture(scope="session")
def dense(smollm2: Path) -> Any:
    return load_model(smollm2)


@pytest.fixture(scope="session")
def attached(plain_smollm2: Path, adapter: Path) -> Any:
    return load_model(plain_smollm2, adapter)


@pytest.fixture(scope="session")
def harness_tailored(tailored: Path) -> Any:
    return harness_model(tailored)


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", SEVEN)
def test_a_tailored_model_scores_as_its_merged_checkpoint_does_in_the_harness(
    name: str, shots: int, plain_smollm2: Path, attached: Any, harness_tailored: Any, full: bool
) -> None:
    if shots and not full and name not in ("arc_easy", "winogrande"):
        pytest.skip("only with --full: the dense model's are compared for all seven")
    count = {(0, True): 200, (0, False): 2, (5, True): 8, (5, False): 1}[shots, full]
    theirs = harness_says(harness_tailored, name, shots, count)
    assert_equal(name, theirs, attached, load_tokenizer(plain_smollm2), shots)


LOADED_ALONE = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
asked = json.load(sys.stdin)
for checkpoint in sys.argv[1:]:
    arguments = f"pretrained={checkpoint},dtype=float32"
    model = get_model("hf").create_from_arg_string(arguments, {"batch_size": 8, "device": "cpu"})
    pairs = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(asked)]
    found = [value for value, _ in model.loglikelihood(pairs, disable_tqdm=True)]
    assert "tailored_llama" not in sys.modules
    print(json.dumps({"type": model.model.config.model_type, "loglikelihoods": found}))
"""


def test_the_harness_loads_checkpoints_without_this_library(tailored: Path, plain_smollm2: Path) -> None:
    checkpoints = [tailored, plain_smollm2]
    pairs, expected = [], []
    for checkpoint in checkpoints:
        prompts, ours = our_scores(
            load_model(checkpoint), load_tokenizer(checkpoint), "arc_easy", 0, list(range(0, 240, 60))
        )
        pairs = [pair for p in prompts for pair in zip(p.contexts, p.continuations, strict=True)]
        expected.append([value for row in ours for value in row])
    run = subprocess.run(
        [sys.executable, "-c", LOADED_ALONE, *map(str, checkpoints)],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    said = [json.loads(line) for line in run.stdout.splitlines()[-2:]]
    assert [own["type"] for own in said] == ["llama", "llama"]
    for own, ours in zip(said, expected, strict=True):
        assert own["loglikelihoods"] == pytest.approx(ours, abs=TOLERANCE)


def test_perplexity_per_byte_equals_the_harness(
    plain_smollm2: Path, quickstart: RunConfig, folder: Callable[[str], Path]
) -> None:
    """As its task wikitext takes them of a page, by its rolling windows."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results

    page = "\n\n".join(load_texts(find_text(quickstart.perplexity), quickstart.store.downloads))[:2000]
    text, out = folder("text") / "page.txt", folder("perplexity")
    text.write_text(page, encoding="utf-8")
    settings = PerplexitySettings.of(PerplexityConfig(source=str(text), window=96, tokens=None))
    measure_perplexity(plain_smollm2, None, settings=settings, work=Work(out, CPU))
    ours = read_metrics(out)
    lm = HFLM(
        pretrained=load_model(plain_smollm2), tokenizer=load_tokenizer(plain_smollm2), batch_size=4, max_length=96
    )
    (loss,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (page,), 0)], disable_tqdm=True)
    said = process_results({"page": page}, (loss,))
    assert ours["tokens"] > 4 * 96
    total, weight = said["byte_perplexity"]
    # lm-eval's log_softmax over 49,152 entries is off by about 8e-6 a token in float32
    assert ours["byte_perplexity"] == pytest.approx(math.exp(-total / weight), rel=1e-4)
