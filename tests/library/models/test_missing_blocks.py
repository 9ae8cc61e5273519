"""Checkpoints without whole blocks, such as pruning once wrote them: they compute as if the blocks were zero."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import CPU, packed_logprobs, prune, remove_blocks, save_tiny_llama
from tailored_llama.config import (
    ExecutionConfig,
    PruningConfig,
    Reconstruction,
    ReconstructionConfig,
    TuningConfig,
    Work,
)
from tailored_llama.data.calibration import CALIBRATION_SCHEMA
from tailored_llama.evaluation.profiling import decode
from tailored_llama.models import (
    Document,
    add_adapter,
    encode_header,
    load_model,
    merge_adapter,
    packed_attention,
    read_structure,
    save_adapter,
)
from tailored_llama.pruning import ImportanceSettings, build_graph, read_groups, score_importance
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


def save_dense(folder: Path, **changes: Any) -> Path:
    return save_tiny_llama(folder / "dense", noise=0.1, num_hidden_layers=LAYERS, **changes)


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


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@every_model
def test_a_model_without_blocks_computes_as_if_they_were_zero(tmp_path: Path, changes: dict[str, Any]) -> None:
    dense = save_dense(tmp_path, **changes)
    blocks = [(0, "attention"), (2, "mlp"), (3, "attention")]
    out = remove_blocks(dense, tmp_path / "out", blocks)
    layers = read_structure(out).layers
    assert [(layer.heads > 0, layer.channels > 0) for layer in layers] == [
        (False, True), (True, True), (True, False), (False, True), (True, True),
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
    dense = save_dense(tmp_path, **MODELS[name])
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
    dense = save_dense(tmp_path, **changes)
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
    dense = save_dense(tmp_path)
    blocks = [(number, "attention") for number in range(LAYERS)]
    model = load_model(remove_blocks(dense, tmp_path / "out", blocks))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    assert torch.equal(*(model.generate(IDS, use_cache=use, **options) for use in (True, False)))


def test_an_adapter_is_trained_saved_and_merged_where_blocks_are_missing(tmp_path: Path) -> None:
    dense = save_dense(tmp_path)
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
    dense = save_dense(tmp_path)
    once, total = remove_blocks(dense, tmp_path / "once", [(0, "attention"), (2, "mlp")]), read_structure(dense).size
    folder = tmp_path / "inputs"
    folder.mkdir()
    build_graph(once, settings=None, work=Work(folder))
    groups = read_groups(folder)
    assert not np.any((groups.layer == 0) & (groups.kind == "attention"))
    columns = {"input_ids": IDS.tolist(), "source": ["here"] * len(IDS), "row": range(len(IDS))}
    write_table(folder / "calibration.parquet", columns, CALIBRATION_SCHEMA)
    score_importance(once, folder, folder, settings=ImportanceSettings("taylor_gate", 0), work=Work(folder, CPU))
    pruning = PruningConfig(shape="any", min_channels=1)
    for method in get_args(Reconstruction):
        fitted, twice = ReconstructionConfig(method=method, ridge=0.01), tmp_path / method
        twice.mkdir()
        given: dict[str, Any] = {"ratio": 0.4, "pruning": pruning, "reconstruction": fitted, "original": dense}
        prune(once, folder, folder, folder, **given, out=twice)
        assert 1 - read_structure(twice).parameters / total.parameters == pytest.approx(0.4, abs=3e-3)
        assert torch.isfinite(logits(load_model(twice))).all()
