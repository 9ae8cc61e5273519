"""Whole layers and whole blocks as things that pruning removes: what is left computes as if they were zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import CPU, WHOLE_BLOCKS, packed_logprobs, prune, remove_blocks, save_tiny_llama
from tailored_llama.config import (
    ExecutionConfig,
    PruningConfig,
    Reconstruction,
    ReconstructionConfig,
    TuningConfig,
    Work,
    validate_config,
)
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.errors import InputError
from tailored_llama.evaluation.profiling import decode
from tailored_llama.models import (
    Document,
    add_adapter,
    encode_header,
    load_model,
    merge_adapter,
    packed_attention,
    read_config,
    read_structure,
    save_adapter,
)
from tailored_llama.pruning import ImportanceSettings, PruneSettings, build_graph, read_groups, score_importance
from tailored_llama.pruning.depth import INFLUENCE_SCHEMA, block_influence, read_influence
from tailored_llama.pruning.importance import write_importance
from tailored_llama.pruning.layerwise import Text
from tailored_llama.store import write_table

IDS = torch.randint(0, 256, (5, 16), generator=torch.Generator().manual_seed(5))
LAYERS = 5
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "fused": {"architecture": "phi3", "pad_token_id": 0, "sliding_window": None},
    "local and global layers": {
        "architecture": "gemma3_text",
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
    },
    "sandwiched": {"architecture": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 4},
    "norms on q and k": {"architecture": "qwen3"},
    "some layers without RoPE": {"architecture": "smollm3", "pad_token_id": 0},
}
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())


def prepare(root: Path, **changes: Any) -> tuple[Path, Path]:
    """A dense model of five layers; its groups, random importances, influences and calibration text in one folder."""
    dense, folder = save_tiny_llama(root / "dense", noise=0.1, num_hidden_layers=LAYERS, **changes), root / "inputs"
    folder.mkdir()
    build_graph(dense, settings=None, work=Work(folder))
    groups = read_groups(folder)
    write_importance(folder, groups, 1 + np.random.default_rng(2).random(len(groups)), "random")
    columns = {"layer": range(5), "influence": [0.5, 0.3, 0.1, 0.4, 0.2]}
    write_table(folder / "influence.parquet", columns, INFLUENCE_SCHEMA)
    columns = {"input_ids": IDS.tolist(), "source": ["here"] * len(IDS), "row": range(len(IDS))}
    write_table(folder / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    return dense, folder


def pruned(
    dense: Path, folder: Path, ratio: float, pruning: PruningConfig, method: Reconstruction = "none", **options: Any
) -> Path:
    out = folder / f"{method}-{len(list(folder.iterdir()))}"
    out.mkdir()
    fitted = ReconstructionConfig(method=method, ridge=0.01)
    text = None if method == "none" else folder
    prune(dense, folder, folder, text, ratio=ratio, pruning=pruning, reconstruction=fitted, out=out, **options)
    return out


OUTPUTS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def silenced(dense: Path, blocks: list[tuple[int, str]], keep: bool = True) -> Any:
    """The dense model with zeros for the output projections of blocks; or the parameters of all other blocks."""
    model = load_model(dense)
    sandwiched = hasattr(model.model.layers[0], "pre_feedforward_layernorm")
    norms = {
        "attention": ["input_layernorm", *(["post_attention_layernorm"] if sandwiched else [])],
        "mlp": ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if sandwiched
        else ["post_attention_layernorm"],
    }
    gone: set[int] = set()
    for number, kind in blocks:
        layer = model.model.layers[number]
        with torch.no_grad():
            for parameter in layer.get_submodule(OUTPUTS[kind]).parameters():
                parameter.zero_()
        for name in (OUTPUTS[kind].partition(".")[0], *norms[kind]):
            gone |= {id(parameter) for parameter in layer.get_submodule(name).parameters()}
    return model if keep else [parameter for parameter in model.parameters() if id(parameter) not in gone]


def whole(*numbers: int) -> list[tuple[int, str]]:
    return [(number, kind) for number in numbers for kind in ("attention", "mlp")]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@every_model
def test_a_model_without_layers_is_a_stock_model_that_computes_as_if_they_were_zero(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    dense, folder = prepare(tmp_path, **changes)
    before, left = read_structure(dense), silenced(dense, whole(2, 4), keep=False)
    layer = before.size.body // LAYERS
    out = pruned(dense, folder, 2.3 * layer / before.parameters, PruningConfig(shape="any", kinds=("layer",)))
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert not type(stock).__name__.startswith("Tailored")
    assert stock.config.num_hidden_layers == LAYERS - 2
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in left)
    torch.testing.assert_close(logits(stock), logits(silenced(dense, whole(2, 4))), rtol=0, atol=1e-5)
    own, source = stock.config, load_model(dense).config
    for name in ("layer_types", "no_rope_layers"):
        if getattr(source, name, None):
            assert getattr(own, name) == [getattr(source, name)[number] for number in (0, 1, 3)]


def test_layers_follow_from_a_configuration_that_leaves_their_types_out(tmp_path: Path) -> None:
    """An older config.json of Gemma 3 has a pattern instead of a list; the pattern no longer holds."""
    dense, folder = prepare(tmp_path, **MODELS["local and global layers"])
    types = read_config(dense)["layer_types"]
    file = dense / "config.json"
    text = file.read_text()
    start = text.index('"layer_types"')
    file.write_text(text[:start] + '"sliding_window_pattern": 2, ' + text[text.index("],", start) + 2 :])
    ratio = read_structure(dense).size.body / LAYERS / read_structure(dense).parameters
    out = pruned(dense, folder, ratio, PruningConfig(shape="any", kinds=("layer",)))
    assert read_config(out)["layer_types"] == [kind for number, kind in enumerate(types) if number != 2]


@every_model
def test_a_model_without_blocks_computes_as_if_they_were_zero(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, _ = prepare(tmp_path, **changes)
    blocks = [(0, "attention"), (2, "mlp"), *whole(3)]
    out = remove_blocks(dense, tmp_path / "out", blocks)
    layers = read_structure(out).layers
    assert [(layer.heads > 0, layer.channels > 0) for layer in layers] == [
        (False, True), (True, True), (True, False), (True, True),
    ]  # fmt: skip
    model, expected = load_model(out), silenced(dense, blocks)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in silenced(dense, blocks, keep=False))
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)
    model.save_pretrained(again := tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model))


def test_blocks_leave_a_model_of_more_than_ten_layers(tmp_path: Path) -> None:
    """transformers then writes layer 2 as "02" into the configuration."""
    dense = save_tiny_llama(tmp_path / "dense", noise=0.1, num_hidden_layers=11)
    blocks = [(2, "attention"), (10, "mlp")]
    out = remove_blocks(dense, tmp_path / "out", blocks)
    layers = read_structure(out).layers
    assert [i for i, layer in enumerate(layers) if not layer.heads] == [2]
    assert [i for i, layer in enumerate(layers) if not layer.channels] == [10]
    torch.testing.assert_close(logits(load_model(out)), logits(silenced(dense, blocks)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "local and global layers", "norms on q and k"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generation_with_a_cache_when_the_first_layer_has_no_attention(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    dense, _ = prepare(tmp_path, **MODELS[name])
    model = load_model(remove_blocks(dense, tmp_path / "out", [(0, "attention"), (2, "attention"), (3, "mlp")]))
    common: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    beams = {"num_beams": options.get("num_beams", 1)}
    cached = model.generate(IDS, use_cache=True, disable_compile=True, **common, **options)
    plain = model.generate(IDS, use_cache=False, **common, **beams)
    assert torch.equal(cached, plain)
    if not options:
        assert torch.equal(decode(model, IDS, 10)[0], plain[:, IDS.shape[1] :])


@every_model
def test_packed_rows_are_scored_as_single_sequences_are(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense, _ = prepare(tmp_path, **changes)
    model = load_model(remove_blocks(dense, tmp_path / "out", [(0, "attention"), (2, "mlp"), (3, "attention")]))
    header, prefix, branches = [9, 8, 7, 6], [5, 4, 3], [[2, 1, 77], [66, 55]]
    document, expected = Document(prefix, branches), list[float]()
    positions = [document.offset(number, 3 + at) for number, branch in enumerate(branches) for at in range(len(branch))]
    with torch.no_grad():
        for branch in branches:
            states = model(torch.tensor([header + prefix + branch])).logits[0].log_softmax(-1)
            expected += states[len(header) + 3 :, 9].tolist()
        with packed_attention(model):
            shared = encode_header(model, header, 3)
            found = packed_logprobs(model, [document, document], [*positions, positions[0] + 8], [9] * 6, shared)
    assert found.tolist() == pytest.approx([*expected, expected[0]], abs=1e-4)


def test_a_model_without_any_attention_generates(tmp_path: Path) -> None:
    dense, _ = prepare(tmp_path)
    blocks = [(number, "attention") for number in range(LAYERS)]
    model = load_model(remove_blocks(dense, tmp_path / "out", blocks))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    assert torch.equal(*(model.generate(IDS, use_cache=use, **options) for use in (True, False)))


def test_an_adapter_is_trained_saved_and_merged_where_blocks_are_missing(tmp_path: Path) -> None:
    dense, _ = prepare(tmp_path)
    out = remove_blocks(dense, tmp_path / "out", [(0, "attention"), (2, "mlp")])
    adapted = add_adapter(
        load_model(out), TuningConfig(rank=2, dropout=0.0), ExecutionConfig(recompute_activations=True)
    )
    adapted.train()
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.5)
    for _ in range(2):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    adapted.eval()
    (adapter := tmp_path / "adapter").mkdir()
    (merged := tmp_path / "merged").mkdir()
    save_adapter(adapted, out, adapter)
    merge_adapter(out, adapter, out=merged)
    assert not torch.allclose(logits(load_model(merged)), logits(load_model(out)))
    torch.testing.assert_close(logits(load_model(merged)), logits(adapted), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load_model(out, adapter)), logits(adapted), rtol=1e-4, atol=1e-5)


def test_a_model_without_blocks_is_pruned_again(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    once, total = remove_blocks(dense, tmp_path / "once", [(0, "attention"), (2, "mlp")]), read_structure(dense).size
    second = tmp_path / "second"
    second.mkdir()
    build_graph(once, settings=None, work=Work(second))
    groups = read_groups(second)
    assert not np.any((groups.layer == 0) & (groups.kind == "attention"))
    score_importance(once, second, folder, settings=ImportanceSettings("taylor_gate", 0), work=Work(second, CPU))
    text = folder / "calibration.parquet"
    (second / "calibration.parquet").write_bytes(text.read_bytes())
    for method in get_args(Reconstruction):
        twice = pruned(once, second, 0.5, WHOLE_BLOCKS, method, original=dense)
        assert 1 - read_structure(twice).parameters / total.parameters == pytest.approx(0.5, abs=3e-3)
        assert torch.isfinite(logits(load_model(twice))).all()


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_layers_count_towards_the_ratio_and_groups_supply_the_rest(tmp_path: Path, ratio: float) -> None:
    dense, folder = prepare(tmp_path, hidden_size=64, intermediate_size=256)
    pruning = PruningConfig(shape="any", kinds=("attention", "mlp", "layer"), layers=1, min_channels=2)
    out = pruned(dense, folder, ratio, pruning)
    after = read_structure(out)
    assert len(after.layers) == LAYERS - 1
    assert 1 - after.parameters / read_structure(dense).parameters == pytest.approx(ratio, abs=1e-3)


def test_a_ratio_of_whole_blocks_is_met_with_their_norms(tmp_path: Path) -> None:
    """At 60 % of the parameters in one ranking, some blocks of a model of many blocks are gone as a whole."""
    dense, folder = prepare(tmp_path, hidden_size=64, intermediate_size=64)
    groups = read_groups(folder)
    scores = np.exp(3 * np.random.default_rng(4).random(2 * LAYERS))[2 * groups.layer + (groups.kind == "mlp")]
    write_importance(folder, groups, scores * groups.parameters, "random")
    after = read_structure(pruned(dense, folder, 0.5, WHOLE_BLOCKS))
    assert not all(layer.heads and layer.channels for layer in after.layers)
    channel = 3 * 64 / read_structure(dense).parameters
    assert 1 - after.parameters / read_structure(dense).parameters == pytest.approx(0.5, abs=channel)


@pytest.mark.parametrize("streaming", ["never", "always"])
def test_influence_is_one_minus_the_mean_cosine_of_input_and_output(tmp_path: Path, streaming: Any) -> None:
    dense, folder = prepare(tmp_path)
    execution = ExecutionConfig(device="cpu", batch_tokens=64, streaming=streaming)
    settings = ImportanceSettings("random", 0, influence=True)
    score_importance(dense, folder, folder, settings=settings, work=Work(folder, execution))
    states: list[torch.Tensor] = []
    model = load_model(dense)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, output: states.extend([given[0], output]))
    logits(model)
    pairs = zip(states[::2], states[1::2], strict=True)
    expected = [1 - torch.cosine_similarity(one, other, dim=-1).mean().item() for one, other in pairs]
    assert read_influence(folder) == pytest.approx(expected, abs=1e-6)
    assert block_influence(model, Text(IDS)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("pruning", "ratio", "message"),
    [
        ({"kinds": ["layer"]}, 0.95, r"pruning\.ratios: got 0\.95; allowed: 0\.6\d{3}, the nearest that"),
        ({"kinds": ["layer"]}, 0.01, r"pruning\.ratios: got 0\.01; allowed: 0\.1\d{3}, the nearest that"),
        ({"kinds": ["layer"], "protect_last": 3}, 0.5, r"got 0\.5; allowed: 0\.3\d{3}, .*protect_last 3"),
        ({"kinds": ["layer", "mlp"], "layers": 5}, 0.9, r"pruning\.layers: got 5; allowed: at most 4 with"),
        ({"kinds": ["layer", "mlp"], "layers": 3}, 0.4, r"pruning\.layers: got 3; allowed: at most 2 with"),
        ({"kinds": ["layer", "mlp"], "layers": 2, "protect_first": 4}, 0.4, r"got 2; allowed: at most 1 "),
    ],
)  # fmt: skip
def test_layers_that_cannot_leave_are_named(tmp_path: Path, pruning: Any, ratio: float, message: str) -> None:
    dense, folder = prepare(tmp_path)
    with pytest.raises(InputError, match=message):
        pruned(dense, folder, ratio, PruningConfig(**pruning, min_channels=2))


def test_something_is_left_of_a_model(tmp_path: Path) -> None:
    dense, folder = prepare(tmp_path)
    size = read_structure(dense).size
    ratio = (size.body - 32) / size.parameters  # all but the last norm
    with pytest.raises(InputError, match=r"pruning\.ratios: got 0\.\d+; allowed: less, since it leaves no layer"):
        pruned(dense, folder, ratio, WHOLE_BLOCKS)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"layers": 2}, "pruning.layers: got 2; allowed: 0, or with kind layer in pruning.kinds"),
        (
            {"kinds": ["layer"], "layers": 2},
            "got 2; allowed: 0 without attention or mlp, as the ratio decides how many",
        ),
        ({"kinds": ["layer", "attention"]}, "got 0; allowed: at least 1 with kind layer beside attention or mlp"),
        ({"kinds": ["layer"], "steps": 2}, "pruning.steps: got 2; allowed: 1 with kind layer"),
        ({"min_kv_heads": -1}, "pruning.min_kv_heads"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(pruning: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        validate_config({"benchmarks": ["piqa"], "pruning": pruning})


def test_keys_know_layers_only_where_they_leave() -> None:
    plain, one, two = (
        validate_config({"benchmarks": ["piqa"], "pruning": {"kinds": kinds, "layers": layers}})
        for kinds, layers in ((["mlp"], 0), (["layer", "mlp"], 1), (["layer", "mlp"], 2))
    )
    assert not ImportanceSettings.of(plain).influence
    assert ImportanceSettings.of(one) == ImportanceSettings.of(two) != ImportanceSettings.of(plain)
    assert [PruneSettings.of(run, 0.2).plan.layers for run in (plain, one, two)] == [0, 1, 2]
