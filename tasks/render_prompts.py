"""Stage: render one split of a benchmark as prompts."""

from prefect import State

from tailored_llama.config import RunConfig, named_benchmark, with_template
from tailored_llama.data import RenderedSplit, prompts
from tailored_llama.store import ArtifactRef
from tasks._stage import open_store, stage, task


@task("render {benchmark} {split} {config.prompts.template}")
def render_prompts(
    config: RunConfig, benchmark: str, split: RenderedSplit, examples: ArtifactRef, further: int = 0
) -> State[ArtifactRef]:
    """`further` is the number of train examples in the split selection."""
    return _render(config, benchmark, split, examples, further)


@task("render {benchmark} {split} {chosen}")
def render_chosen(
    config: RunConfig, benchmark: str, split: RenderedSplit, examples: ArtifactRef, chosen: str, further: int = 0
) -> State[ArtifactRef]:
    """Render with a template set that the run itself chooses."""
    return _render(with_template(config, chosen), benchmark, split, examples, further)


def _render(
    config: RunConfig, benchmark: str, split: RenderedSplit, examples: ArtifactRef, further: int = 0
) -> State[ArtifactRef]:
    own = named_benchmark(config, benchmark)
    return stage(
        prompts,
        config.store,
        prompts.key_fields(config, own, split, further),
        {"examples": examples},
        lambda out, progress: prompts.render_prompts(
            open_store(config.store).open(examples),
            benchmark=own,
            split=split,
            template=config.prompts.template,
            num_fewshot=config.scoring.num_fewshot,
            seed=config.seed,
            out=out,
            **prompts.split_sizes(config, split, further),
        ),
    )
