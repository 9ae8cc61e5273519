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


def test_messages_that_are_none_are_refused_in_one_line() -> None:
    chat = Chat(("", ""), "{user}", (" a", " b"), (" a", " b"), (), 0, form="messages")
    with pytest.raises(InputError, match=r"^rows: row 0: column messages: got .*; allowed: a list of messages$"):
        asked(chat, {"messages": ["a"]})
