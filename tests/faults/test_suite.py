"""The suite itself: the moments it draws, and the table it writes."""

from pathlib import Path

import pyarrow.parquet as pq

from faults.ledger import Trial, table, write
from faults.runs import PHASES, draw_moments


def test_moments_are_seeded_and_cover_every_artifact_and_phase() -> None:
    places = [f"stage-{i}/key" for i in range(21)]
    moments = draw_moments(places, 30)
    assert moments == draw_moments(places, 30)
    assert moments != draw_moments(places, 30, seed=1)
    assert {moment.place for moment in moments} == set(places)
    assert {moment.phase for moment in moments} == set(PHASES)
    assert len({(moment.place, moment.phase, moment.share) for moment in moments}) == 30


def test_a_fault_that_a_run_did_not_survive_is_in_the_table(tmp_path: Path) -> None:
    trials = [Trial("kill", "a", True, 1.5), Trial("kill", "b", False, 2.0), Trial("full disk", "c", True)]
    assert table(trials).splitlines()[2:] == ["| kill | 2 | 1 | 3.5 | 2.0 |", "| full disk | 1 | 1 | 0.0 | 0.0 |"]
    write(trials, tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "faults.parquet")["survived"].to_pylist() == [True, False, True]
    assert (tmp_path / "out" / "faults.md").read_text() == table(trials) + "\n"
