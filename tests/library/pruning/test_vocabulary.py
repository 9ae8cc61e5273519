"""The kind vocabulary: what counts, which rows leave, how the ratio is made up, and that a model keeps its words."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from helpers import (
    CPU,
    bpe_tokenizer,
    load_and_render,
    prune,
    render_split,
    save_worded_llama,
    spm_tokenizer,
    words,
    write_own_benchmark,
)
from tailored_llama.config import BenchmarkConfig, PruningConfig, ReconstructionConfig, RunConfig, Work, validate_config
from tailored_llama.data import CalibrationSettings, load_calibration, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import (
    load_model,
    load_tokenizer,
    merge_adapter,
    read_config,
    read_id_table,
    read_structure,
    read_tokens,
)
from tailored_llama.pruning import (
    CountSettings,
    ImportanceSettings,
    PruneSettings,
    build_graph,
    count_tokens,
    score_importance,
)
from tailored_llama.pruning.split import Split, possible_sizes, search
from tailored_llama.pruning.surgery import Planned
from tailored_llama.pruning.vocabulary import GENERAL_TOKENS, read_shares

Make = Callable[[str], Path]
KINDS = ("attention", "mlp", "vocabulary")
TOKENIZERS: dict[str, Callable[[], Any]] = {"byte-level": bpe_tokenizer, "byte fallback": spm_tokenizer}


@pytest.fixture
def text(tmp_path: Path) -> RunConfig:
    file = tmp_path / "text.txt"
    file.write_text(words(2000, seed=2))
    return validate_config({"calibration": {"source": str(file), "samples": 4, "tokens": 32}})


@pytest.fixture
def dense(folder: Make) -> Path:
    return save_worded_llama(folder("dense"), noise=0.1)


def random_scores(model: Path, graph: Path, scores: Path) -> None:
    build_graph(model, settings=None, work=Work(graph))
    score_importance(model, graph, None, settings=ImportanceSettings("random", 0), work=Work(scores, CPU))


def cut(
    dense: Path, text: RunConfig, folder: Make, ratio: float = 0.4, method: str = "none", **pruning: Any
) -> tuple[Path, dict[str, Any]]:
    """Prune a checkpoint with the kind vocabulary, by random importance; `prompts` are train prompts."""
    prompts = pruning.pop("prompts", {})
    config = PruningConfig(**({"kinds": KINDS, "vocabulary": 448, "min_channels": 4, "criterion": "random"} | pruning))
    graph, scores, counts, sequences, out = map(folder, ("graph", "scores", "counts", "sequences", "pruned"))
    random_scores(dense, graph, scores)
    load_calibration(dense, {}, settings=CalibrationSettings.of(text), work=Work(sequences))
    count_tokens(dense, prompts, settings=CountSettings.of(text), work=Work(counts))
    fitted = ReconstructionConfig(method=method)  # type: ignore[arg-type]
    given: dict[str, Any] = {"pruning": config, "reconstruction": fitted, "counts": counts, "prompts": prompts}
    return out, prune(dense, graph, scores, sequences, ratio=ratio, out=out, **given)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_rows_leave_and_the_ratio_is_of_all_parameters(text: Any, folder: Make, tokenizer: str, tied: bool) -> None:
    dense = save_worded_llama(folder("dense"), TOKENIZERS[tokenizer](), noise=0.1, tie_word_embeddings=tied)
    pruned, facts = cut(dense, text, folder)
    before, after = read_structure(dense).size, read_structure(pruned).size
    assert facts["ratio"] == pytest.approx(0.4, abs=0.01)  # within a channel of every layer
    assert facts["body_ratio"] == pytest.approx(1 - after.body / before.body, abs=1e-6)
    assert (facts["tokens"], after.vocab_size, read_config(pruned)["vocab_size"]) == (448, 448, 448)
    table, weights = read_id_table(pruned), load_file(pruned / "model.safetensors")
    assert table
    kept = sorted(table.kept)
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        assert torch.equal(weights[name], load_file(dense / "model.safetensors")[name][kept])
    assert ("lm_head.weight" in weights) != tied


def test_a_model_that_loses_only_tokens_computes_the_same_logits(dense: Path, text: Any, folder: Make) -> None:
    size = read_structure(dense).size
    ratio = (size.vocab_size - 448) * size.row / size.parameters
    pruned, facts = cut(dense, text, folder, ratio)
    assert facts["body_ratio"] == 0
    table = read_id_table(pruned)
    assert table
    kept = sorted(table.kept)
    old = torch.tensor([kept[50:80]])
    new = torch.tensor([[table.pieces[int(token)][0] for token in old[0]]])
    with torch.no_grad():
        expected, found = load_model(dense)(old).logits[..., kept], load_model(pruned)(new).logits
    torch.testing.assert_close(found, expected)


def test_reconstruction_reads_the_dense_tokens(dense: Path, text: Any, folder: Make) -> None:
    pruned, facts = cut(dense, text, folder, method="static")
    assert facts["tokens"] == 448
    ids = load_tokenizer(pruned)(words(50, seed=5), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert bool(load_model(pruned)(ids).logits.isfinite().all())


def test_a_small_ratio_keeps_more_tokens_than_configured(dense: Path, text: Any, folder: Make) -> None:
    _, facts = cut(dense, text, folder, ratio=0.15)
    size = read_structure(dense).size
    assert 448 < facts["tokens"] < size.vocab_size
    assert facts["tokens"] % 64 == 0
    assert facts["ratio"] == pytest.approx(0.15, abs=0.005)
    assert (size.vocab_size - facts["tokens"] + 64) * size.row > 0.15 * size.parameters


def test_the_chosen_split_is_the_one_that_loses_least_on_held_out_prompts(
    dense: Path, text: Any, folder: Make, tmp_path: Path
) -> None:
    benchmark = BenchmarkConfig(**write_own_benchmark(tmp_path))
    train = load_and_render(benchmark, tmp_path, split="train", shots=8, held_out=8)
    pruned, facts = cut(dense, text, folder, ratio=0.25, vocabulary="auto", prompts={"own": train})
    table = pq.read_table(dense.parent / "pruned-split" / "split.parquet").to_pandas()
    assert len(table) >= 2
    best = table.loc[table["nats_per_byte"].idxmin()]
    assert table["chosen"].tolist() == (table["tokens"] == best["tokens"]).tolist()
    assert facts["tokens"] == best["tokens"] == read_structure(pruned).size.vocab_size
    assert table["body_ratio"].is_monotonic_increasing
    assert table["whole"].is_monotonic_increasing


def test_the_search_stops_after_a_rise_and_looks_at_both_sides_of_the_best() -> None:
    def measure(size: int) -> Split | None:
        return Split(size, 1.0, 0.0, abs(np.log(size / 1500))) if size < 10_000 else None

    found = [split.tokens for split in search(measure, [512, 1024, 2048, 4096, 8192, 16384])]
    assert found == [512, 1024, 1472, 2048, 2880, 4096]
    assert search(lambda size: None, [512, 1024]) == []


def test_special_tokens_have_their_new_ids_everywhere(dense: Path, text: Any, folder: Make) -> None:
    pruned, _ = cut(dense, text, folder)
    end = load_tokenizer(pruned).convert_tokens_to_ids("<|end|>")
    assert read_config(pruned)["eos_token_id"] == end
    assert json.loads((pruned / "generation_config.json").read_text())["eos_token_id"] == end
    assert load_tokenizer(pruned).eos_token_id == end


def counted(counts: Path, column: str) -> Any:
    return pq.read_table(counts / "tokens.parquet")[column].to_numpy().astype(float)


def test_the_examples_that_a_split_is_measured_on_are_new_to_it(
    dense: Path, text: Any, folder: Make, tmp_path: Path
) -> None:
    benchmark = BenchmarkConfig(**write_own_benchmark(tmp_path))
    train = load_and_render(benchmark, tmp_path, split="train", shots=8, held_out=8)
    asked = {"benchmarks": [benchmark.model_dump()], "calibration": {"source": "questions"}}
    count_tokens(
        dense, {benchmark.name: train}, settings=CountSettings.of(validate_config(asked)), work=Work(folder("counts"))
    )
    held = read_prompts(train, "held_out")
    tokenizer = load_tokenizer(dense)
    used = sum(
        len(tokenizer(c + k)["input_ids"]) for p in held for c, k in zip(p.contexts, p.continuations, strict=True)
    )
    assert counted(tmp_path / "counts", "measured_prompts").sum() == used
    assert 0 < counted(tmp_path / "counts", "measured_text").sum() < counted(tmp_path / "counts", "text").sum()


def test_prompts_count_as_much_as_a_long_text_and_evaluation_never(
    dense: Path, text: Any, folder: Make, tmp_path: Path
) -> None:
    benchmark = BenchmarkConfig(**write_own_benchmark(tmp_path))
    train, evaluation = load_and_render(benchmark, tmp_path, split="train", shots=8), folder("evaluation")
    render_split(tmp_path / "examples", evaluation, benchmark)
    shares = {}
    for name, given in (("text", {}), ("train", {"own": train}), ("evaluation", {"own": evaluation})):
        count_tokens(dense, given, settings=CountSettings.of(text), work=Work(folder(f"counts {name}")))
        shares[name] = read_shares(tmp_path / f"counts {name}")
    assert np.array_equal(shares["evaluation"], shares["text"])
    colon = load_tokenizer(dense).convert_tokens_to_ids(":")
    assert shares["train"][colon] > shares["text"][colon] > 0  # general text has it
    assert {name: own.sum() for name, own in shares.items()} == pytest.approx(dict.fromkeys(shares, 1))
    counts = {name: counted(tmp_path / "counts train", name) for name in ("text", "prompts", "general")}
    own = (counts["text"] / counts["text"].sum() + counts["prompts"] / counts["prompts"].sum()) / 2
    size = counts["text"].sum() + counts["prompts"].sum()
    general = counts["general"] / counts["general"].sum()
    expected = (own * size + general * GENERAL_TOKENS) / (size + GENERAL_TOKENS)
    assert np.abs(shares["train"] - expected).max() < 1e-9


def test_questions_count_the_tokens_of_choices_as_prompts_write_them(dense: Path, folder: Make, tmp_path: Path) -> None:
    own = write_own_benchmark(tmp_path)
    settings = CountSettings.of(validate_config({"benchmarks": [own]}))
    count_tokens(dense, {}, settings=settings, work=Work(folder("counts")))
    train = load_and_render(BenchmarkConfig(**own), tmp_path, split="train", shots=8)
    tokenizer = load_tokenizer(dense)
    written = {text for prompt in read_prompts(train, "shots") for text in prompt.continuations}
    used = {token for text in written for token in tokenizer(text, add_special_tokens=False)["input_ids"]}
    assert all(text.startswith(" ") for text in written)
    assert counted(tmp_path / "counts", "text")[sorted(used)].all()


def test_impossible_numbers_are_refused(dense: Path, text: Any, folder: Make) -> None:
    with pytest.raises(InputError, match=r"pruning.vocabulary: got 64; allowed: at least 320, for bytes"):
        cut(dense, text, folder, vocabulary=64)
    planned = Planned(dense, dense, None, 0.4, PruningConfig(kinds=KINDS, vocabulary=704))
    with pytest.raises(InputError, match=r"pruning.vocabulary: got 704; allowed: below 704, the model's tokens"):
        possible_sizes(planned, read_tokens(dense))


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"vocabulary": 100}, "pruning.vocabulary: got 100; allowed: a multiple of 64; pruning.vocabulary: got"),
        ({"vocabulary": "most"}, "pruning.vocabulary: got 'most'; allowed: a valid integer"),
        (
            {"kinds": ["vocabulary"]},
            "pruning.kinds: got vocabulary alone; allowed: with attention or mlp, for the rest",
        ),
    ],
)
def test_impossible_settings_are_refused_before_any_work(pruning: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        validate_config({"pruning": pruning})
    assert str(refused.value).startswith(message)


def test_a_key_has_the_vocabulary_only_where_tokens_leave() -> None:
    for kinds, differ in ((KINDS[:2], False), (KINDS, True)):
        few, many = (
            PruneSettings.of(validate_config({"pruning": {"kinds": kinds, "vocabulary": size}}), 0.2)
            for size in (640, 1280)
        )
        assert (few != many) == differ


def test_the_table_stays_with_what_is_made_from_the_checkpoint_but_not_with_what_is_pruned_from_it(
    dense: Path, text: Any, folder: Make
) -> None:
    from peft import LoraConfig, get_peft_model

    pruned, _ = cut(dense, text, folder)
    adapter, merged = folder("adapter"), folder("merged")
    get_peft_model(load_model(pruned), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    merge_adapter(pruned, adapter, out=merged)
    assert read_id_table(merged) == read_id_table(pruned)
    graph, scores, again = folder("graph 2"), folder("scores 2"), folder("again")
    random_scores(pruned, graph, scores)
    prune(pruned, graph, scores, None, ratio=0.1, pruning=PruningConfig(min_channels=4), out=again)
    assert read_id_table(again) is None
    assert load_tokenizer(again).get_vocab() == load_tokenizer(pruned).get_vocab()


def test_the_card_has_both_shares_and_the_tokens(dense: Path, text: Any, folder: Make) -> None:
    pruned, facts = cut(dense, text, folder)
    card = " ".join((pruned / "README.md").read_text().split())
    assert f"{facts['body_ratio']:.2%} of the body without embeddings" in card
    assert "Of 704 tokens, 448 are left" in card
    assert not math.isclose(facts["body_ratio"], facts["ratio"], abs_tol=0.01)
