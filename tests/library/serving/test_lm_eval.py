"""The model `tailored` of lm-evaluation-harness beside its own `hf`: the same answers, from fewer tokens."""

import functools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from helpers import CPU, save_tiny_llama, write_jsonl, write_own_benchmark
from tailored_llama.cli import main
from tailored_llama.config import TuningConfig
from tailored_llama.errors import InputError
from tailored_llama.models import (
    Encoded,
    Layer,
    add_adapter,
    layered_config,
    load_model,
    load_tokenizer,
    read_config,
    save_adapter,
)
from tailored_llama.serving import lm_eval_model
from tailored_llama.serving.lm_eval_model import Request, TailoredLM

MIXED = (Layer(4, 2, 24), Layer(2, 1, 40), Layer(4, 2, 7), Layer(2, 1, 33))
# With its logits cache, lm-eval 0.4.13 takes the wrong positions where one input is split at two places.
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 8, "logits_cache": False}


def both(checkpoint: Path, **options: Any) -> tuple[HFLM, TailoredLM]:
    return tuple(kind(pretrained=str(checkpoint), **OPTIONS | options) for kind in (HFLM, TailoredLM))


@pytest.fixture(scope="module")
def per_layer(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers have different widths, with random weights."""
    out = tmp_path_factory.mktemp("per-layer")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(layered_config(read_config(tiny), MIXED)).save_pretrained(out)
    load_tokenizer(tiny).save_pretrained(out)
    return out


def tokens(count: int, seed: object) -> list[int]:
    return random.Random(str(seed)).choices(range(250), k=count)


def greedy_tokens(model: Any, context: list[int], count: int) -> list[int]:
    ids = list(context)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(context) :]


def many_requests(model: Any) -> list[Request]:
    """Requests of all kinds, shuffled: some share a header, a context, all but the last token, or nothing at all."""
    pairs: list[tuple[list[int], list[int]]] = []
    for task in range(2):
        header = tokens(90, f"header {task}")
        for question in range(16):  # so many that a header is worth a pass
            context = header + tokens(5 + question, f"question {task} {question}")
            pairs += [(context, tokens(1 + choice, f"choice {question} {choice}")) for choice in range(3)]
            greedy = greedy_tokens(model, context, 4)
            pairs += [(context, greedy), (context, greedy[:1]), (context, [*greedy[:3], 251])]
    for pair in range(10):  # sentences that part in the middle, after the token that stands for no context
        sentence = tokens(12, f"sentence {pair}")
        pairs += [([256], [*sentence[:6], word, *sentence[6:]]) for word in (1, 2)]
    sequence = tokens(20, "one sequence")
    pairs += [(sequence[:cut], sequence[cut:]) for cut in (3, 19)]  # the same input, scored from different positions
    pairs += [pairs[0]]  # asked twice
    random.Random(0).shuffle(pairs)
    return [((f"context {i}", f"continuation {i}"), *pair) for i, pair in enumerate(pairs)]


def assert_equal(found: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=0, abs=1e-3)
    assert len({round(value, 1) for value, _ in expected}) > len(expected) / 4  # their order matters


@pytest.mark.parametrize("kind", ["dense", "per layer", "gemma2, sliding window"])
def test_every_answer_is_that_of_hf_in_the_order_of_the_requests(
    kind: str, tiny: Path, per_layer: Path, tmp_path: Path
) -> None:
    checkpoint = {"dense": tiny, "per layer": per_layer}.get(kind)
    checkpoint = checkpoint or save_tiny_llama(tmp_path / "gemma2", architecture="gemma2", sliding_window=32)
    hf, ours = both(checkpoint)
    requests = many_requests(hf.model)
    expected = hf._loglikelihood_tokens(requests, disable_tqdm=True)
    assert 50 < sum(greedy for _, greedy in expected) < len(expected) - 50
    assert_equal(ours._loglikelihood_tokens(requests, disable_tqdm=True), expected)


def test_requests_longer_than_the_context_lose_the_same_tokens(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    hf, ours = both(tiny)
    context = tokens(300, "long")
    cuts = (257, 256, 255, 254, 200)
    pairs = [(context[:cut], tokens(length, length)) for cut in cuts for length in (1, 2, 3)]
    pairs += [(context[:50], tokens(length, "whole")) for length in (205, 206, 207, 208, 256)]
    requests: list[Request] = [(("", ""), *pair) for pair in pairs]
    assert_equal(
        ours._loglikelihood_tokens(requests, disable_tqdm=True), hf._loglikelihood_tokens(requests, disable_tqdm=True)
    )
    assert "8 of 20 requests are longer than the context of 256 tokens: they lose their start" in caplog.messages


def passes(lm: HFLM) -> list[int]:
    """Collects the number of tokens in each of a model's forward passes."""
    sizes: list[int] = []
    lm.model.get_decoder().embed_tokens.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].numel()))
    return sizes


def test_each_task_s_header_and_each_context_is_encoded_once(tiny: Path) -> None:
    hf, ours = both(tiny)
    contexts = [
        tokens(100, f"header {task}") + tokens(10, f"question {task} {i}") for task in range(3) for i in range(20)
    ]
    requests: list[Request] = [(("", ""), context, tokens(4, choice)) for context in contexts for choice in range(4)]
    theirs, sizes = passes(hf), passes(ours)
    assert_equal(
        ours._loglikelihood_tokens(requests, disable_tqdm=True), hf._loglikelihood_tokens(requests, disable_tqdm=True)
    )
    distinct = 3 * 100 + 60 * (10 + 4 * 3)
    assert distinct <= sum(sizes) < 1.02 * distinct  # by chance, too, questions start with the same token
    assert sum(theirs) == 60 * 4 * 113
    assert len(sizes) == 3 * 2  # a header and a row for each task


@pytest.mark.parametrize("continuation", [[], [1] * 257])
def test_a_continuation_without_tokens_or_longer_than_the_context_is_refused(
    continuation: list[int], tiny: Path
) -> None:
    lm = both(tiny)[1]
    said = f"continuation ' x': got {len(continuation)} tokens after a context of 1; allowed: 1 to 256 tokens after"
    with pytest.raises(InputError, match=said):
        lm._loglikelihood_tokens([(("a", " x"), [1], continuation)], disable_tqdm=True)


def test_many_requests_without_a_context_of_their_own_make_no_long_document(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[Request] = [(("", str(i)), [1], tokens(6, i)) for i in range(400)]
    requests += [(("same", str(i)), [1, 2, 3], [i]) for i in range(20)]  # one input, and many continuations
    longest = []
    scores = lm_eval_model.choice_scores

    def spy(model: Any, encoded: Sequence[Encoded], budget: int) -> Any:
        longest.append(max(len(one.document) for one in encoded))
        return scores(model, encoded, budget)

    monkeypatch.setattr(lm_eval_model, "choice_scores", spy)
    expected, found = ([lm._loglikelihood_tokens(requests, disable_tqdm=True)] for lm in both(tiny))
    assert found[0] == [(pytest.approx(value, abs=1e-4), greedy) for value, greedy in expected[0]]
    assert max(longest) <= 520


def test_no_requests(tiny: Path) -> None:
    assert both(tiny)[1]._loglikelihood_tokens([], disable_tqdm=True) == []


def test_answers_reach_the_cache_one_by_one_as_those_of_hf_do(tiny: Path) -> None:
    class Hook:
        def __init__(self) -> None:
            self.kept: dict[Any, Any] = {}

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            self.kept[kind, request] = answer

    hooks = []
    asked = [("one context", " a"), ("one context", " b"), ("", "c")]
    for lm in both(tiny):
        lm.set_cache_hook(hook := Hook())
        lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)], disable_tqdm=True)
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a text",), 0)], disable_tqdm=True)
        hooks.append(hook.kept)
    assert (
        hooks[0].keys()
        == hooks[1].keys()
        == {("loglikelihood_rolling", ("a text",))} | {("loglikelihood", pair) for pair in asked}
    )


def test_mixed_precision_is_that_of_hf(tiny: Path) -> None:
    requests = many_requests(load_model(tiny))
    plain, mixed = (
        [[value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)] for lm in both(tiny, **options)]
        for options in ({}, {"mixed_precision_dtype": "bfloat16"})
    )
    assert mixed[1] == pytest.approx(mixed[0], rel=0.02, abs=0.1)
    assert mixed[1] != pytest.approx(plain[1], rel=0, abs=1e-3)


# Loading


def test_an_adapter_is_scored_as_the_other_commands_score_it(per_layer: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = add_adapter(load_model(per_layer), TuningConfig(rank=4), CPU)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    save_adapter(adapted, per_layer, tmp_path / "adapter")
    expected = HFLM(load_model(per_layer, tmp_path / "adapter"), tokenizer=load_tokenizer(per_layer), **OPTIONS)
    bare, ours = (TailoredLM(str(per_layer), adapter=a, **OPTIONS) for a in (None, str(tmp_path / "adapter")))
    requests = many_requests(bare.model)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert_equal(found, expected._loglikelihood_tokens(requests, disable_tqdm=True))
    without = bare._loglikelihood_tokens(requests, disable_tqdm=True)
    assert min(abs(a - b) for (a, _), (b, _) in zip(found, without, strict=True)) > 1e-3


def test_an_adapter_of_another_checkpoint_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=3)
    save_adapter(add_adapter(load_model(other), TuningConfig(rank=4), CPU), other, tmp_path / "adapter")
    with pytest.raises(InputError, match="trained on weights"):
        TailoredLM(str(tiny), adapter=str(tmp_path / "adapter"), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallelize": True}, "model_args: parallelize: got True; allowed: one device"),
        ({"adapter": "one", "peft": "two"}, "model_args: peft: got 'two' beside adapter; allowed: one of the two"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(options: dict[str, Any], said: str, tiny: Path) -> None:
    with pytest.raises(InputError, match=f"^{said}$"):
        TailoredLM(str(tiny), **OPTIONS | options)


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match=r"^model_args: pretrained: architecture gpt2; allowed: llama, mistral, "):
        TailoredLM(str(tmp_path), **OPTIONS)


@pytest.mark.parametrize("adapted", [False, True])
def test_dtype_is_that_of_the_arguments_or_of_the_checkpoint(adapted: bool, tiny: Path, tmp_path: Path) -> None:
    save_adapter(add_adapter(load_model(tiny), TuningConfig(rank=4), CPU), tiny, tmp_path / "adapter")
    adapter = str(tmp_path / "adapter") if adapted else None
    for dtype, expected in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        assert TailoredLM(str(tiny), adapter=adapter, **OPTIONS | {"dtype": dtype}).model.dtype == expected


# Tasks


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with local tasks: multiple choice (two of them), a continuation, a whole text, and generation."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    own = write_own_benchmark(tmp_path)
    words = ["The sea is blue", "Coal is black and so is ink", "A leaf is green"] * 3
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": f"{i}: {word}"} for i, word in enumerate(words)])
    common = {"dataset_path": "json", "metadata": {"version": 1.0}}
    files = {"data_files": {"train": own["train"], "test": own["evaluation"]}, "cache_dir": str(tmp_path / "cache")}
    accuracies = [{"metric": name} for name in ("acc", "acc_norm")]
    choice = common | {
        "dataset_kwargs": files,
        "training_split": "train",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "right",
        "metric_list": accuracies,
    }
    texts = common | {
        "dataset_kwargs": {"data_files": {"test": plain}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    described = {
        "colours": choice,
        "letters": choice | {"description": "Name the letter.\n\n", "doc_to_choice": ["A", "B", "C", "D"]},
        "words": texts
        | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text[:6]}}",
            "doc_to_target": "{{text[6:]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "pages": texts
        | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{(text + '. ') * 12}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "written": texts
        | {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in described.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task))
    return folder


@pytest.fixture(autouse=True)
def environment_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip for all packages after each evaluation, which takes longer than that."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("checkpoint", ["tiny", "per_layer"])
def test_tasks_end_as_they_do_with_hf(checkpoint: str, shots: int, tasks: Path, request: pytest.FixtureRequest) -> None:
    names = ["colours", "letters"] + (["words", "pages", "written"] if shots == 0 else [])
    runs = []
    for lm in both(request.getfixturevalue(checkpoint)):
        manager = TaskManager(include_path=tasks, include_defaults=False)
        runs.append(simple_evaluate(lm, tasks=names, num_fewshot=shots, task_manager=manager, bootstrap_iters=0))
    expected, found = runs
    assert set(found["samples"]) == set(names)
    for name in names:
        assert numbers(found["results"][name]) == pytest.approx(numbers(expected["results"][name]), rel=1e-3)
        for ours, theirs in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert (ours["doc_id"], ours["arguments"]) == (theirs["doc_id"], theirs["arguments"])
            if name == "written":
                assert ours["resps"] == theirs["resps"]
            elif name == "pages":
                assert ours["resps"][0][0] == pytest.approx(theirs["resps"][0][0], rel=1e-5)
            else:
                pairs = [[answer for (answer,) in sample["resps"]] for sample in (ours, theirs)]
                assert [greedy for _, greedy in pairs[0]] == [greedy for _, greedy in pairs[1]]
                assert [v for v, _ in pairs[0]] == pytest.approx([v for v, _ in pairs[1]], rel=0, abs=1e-3)
            assert {ours.get(m) for m in ("acc", "acc_norm")} == {theirs.get(m) for m in ("acc", "acc_norm")}


# The command line


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command `tailored-llama lm-eval`, without a network; returns its exit status."""
    # Without the harness's own tasks: reading thousands of files takes ten seconds.
    without = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", without)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("logging.raiseExceptions", False)  # the harness logs to the stderr of the first run, now closed

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["tailored-llama", "lm-eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return run


def test_the_command_line_is_the_harness_s_own_with_one_more_model(
    per_layer: Path, tasks: Path, lm_eval: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for model in ("hf", "tailored"):
        status = lm_eval(
            *("--model", model, "--model_args", f"pretrained={per_layer},dtype=float32", "--device", "cpu"),
            *("--tasks", "colours,letters,written", "--include_path", tasks, "--limit", 6, "--log_samples"),
            *("--output_path", tasks / model),
        )
        assert status == 0
        assert f"{model} (" in capsys.readouterr().out
        (results,) = (tasks / model).rglob("results_*.json")
        found[model] = {name: numbers(own) for name, own in json.loads(results.read_text())["results"].items()}
        assert len(list((tasks / model).rglob("samples_*.jsonl"))) == 3
    assert found["hf"].keys() == {"colours", "letters", "written"}
    for name, values in found["hf"].items():
        assert found["tailored"][name] == pytest.approx(values, rel=1e-3)


def test_what_the_model_refuses_is_one_line(
    tiny: Path, tasks: Path, lm_eval: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(tasks.glob("*.yaml"))
    status = lm_eval("--model", "tailored", "--model_args", f"pretrained={tiny},parallelize=True", "--tasks", file)
    assert status == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "error: model_args: parallelize: got True; allowed: one device"
    assert "Traceback" not in said


def test_help_is_the_harness_s(lm_eval: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert lm_eval("run", "--help") == 0
    said = capsys.readouterr().out
    assert "lm-eval run --model" in said
    assert "--apply_chat_template" in said


def test_without_the_harness_the_command_says_how_to_install_it(
    lm_eval: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert lm_eval("--help") == 2
    said = capsys.readouterr().err
    assert said == "error: lm-eval: not installed; allowed: pip install 'tailored-llama[lm-eval]'\n"
