"""The weekly deployment's flow removes what `store gc` would."""

import os
import time
from pathlib import Path

from flows.housekeeping import housekeeping
from tailored_llama.store import ArtifactRef, ArtifactStore

DAY = 86400


def test_what_no_kept_report_used_goes_and_the_rest_stays(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))

    def made(stage: str, days: float, **inputs: ArtifactRef) -> ArtifactRef:
        ref, _ = store.build(
            stage, 1, {"days": days}, inputs, lambda out: (out / "text").write_text("x" * 100) and None
        )
        os.utime(store.folder(ref.stage, ref.key), (time.time() - days * DAY,) * 2)
        return ref

    reported = made("dense", 50)
    refs = {
        "of a kept report": reported,
        "new report": made("report", 40, dense=reported),
        "old report": made("report", 60),
        "unused": made("adapter", 45),
        "young": made("adapter", 2),
    }
    housekeeping(str(tmp_path), older_than_days=30, keep_reports=1)
    gone = {name for name, ref in refs.items() if not store.folder(ref.stage, ref.key).exists()}
    assert gone == {"old report", "unused"}


def test_claims_of_dead_runs_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    claims = tmp_path / "shared" / ".claims"
    claims.mkdir(parents=True)
    names = {"dead": f"{'a' * 64}.1", "alive": f"{'b' * 64}.2"}
    for name in names.values():
        (claims / name).write_text("{}")
    os.utime(claims / names["dead"], (time.time() - DAY,) * 2)
    housekeeping(f"file://{tmp_path / 'shared'}")
    assert [path.name for path in claims.iterdir()] == [names["alive"]]
