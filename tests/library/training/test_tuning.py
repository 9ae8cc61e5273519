"""Tuning: learns, repeats, stops, and writes adapters that PEFT loads."""

import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from threading import get_ident
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP

from helpers import CPU, render_split, save_tiny_llama, tune, tune_settings, write_own_benchmark
from hybrids import HYBRIDS, save_hybrid
from tailored_llama import training
from tailored_llama.config import BenchmarkConfig, ExecutionConfig, TuningConfig, Work
from tailored_llama.data import Prompt, read_prompts
from tailored_llama.errors import InputError
from tailored_llama.models import (
    FAMILIES,
    HEAD_POSITIONS,
    add_adapter,
    encode_pair,
    load_model,
    load_tokenizer,
    merge_adapter,
    packed_attention,
    streaming,
    using_threads,
)
from tailored_llama.training import loop, tuning
from tailored_llama.training.loop import Course, learning_rate
from tailored_llama.training.losses import Sample, outcomes, sample_losses
from tailored_llama.training.state import trained
from tailored_llama.training.tuning import encode_sample

QUICK = TuningConfig(epochs=3, learning_rate=2e-2, batch_size=4, dropout=0.1)


def log_of(adapter: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(adapter / "log.parquet").to_pydict())


def test_tuning_lowers_the_loss_and_peft_loads_the_adapter(
    tiny: Path, prompts: Path, folder: Callable[[str], Path]
) -> None:
    out = folder("adapter")
    tune(tiny, prompts, QUICK, out)
    held = [loss for loss in log_of(out)["held_out_loss"] if loss is not None]
    assert min(held[1:]) < 0.8 * held[0]
    assert held_out_loss(tiny, out, prompts) == pytest.approx(min(held), abs=1e-4)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_losses_are_those_of_a_plain_loop_over_peft(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], dtype: str, near: float
) -> None:
    checkpoint, out, settings = folder("checkpoint"), folder("out"), QUICK.model_copy(update={"dropout": 0.0})
    load_model(tiny).to(getattr(torch, dtype)).save_pretrained(checkpoint)
    load_tokenizer(tiny).save_pretrained(checkpoint)
    tune(checkpoint, prompts, settings.model_copy(update={"batch_size": 8}), out)  # all shots in a step

    torch.manual_seed(0)
    targets = sorted({name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")})
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, task_type="CAUSAL_LM")
    model, tokenizer, losses = get_peft_model(load_model(checkpoint), lora), load_tokenizer(checkpoint), []
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    for step in range(1, 4):
        optimizer.param_groups[0]["lr"] = learning_rate(step, 3, settings)
        mean = torch.zeros(())
        for prompt in (shots := read_prompts(prompts, "shots")):
            pair = encode_pair(tokenizer, prompt.contexts[prompt.answer], prompt.continuations[prompt.answer])
            answer = [*pair[1], tokenizer.eos_token_id]  # all rows have the same choices
            logits = model(torch.tensor([[*pair[0], *answer]])).logits[0, len(pair[0]) - 1 : -1].float()
            mean = mean + torch.nn.functional.cross_entropy(logits, torch.tensor(answer)) / len(shots)
        losses.append(float(mean.detach()))
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert log_of(out)["loss"][1:] == pytest.approx(losses, rel=near)
    assert losses[-1] < losses[0]
    saved = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_fused_projections_get_the_adapters_of_their_parts(prompts: Path, folder: Callable[[str], Path]) -> None:
    sizes = {"pad_token_id": 0, "sliding_window": None}
    dense, out = save_tiny_llama(folder("phi"), architecture="phi3", **sizes), folder("adapter")
    tune(dense, prompts, QUICK, out)
    held = [loss for loss in log_of(out)["held_out_loss"] if loss is not None]
    assert min(held[1:]) < held[0]
    tuned = {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")}
    assert tuned == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def held_out_loss(checkpoint: Path, adapter: Path, prompts: Path, skip: int = 0) -> float:
    """The held-out loss of a saved adapter, by plain forward passes over PEFT's own loader.

    `skip`: logits that stand before those of the text.
    """
    tuned = PeftModel.from_pretrained(load_model(checkpoint), adapter).eval()
    tokenizer, losses = load_tokenizer(checkpoint), []
    for prompt in read_prompts(prompts, "held_out"):
        before, after = encode_pair(tokenizer, prompt.contexts[prompt.answer], prompt.continuations[prompt.answer])
        with torch.no_grad():
            logprobs = tuned(torch.tensor([before + after])).logits[0, skip:].log_softmax(-1)
        losses.append(-sum(float(logprobs[len(before) + i - 1, t]) for i, t in enumerate(after)) / len(after))
    return sum(losses) / len(losses)


def test_the_same_seed_gives_the_same_bytes(tiny: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    first, second, other = folder("first"), folder("second"), folder("other")
    for out, seed in ((first, 0), (second, 0), (other, 1)):
        tune(tiny, prompts, QUICK, out, seed=seed)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    weights = [load_file(out / "adapter_model.safetensors") for out in (first, other)]
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Killed(BaseException):
    """What a kill looks like from within."""


# Two steps an epoch: a kill within one, at its end, and after it.
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_killed_tuning_goes_on_and_ends_with_the_same_bytes(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], step: int
) -> None:
    keep = ExecutionConfig(device="cpu", keep_state_every=2)
    whole, killed, state = folder("whole"), folder("killed"), folder("state")
    tune(tiny, prompts, QUICK, whole)
    held = [loss for loss in log_of(whole)["held_out_loss"] if loss is not None]
    assert min(held[1:]) < 0.9 * held[0]

    def kill(done: int, total: int) -> None:
        if done == step:
            raise Killed

    with pytest.raises(Killed):
        tune(tiny, prompts, QUICK, killed, execution=keep, progress=kill, resume=state)
    steps: list[int] = []
    tune(tiny, prompts, QUICK, killed, execution=keep, progress=lambda done, total: steps.append(done), resume=state)
    assert steps[0] == (step - 1) // 2 * 2 + 1  # progress is told before the state of the step is kept
    for path in whole.iterdir():
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_killed_tuning_of_every_type_goes_on(
    tmp_path: Path, prompts: Path, folder: Callable[[str], Path], architecture: str
) -> None:
    if architecture in HYBRIDS:
        dense = save_hybrid(tmp_path / "dense", architecture)
    else:
        dense = save_tiny_llama(tmp_path / "dense", architecture=architecture, noise=0.1, pad_token_id=0)
    keep, settings = (
        ExecutionConfig(device="cpu", keep_state_every=1),
        QUICK.model_copy(update={"epochs": 2, "dropout": 0.0}),
    )

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    tune(dense, prompts, settings, folder("whole"))
    with pytest.raises(Killed):
        tune(dense, prompts, settings, folder("killed"), execution=keep, progress=kill, resume=folder("state"))
    tune(dense, prompts, settings, tmp_path / "killed", execution=keep, resume=tmp_path / "state")
    first, second = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_experts_take_no_dropout(tmp_path: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    dense = save_hybrid(tmp_path / "dense", "olmoe")
    with pytest.raises(InputError, match=r"^dropout: got 0.1 for a mixture of experts; allowed: 0$"):
        tune(dense, prompts, QUICK, folder("adapter"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def age(path: Path) -> None:
    """Let the state say that another version of the library wrote it."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {"format": "1"})


BROKEN_STATES: dict[str, Callable[[Path, Path], Any]] = {
    "garbage": lambda path, other: path.write_bytes(b"not a state"),
    "cut short": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "bit flipped": lambda path, other: flip(path),
    "a pickle": lambda path, other: torch.save({"adapter": torch.ones(3)}, path),
    "of another version": lambda path, other: age(path),
    "of another training": lambda path, other: shutil.copy(other, path),
    "safetensors of something else": lambda path, other: save_file({"weight": torch.ones(3)}, path, {"state": "{}"}),
}


@pytest.mark.parametrize("damage", BROKEN_STATES.values(), ids=BROKEN_STATES)
def test_a_broken_state_is_left_aside(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], damage: Callable[[Path, Path], Any]
) -> None:
    whole, again, state, other = folder("whole"), folder("again"), folder("state"), folder("other")
    keep = ExecutionConfig(device="cpu", keep_state_every=2)

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    for where, rank in ((state, QUICK.rank), (other, QUICK.rank + 1)):
        settings = QUICK.model_copy(update={"rank": rank})
        with pytest.raises(Killed):
            tune(tiny, prompts, settings, folder(f"killed-{rank}"), execution=keep, progress=kill, resume=where)
    damage(state / "state.safetensors", other / "state.safetensors")
    tune(tiny, prompts, QUICK, whole)
    steps: list[int] = []
    tune(tiny, prompts, QUICK, again, progress=lambda done, total: steps.append(done), resume=state)
    assert steps[0] == 1
    assert log_of(again) == log_of(whole)


def test_micro_batches_change_nothing_but_memory(tiny: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    without_dropout = QUICK.model_copy(update={"dropout": 0.0})
    for name, budget in (("small", 64), ("large", 4096)):
        split = without_dropout.model_copy(update={"micro_batch_tokens": budget})
        tune(tiny, prompts, split, folder(name))
    small, large = (log_of(prompts.parent / name)["loss"] for name in ("small", "large"))
    assert small[1:] == pytest.approx(large[1:], rel=1e-3)


def test_where_memory_runs_out_a_step_is_begun_again_in_smaller_parts(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = QUICK.model_copy(update={"dropout": 0.0})
    tune(tiny, prompts, quiet, folder("whole"))
    real, refused = sample_losses, []

    def small_only(model: Any, batch: Any) -> Any:
        if sum(map(len, batch)) > 80 and model.training:
            refused.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch)

    monkeypatch.setattr("tailored_llama.training.losses.sample_losses", small_only)
    tune(tiny, prompts, quiet, folder("parts"))
    assert len(refused) == 1  # later steps begin with what did fit
    whole, parts = (log_of(prompts.parent / name)["loss"] for name in ("whole", "parts"))
    assert parts[1:] == pytest.approx(whole[1:], rel=1e-3)

    def never(*given: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("tailored_llama.training.losses.sample_losses", never)
    with pytest.raises(MemoryError):
        tune(tiny, prompts, quiet, folder("none"))


def test_logits_are_bounded_forth_and_back_and_small_steps_read_the_head_once(tiny: Path) -> None:
    tokenizer, model = load_tokenizer(tiny), add_adapter(load_model(tiny), QUICK.model_copy(update={"dropout": 0.0}))
    texts = [letter * 150 for letter in "abcd"]
    prompts = [Prompt(i, (text[:9],), (" " + text,), 0, (150,), is_ended=True) for i, text in enumerate(texts)]
    samples, rows, kept = [encode_sample(tokenizer, 256, None, prompt) for prompt in prompts], list[int](), list[int]()
    model.get_output_embeddings().register_forward_hook(lambda _, given, logits: rows.append(logits.shape[-2]))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-1:] == (model.config.vocab_size,):
            kept.append(len(tensor))
        return tensor

    def gradients(*batches: list[Sample]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        rows.clear()
        for batch in batches:
            kept.clear()
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                losses = sample_losses(model, batch)
            torch.stack(losses).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in trained(model).items()}

    with packed_attention(model):
        alone = gradients(*([sample] for sample in samples))
        assert rows == [152] * 4
        assert sum(kept) >= 152
        together = gradients(samples)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert max(rows) <= HEAD_POSITIONS < 4 * 152
    assert sum(kept) <= HEAD_POSITIONS
    rows.clear()
    found = outcomes(model, samples, QUICK, 2048)
    assert sum(rows) == 4 * 152
    assert max(rows) <= HEAD_POSITIONS
    assert found == [outcomes(model, [sample], QUICK, 2048)[0] for sample in samples]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3"])
def test_tuning_tells_if_less_is_free_than_it_holds_and_not_if_plenty_is(
    tmp_path: Path,
    prompts: Path,
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    architecture: str,
    recompute: bool,
) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.02, "pad_token_id": 0}
    checkpoint = save_tiny_llama(tmp_path / "model", architecture=architecture, **wide)
    real, held = sample_losses, list[int]()

    def losses(model: Any, batch: Any) -> Any:
        here: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            here[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            found = real(model, batch)
        for parameter in model.parameters():
            here[parameter.untyped_storage().data_ptr()] = parameter
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in here.values()))
        return found

    monkeypatch.setattr("tailored_llama.training.losses.sample_losses", losses)
    execution = ExecutionConfig(device="cpu", recompute_activations=recompute)
    tune(checkpoint, prompts, QUICK.model_copy(update={"dropout": 0.0}), folder("whole"), execution=execution)
    assert "cannot be streamed" not in caplog.text
    for free, told in ((max(held), True), (3 * max(held), False)):
        caplog.clear()
        monkeypatch.setattr(streaming, "free_memory", lambda device, free=free: free)
        tune(checkpoint, prompts, QUICK, folder(f"free-{free}"), execution=execution)
        assert ("but tuning cannot be streamed" in caplog.text) is told


def test_a_small_step_takes_one_thread_and_gives_the_others_back(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def losses(*args: Any) -> Any:
        seen.append((get_ident(), torch.get_num_threads()))
        return sample_losses(*args)

    monkeypatch.setattr("tailored_llama.training.losses.sample_losses", losses)
    with using_threads(2):
        tune(tiny, prompts, QUICK, folder("out"))
        assert set(seen) == {(get_ident(), 1)}
        assert torch.get_num_threads() == 2


def test_recomputed_activations_change_nothing_but_memory(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, computed = LlamaMLP.forward, {False: 0, True: 0}
    for name, recompute in (("kept", False), ("recomputed", True)):

        def counted(self: Any, states: Any, recompute: bool = recompute) -> Any:
            computed[recompute] += 1
            return real(self, states)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        execution = ExecutionConfig(device="cpu", recompute_activations=recompute)
        tune(tiny, prompts, QUICK, folder(name), execution=execution)
    kept, recomputed = (log_of(prompts.parent / name)["loss"] for name in ("kept", "recomputed"))
    assert recomputed[1:] == pytest.approx(kept[1:], rel=1e-4)
    assert computed[True] > 1.3 * computed[False]


def test_tuning_stops_when_the_held_out_loss_no_longer_falls(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, calls = folder("adapter"), loop.training_loss, count()

    def rising(*arguments: Any) -> float:
        """From the third epoch on far higher: a training that rises by itself does so on some CPUs only."""
        return real(*arguments) + (100 if next(calls) > 2 else 0)

    monkeypatch.setattr(loop, "training_loss", rising)
    tune(tiny, prompts, QUICK.model_copy(update={"epochs": 20}), out)
    log = log_of(out)
    held = [loss for loss in log["held_out_loss"] if loss is not None]
    assert log["epoch"][-1] == held.index(min(held)) + 2
    assert held[-1] > min(held)
    assert held_out_loss(tiny, out, prompts) == pytest.approx(min(held), abs=1e-3)  # the best one is kept


def test_a_loss_that_is_not_a_number_stops_with_the_step(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample_losses
    calls = iter(range(1000))

    def broken(*given: Any) -> Any:
        factor = float("nan") if next(calls) >= 4 else 1
        return [loss * factor for loss in real(*given)]

    monkeypatch.setattr("tailored_llama.training.losses.sample_losses", broken)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d+ of 6"):
        tune(tiny, prompts, QUICK, folder("adapter"))


def test_the_learning_rate_warms_up_then_follows_its_schedule() -> None:
    def rates(**changes: Any) -> list[float]:
        config = TuningConfig(learning_rate=0.5, warmup=0.2, **changes)
        return [learning_rate(step, 10, config) for step in range(1, 11)]

    cosine = [0.25 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates() == pytest.approx([0.25, 0.5, *cosine])
    assert rates(schedule="linear") == pytest.approx([0.25, 0.5, *(0.5 * (1 - step / 8) for step in range(8))])
    assert rates(schedule="constant_with_warmup") == pytest.approx([0.25] + [0.5] * 9)
    assert rates(schedule="constant") == [0.5] * 10


def test_a_continuation_longer_than_the_context_is_named(tiny: Path) -> None:
    prompt = Prompt(3, ("short",), (" " + "x" * 300,), 0, (300,))
    with pytest.raises(InputError, match=r"^row 3: got an answer of 301 tokens, which begins with 'x{40}'; allowed: "):
        encode_sample(load_tokenizer(tiny), 256, None, prompt)


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_an_adapter_from_elsewhere_is_merged_as_peft_reads_it(
    tiny: Path, folder: Callable[[str], Path], variant: str
) -> None:
    out, merged = folder("adapter"), folder("merged")
    settings: dict[str, Any] = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", variant: True}
    get_peft_model(load_model(tiny), LoraConfig(**settings)).save_pretrained(out)
    merge_adapter(tiny, out, out=merged)
    ids = torch.tensor([[5, 9, 77, 14]])
    with torch.no_grad():
        attached = PeftModel.from_pretrained(load_model(tiny), out).eval()(ids).logits
        assert (attached - load_model(tiny)(ids).logits).abs().max() > 1e-3
        torch.testing.assert_close(load_model(merged)(ids).logits, attached, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_a_soft_prompt_is_refused(tiny: Path, folder: Callable[[str], Path], config: Any) -> None:
    out, settings = folder("soft"), config(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(load_model(tiny), settings).save_pretrained(out)
    kind = settings.peft_type.value
    with pytest.raises(InputError, match=rf"^adapter .*: is {kind}; allowed: LoRA or a variant of it$"):
        load_model(tiny, out)


def test_a_mixture_gives_every_benchmark_its_part(
    tiny: Path, prompts: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = BenchmarkConfig(**write_own_benchmark(folder("more"))), folder("other")
    render_split(prompts.parent / "examples", other, own, "train", "reread", shots=8, held_out=8)
    config = TuningConfig(epochs=1, shots=5, held_out=3, batch_size=1)
    settings, work = tune_settings(config, metrics=(("once", "acc"), ("twice", "acc"))), Work(folder("adapter"), CPU)
    seen: dict[str, list[int]] = {}

    def spy(model: Any, course: Course, *given: Any) -> Any:
        seen["shots"], seen["held_out"] = ([len(s) for s in part] for part in (course.samples, course.held_out))
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        training.tune(tiny, {"once": prompts, "twice": other}, settings=settings, work=work)
    longest = max(seen["shots"][:3])
    assert (len(seen["shots"]), len(seen["held_out"])) == (5, 3)
    assert min(seen["shots"][3:]) > longest  # read twice: longer
    assert seen["held_out"][2] > max(seen["held_out"][:2])


def test_bfloat16_products_leave_adapters_in_float32(tiny: Path, prompts: Path, folder: Callable[[str], Path]) -> None:
    settings = TuningConfig(epochs=2, learning_rate=2e-2, batch_size=4, dropout=0.0)
    for precision in ("float32", "bfloat16"):
        tune(tiny, prompts, settings.model_copy(update={"precision": precision}), folder(precision))
    exact, rounded = (
        pq.read_table(prompts.parent / name / "log.parquet").to_pydict()["loss"][1:] for name in ("float32", "bfloat16")
    )
    assert exact != rounded
    saved = load_file(prompts.parent / "bfloat16" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert rounded == pytest.approx(exact, rel=0.05)
