"""Tuning and healing on a base in 4 bits: what is computed, what is merged, and what is refused beforehand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import CPU, as_toml, byte_tokenizer, save_tiny_llama, tune
from tailored_llama.config import (
    ExecutionConfig,
    HealingConfig,
    RunConfig,
    TrainingConfig,
    TuningConfig,
    Work,
    narrow,
    validate_config,
)
from tailored_llama.errors import InputError
from tailored_llama.models import (
    DenseSettings,
    Layer,
    layered_config,
    load_base,
    load_model,
    merge_adapter,
    read_config,
)
from tailored_llama.preflight import preflight, preflight_tailor
from tailored_llama.store import write_table
from tailored_llama.training import HealSettings, TuneSettings, heal
from tailored_llama.training.distillation import TEACHER_SCHEMA

Make = Callable[[str], Path]

QUICK = TuningConfig(epochs=3, learning_rate=2e-2, batch_size=4)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # 4 query heads: multiples of 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of type llama whose widths suit the CPU."""
    return save_tiny_llama(tmp_path_factory.mktemp("wide") / "checkpoint", **WIDE)


@pytest.fixture(scope="module")
def layered(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of type tailored_llama, whose layers differ in heads and channels."""
    out = tmp_path_factory.mktemp("layered") / "checkpoint"
    layers = (Layer(4, 2, 192), Layer(2, 1, 64), Layer(2, 1, 128), Layer(4, 2, 64))
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(layered_config(read_config(wide), layers)).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    return out


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


BOTH = pytest.mark.parametrize("checkpoint", ["wide", "layered"], indirect=True)


def tune_nf4(
    checkpoint: Path, prompts: Path, out: Path, tuning: TuningConfig = QUICK, execution: ExecutionConfig = CPU
) -> None:
    tune(checkpoint, prompts, tuning, out, execution=execution, quantization="nf4")


def held_out(adapter: Path) -> list[float]:
    log = pq.read_table(adapter / "log.parquet").to_pydict()
    return [loss for loss in log["held_out_loss"] if loss is not None]


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantised and back: in blocks of 64, the nearest of 16 shares of the largest magnitude (QLoRA, appendix E)."""
    levels = torch.tensor(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ]
    )  # fmt: skip
    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / largest)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


@BOTH
def test_projections_are_in_nf4_and_all_else_is_as_in_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    base, whole = load_base(checkpoint, "nf4", QUICK, CPU, tmp_path, "tuning"), load_model(checkpoint)
    expected = {name: module for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear)}
    seen = 0
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            assert module.weight.dtype == torch.uint8
            assert module.weight.numel() == expected[name].weight.numel() // 2
            quantised, inputs = nf4(expected[name].weight), torch.eye(module.in_features)
            with torch.no_grad():
                assert torch.allclose(module.eval()(inputs).T, quantised, atol=1e-6), name
            (gradient,) = torch.autograd.grad(module.train()(inputs.requires_grad_()).sum(), inputs)  # afterwards
            assert torch.allclose(gradient, quantised.sum(0).expand_as(gradient), atol=1e-4), name
            seen += 1
    assert seen == 4 * len(PROJECTIONS)
    rest = {name: tensor for name, tensor in whole.named_parameters() if "_proj" not in name}
    kept = dict(base.named_parameters())
    assert all(torch.equal(kept[name], tensor) for name, tensor in rest.items())
    assert not any(parameter.requires_grad for parameter in base.parameters())


@BOTH
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapter_trained_in_4_bits_merges_into_the_weights_in_full_precision(
    checkpoint: Path, prompts: Path, folder: Make, variant: Any
) -> None:
    adapter, merged = folder("adapter"), folder("merged")
    tune_nf4(checkpoint, prompts, adapter, QUICK.model_copy(update={"variant": variant}))
    losses = held_out(adapter)
    assert min(losses[1:]) < 0.9 * losses[0]
    merge_adapter(checkpoint, adapter, out=merged)
    assert read_config(merged) == read_config(checkpoint)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, merged))
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    if variant == "lora":
        own = load_file(adapter / "adapter_model.safetensors")
        name = "model.layers.1.mlp.down_proj"
        a, b = (own[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        update = b @ a * QUICK.alpha / QUICK.rank
        assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + update, atol=1e-6)


def test_the_merged_checkpoint_loads_as_a_stock_one_and_its_loss_is_about_the_trained_one(
    wide: Path, prompts: Path, folder: Make
) -> None:
    adapter, merged = folder("adapter"), folder("merged")
    tune_nf4(wide, prompts, adapter)
    merge_adapter(wide, adapter, out=merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert type(model).__name__ == "LlamaForCausalLM"
    untrained = folder("untrained")
    tune(merged, prompts, QUICK.model_copy(update={"epochs": 1, "learning_rate": 1e-9}), untrained)
    losses = held_out(adapter)
    assert held_out(untrained)[0] < (losses[0] + min(losses)) / 2


def test_nf4_changes_the_losses_a_little_and_the_same_seed_gives_the_same_bytes(
    wide: Path, prompts: Path, folder: Make
) -> None:
    whole, first, second = folder("whole"), folder("first"), folder("second")
    tune(wide, prompts, QUICK, whole)
    for out in (first, second):
        tune_nf4(wide, prompts, out)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert held_out(first)[0] != held_out(whole)[0]
    assert held_out(first)[0] == pytest.approx(held_out(whole)[0], rel=0.1)
    assert (first / "base.json").read_text() == (whole / "base.json").read_text()  # the weights in full precision


def test_tuning_in_bfloat16_learns_in_4_bits_too(layered: Path, prompts: Path, folder: Make) -> None:
    out = folder("adapter")
    tune_nf4(layered, prompts, out, QUICK.model_copy(update={"precision": "bfloat16"}))
    losses = held_out(out)
    assert min(losses[1:]) < losses[0]


def test_recomputed_activations_change_nothing_but_memory(layered: Path, prompts: Path, folder: Make) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        execution = ExecutionConfig(device="cpu", recompute_activations=recompute)
        tune_nf4(layered, prompts, folder(name), execution=execution)
    kept, recomputed = (held_out(prompts.parent / name) for name in ("kept", "recomputed"))
    assert kept == pytest.approx(recomputed, rel=1e-4)


@BOTH
def test_healing_in_4_bits_comes_closer_to_the_teacher(checkpoint: Path, folder: Make) -> None:
    teacher, out = folder("teacher"), folder("healed")
    rows = [list(range(start, start + 16)) for start in range(8)]
    columns = {
        "input_ids": rows,
        "tokens": [[t for token in row for t in (token + 1, token)] for row in rows],
        "logprobs": [[-0.1, -3.0] * len(row) for row in rows],
    }
    write_table(teacher / "teacher.parquet", columns, TEACHER_SCHEMA)
    healing = narrow(HealingConfig(tokens=128, rank=8, learning_rate=2e-2), TrainingConfig)
    heal(checkpoint, teacher, settings=HealSettings(healing, "nf4", 0), work=Work(out, CPU))
    losses = pq.read_table(out / "log.parquet").to_pydict()["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert read_config(out) == read_config(checkpoint)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_a_width_that_does_not_suit_is_named_before_any_weight_is_read(prompts: Path, folder: Make, wide: Path) -> None:
    odd, out = folder("odd"), folder("adapter")
    layers = (Layer(4, 2, 128), Layer(4, 2, 128), Layer(2, 1, 96), Layer(4, 2, 64))
    AutoModelForCausalLM.from_config(layered_config(read_config(wide), layers)).save_pretrained(odd)
    message = (
        r"model.quantization: got 'nf4' for .*odd, whose layer 2's MLP width is 96; allowed on a CPU: multiples of"
    )
    with pytest.raises(InputError, match=f"^{message} 64, as from pruning.channel_multiple = 64$"):
        tune_nf4(odd, prompts, out)


def run_on(checkpoint: Path, own_run: dict[str, Any], **pruning: Any) -> RunConfig:
    own_run["model"] = {"source": str(checkpoint), "quantization": "nf4", "dtype": "float32"}
    own_run["pruning"] |= pruning
    own_run["execution"] = {"device": "cpu"}
    return validate_config(own_run)


def test_a_run_whose_widths_will_not_suit_ends_before_any_work(tiny: Path, wide: Path, own_run: dict[str, Any]) -> None:
    multiple = r"pruning.channel_multiple: got 1; allowed with model.quantization = 'nf4' on a CPU: a multiple of 64"
    with pytest.raises(InputError, match=f"^{multiple}$"):
        preflight(run_on(wide, own_run))
    preflight(run_on(wide, own_run, channel_multiple=128))
    preflight(run_on(wide, own_run, channel_multiple=1, kinds=["attention"]))
    with pytest.raises(InputError, match=r"whose hidden size is 32; allowed on a CPU: multiples of 64"):
        preflight(run_on(tiny, own_run, channel_multiple=64))
    own_run["execution"] = {"device": "cuda", "dispatch": "gpu"}  # a GPU takes any width
    preflight_tailor(validate_config(own_run))


def test_without_bitsandbytes_a_line_says_what_to_install(wide: Path, own_run: dict[str, Any]) -> None:
    with (
        patch("tailored_llama.config.execution.find_spec", lambda name: None),
        pytest.raises(InputError, match=r"got 'nf4', which needs bitsandbytes; .*pip install 'tailored-llama\[nf4\]'$"),
    ):
        preflight(run_on(wide, own_run, channel_multiple=64))


def test_quantization_enters_the_keys_of_what_is_trained_and_not_the_dense_model_s(tiny: Path) -> None:
    plain, quantised = (
        validate_config({"benchmarks": ["piqa"], "model": {"source": str(tiny), "quantization": kind}})
        for kind in ("none", "nf4")
    )
    for settings in (lambda run: TuneSettings.of(run, ["piqa"]), HealSettings.of):
        assert settings(quantised) == replace(settings(plain), quantization="nf4") != settings(plain)
    assert DenseSettings.of(quantised.model) == DenseSettings.of(plain.model)
    assert RunConfig.model_validate(quantised.model_dump(mode="json")) == quantised


def test_tune_and_heal_on_the_command_line(
    layered: Path, wide: Path, own_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailored_llama.cli.main import main

    (tmp_path / "run.toml").write_text(as_toml(own_run))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(layered, "pruned")

    def run(*arguments: str) -> int:
        options = ["--config", "run.toml", "--set", "model.quantization=nf4", "--set", "execution.device=cpu"]
        monkeypatch.setattr("sys.argv", ["tailored-llama", *arguments, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run("tune", "pruned", "adapter", "--benchmark", "colours") == 0
    assert run("heal", "pruned", "healed", "--dense", str(wide), "--set", "healing.tokens=64") == 0
    monkeypatch.setattr("sys.argv", ["tailored-llama", "merge", "pruned", "adapter", "tailored"])
    with pytest.raises(SystemExit):
        main()
    for out in ("healed", "tailored"):
        assert json.loads((tmp_path / out / "config.json").read_text())["model_type"] == "tailored_llama"
        assert load_model(tmp_path / out).dtype == torch.float32
    assert run("tune", own_run["model"]["source"], "other", "--benchmark", "colours") == 2
