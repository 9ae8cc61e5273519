"""The code of a card, as it stands there, gets an answer: curl, OpenAI's client, and transformers."""

import json
import re
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

import helpers
from llama_server import llama_server
from tailored_llama.config import Work, validate_config
from tailored_llama.data import read_chat
from tailored_llama.serving import GgufSettings, export_gguf, how_to_ask, write_chat_template

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "x"}}}]}
ROWS = {
    "labels": [{"text": f"text {i}", "label": ("good", "bad")[i % 2]} for i in range(150)],
    "text": [{"prompt": f"text {i}", "completion": f"number {i}"} for i in range(150)],
    "JSON": [{"prompt": f"text {i}", "completion": {"a": i}} for i in range(150)],
    "choices": [{"question": f"text {i}", "choices": [f"a {i}", "b"], "answer": "b"} for i in range(150)],
    "messages": [{"messages": [{"role": "user", "content": f"text {i}"}, CALL]} for i in range(150)],
    "tools": [
        {"messages": [{"role": "user", "content": f"text {i}"}, CALL], "tools": [{"name": "look"}]} for i in range(150)
    ],
}
SOURCES = {  # what a card says of a row
    "labels": "`{text}` is the column `text` of a row.",
    "choices": "`{question}` is the column `question` of a row.",
    "messages": "A request holds all messages of a row (column `messages`, or `prompt`) but the last, the answer.",
    "tools": "`{user}` is the text of the user in the `messages` of a row.",  # its base has no chat template
}


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def printed(code: str) -> str:
    """What code prints that finds no name but its own; in this process, as another one imports for seconds."""
    with redirect_stdout(StringIO()) as out:
        exec(code, {"__name__": "__main__"})
    return out.getvalue()


@pytest.mark.parametrize("kind", ROWS)
def test_the_code_of_a_card_gets_an_answer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = helpers.write_jsonl(tmp_path / "job.jsonl", ROWS[kind])
    (benchmark,) = validate_config({"benchmarks": [file]}).benchmarks
    save = helpers.save_chatting_llama if kind == "messages" else helpers.save_worded_llama
    checkpoint, out = save(tmp_path / "model"), tmp_path / "out"
    prompts = helpers.load_and_render(
        benchmark, tmp_path, split="train", shots=8, dense=checkpoint if kind == "messages" else None
    )
    out.mkdir()
    export_gguf(checkpoint, None, {"job": prompts}, settings=GgufSettings("f16", "job"), work=Work(out))
    card = (out / "README.md").read_text()
    assert SOURCES.get(kind, "`{prompt}` is the column `prompt` of a row.") in card
    assert not re.search("content.{1,4}{", card)  # no name in braces is asked
    is_call = kind in ("messages", "tools")
    assert ("each as one line of JSON, and an empty line. OpenAI's field `tools` is not used." in card) == is_call
    assert ("Answers are JSON of the schema in `schema.json`." in card) == (is_call or kind == "JSON")
    monkeypatch.chdir(out)
    with llama_server(out / "job-f16.gguf") as server:
        port = server.url.rpartition(":")[2]
        *_, curl = (block for block in blocks(card, "sh") if "curl" in block)
        asked = curl[curl.index("curl") :].replace(":8080/", f":{port}/")
        answer = subprocess.run(["bash", "-c", asked], capture_output=True, timeout=120, check=True).stdout
        said = json.loads(answer)["choices"][0]["message"]["content"]
        client = blocks(card, "python")[0].replace(":8080/", f":{port}/")
        assert printed(client) == f"{said}\n"
    assert kind != "labels" or said in (" good", " bad")
    chat = read_chat(prompts)
    assert chat is not None
    write_chat_template(checkpoint, chat)
    card = how_to_ask("job", chat)
    assert "The tests of tailored-llama run the calls, and start the server by its Python module" in card
    assert "vllm serve path/to/this/folder --served-model-name job" in card
    code = blocks(card, "python")[1].replace("path/to/this/folder", str(checkpoint))
    assert printed(code).strip()
