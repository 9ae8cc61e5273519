"""Two rivals of the allocation by ranking, at about the same share of all parameters, before any tuning.

    python tests/performance/rivals.py FOLDER data/quickstart.toml --ratio 0.2 --ratio 0.5

- `two stages`: the split of 2SSP (arXiv 2501.17771) between MLPs and attention. Of L layers, L·s^(m ÷ 1.5a) lose
  their whole attention, where s is the share of the layers' parameters that leaves, and m and a are the parameters of
  an MLP and an attention. They leave one by one, each time the one that raises the loss of the calibration text least.
  The MLPs lose the rest, each about the same. Known deviations: attention leaves before channels do, by the loss
  of 512 tokens; channels are chosen by `pruning.criterion`, and what stays is fitted as `reconstruction.method` says.
  So the split alone is compared.
- `rotated`: the residual stream, rotated onto its principal components and cut (SliceGPT, arXiv 2401.15024). One
  rotation serves all layers, so the checkpoint is a plain LLaMA of a smaller hidden size, which loads everywhere. The
  head absorbs the weights of the last norm and the embedding does not, so they can no longer be tied. For plain LLaMA
  without biases alone. Known deviation: SliceGPT rotates every block differently, which takes a matrix on each skip
  connection.

The figures are those of `allocation.py`. Results are kept in FOLDER, and found again.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from allocation import compare, kept_in, prepare, with_pruning
from tailored_llama.config import Work, load_config
from tailored_llama.data import read_calibration
from tailored_llama.errors import InputError
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.pipeline import Artifact, steps
from tailored_llama.pipeline.graph import stage
from tailored_llama.pruning import read_groups
from tailored_llama.pruning.importance import read_importance, write_importance

ALPHA = 1.5  # 2SSP's
SEARCHED, ROTATED = 512, 4096  # tokens of the calibration text


@contextmanager
def silenced(model: Any, layers: list[int]) -> Iterator[None]:
    """A model whose attention adds nothing in some layers."""
    hooks = [
        model.model.layers[layer].self_attn.o_proj.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def least_attention(model: Any, text: Tensor, count: int) -> list[int]:
    """Layers whose attention leaves, one by one by the loss of a text [1, tokens]."""
    gone: list[int] = []
    for _ in range(count):
        losses = {}
        for layer in set(range(model.config.num_hidden_layers)) - set(gone):
            with silenced(model, [*gone, layer]):
                losses[layer] = float(model(text, labels=text).loss)
        gone.append(min(losses, key=lambda layer: losses[layer]))
        print("without attention:", gone, f"loss {losses[gone[-1]]:.3f}", flush=True)
    return gone


@dataclass(frozen=True)
class RatioSettings:
    ratio: float


def split_in_two(
    dense: Path, groups: Path, calibration: Path, importance: Path, *, settings: RatioSettings, work: Work
) -> None:
    """Stage: write importance whose ranking gives 2SSP's split: what that removes scores below all that it keeps."""
    model, table = load_model(dense), read_groups(groups)
    layers, budget = model.config.num_hidden_layers, settings.ratio * model.num_parameters()
    sizes = {kind: int(table.parameters[table.kind == kind].sum()) for kind in ("attention", "mlp")}
    count = round(layers * (budget / sum(sizes.values())) ** (sizes["mlp"] / sizes["attention"] / ALPHA))
    rest = (budget - count * sizes["attention"] / layers) / sizes["mlp"]
    if not 0 <= rest < 1:
        raise InputError(
            f"--ratio: got {settings.ratio}; allowed: a ratio that removes a part of every MLP, but not all"
        )
    gone = least_attention(model, read_calibration(calibration)[:1, :SEARCHED], count)
    scores = read_importance(importance).copy()  # an array of a table cannot be written to
    below = 1000 * (scores.max() - scores.min() + 1)  # more than the sizes of groups make up for
    for layer in range(layers):
        for kind in sizes:
            members = np.flatnonzero((table.layer == layer) & (table.kind == kind))
            kept = math.ceil(len(members) * (1 - rest)) if kind == "mlp" else len(members) * (layer not in gone)
            scores[members[np.argsort(scores[members])[: len(members) - kept]]] -= below
    write_importance(work.out, table, scores, "two stages")


def readers(model: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Every norm of the residual stream, and the projections that read it."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    yield model.model.norm, [model.lm_head]


@torch.inference_mode()
def principal_components(model: Any, text: Tensor) -> Tensor:
    """Of what all norms read, each position scaled to length 1; float64 [hidden, hidden], the largest first."""
    hidden = model.config.hidden_size
    total = torch.zeros(hidden, hidden, dtype=torch.float64)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = nn.functional.normalize(inputs[0].flatten(0, -2).double(), dim=-1)
        total.addmm_(states.T, states)

    for norm, _ in readers(model):
        norm.register_forward_pre_hook(add)
    for sequence in text:
        model(sequence[None])
    components: Tensor = torch.linalg.eigh(total).eigenvectors
    return components.flip(-1)


@torch.inference_mode()
def rotate(dense: Path, calibration: Path, *, settings: RatioSettings, work: Work) -> dict[str, float]:
    """Stage: write the dense model with a residual stream so narrow that the ratio of all parameters is gone."""
    text = read_calibration(calibration)
    basis = principal_components(load_model(dense), text[: max(1, ROTATED // text.shape[1])])
    model = load_model(dense)
    parameters, hidden = model.num_parameters(), model.config.hidden_size
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    kept = int(
        hidden * (1 - settings.ratio) * parameters / model.num_parameters()
    )  # every parameter shrinks with the width
    kept -= kept % model.config.num_attention_heads  # a LlamaConfig takes no other hidden size
    basis = basis[:, :kept]
    for norm, projections in readers(model):
        for projection in projections:
            weight = projection.weight.double() * norm.weight.double()
            projection.weight = nn.Parameter((weight @ basis).to(model.dtype))
        # The mean square is now over fewer components: as if they held all of the length.
        norm.weight = nn.Parameter(torch.full((kept,), (hidden / kept) ** 0.5, dtype=model.dtype))
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight = nn.Parameter((basis.T @ writer.weight.double()).to(model.dtype))
    embedding = model.model.embed_tokens
    embedding.weight = nn.Parameter((embedding.weight.double() @ basis).to(model.dtype))
    model.config.head_dim = model.config.head_dim or hidden // model.config.num_attention_heads
    model.config.hidden_size = kept
    model.save_pretrained(work.out)
    load_tokenizer(dense).save_pretrained(work.out)
    return {"hidden size": kept, "ratio": 1 - model.num_parameters() / parameters}


@stage("two-stages", 1, lambda: split_in_two)
def two_stages(
    *, settings: RatioSettings, dense: Artifact, calibration: Artifact, groups: Artifact, importance: Artifact
) -> None: ...


@stage("rotated", 1, lambda: rotate)
def rotated(*, settings: RatioSettings, dense: Artifact, calibration: Artifact) -> None: ...


def main(
    folder: Path,
    config: Path,
    ratio: Annotated[list[float], typer.Option()],
    examples: int = 250,
    override: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    own = with_pruning(load_config(str(config), override or []), ratios=tuple(ratio), shape="any")
    run = kept_in(folder, own)
    inputs = prepare(run, own, examples)
    dense, prompts = inputs.dense, steps.render_train(own)
    text = steps.draw_calibration(own, dense.checkpoint, prompts)
    read = {"dense": dense.checkpoint, "calibration": text}
    models = {}
    for r in ratio:
        scores = {"groups": dense.groups, "importance": dense.importance}
        split = two_stages(f"two stages {r:g}", settings=RatioSettings(r), **read, **scores)
        models[f"global {r:g}"] = steps.prune_to(own, dense, r, prompts)
        models[f"two stages {r:g}"] = steps.prune_to(own, replace(dense, importance=split), r, prompts)
        models[f"rotated {r:g}"] = rotated(f"rotate {r:g}", settings=RatioSettings(r), **read)
    compare(run, own, inputs, models)


if __name__ == "__main__":
    typer.run(main)
