"""The JSON schema of a job's answers, found in those to tune on: it limits what a server lets the model write."""

from collections.abc import Sequence
from typing import Any

from tailored_llama.config import calls_of, from_json, is_labelled

_TYPES = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}


def find_schema(answers: Sequence[str]) -> dict[str, Any] | None:
    """The JSON schema of answers in JSON; None: there are none.

    What comes again and again, by the rule for labels, is enumerated: the fields of an object, and the values of a
    text. All other objects and texts are free, and so are the arguments of calls, whose tools may differ by row.
    """
    values = [from_json(answer) for answer in answers]
    for calls in map(calls_of, values):
        for call in calls:
            call["arguments"] = {}
    return _schema(values) if values else None


def _schema(values: Sequence[Any]) -> dict[str, Any]:
    by_type = dict[str, list[Any]]()
    for value in values:
        by_type.setdefault(_TYPES.get(type(value), "null"), []).append(value)
    if "number" in by_type:
        by_type["number"] += by_type.pop("integer", [])
    schemas = [_of_type(name, members) for name, members in by_type.items()]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _of_type(name: str, values: Sequence[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": name}
    members = [member for value in values for member in value] if name in ("object", "array") else []
    if name == "object" and members and _come_again(members):
        fields = {field: [value[field] for value in values if field in value] for field in dict.fromkeys(members)}
        schema["properties"] = {field: _schema(inner) for field, inner in fields.items()}
        schema["required"] = [field for field, inner in fields.items() if len(inner) == len(values)]
        schema["additionalProperties"] = False
    if name == "array" and members:
        schema["items"] = _schema(members)
    if name == "string" and _come_again(values):
        schema["enum"] = sorted(set(values))
    return schema


def _come_again(texts: Sequence[str]) -> bool:
    return is_labelled("", [(text,) for text in texts])
