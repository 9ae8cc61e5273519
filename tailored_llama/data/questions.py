"""New rows, as a finished model is asked them: what becomes of a row is what its job's chat says."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tailored_llama.config import form_of, in_form
from tailored_llama.data.chat import Chat, filled, names_of
from tailored_llama.data.custom import choices_of
from tailored_llama.errors import InputError

MESSAGE = "message"  # the column with the whole message of the user, where the chat's own are not there

Row = Mapping[str, Any]
Question = tuple[list[dict[str, str]], tuple[str, ...]]  # messages, and the choices; none: a text of the model's own


def read_questions(chat: Chat, rows: Sequence[Row]) -> list[Question]:
    """Rows as questions; they have the columns that the model was tuned on, or `message`, and need no answers.

    InputError: a row lacks a column, or has something else in it.
    """
    names, questions = {*names_of(chat.message)}, list[Question]()
    for number, row in enumerate(_in_form(chat, rows)):
        asked = chat.message if row.keys() >= names or MESSAGE not in row else f"{{{MESSAGE}}}"
        try:
            for name in names_of(asked):
                if not isinstance(text := row.get(name), str) or not text.strip():
                    allowed = f"a text in it, or the whole message in the column {MESSAGE}"
                    raise ValueError(f"column {name}: got {text!r} (columns: {', '.join(row)}); allowed: {allowed}")
            messages = [{"role": "user", "content": filled(asked, row.__getitem__)}]
            choices = chat.answers if chat.answers or chat.new_tokens else _choices(chat, row)
            questions.append((row.get("turns", messages) if chat.template else messages, choices))
        except ValueError as error:
            raise InputError(f"row {number}: {error}") from None
    return questions


def _in_form(chat: Chat, rows: Sequence[Row]) -> Sequence[Row]:
    """Rows with the columns that the form of a chat's rows stands for, if they have that form."""
    lower = [{column.lower(): cell for column, cell in row.items()} for row in rows]
    form = form_of(lower[0], is_asked=True) if lower and MESSAGE not in lower[0] else None
    return in_form(lower, form, "rows:", unanswered=True) if form and form == chat.form else rows


def _choices(chat: Chat, row: Row) -> tuple[str, ...]:
    """The choices of a row, as they follow its prompt."""
    texts = choices_of(chat.columns, defaultdict(lambda: None, row))
    choices = tuple(filled(chat.choices[0], {"first choice": str(text)}.__getitem__) for text in texts)
    if len({*choices}) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"choices ({chat.columns}): got {texts}; allowed: two or more texts, one of which is answered")
    return choices
