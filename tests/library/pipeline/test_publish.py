"""Publishing the answer of a search: what replaces the last one, in a folder and on the Hub."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from compositions import built, fail, run_command
from helpers import as_toml, write_own_benchmark
from tailored_llama import pruning
from tailored_llama.config import GoalConfig, SmallestConfig, validate_as
from tailored_llama.errors import InputError, UnreachableError
from tailored_llama.evaluation import Answer, CandidateFigures, RowSet, level_of
from tailored_llama.evaluation import noninferiority_test as prove
from tailored_llama.evaluation.statistics import Answers
from tailored_llama.pipeline import publishing
from tailored_llama.pipeline.publishing import publish_answer
from tailored_llama.reports import certificate_of
from tailored_llama.store import ArtifactStore

Offer = Callable[..., str]


def certificate(size: int, loss: float, goal: dict[str, Any]) -> dict[str, Any]:
    """The certificate of a model of so many bytes that loses this share of 2,000 rows."""
    config = SmallestConfig(benchmarks=("csqa",), goal=GoalConfig(**goal))
    rows, lost, gained = np.arange(2000), max(0, round(2000 * loss)), max(0, round(-2000 * loss))
    dense, small = (
        np.repeat([1.0, first, second, 0.0], (1000, lost, gained, 1000 - lost - gained))
        for first, second in ((1, 0), (0, 1))
    )
    test = prove(
        Answers(rows, rows, dense), Answers(rows, rows, small), config.goal.lose_at_most / 100, level_of(1, 0.95)
    )
    candidate = CandidateFigures("dense", 0.5, "q8_0", False, True, 100, size, size, {"csqa": loss}, loss)
    sets = {"csqa": {"proving": RowSet(2000, "ab" * 32)}}
    answer = Answer(config.goal, "the dense model", [candidate], [0], [{"csqa": test}], 1, sets, 0)
    facts = {"name": "csqa", "bytes": size, "sha256": {f"csqa-{size}.gguf": "cd" * 32}}
    run = config.model_dump(mode="json", exclude={"store", "execution"})
    return certificate_of(answer, config, facts) | {"run": run, "served": {}}


class Hub:
    """A Hub with one repository: a folder that is there once it was created."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private, self.fails = folder, False, 0

    def list_repo_files(self, repository: str) -> list[str]:
        assert repository == "ada/small"
        if not self.folder.is_dir():
            missing = httpx.Response(404, request=httpx.Request("GET", "https://hub/"))
            raise RepositoryNotFoundError("no repository", response=missing)
        return [".gitattributes", *(path.name for path in self.folder.iterdir())]

    def hf_hub_download(self, repository: str, name: str) -> str:
        return str(self.folder / name)

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.folder.mkdir(exist_ok=True)
        self.private = private

    def create_commit(self, repository: str, operations: list[Any], commit_message: str) -> None:
        if self.fails:
            self.fails -= 1
            busy = httpx.Response(503, request=httpx.Request("POST", "https://hub/"))
            raise httpx.HTTPStatusError("busy", request=busy.request, response=busy)
        for one in operations:
            if isinstance(one, huggingface_hub.CommitOperationDelete):
                (self.folder / one.path_in_repo).unlink()
            else:
                shutil.copyfile(one.path_or_fileobj, self.folder / one.path_in_repo)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Offer:
    """A search that ends with a model of so many bytes and such a loss, or without a proof; says what became of it."""
    store = ArtifactStore(str(tmp_path / "store"))
    monkeypatch.setattr(publishing, "RETRY_AFTER", (0, 0, 0))
    caplog.set_level(logging.INFO)

    def search(target: Path | str, size: int = 90, loss: float = 0.01, proven: bool = True, **goal: Any) -> str:
        content = json.dumps(certificate(size, loss, goal))

        def write(out: Path) -> None:
            (out / "certificate.json").write_text(content)
            (out / f"csqa-{size}.gguf").write_text("weights")

        ref, _ = store.build("answer", 1, {"of": [size, loss, goal]}, {}, write)
        folder = store.folder(ref.stage, ref.key)
        caplog.clear()
        publish_answer(str(target), folder if proven else None)
        return caplog.messages[-1]

    return search


@pytest.mark.parametrize("on_hub", [False, True], ids=["folder", "hub"])
def test_only_a_smaller_model_or_a_better_one_of_its_size_replaces_the_last(
    on_hub: bool, hub: Hub, offer: Offer, tmp_path: Path
) -> None:
    folder = hub.folder if on_hub else tmp_path / "published"
    target = "hf://ada/small" if on_hub else folder

    def there() -> tuple[str, float]:
        (model,) = folder.glob("*.gguf")
        content = json.loads((folder / "certificate.json").read_text())
        return model.stem, round(content["benchmarks"]["csqa"]["loss"], 6)

    assert offer(target, proven=False) == f"nothing is published, as nothing is proven; what is at {target} stays"
    assert not folder.exists()
    assert offer(target) == f"published to {target}: 90 bytes, 1.00 points lost"
    assert there() == ("csqa-90", 0.01)
    assert hub.private == on_hub
    stays = f"not published: 91 bytes, -5.00 points lost, and that at {target}, 90 bytes, 1.00 points lost, stays"
    assert offer(target, size=91, loss=-0.05) == stays
    for size, loss, is_proven in ((90, 0.02, True), (90, 0.01, True), (10, 0.0, False)):
        offer(target, size, loss, is_proven)
        assert there() == ("csqa-90", 0.01)
    offer(target, 90, 0.005)
    assert there() == ("csqa-90", 0.005)
    offer(target, 80, 0.02)
    assert there() == ("csqa-80", 0.02)  # the other file is gone


def test_a_hub_that_fails_keeps_the_last_and_may_be_asked_again(hub: Hub, offer: Offer) -> None:
    offer("hf://ada/small")
    hub.fails = 4
    with pytest.raises(UnreachableError, match=r"^store.publish hf://ada/small: cannot be published \(busy\)$"):
        offer("hf://ada/small", 80)
    assert [path.name for path in hub.folder.glob("*.gguf")] == ["csqa-90.gguf"]
    hub.fails = 3  # after which it takes the model
    assert offer("hf://ada/small", 80).startswith("published")


def test_what_is_no_model_or_one_for_another_goal_is_not_replaced(hub: Hub, offer: Offer, tmp_path: Path) -> None:
    offer(tmp_path / "published")
    told = (
        "has a model for another goal (3 points of accuracy at 95 % on csqa, here 5 points of accuracy at 95 % on csqa)"
    )
    with pytest.raises(InputError) as refused:
        offer(tmp_path / "published", 10, lose_at_most=5.0)
    assert told in str(refused.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"mine is not a published model; allowed: a new place, or one to replace"):
        offer(tmp_path / "mine")
    hub.create_repo("ada/small", private=False, exist_ok=True)
    (hub.folder / "certificate.json").write_text("[]")
    told = r"^store.publish: got hf://ada/small, whose certificate.json: got 2 bytes; allowed: .*publish to a new place"
    with pytest.raises(InputError, match=told):
        offer("hf://ada/small")


@pytest.mark.parametrize("place", ["s3://bucket/x", "hf://small", "hf://a/b/c"])
def test_another_kind_of_place_is_refused(place: str) -> None:
    with pytest.raises(InputError, match=f"store.publish: got '{place}'; allowed: a Hub repository, hf://user/name"):
        validate_as(SmallestConfig, {"benchmarks": ["csqa"], "store": {"publish": place}})


def test_without_a_token_a_search_for_the_hub_does_not_start(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    own_run["store"] |= {"export": str(tmp_path / "models"), "publish": "hf://ada/small"}
    goal = '[goal]\nruntime = "transformers"\neven_if_unprovable = true\n'
    (path := tmp_path / "run.toml").write_text(as_toml(own_run) + goal)
    status, out, err = run_command(path)
    assert (status, out) == (2, "")
    assert err == "error: store.publish: got 'hf://ada/small' without a token for the Hub; allowed: with HF_TOKEN set\n"
    assert not built(own_run["store"]["root"])


@pytest.mark.parametrize("errors", [2, 9], ids=["that passes", "that stays"])
def test_a_failing_upload_is_tried_again_and_never_loses_the_answer(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: int
) -> None:
    real, fails = publishing.publish, [UnreachableError("the Hub does not answer")] * errors

    def upload(*call: Any) -> None:
        if fails:
            raise fails.pop()
        real(*call)

    monkeypatch.setattr(publishing, "publish", upload)
    monkeypatch.setattr(publishing, "RETRY_AFTER", (0, 0, 0))
    own_run["store"] |= {"export": str(tmp_path / "models"), "publish": str(tmp_path / "published")}
    goal = '[goal]\nruntime = "transformers"\nlose_at_most = 90\neven_if_unprovable = true\n'
    write_own_benchmark(tmp_path / "data", train=80)  # enough to choose with
    (path := tmp_path / "run.toml").write_text(as_toml(own_run) + goal)
    status, out, err = run_command(path)
    assert status == int(errors > 3)
    assert "report: " in out
    assert (tmp_path / "models" / "colours" / "certificate.json").is_file()
    assert (tmp_path / "published" / "certificate.json").is_file() == (errors < 4)
    assert ("error: publish: the Hub does not answer" in err) == (errors > 3)


def test_a_candidate_that_fails_takes_nothing_from_what_is_proven(
    own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(
        monkeypatch,
        (pruning, "prune_model"),
        RuntimeError("a shape is wrong"),
        lambda call: call["settings"].ratio > 0.3,
    )
    own_run["pruning"]["ratios"] = [0.2, 0.4]
    own_run["store"] |= {"export": str(tmp_path / "models"), "publish": str(tmp_path / "published")}
    goal = '[goal]\nruntime = "transformers"\nlose_at_most = 90\neven_if_unprovable = true\n'
    write_own_benchmark(tmp_path / "data", train=80)  # enough to choose with
    (path := tmp_path / "run.toml").write_text(as_toml(own_run) + goal)
    status, _, err = run_command(path)
    assert status == 1
    assert "@ 0.40, 16 bits: a shape is wrong" in err
    assert (tmp_path / "published" / "certificate.json").is_file()
