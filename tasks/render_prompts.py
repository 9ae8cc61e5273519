"""Stage: one split of a benchmark written out as prompts."""

from typing import Any, Literal

from prefect.states import State

from tailored_llama import prompts
from tailored_llama.artifacts import ArtifactRef
from tailored_llama.config import RunConfig
from tailored_llama.own import is_written, stop_strings
from tailored_llama.templates import load_template, wording
from tasks._stage import open_store, stage, task

VERSION = 3


@task("render {benchmark} {split} {config.prompts.template}")
def render_prompts(
    config: RunConfig,
    benchmark: str,
    split: Literal["train", "selection", "evaluation"],
    examples: ArtifactRef,
    selection: int = 0,
) -> State[ArtifactRef]:
    """Render one split.

    Args:
        selection: train examples of the split `selection`, which a template is chosen on.
    """
    own = next(b for b in config.benchmarks if b.name == benchmark)
    amounts: dict[str, Any] = {"shots": config.tuning.shots, "held_out": config.tuning.held_out}
    if split == "selection":  # drawn from what the others leave
        amounts["selection"] = selection
    elif split == "evaluation":
        amounts = {"limit": config.scoring.limit}
    options = {**amounts, "num_fewshot": config.scoring.num_fewshot, "seed": config.seed}
    template = config.prompts.template
    ending = {"stop": stop_strings(own)[0]} if split == "train" and is_written(own) else {}
    return stage(
        config.store,
        "prompts",
        VERSION,
        {
            "benchmark": benchmark,
            "split": split,
            "template": wording(load_template(template), own),
            **amounts,
            **ending,
            "num_fewshot": config.scoring.num_fewshot,
            "seed": config.seed if split != "evaluation" or config.scoring.num_fewshot else None,
        },
        {"examples": examples},
        lambda out: prompts.render_prompts(
            open_store(config.store).open(examples), own, split, template, out, **options
        ),
    )
