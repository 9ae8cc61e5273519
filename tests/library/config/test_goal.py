"""A goal: what it fills in by itself, and every wrong value, told in one line with its field and what is allowed."""

from typing import Any

import pytest

from tailored_llama.config import SmallestConfig
from tailored_llama.config.loading import build_config
from tailored_llama.config.studies import RATIOS_TO_TRY, bases_of
from tailored_llama.errors import InputError

ONE: dict[str, Any] = {"model": {"source": "base"}, "benchmarks": ["piqa"]}


def configure(**sections: Any) -> SmallestConfig:
    return build_config(SmallestConfig, ONE | sections)


def test_what_a_goal_fills_in_and_what_was_given_stays() -> None:
    config = configure()
    assert config.pruning.ratios == RATIOS_TO_TRY
    assert config.store.export == "smallest"
    assert config.tuning.examples == "benchmark"
    assert configure(benchmarks=["piqa", "arc_easy"]).tuning.examples == "mixture"
    given = configure(pruning={"ratios": [0.25]}, store={"export": "out"}, tuning={"examples": "mixture"})
    assert (given.pruning.ratios, given.store.export, given.tuning.examples) == ((0.25,), "out", "mixture")
    assert SmallestConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_types_of_file_are_those_of_the_runtime() -> None:
    assert configure().file_types == ("iq4_nl", "q5_0", "q8_0")
    assert configure(goal={"runtime": "transformers"}).file_types == (None,)


def test_each_base_model_has_a_search_and_the_reference_is_first() -> None:
    config = configure(model={"source": "base", "revision": "main"}, goal={"models": ["other", "third"]})
    assert [(own.model.source, own.model.revision) for own in bases_of(config)] == [
        ("base", "main"),
        ("other", None),
        ("third", None),
    ]


TWO = ["piqa", "arc_easy"]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"goal": {"lose_at_most": -1}}, "goal.lose_at_most: got -1; allowed: greater than 0"),
    ({"goal": {"lose_at_most": 100}}, "goal.lose_at_most: got 100; allowed: less than 100"),
    ({"goal": {"confidence": 1}}, "goal.confidence: got 1; allowed: less than 1"),
    ({"goal": {"confidence": 0.4}}, "goal.confidence: got 0.4; allowed: greater than or equal to 0.5"),
    ({"goal": {"choosing_rows": 5}}, "goal.choosing_rows: got 5; allowed: greater than or equal to 10"),
    ({"goal": {"smallest": "size"}}, "goal.smallest: got 'size'; allowed: 'file', 'memory', 'reading' or 'writing'"),
    ({"goal": {"runtime": "gguf"}}, "goal.runtime: got 'gguf'; allowed: 'llama.cpp', 'transformers' or 'vllm'"),
    ({"goal": {"types": []}}, "goal.types: got []; allowed: at least 1 item"),
    ({"goal": {"types": ["q8_0", "q8_0"]}}, "goal.types: got q8_0, q8_0; allowed: each type once"),
    ({"goal": {"lose_atmost": 3}}, "goal.lose_atmost: unknown key; did you mean goal.lose_at_most?"),
    ({"goal": 3}, "goal: got 3; allowed: a table"),
    *(
        (
            {"goal": {"runtime": runtime, "smallest": "writing"}},
            f"goal.smallest: got 'writing' with runtime {runtime!r}, which is not timed here; allowed: file or memory",
        )
        for runtime in ("transformers", "vllm")
    ),
    (
        {"benchmarks": TWO, "tuning": {"examples": "benchmark"}},
        "tuning.examples: got 'benchmark' with 2 benchmarks; allowed: mixture or none, as one model has to do all of "
        "them",
    ),
    ({"goal": {"models": ["a", "a"]}}, "goal.models: got 'a' twice; allowed: each model once, beside model.source"),
    ({"goal": {"models": ["base"]}}, "goal.models: got 'base' twice; allowed: each model once, beside model.source"),
]


@pytest.mark.parametrize(("sections", "message"), WRONG, ids=[message.split(";")[0] for _, message in WRONG])
def test_a_wrong_value_is_told_in_one_line(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as told:
        configure(**sections)
    assert str(told.value) == message
