"""Scoring: packed rows equal plain forward passes; accuracies are what lm-evaluation-harness defines."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from helpers import (
    CPU,
    byte_tokenizer,
    load_and_render,
    packed_logprobs,
    plain_loglikelihood,
    prune,
    save_worded_llama,
    words,
    write_own_benchmark,
)
from tailored_llama.config import BenchmarkConfig, PruningConfig, Work
from tailored_llama.config.training import PROJECTIONS
from tailored_llama.data import Prompt, encode_prompt, loglikelihoods, score_prompts, shared_header
from tailored_llama.data.prompts import PROMPTS_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.evaluation import ScoreSettings, score_benchmark
from tailored_llama.evaluation.scores import choice_probabilities, hits, metrics, read_answers, read_chosen
from tailored_llama.evaluation.scoring import choice_floor, predict
from tailored_llama.models import Document, encode_pair, load_model, load_tokenizer, packed_attention, packed_states
from tailored_llama.pruning import ImportanceSettings, build_graph, score_importance
from tailored_llama.store import write_table


def prompt(context: str | tuple[str, ...], *continuations: str, answer: int = 0) -> Prompt:
    contexts = (context,) * len(continuations) if isinstance(context, str) else context
    return Prompt(0, contexts, continuations, answer, tuple(len(c) - 1 for c in continuations))


PROMPTS = [
    prompt("The sky is", " blue", " a very long way up", " blue"),
    prompt("Is it? Answer:", " no", " yes"),
    prompt(("Ann saw Bob because Ann", "Ann saw Bob because Bob"), " was there.", " was there."),
    prompt("x", " y", " z"),
]


@pytest.fixture
def pruned(tiny: Path, folder: Callable[[str], Path]) -> Path:
    groups, importance, out = folder("groups"), folder("importance"), folder("pruned")
    build_graph(tiny, settings=None, work=Work(groups))
    score_importance(tiny, groups, None, settings=ImportanceSettings("random", 0), work=Work(importance))
    settings = PruningConfig(min_channels=4)
    prune(tiny, groups, importance, None, ratio=0.2, pruning=settings, out=out)
    return out


def test_a_pruned_model_with_an_adapter_scores_as_plain_passes_do(pruned: Path) -> None:
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=list(PROJECTIONS), init_lora_weights=False, task_type="CAUSAL_LM")
    bare, tokenizer = load_model(pruned), load_tokenizer(pruned)
    without = loglikelihoods(bare, [encode_prompt(tokenizer, PROMPTS[0], 256)], 256)[0]
    model = get_peft_model(bare, adapter).eval()
    solved = "Solved before: yes. " * 4
    few_shot = [prompt(solved + "The sky is", " blue", " a very long way up"), prompt(solved + "Is it?", " no", " yes")]
    for prompts in (PROMPTS, few_shot):
        encoded = [encode_prompt(tokenizer, p, 256) for p in prompts]
        assert (len(shared_header(encoded)) == len(solved)) == (prompts is few_shot)
        for item, row in zip(prompts, loglikelihoods(model, encoded, 64), strict=True):
            pairs = zip(item.contexts, item.continuations, strict=True)
            assert row == pytest.approx([plain_loglikelihood(model, tokenizer, *pair) for pair in pairs], abs=1e-4)
    with_adapter = loglikelihoods(model, [encode_prompt(tokenizer, PROMPTS[0], 256)], 256)[0]
    assert with_adapter != pytest.approx(without, abs=1e-2)


@pytest.mark.parametrize("budget", [64, 4096], ids=["many rows", "one row"])
def test_packed_loglikelihoods_equal_one_plain_pass_per_choice(tiny: Path, budget: int) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    encoded = [encode_prompt(tokenizer, p, 256) for p in PROMPTS]
    packed = loglikelihoods(model, encoded, budget)
    for item, row in zip(PROMPTS, packed, strict=True):
        plain = [
            plain_loglikelihood(model, tokenizer, *pair) for pair in zip(item.contexts, item.continuations, strict=True)
        ]
        assert row == pytest.approx(plain, abs=1e-4)
    assert model.config._attn_implementation == "sdpa"


def test_a_shared_context_is_encoded_once() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_prompt(tokenizer, prompt("0123456789", " ab", " cd"), 256)
    assert len(encoded.document) == len("0123456789 ") + 2  # the last token of a choice is only a target
    assert len(encode_prompt(tokenizer, prompt("0123456789", " a", " b"), 256).document) == len("0123456789 ")


def test_the_head_runs_on_scored_positions_only(tiny: Path) -> None:
    model, read = load_model(tiny), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: read.append(output.shape[-2:]))
    with torch.no_grad(), packed_attention(model):
        packed_logprobs(model, [Document(list(range(50))), Document(list(range(9)))], [49, 52], [3, 4])
    assert read == [(2, 260)]


def test_documents_of_a_row_do_not_see_each_other(tiny: Path) -> None:
    model = load_model(tiny)
    first, others = Document([7, 8, 9]), [Document([1] * 20), Document([2] * 11)]
    with torch.no_grad(), packed_attention(model):
        alone = packed_states(model, [first], torch.tensor([2]))
        with_others = [packed_states(model, [o, first], torch.tensor([len(o) + 2])) for o in others]
    for states in with_others:
        torch.testing.assert_close(states, alone, rtol=0, atol=1e-5)


def test_the_space_between_belongs_to_the_continuation() -> None:
    tokenizer = byte_tokenizer()
    assert encode_pair(tokenizer, "ab ", "cd") == encode_pair(tokenizer, "ab", " cd")
    assert tokenizer.decode(encode_pair(tokenizer, "ab  ", "cd")[1]) == "  cd"
    for empty in ("", "<|end|>"):
        assert encode_pair(tokenizer, empty, "cd") == ([tokenizer.bos_token_id], tokenizer.encode("cd"))
    assert encode_pair(tokenizer, " ", "cd") == ([tokenizer.bos_token_id], tokenizer.encode(" cd"))


def test_long_contexts_lose_their_start_never_the_continuation(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    long = prompt("z" * 50 + "The sky is", " blue", " red")
    cut = encode_prompt(tokenizer, long, 12)
    assert max(len(cut.document.prefix) + len(branch) for branch in cut.document.branches) == 12
    assert [len(target) for target in cut.targets] == [5, 4]
    # lm-evaluation-harness keeps the last max_length + 1 tokens of each sequence
    kept = ("z" * 50 + "The sky is blue")[-13:]
    expected = plain_loglikelihood(model, tokenizer, kept[:-5], kept[-5:])
    assert loglikelihoods(model, [cut], 256)[0][0] == pytest.approx(expected, abs=1e-4)


def test_a_continuation_longer_than_the_models_context_is_refused() -> None:
    refused = "^row 0: got an answer of 9 tokens, which begins with 'cdefghij'; allowed: at most 8, the model's"
    with pytest.raises(InputError, match=refused):
        encode_prompt(byte_tokenizer(), prompt("a", " b", " cdefghij"), 8)


def test_what_all_prompts_start_with_is_encoded_once(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    shots = "Question: up?\nAnswer: down\n\nQuestion: wet?\nAnswer: dry\n\n"
    prompts = [prompt(f"{shots}Question: {q}?\nAnswer:", " left", " right") for q in ("hot", "black", "slow")]
    encoded = [encode_prompt(tokenizer, p, 256) for p in prompts]
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    scores = loglikelihoods(model, encoded, 40)  # a header longer than a pass is encoded in pieces
    header = len(shots + "Question: ")
    assert seen[0] == 40
    assert sum(seen) == header + sum(len(item.document) - header for item in encoded)
    for item, row in zip(prompts, scores, strict=True):
        plain = [
            plain_loglikelihood(model, tokenizer, *pair) for pair in zip(item.contexts, item.continuations, strict=True)
        ]
        assert row == pytest.approx(plain, abs=1e-4)


def test_a_short_start_in_common_gets_no_pass_of_its_own(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    encoded = [encode_prompt(tokenizer, prompt(f"Q: {q}?", " left", " right"), 256) for q in ("hot", "black", "slow")]
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    loglikelihoods(model, encoded, 256)
    assert seen == [sum(len(item.document) for item in encoded)]


def test_a_prompt_that_lost_its_start_shares_no_header_and_costs_the_others_none(tiny: Path) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    opening = "Answer briefly, in a single word or in two, and in lower case only: "
    prompts = [prompt(opening + text, " a", " bc") for text in ("One?", "Two?", "x" * 60)]
    encoded = [encode_prompt(tokenizer, p, 100) for p in prompts]
    assert [item.truncated for item in encoded] == [False, False, True]
    assert tokenizer.decode(shared_header(encoded[:2])) == opening
    scores = loglikelihoods(model, encoded, 256)
    for item, row in zip(encoded, scores, strict=True):
        assert loglikelihoods(model, [item], 256)[0] == pytest.approx(row, abs=1e-4)


def test_a_scored_position_is_never_in_the_header(tiny: Path) -> None:
    """Prompts that differ in their choices only: the last token of the context predicts, so it stays."""
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    context = "It is noon, the sun is out, there is no cloud to be seen, and the sky is"
    prompts = [prompt(context, " blue", " red"), prompt(context, " green", " black")]
    encoded = [encode_prompt(tokenizer, p, 256) for p in prompts]
    assert tokenizer.decode(shared_header(encoded)) == context[:-1]
    for item, row in zip(prompts, loglikelihoods(model, encoded, 256), strict=True):
        assert row[0] == pytest.approx(
            plain_loglikelihood(model, tokenizer, item.contexts[0], item.continuations[0]), abs=1e-4
        )


def test_a_continuation_that_the_tokenizer_swallows_is_refused() -> None:
    class Joining:
        bos_token, bos_token_id = None, 0

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(range(len(text.split(" "))))  # a token per word: "ab" + "c" is one

    with pytest.raises(InputError, match=r"^example 0: got the continuation 'c', which the tokenizer merges into its"):
        encode_prompt(Joining(), prompt("a b", "c", " d"), 256)


def test_acc_norm_by_hand() -> None:
    """Three examples: right by likelihood only, right by likelihood per character only, wrong by both."""
    prompts = [
        prompt("a", " xx", " yyyyyy", answer=0),  # -4 > -9; -2.0 < -1.5
        prompt("b", " xx", " yyyyyy", answer=1),  # the other way round
        prompt("c", " xx", " yyyyyy", answer=1),  # -1 > -6; -0.5 > -1.0
    ]
    predictions = predict(prompts, [[-4.0, -9.0], [-4.0, -9.0], [-1.0, -6.0]])
    assert predictions["prediction"] == [0, 0, 0]
    assert predictions["prediction_norm"] == [1, 1, 0]
    result = metrics(hits(predictions))
    assert result["acc"] == pytest.approx(1 / 3)
    assert result["acc_norm"] == pytest.approx(1 / 3)
    assert result["acc_stderr"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))  # sample deviation ÷ √n


def test_the_probabilities_of_choices_by_hand() -> None:
    """Per character, times the mean length: −2.0 and −1.5, times 4."""
    second = {"acc_norm": 1 / (1 + math.exp(-2)), "acc": 1 / (1 + math.exp(5))}
    for metric, chance in second.items():
        assert choice_probabilities([-4.0, -9.0], [2, 6], metric) == pytest.approx([1 - chance, chance])


def test_the_floor_is_guessing_or_the_commonest_answer() -> None:
    two, four = (" x", " y"), (" x", " y", " z", " w")
    assert choice_floor([prompt("a", *two, answer=i) for i in (0, 1, 1)]) == pytest.approx(2 / 3)  # always answering 1
    assert choice_floor([prompt("a", *four, answer=i) for i in (0, 1, 2, 3)]) == pytest.approx(1 / 4)
    assert choice_floor([prompt("a", *two, answer=0), prompt("a", *four, answer=3)]) == pytest.approx(1 / 2)


def test_a_score_that_is_not_a_number_names_its_example() -> None:
    with pytest.raises(FloatingPointError, match="example 0: log-likelihoods"):
        predict([prompt("a", " b", " c")], [[float("nan"), 1.0]])


def test_the_stage_writes_predictions_and_metrics(tiny: Path, folder: Callable[[str], Path]) -> None:
    benchmark = BenchmarkConfig(**write_own_benchmark(folder("data")))
    prompts, out = load_and_render(benchmark, folder("rendered")), folder("scores")
    measured = score_benchmark(tiny, None, prompts, settings=ScoreSettings.of(benchmark), work=Work(out, CPU))
    found = read_answers(out, "acc_norm")
    assert len(found.values) == 12
    result = json.loads((out / "metrics.json").read_text())
    assert result["acc_norm"] == found.values.mean()
    assert result["floor"] == 0.25
    assert measured["tokens"] > 0


def test_a_tokenizer_that_adds_a_first_token_adds_it_once() -> None:
    """As Llama 2's does: before the context, never between context and continuation."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    before, after = encode_pair(tokenizer, "ab", " cd")
    assert (before[0], tokenizer.decode(before[1:]), tokenizer.decode(after)) == (tokenizer.bos_token_id, "ab", " cd")
    before, after = encode_pair(tokenizer, "<|end|>ab", " cd")
    assert (before[0], tokenizer.decode(before[1:]), tokenizer.decode(after)) == (tokenizer.bos_token_id, "ab", " cd")
    before, after = encode_pair(tokenizer, "", "cd")
    assert (before, tokenizer.decode(after)) == ([tokenizer.bos_token_id], "cd")


def test_labels_are_written_as_greedy_generation_that_only_they_may_follow_writes_them(
    folder: Callable[[str], Path],
) -> None:
    checkpoint = save_worded_llama(folder("model"), max_position_embeddings=256)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    labels = (" a cat", " a cat that sleeps", " a dog", " no cat", " nothing", " dogs and a cat")  # one begins another
    prompts = [replace(prompt(f"{words(40)[i : i + 30]}:", *labels), example=i, is_ended=True) for i in range(40)]
    ids = [[*encode_pair(tokenizer, "a:", label)[1], tokenizer.eos_token_id] for label in labels]

    def allowed(start: int, _: int, written: torch.Tensor) -> list[int]:
        new = written[start:].tolist()
        return [own[len(new)] for own in ids if own[: len(new)] == new and len(own) > len(new)] or [0]

    expected = []
    for own in prompts:
        asked = torch.tensor([tokenizer(own.contexts[0])["input_ids"]])
        start = asked.shape[1]
        text = model.generate(
            asked, max_new_tokens=32, do_sample=False, prefix_allowed_tokens_fn=partial(allowed, start)
        )
        expected.append(ids.index(text[0, start:].tolist()))
    benchmark = BenchmarkConfig(name="mine", evaluation="x", context="c", labels=tuple(map(str.strip, labels)))
    write_table(
        (rows := folder("rows")) / "prompts.parquet",
        {field: [getattr(own, field) for own in prompts] for field in Prompt.__dataclass_fields__ if field != "end"}
        | {"split": ["evaluation"] * len(prompts), "template": ["harness"] * len(prompts)},
        PROMPTS_SCHEMA,
    )
    settings, out = ScoreSettings.of(benchmark, writes_labels=True), folder("scores")
    score_benchmark(checkpoint, None, rows, settings=settings, work=Work(out, CPU))
    assert list(read_chosen(out, "acc").values()) == expected
    assert len(set(expected)) > 1
    ranked = predict(prompts, loglikelihoods(model, [encode_prompt(tokenizer, own, 256) for own in prompts], 1024))
    assert ranked["prediction"] != expected
    assert json.loads((out / "metrics.json").read_text())["written"] is True


@pytest.mark.parametrize("labels", [(" no", " nobody", " not"), (" nobody", " not", " no")])
def test_without_an_end_the_shortest_label_that_begins_the_others_is_written(
    tiny: Path, labels: tuple[str, ...]
) -> None:
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    tokenizer.eos_token = None
    asked = [replace(prompt("Is it? Answer:", *labels), is_ended=True)]
    assert score_prompts(model, tokenizer, asked, True, 1024)[2] == [labels.index(" no")]
