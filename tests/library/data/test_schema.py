"""The JSON schema of answers: what it allows, and what it leaves free."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tailored_llama.data.schema import find_schema

COLOURS = {"type": "string", "enum": ["blue", "red"]}


def schema(*answers: Any) -> dict[str, Any] | None:
    return find_schema([json.dumps(answer) for answer in answers])


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("few that come again", ["red", "blue"] * 5, COLOURS),
        ("many", [f"name {i}" for i in range(10)], {"type": "string"}),
        ("empty ones", ["", *(f"name {i}" for i in range(9))], {"type": "string"}),
        ("whole numbers", [1, 2] * 5, {"type": "integer"}),
        ("numbers", [1, 2.5] * 5, {"type": "number"}),
        ("switches", [True, False] * 5, {"type": "boolean"}),
        ("missing", [None, 7] * 5, {"anyOf": [{"type": "null"}, {"type": "integer"}]}),
        ("lists", [["red", "blue"]] * 10, {"type": "array", "items": COLOURS}),
        ("empty lists", [[]] * 10, {"type": "array"}),
        ("other fields in each", [{f"name {i}": 1} for i in range(10)], {"type": "object"}),
    ],
)
def test_the_schema_of_a_field(field: str, values: list[Any], expected: dict[str, Any]) -> None:
    answers = [{"a": value} for value in values]
    assert schema(*answers) == {
        "type": "object",
        "properties": {"a": expected},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert all(Draft202012Validator(schema(*answers)).is_valid(answer) for answer in answers)


def test_a_field_that_an_answer_lacks_may_be_left_out() -> None:
    told = schema(*[{"a": 1, "b": 2}, {"a": 3}] * 5)
    assert told is not None
    assert (list(told["properties"]), told["required"]) == (["a", "b"], ["a"])


def test_the_tools_of_calls_are_enumerated_if_they_come_again_and_again() -> None:
    calls = [{"name": "fg"[i % 2], "arguments": {f"a{i}": i}} for i in range(20)]
    one = {
        "type": "object",
        "properties": {"name": {"type": "string", "enum": ["f", "g"]}, "arguments": {"type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    assert find_schema([json.dumps(call) for call in calls]) == one
    assert find_schema([json.dumps([call, call]) for call in calls]) == {"type": "array", "items": one}
    others = find_schema([json.dumps(call | {"name": f"tool {i}"}) for i, call in enumerate(calls)])
    assert others == one | {"properties": one["properties"] | {"name": {"type": "string"}}}


def test_no_answers_have_no_schema() -> None:
    assert find_schema([]) is None
