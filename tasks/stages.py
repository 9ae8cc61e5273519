"""The Prefect task of every stage: its name, and what its retries and its runs on workers need to know."""

from __future__ import annotations

from dataclasses import dataclass

from tailored_llama.pipeline import STAGES


@dataclass(frozen=True)
class Page:
    """The Markdown file of a report that the UI shows: its name, the artifact's key, and a few words about it."""

    name: str
    key: str
    about: str


@dataclass(frozen=True)
class Declaration:
    """How Prefect runs a stage.

    Args:
        title: the name of its task.
        frugal: whether it takes less memory when it is tried again, so that running out of it is retried.
        short: whether workers share out the calls that are ready at once, instead of starting a process for each.
        page: what the UI shows of it.
    """

    title: str
    frugal: bool = False
    short: bool = False
    page: Page | None = None


DECLARATIONS = {
    "dense": Declaration("load model"),
    "examples": Declaration("load benchmark"),
    "prompts": Declaration("render prompts"),
    "tokens": Declaration("count tokens"),
    "calibration": Declaration("load calibration"),
    "groups": Declaration("build graph"),
    "reach": Declaration("check ratio"),
    "importance": Declaration("score importance", frugal=True),
    "split": Declaration("choose split", frugal=True),
    "pruned": Declaration("prune", frugal=True),
    "teacher": Declaration("teach", frugal=True),
    "healed": Declaration("heal", frugal=True),
    "adapter": Declaration("tune", frugal=True),
    "scores": Declaration("score", frugal=True, short=True),
    "quantised-scores": Declaration("score quantised", frugal=True),
    "perplexity": Declaration("perplexity", frugal=True),
    "profile": Declaration("profile"),
    "tailored": Declaration("export"),
    "gguf": Declaration("export gguf"),
    "report": Declaration("report", page=Page("report", "recovery", "What was kept and what was lost")),
    "sweep": Declaration("sweep report", page=Page("sweep", "sweep", "Every setting, and the curves")),
    "transfer": Declaration("transfer report", page=Page("transfer", "transfer", "Each adapter on every benchmark")),
    "speed": Declaration("time in llama.cpp"),
    "answer": Declaration("ship the answer"),
    "smallest": Declaration("smallest report", page=Page("smallest", "smallest", "The smallest model, and the proof")),
    "prompt-study": Declaration(
        "prompt study report", page=Page("study", "prompt-study", "Chosen prompts and references")
    ),
}
assert DECLARATIONS.keys() == STAGES.keys()
