"""Every composition through every executor: the same keys, each of which follows from the bytes of what was read."""

from pathlib import Path
from typing import Any

import pytest

from compositions import compose
from flows.compositions import FLOWS
from helpers import write_own_benchmark
from tailored_llama.config import build_config
from tailored_llama.pipeline import COMPOSITIONS
from tailored_llama.store import REPORTS

GOAL = {"runtime": "transformers", "lose_at_most": 90, "even_if_unprovable": True}
OWN: dict[str, dict[str, Any]] = {  # what a composition is asked beside a run's own fields
    "tailor": {},
    "sweep": {"grid": [{"pruning.criterion": ["random", "taylor_gate"]}], "tailored": True},
    "smallest": {"goal": GOAL},
}
EXECUTORS: dict[str, tuple[bool, dict[str, Any]]] = {  # whether it is a flow, and how it is executed
    "worker processes": (False, {"processes": 2}),
    "flow": (True, {}),
    "flow with worker processes": (True, {"processes": 2}),
    "flow with workers": (True, {"device": "cpu", "dispatch": "pool"}),
}


def made(config: dict[str, Any], name: str, root: Path, is_flow: bool, execution: dict[str, Any]) -> set[str]:
    """The artifacts of a composition in an empty store, but for its report, which tells times."""
    kind = COMPOSITIONS[name].kind
    own = build_config(
        kind,
        config | OWN[name] | {"store": {"root": str(root), "reports": None, "export": None}, "execution": execution},
    )
    if is_flow:
        FLOWS[name](own)
    else:
        compose(name, own)
    return {f"{path.parent.name}/{path.name}" for path in root.glob("[!.]*/*") if path.parent.name not in REPORTS}


@pytest.mark.parametrize("name", OWN)
def test_all_executors_make_the_same(own_run: dict[str, Any], name: str, tmp_path: Path, workers: Any) -> None:
    write_own_benchmark(tmp_path / "data", train=80)  # enough for a search to choose with
    plain = made(own_run, name, tmp_path / "plain", False, {})
    assert len(plain) > 5
    for number, (executor, how) in enumerate(EXECUTORS.items()):
        asked = workers()
        assert made(own_run, name, tmp_path / str(number), *how) == plain, executor
        assert bool(asked) == ("dispatch" in how[1])
