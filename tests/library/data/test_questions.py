"""New rows for a finished model are read in the form that its rows had."""

from typing import Any

import pytest

from tailored_llama.data import Chat, read_questions
from tailored_llama.errors import InputError

Row = dict[str, Any]


def asked(chat: Chat, row: Row) -> str:
    ((messages, _),) = read_questions(chat, [row])
    return messages[-1]["content"]


@pytest.mark.parametrize(
    ("form", "message", "row", "text"),
    [
        ("messages", "{user}", {"user": "u123", "messages": [{"role": "user", "content": "hello"}]}, "hello"),
        ("messages", "{user}", {"Messages": [{"role": "user", "content": "hello"}]}, "hello"),
        ("messages", "{user}", {"prompt": [{"role": "user", "content": "hello"}]}, "hello"),
        ("messages", "{user}", {"prompt": [{"role": "user", "content": "hello"}], "completion": None}, "hello"),
        ("alpaca", "{prompt}", {"prompt": "p7", "Instruction": "Do", "Input": "x"}, "Do\n\nx"),
        ("alpaca", "{prompt}", {"prompt": "the whole"}, "the whole"),
        ("", "{prompt}", {"prompt": "p7", "instruction": "Do"}, "p7"),
        ("messages", "{user}", {"message": "the user's own"}, "the user's own"),
    ],
)
def test_a_row_is_asked_by_what_it_stands_for(form: str, message: str, row: Row, text: str) -> None:
    chat = Chat(("", ""), message, (" a", " b"), (" a", " b"), (), 0, form=form)
    assert asked(chat, row) == text


def test_braces_of_a_layout_are_no_columns() -> None:
    chat = Chat(("", ""), "{{{ask}}} or {{x}} {more}", ("{{ {first choice} }}",), (), (), 0, columns="choices")
    row = {"ask": "{more}", "more": "now", "choices": ["{ask}", "b"]}
    assert chat.sources == {name: f"the column `{name}` of a row" for name in ("ask", "more")}
    assert chat.shown == "{{ask}} or {x} {more}"
    assert asked(chat, row) == "{{more}} or {x} now"
    assert read_questions(chat, [row])[0][1] == ("{ {ask} }", "{ b }")
    assert chat.with_words().message == "{the words of the ask} or {x} the words of the more"


def test_messages_that_are_none_are_refused_in_one_line() -> None:
    chat = Chat(("", ""), "{user}", (" a", " b"), (" a", " b"), (), 0, form="messages")
    with pytest.raises(InputError, match=r"^rows: row 0: column messages: got .*; allowed: a list of messages$"):
        asked(chat, {"messages": ["a"]})
