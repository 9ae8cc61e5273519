"""A chat with a shipped model asks what it was tuned on: the same tokens, by transformers and by llama.cpp's server."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import PreTrainedTokenizerFast

import helpers
from llama_server import LlamaServer, llama_server
from tailored_llama.config import BenchmarkConfig, Work, validate_config
from tailored_llama.data import BenchmarkSource, load_benchmark, read_chat, read_prompts
from tailored_llama.models import encode, encode_pair, load_tokenizer
from tailored_llama.serving import GgufSettings, export_gguf, write_chat_template
from tailored_llama.training.tuning import encode_sample

ENDS = ("", " ", "\n", '"', "'", "\\n", " é☃", "{x}{{ y }}", "<|end|>")
ROWS = [
    {"text": f"{helpers.words(60)[i:40]}{end}", "kind": f"kind {i}", "labels": ["good", 'so "so"'],
     "options": [f"a{i}", "good"], "answer": "good", "object": {"a": i}}
    for i, end in enumerate(ENDS)
]  # fmt: skip
Row = dict[str, Any]
JOBS: dict[str, tuple[dict[str, Any], str, Callable[[Row], str]]] = {
    "labels": ({"context": "text", "choices": "labels"}, "harness", lambda row: row["text"]),
    "spaces at the end": ({"context": "{text} → \n", "choices": "labels"}, "harness", lambda row: row["text"]),
    "words around": (
        {"context": 'It\'s "{text}" of\\n {{x}} {kind}\nAnswer:', "choices": "labels"},
        "generic",
        lambda row: f'{row["text"]}" of\\n {{x}} {row["kind"]}',
    ),
    "twice": ({"context": "Q: {text}\nA:", "choices": "options"}, "reread", lambda row: row["text"]),
    "letters": (
        {"context": "text", "choices": "options"},
        "lettered",
        lambda row: f"{row['text']}\nA. {row['options'][0]}\nB. good",
    ),
    "json": ({"context": "text", "metric": "json", "answer": "object"}, "generic", lambda row: row["text"]),
    "written": ({"context": "Q: {text}\nA: ", "metric": "exact_match"}, "task", lambda row: row["text"]),
}


def rendered(folder: Path, job: str) -> Path:
    """The rendered prompts of a job, with a solved example before each."""
    fields, template, _ = JOBS[job]
    train = [{**row, "text": f"{i} of train"} for i, row in enumerate(ROWS)]
    files = {
        name: helpers.write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", ROWS))
    }
    named = {"name": "job", "answer": "answer", "train": files["train"], "evaluation": files["test"]} | fields
    benchmark = BenchmarkConfig.model_validate(named)
    return helpers.load_and_render(benchmark, folder, template=template, num_fewshot=1, seed=0)


def tuned_ids(tokenizer: Any, prompts: Path, written: bool) -> list[list[int]]:
    asked = [(p.contexts[0], p.continuations[0]) for p in read_prompts(prompts, "evaluation")]
    return [encode(tokenizer, text) if written else encode_pair(tokenizer, text, after)[0] for text, after in asked]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("tokenizer", [helpers.bpe_tokenizer, helpers.spm_tokenizer], ids=["bytes", "pieces"])
def test_a_chat_asks_what_was_tuned_on(
    tokenizer: Callable[[], PreTrainedTokenizerFast], job: str, folder: Callable[[str], Path]
) -> None:
    checkpoint = helpers.save_worded_llama(folder("model"), tokenizer(), max_position_embeddings=512)
    before, prompts, out = load_tokenizer(checkpoint), rendered(folder("rows"), job), folder("out")
    export_gguf(checkpoint, None, {"job": prompts}, settings=GgufSettings("f16", "job"), work=Work(out))
    assert load_tokenizer(checkpoint).chat_template == before.chat_template  # the checkpoint stays
    chat = read_chat(prompts)
    assert chat is not None
    assert chat.sources.keys() <= {"text", "kind", "first choice", "second choice"}
    write_chat_template(checkpoint, chat)
    after, expected = load_tokenizer(checkpoint), tuned_ids(before, prompts, job in ("written", "json"))
    with llama_server(out / "job-f16.gguf", 512) as server:
        for row, ids in zip(ROWS, expected, strict=True):
            message = {"role": "user", "content": JOBS[job][2](row)}
            earlier = [{"role": "system", "content": "Be good."}, message, {"role": "assistant", "content": "x"}]
            for messages in ([message], [*earlier, message]):
                chatted = after.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                assert chatted == ids, row
                assert server.chat_ids(*messages) == ids, row


def asked_by_card(server: LlamaServer, card: str, message: str) -> str:
    """The answer to the request that a card shows, with a message in place of the card's."""
    (command,) = re.findall(r"^curl .*", card, re.MULTILINE)
    body = json.loads(shlex.split(command)[-1])
    body["messages"][0]["content"] = message
    return server.chat(body)


def test_the_card_s_request_gets_one_of_the_answers(folder: Callable[[str], Path]) -> None:
    checkpoint = helpers.save_worded_llama(folder("model"))
    jobs = {job: rendered(folder(f"rows of {job}"), job) for job in ("labels", "letters", "twice")}
    answers_of = {"labels": [" good", ' so "so"'], "letters": [" A", " B"], "twice": None, "turns": ["bad one", "good"]}
    chatting = helpers.save_chatting_llama(folder("chatting"))
    (turns,) = validate_config({"benchmarks": [rows_of_turns(folder("rows"), ["Be good."])]}).benchmarks
    jobs["turns"] = helpers.load_and_render(turns, folder("prompts"), dense=chatting)
    for job, answers in answers_of.items():
        prompts, out = jobs[job], folder(job)
        model = chatting if job == "turns" else checkpoint
        export_gguf(model, None, {"job": prompts}, settings=GgufSettings("f16", "job"), work=Work(out))
        card = (out / "README.md").read_text()
        assert ("--grammar-file grammar.gbnf" in card) == bool(answers)
        with llama_server(out / "job-f16.gguf") as server:
            said = {asked_by_card(server, card, row["text"]) for row in ROWS}
        assert said <= {*(answers or (" the words of the first choice", " the words of the second choice"))}


def test_a_server_with_the_schema_writes_json_of_it(folder: Callable[[str], Path]) -> None:
    checkpoint, examples, prompts = helpers.save_worded_llama(folder("model")), folder("examples"), folder("prompts")
    rows = [{"prompt": f"text {i}", "completion": {"a": "xy"[i % 2], "b": i % 2 == 0}} for i in range(150)]
    file = helpers.write_jsonl(folder("rows") / "job.jsonl", rows)
    (job,) = validate_config({"benchmarks": [file]}).benchmarks
    load_benchmark(settings=BenchmarkSource(job), work=Work(examples))
    helpers.render_split(examples, prompts, job, "train", shots=8)
    tuning = validate_config({"tuning": {"shots": 8, "held_out": 0, "epochs": 30, "learning_rate": 0.02}}).tuning
    helpers.tune(checkpoint, prompts, tuning, adapter := folder("adapter"), metric="json")
    settings, work = GgufSettings("f16", "job"), Work(out := folder("out"))
    export_gguf(checkpoint, adapter, {"job": prompts}, settings=settings, work=work)
    schema = json.loads((out / "schema.json").read_text())
    with llama_server(out / "job-f16.gguf") as server:
        for row in rows[:4]:
            text = asked_by_card(server, (out / "README.md").read_text(), row["prompt"])
            Draft202012Validator(schema).validate(json.loads(text))
            assert text == server.chat({"messages": [{"role": "user", "content": row["prompt"]}], "temperature": 0})


def test_what_no_chat_can_ask_keeps_the_base_s_template(folder: Callable[[str], Path]) -> None:
    checkpoint = helpers.save_worded_llama(folder("model"))
    two = {job: rendered(folder(f"rows of {job}"), job) for job in ("labels", "written")}
    assert read_chat(*two.values()) is None
    export_gguf(checkpoint, None, two, settings=GgufSettings("f16", "job"), work=Work(out := folder("out")))
    assert "a chat gives other answers" in (out / "README.md").read_text()
    with llama_server(out / "job-f16.gguf") as server:
        assert server.ask("/apply-template", {"messages": [{"role": "user", "content": "x"}]})["prompt"] == (
            "<|user|>user said: x<|end|>"
        )


BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ '<<' + m['content'] + '>>' + strftime_now('%Y') }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def dialogue(i: int, system: str, turns: int) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * turns
    told = [{"role": "system", "content": system}] if system else []
    texts = [f"{word}{ENDS[i % len(ENDS)]}" for word in words_of(i, 2 * turns - 1)] + ["good" if i % 2 else "bad one"]
    return told + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


def words_of(i: int, count: int) -> list[str]:
    return [helpers.words(400)[i + 9 * k : i + 9 * k + 20] for k in range(count)]


def rows_of_turns(folder: Path, systems: Sequence[str]) -> Path:
    rows = [{"messages": dialogue(i, systems[i % len(systems)], 1 + i % 3)} for i in range(150)]
    return helpers.write_jsonl(folder / "turns.jsonl", rows)


@pytest.mark.parametrize(
    "systems", [['Say "it\'s"\n{{ x }} é☃.'], ["Be good.", "Be bad."], [""]], ids=["one", "two", "none"]
)
@pytest.mark.parametrize("kind", ["labels", "written"])
@pytest.mark.parametrize(
    ("tokenizer", "template"),
    [
        (helpers.bpe_tokenizer, helpers.CHATML),
        (helpers.spm_tokenizer, helpers.CHATML),
        (helpers.spm_tokenizer, BRACKETS),
    ],
    ids=["bytes", "pieces", "pieces, BOS in the template"],
)
def test_messages_are_asked_by_the_base_s_chat_template(
    tokenizer: Callable[[], PreTrainedTokenizerFast],
    template: str,
    kind: str,
    systems: list[str],
    folder: Callable[[str], Path],
) -> None:
    checkpoint = helpers.save_chatting_llama(folder("model"), tokenizer(), template)
    (benchmark,) = validate_config(
        {"benchmarks": [{"data": str(rows_of_turns(folder("rows"), systems)), "kind": kind}]}
    ).benchmarks
    prompts, out = helpers.load_and_render(benchmark, folder("prompts"), dense=checkpoint), folder("out")
    asked = read_prompts(prompts, "evaluation")
    before, chat = load_tokenizer(checkpoint), read_chat(prompts)
    assert chat is not None
    export_gguf(checkpoint, None, {"turns": prompts}, settings=GgufSettings("f16", "turns"), work=Work(out))
    write_chat_template(checkpoint, chat)
    after = load_tokenizer(checkpoint)
    end = "</s>" if template == BRACKETS else "<|im_end|>"
    assert (after.eos_token, chat.end) == (end, end)
    assert json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"][0] == after.eos_token_id
    gap = " " if template == BRACKETS else ""
    with llama_server(out / "turns-f16.gguf", 512) as server:
        for prompt in asked:
            messages = dialogue(prompt.example, systems[prompt.example % len(systems)], 1 + prompt.example % 3)
            answer, right = messages.pop(), prompt.continuations[prompt.answer]
            assert right == gap + answer["content"]
            ids = encode_pair(before, prompt.contexts[0], right, is_chat=True)[0]
            tuned = encode_sample(before, 512, None, prompt).encoded
            assert list(tuned.document.prefix)[: tuned.positions[0][0] + 1] == ids == encode(before, prompt.contexts[0])
            sent = [messages[1:]] if len(systems) == 1 and systems[0] else []
            for request in [messages, *sent]:
                assert after.apply_chat_template(request, add_generation_prompt=True, return_dict=False) == ids
                assert server.chat_ids(*request) == ids
            whole = after.apply_chat_template([*messages, answer], return_dict=False)
            assert [*ids, *tuned.targets[0]] == whole[: len(ids) + len(tuned.targets[0])]
            assert tuned.targets[0][-1] == after.eos_token_id
