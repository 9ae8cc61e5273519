"""Allocation by search: what it removes first, what its divergences describe, its ratio, and what it never reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import CPU, UNFITTED, save_tiny_llama, write_own_benchmark
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, PruningConfig, ReconstructionConfig, validate_config
from tailored_llama.data import read_calibration
from tailored_llama.data.benchmarks import load_benchmark
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.data.prompts import render_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import Document, all_tensor_shapes, load_model, packed_attention, read_structure
from tailored_llama.preflight import preflight_tailor
from tailored_llama.progress import silent
from tailored_llama.pruning import read_groups
from tailored_llama.pruning.allocation import key_fields, search_widths
from tailored_llama.pruning.groups import build_graph, read_slices
from tailored_llama.pruning.importance import read_importance, score_importance
from tailored_llama.pruning.plan import ALLOCATION_SCHEMA, Block, blocks_of, read_widths
from tailored_llama.pruning.prune import key_fields as pruned_key_fields
from tailored_llama.pruning.prune import prune
from tailored_llama.pruning.search import cheapest
from tailored_llama.pruning.supernet import Supernet, fit_levels
from tailored_llama.store import write_table

Make = Callable[[str], Path]
SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
SEARCH = PruningConfig(allocation="search", min_channels=8, search_evaluations=40)
STATIC = ReconstructionConfig(method="static")


def prepare(folder: Make, criterion: Any = "magnitude_l2", **changes: Any) -> tuple[Path, Path, Path, Path]:
    """A dense model, its groups, their importance and calibration sequences."""
    graph, scores, text = map(folder, ("graph", "scores", "text"))
    dense = save_tiny_llama(folder("dense"), noise=0.1, **(SIZES | changes))
    build_graph(dense, out=graph)
    score_importance(dense, graph, None, criterion=criterion, seed=0, out=scores, execution=CPU)
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(5))
    columns = {"input_ids": ids.tolist(), "source": ["text"] * len(ids), "row": range(len(ids))}
    write_table(text / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return dense, graph, scores, text


def find(
    inputs: tuple[Any, ...], out: Path, ratio: float = 0.3, pruning: PruningConfig = SEARCH, **further: Any
) -> Path:
    settings: dict[str, Any] = {"reconstruction": STATIC, "seed": 0, "execution": CPU} | further
    search_widths(*inputs, ratio=ratio, pruning=pruning, out=out, **settings)
    return out


def cut(inputs: tuple[Path, ...], widths: Path, out: Path, ratio: float = 0.3, **further: Any) -> Path:
    settings: dict[str, Any] = {"pruning": SEARCH, "reconstruction": UNFITTED, "execution": CPU} | further
    prune(*inputs, ratio=ratio, allocation=widths, out=out, **settings)
    return out


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / "search.parquet").to_pylist())


@contextmanager
def supernet(inputs: tuple[Path, ...], pruning: PruningConfig = SEARCH) -> Iterator[tuple[Any, Supernet, list[Block]]]:
    """The model, its supernet and its blocks."""
    dense, graph, scores, text = inputs
    model, blocks = load_model(dense), blocks_of(read_groups(graph), read_importance(scores), pruning)
    slices, ids = read_slices(graph, all_tensor_shapes(dense)), read_calibration(text)
    fits = fit_levels(model, ids, slices, blocks, 0.1, silent)
    with packed_attention(model):
        yield model, Supernet(model, blocks, fits, [[Document(part) for part in ids[:2].tolist()]]), blocks


def plain_divergence(dense: Any, model: Any, ids: torch.Tensor) -> float:
    """Over all positions of plain sequences, from all logits."""
    with torch.no_grad():
        first, second = (own(ids).logits.float().log_softmax(-1) for own in (dense, model))
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_a_layer_that_does_nothing_loses_its_groups_first(folder: Make) -> None:
    inputs = prepare(folder)
    weights = load_file(inputs[0] / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"].zero_()
    save_file(weights, inputs[0] / "model.safetensors", {"format": "pt"})
    blocks = blocks_of(read_groups(inputs[1]), read_importance(inputs[2]), SEARCH)
    useless = sum(block.removed(len(block.widths) - 1) for block in blocks if block.layer == 2)
    ratio = useless / read_structure(inputs[0]).parameters  # a plan's rest of single channels is nothing
    out = find(inputs, folder("widths"), ratio)
    widths, dense = read_widths(out), read_structure(inputs[0]).layers[0]
    assert {layer for (layer, _), kept in widths.items() if kept not in (dense.kv_heads, dense.channels)} == {2}
    assert rows(out)[-1]["divergence"] == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_that_of_the_model_it_describes(folder: Make) -> None:
    inputs = prepare(folder, tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    with supernet(inputs) as (model, net, blocks):
        dense, levels = (0,) * len(blocks), tuple(index % len(block.widths) for index, block in enumerate(blocks))
        wider = tuple(max(0, level - 1) for level in levels)
        assert net.divergence(dense) == pytest.approx(0, abs=1e-6)
        fresh = net.divergence(levels)
        net.hold(wider)
        assert net.divergence(dense) == pytest.approx(0, abs=1e-6)
        held = net.divergence(levels)  # only the layers that differ are run again
    assert held == pytest.approx(fresh, rel=1e-6)
    expected = plain_divergence(load_model(inputs[0]), model, read_calibration(inputs[3])[:2])
    assert fresh == pytest.approx(expected, rel=1e-4)


def test_a_width_is_fitted_as_static_reconstruction_fits_it(folder: Make) -> None:
    inputs = prepare(folder)
    pruning = SEARCH.model_copy(update={"search_evaluations": 0, "kinds": ("mlp",)})
    with supernet(inputs, pruning) as (_, net, blocks):
        divergence = net.divergence((4,) * 4)
    total = read_structure(inputs[0]).parameters
    ratio = sum(block.removed(4) for block in blocks) / total
    widths = folder("widths")
    columns = {"layer": [b.layer for b in blocks], "kind": ["mlp"] * 4, "groups": [192] * 4}
    kept = [block.widths[4] for block in blocks]
    write_table(widths / "allocation.parquet", columns | {"kept": kept}, ALLOCATION_SCHEMA)
    out = cut(inputs, widths, folder("cut"), ratio, pruning=pruning, reconstruction=STATIC)
    assert [layer.channels for layer in read_structure(out).layers] == kept
    ids = read_calibration(inputs[3])[:2]
    expected = plain_divergence(load_model(inputs[0]), load_model(out), ids)
    assert divergence == pytest.approx(expected, rel=1e-3)


def test_the_search_is_deterministic_and_every_step_is_better(folder: Make) -> None:
    inputs = prepare(folder, num_hidden_layers=6)
    first, second = find(inputs, folder("first")), find(inputs, folder("second"))
    assert (first / "allocation.parquet").read_bytes() == (second / "allocation.parquet").read_bytes()
    assert rows(first) == rows(second)
    divergences = [row["divergence"] for row in rows(first)]
    assert rows(first)[-1]["step"] == "exchange"
    assert divergences == sorted(divergences, reverse=True)
    assert {row["step"] for row in rows(first)[:2]} == {"ranking", "blocks alone"}
    none = find(inputs, folder("none"), pruning=SEARCH.model_copy(update={"search_evaluations": 0}))
    assert rows(none) == rows(first)[:2]


@pytest.mark.parametrize(
    "changes",
    [{}, {"channel_multiple": 16}, {"kinds": ("attention", "mlp"), "protect_first": 1}, {"min_kv_heads": 2}],
    ids=str,
)
def test_the_ratio_is_exact_and_limits_hold(folder: Make, changes: dict[str, Any]) -> None:
    inputs = prepare(folder, num_attention_heads=8, num_key_value_heads=4)
    pruning = SEARCH.model_copy(update={"search_evaluations": 20} | changes)
    total, block = read_structure(inputs[0]).parameters, 16 * 3 * SIZES["hidden_size"]  # of channels; a KV group is two
    ratio = round(0.3 * total / block) * block / total
    widths = find(inputs, folder("widths"), ratio, pruning)
    out = cut(inputs, widths, folder("cut"), ratio, pruning=pruning)
    before, after = read_structure(inputs[0]), read_structure(out)
    channel = 3 * SIZES["hidden_size"] * pruning.channel_multiple
    assert abs(before.parameters - after.parameters - ratio * before.parameters) <= channel
    for number, layer in enumerate(after.layers):
        assert layer.kv_heads >= pruning.min_kv_heads
        assert layer.channels >= pruning.min_channels
        assert layer.channels == 192 or layer.channels % pruning.channel_multiple == 0
        assert number >= pruning.protect_first or layer == before.layers[number]
        if number >= pruning.protect_first:
            assert (layer.kv_heads, layer.channels) == tuple(
                read_widths(widths)[number, kind] for kind in ("attention", "mlp")
            )


def test_the_groups_that_stay_are_the_most_important_ones(folder: Make) -> None:
    inputs = prepare(folder, criterion="random")
    out = cut(inputs, find(inputs, folder("widths")), folder("cut"))
    kept = pq.read_table(out / "plan.parquet")["kept"].to_numpy()
    table, scores = read_groups(inputs[1]), read_importance(inputs[2])
    for layer in range(4):
        members = (table.layer == layer) & (table.kind == "mlp")
        assert scores[members & kept].min() > max(scores[members & ~kept], default=-1)


def test_prompts_change_what_is_chosen_but_only_the_shots_do(folder: Make, tmp_path: Path) -> None:
    inputs, examples = prepare(folder), folder("examples")
    benchmark = BenchmarkConfig.model_validate(write_own_benchmark(folder("data")))
    load_benchmark(benchmark, downloads="", out=examples)
    found = {}
    for name, held_out in (("few", 2), ("many", 8)):
        prompts = folder(f"prompts {name}")
        render_prompts(
            examples, benchmark=benchmark, split="train", template="harness", out=prompts, shots=8, held_out=held_out
        )
        found[name] = rows(find((*inputs, [prompts]), folder(name)))
    evaluation = folder("evaluation prompts")
    render_prompts(examples, benchmark=benchmark, split="evaluation", template="harness", out=evaluation)
    without = rows(find(inputs, folder("without")))
    assert found["few"] == found["many"] != without
    assert rows(find((*inputs, [evaluation]), folder("evaluation"))) == without


def test_the_greedy_knapsack_takes_what_costs_least_per_parameter() -> None:
    blocks = [Block(number, "mlp", np.arange(8), (8, 6, 4, 2), 10) for number in range(3)]
    costs = [[0, 1, 2, 3], [0, 5, 5.5, 6], [0, 100, 200, 300]]
    assert cheapest(blocks, costs, 60) == (3, 0, 0)
    assert cheapest(blocks, costs, 79) == (3, 0, 0)
    assert cheapest(blocks, costs, 120) == (3, 3, 0)  # over the first, dear step to the cheap ones behind it
    assert cheapest(blocks, costs, 0) == (0, 0, 0)


def test_progress_comes_to_its_end(folder: Make) -> None:
    seen: list[tuple[int, int]] = []
    find(prepare(folder), folder("widths"), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total in seen)


def test_models_that_must_be_streamed_are_refused(folder: Make, own_run: dict[str, Any]) -> None:
    message = r"execution.streaming: got 'always' with pruning.allocation = 'search'"
    with pytest.raises(InputError, match=message):
        find(prepare(folder), folder("widths"), execution=ExecutionConfig(device="cpu", streaming="always"))
    own_run["pruning"]["allocation"], own_run["tuning"] = "search", {"examples": "none", "shots": 8, "held_out": 4}
    with pytest.raises(InputError, match=message):
        preflight_tailor(validate_config(own_run | {"execution": {"streaming": "always"}}))


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"allocation": "searched"}, r"pruning.allocation.*uniform.*global.*search"),
        ({"allocation": "search", "steps": 2}, "pruning.steps: got 2; allowed: 1 with allocation search"),
        ({"search_evaluations": -1}, "pruning.search_evaluations"),
    ],
)
def test_wrong_values_are_named(own_run: dict[str, Any], pruning: dict[str, Any], message: str) -> None:
    own_run["pruning"] |= pruning
    with pytest.raises(InputError, match=message):
        validate_config(own_run)


def test_keys_depend_on_what_the_search_reads(own_run: dict[str, Any]) -> None:
    def keys(**pruning: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        run = validate_config(own_run | {"pruning": own_run["pruning"] | pruning})
        return key_fields(run, 0.2, 1000), pruned_key_fields(run, 0.2, 1000)

    plain, more = keys(allocation="search"), keys(allocation="search", search_evaluations=10)
    assert plain[0] != more[0]
    assert plain[1] == more[1]
    assert "search_evaluations" not in pruned_key_fields(validate_config(own_run), 0.2, 1000)
