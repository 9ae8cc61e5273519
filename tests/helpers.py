"""What tests are made of: a tiny random Llama with grouped-query attention, a byte tokenizer, a small benchmark."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tailored_llama import training
from tailored_llama.config import (
    AdapterConfig,
    BenchmarkConfig,
    ExecutionConfig,
    GgufType,
    Metric,
    PlanConfig,
    PruningConfig,
    ReconstructionConfig,
    TuningConfig,
    Work,
    narrow,
    validate_config,
)
from tailored_llama.data import BenchmarkSource, PromptSettings, Split, load_benchmark, render_prompts
from tailored_llama.data.prompts import PROMPTS_SCHEMA
from tailored_llama.data.settings import Draw, Wording
from tailored_llama.evaluation.scores import PREDICTIONS_SCHEMA
from tailored_llama.models import Document, Header, distinct, encode_pair, packed_states, target_logprobs
from tailored_llama.progress import Progress, silent
from tailored_llama.pruning import PruneSettings, SplitSettings, choose_split, prune_model
from tailored_llama.serving import write_gguf
from tailored_llama.store import write_table
from tailored_llama.training import TuneSettings

UNFITTED = ReconstructionConfig(method="none")
CPU = ExecutionConfig(device="cpu")


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; 256 is the end (and beginning) of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


@cache
def words(count: int, seed: int = 0) -> str:
    """A text of made-up words, a few of them frequent, with numbers, capitals, accents and line ends."""
    rng = np.random.default_rng(seed)
    syllables = [c + v for c in "bdfgklmnprst" for v in "aeiou"] + ["ção", "ñu", "ün", "żó"]
    lexicon = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(400)]
    drawn = [lexicon[min(int(rng.zipf(1.3)), 400) - 1] for _ in range(count)]
    ends = [".\n" if i % 11 == 10 else f" {rng.integers(10_000)}," if i % 17 == 16 else "" for i in range(count)]
    return " ".join(
        (w.capitalize() if i % 11 == 0 else w) + end for i, (w, end) in enumerate(zip(drawn, ends, strict=True))
    )


def bpe_tokenizer(vocab_size: int = 704) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `words`, with a special token, an added one and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(words(20_000).splitlines(), trainer)
    tokenizer.add_tokens(["<name>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    wrapped.chat_template = "{% for m in messages %}<|user|>{{ m['role'] }} said: {{ m['content'] }}<|end|>{% endfor %}"
    return wrapped


def spm_tokenizer(vocab_size: int = 704) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, as converted from SentencePiece: every pair that makes a token is a merge."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, max_token_length=12)
    tokenizer.train_from_iterator(words(20_000).split("\n"), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are plain tokens
    vocab = state["model"]["vocab"]
    splits = ((t[:i], t[i:]) for t in vocab if not t.startswith("<") for i in range(1, len(t)))
    pairs = [pair for pair in splits if vocab.keys() >= set(pair)]
    state["model"]["merges"] = sorted(map(list, pairs), key=lambda pair: vocab["".join(pair)])
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_worded_llama(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer of words."""
    tokenizer = tokenizer or bpe_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    save_tiny_llama(folder, **({"vocab_size": len(tokenizer)} | ids | changes))
    tokenizer.save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_chatting_llama(
    folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, template: str = CHATML, **changes: Any
) -> Path:
    """As `save_worded_llama`, with a chat template, and tokens around a turn that are not those around a text."""
    tokenizer = tokenizer or bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return save_worded_llama(folder, tokenizer, **({"max_position_embeddings": 512} | changes))


def worded_gguf(folder: Path, gguf_type: GgufType = "f16") -> Path:
    """A tiny Llama with a tokenizer of words, as one GGUF file."""
    write_gguf(save_worded_llama(folder / "of-the-file"), gguf_type=gguf_type, out=folder / "worded.gguf")
    return folder / "worded.gguf"


def save_tiny_llama(
    folder: Path, seed: int = 0, architecture: str = "llama", noise: float = 0.0, **changes: Any
) -> Path:
    """Write a seeded 4-layer Llama or kin (4 query heads over 2 KV heads, 24 channels), with its tokenizer.

    `noise` moves norms and biases off the ones and zeros that would hide a wrong index.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "initializer_range": 0.2,  # large enough that no two logits are alike by accident
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **(sizes | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def prune(
    model: Path,
    groups: Path,
    importance: Path,
    text: Path | None,
    *,
    ratio: float,
    out: Path,
    pruning: PruningConfig | None = None,
    reconstruction: ReconstructionConfig = UNFITTED,
    counts: Path | None = None,
    prompts: Mapping[str, Path] | None = None,
    execution: ExecutionConfig = CPU,
) -> dict[str, Any]:
    """Prune a checkpoint as the stages do.

    With counts of tokens, these leave too; a split that is not fixed is measured on the prompts.
    """
    plan, split = narrow(pruning or PruningConfig(kinds=("attention", "mlp")), PlanConfig), None
    if counts:
        split = out.with_name(f"{out.name}-split")
        split.mkdir()
        inputs = (model, groups, importance, counts, prompts or {})
        choose_split(*inputs, settings=SplitSettings(ratio, plan), work=Work(split, execution))
    settings = PruneSettings(ratio, plan, reconstruction)
    return prune_model(model, groups, importance, text, split, settings=settings, work=Work(out, execution))


def tune_settings(tuning: TuningConfig, **changes: Any) -> TuneSettings:
    """Tuning on one benchmark, `own`, by seed 0, where the changes do not say otherwise."""
    adapter, metrics = narrow(tuning, AdapterConfig), (("own", "acc_norm"),)
    shots = None if tuning.shots == "auto" else tuning.shots
    return replace(TuneSettings(adapter, metrics, shots, tuning.held_out, 0), **changes)


def tune(
    checkpoint: Path,
    prompts: Path,
    tuning: TuningConfig,
    out: Path,
    *,
    metric: Metric = "acc_norm",
    execution: ExecutionConfig = CPU,
    progress: Progress = silent,
    resume: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Tune on one benchmark's prompts as the stage does, by `tune_settings` with the changes."""
    settings = tune_settings(tuning, metrics=(("own", metric),), **changes)
    work = Work(out, execution, progress=progress, resume=resume)
    return training.tune(checkpoint, {"own": prompts}, settings=settings, work=work)


def add_merge(folder: Path) -> Path:
    """Give the tiny model's tokenizer a merge: llama.cpp takes none without."""
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"] |= {"vocab": state["model"]["vocab"] | {"<|end|>": 256, "hi": 257}, "merges": [["h", "i"]]}
    file.write_text(json.dumps(state))
    return folder


COLOURS = ("red", "blue", "green", "black")
THINGS = ("sky", "coal", "blood", "grass", "ink", "rust", "leaf", "sea")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_benchmark(**fields: Any) -> BenchmarkConfig:
    """A benchmark with what its file decides, as every entry reads it."""
    (benchmark,) = validate_config({"benchmarks": [fields]}).benchmarks
    return benchmark


def write_own_benchmark(folder: Path, train: int = 24, evaluation: int = 12) -> dict[str, Any]:
    """Write a two-file benchmark of the user's own and return its table of the configuration."""
    for name, count in (("train", train), ("evaluation", evaluation)):
        rows = [
            {
                "question": f"{name} {i}: the {THINGS[i % len(THINGS)]} is",
                "options": list(COLOURS),
                "right": i % len(COLOURS),
            }
            for i in range(count)
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return {
        "name": "colours",
        "train": str(folder / "train.jsonl"),
        "evaluation": str(folder / "evaluation.jsonl"),
        "context": "question",
        "choices": "options",
        "answer": "right",
        "instruction": "Name the colour.",
    }


def own_configuration(folder: Path, model: Path) -> dict[str, Any]:
    """A whole run configuration on a tiny model and the user's own benchmark, as plain data; all files in a folder."""
    data = folder / "data"
    data.mkdir()
    text = data / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {
        "benchmarks": [write_own_benchmark(data)],
        "model": {"source": str(model), "dtype": "float32"},
        "calibration": {"source": str(text), "samples": 4, "tokens": 16},
        "pruning": {"ratios": [0.2], "kinds": ["attention", "mlp"], "min_channels": 4},
        "tuning": {"shots": 8, "held_out": 4, "epochs": 2, "learning_rate": 1e-2, "dense": False},
        "perplexity": {"source": str(text), "window": 32, "tokens": 128},
        "store": {
            "root": str(folder / "store"),
            "downloads": str(folder / "downloads"),
            "reports": str(folder / "reports"),
        },
    }


def load_and_render(benchmark: BenchmarkConfig, folder: Path, **changes: Any) -> Path:
    """Load a benchmark below a folder and render its evaluation split, as a run does; returns the prompts' folder."""
    examples, prompts = folder / "examples", folder / "prompts"
    for one in (examples, prompts):
        one.mkdir(parents=True)
    load_benchmark(settings=BenchmarkSource(benchmark), work=Work(examples))
    render_split(examples, prompts, benchmark, **changes)
    return prompts


def render_split(
    examples: Path,
    out: Path,
    benchmark: BenchmarkConfig,
    split: Split = "evaluation",
    template: str = "harness",
    dense: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Render one split as the stage does; `changes` are what is drawn of the train split, and a `count`."""
    count = changes.pop("count", None)
    settings = PromptSettings(Wording(template, benchmark), split, Draw(**changes), count)
    return render_prompts(examples, dense, settings=settings, work=Work(out))


def write_prompts(folder: Path, *contexts: str) -> None:
    """Rendered prompts of an evaluation split, each with the choices no, which is right, and yes."""
    n = len(contexts)
    columns = {
        "example": range(n), "split": ["evaluation"] * n, "contexts": [[text, text] for text in contexts],
        "continuations": [[" no", " yes"]] * n, "answer": [0] * n, "choice_lengths": [[2, 3]] * n, "messages": [""] * n,
        "template": ["harness"] * n, "is_ended": [True] * n,
    }  # fmt: skip
    write_table(folder / "prompts.parquet", columns, PROMPTS_SCHEMA)


def as_toml(run: dict[str, Any]) -> str:
    """A run configuration as TOML: JSON's strings, numbers and lists are TOML's too."""
    tables = ["{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) + "}" for table in run["benchmarks"]]
    lines = [f"benchmarks = [{', '.join(tables)}]"]
    for section, fields in run.items():
        if section != "benchmarks":
            lines.append(f"[{section}]")
            lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(lines) + "\n"


def scored(folder: Path, right: Sequence[int], floor: float, metric: str = "acc_norm", first: int = 0) -> Path:
    """A scored benchmark: `right` says which of its examples are answered rightly under the headline metric."""
    folder.mkdir(parents=True)
    hit, count = np.array(right, dtype=int), len(right)
    columns: dict[str, Any] = {
        "example": range(first, first + count),
        "loglikelihoods": [[0.0, -1.0]] * count,
        "prediction": hit if metric == "acc" else [0] * count,
        "prediction_norm": hit if metric == "acc_norm" else [0] * count,
        "answer": [1] * count,
    }
    write_table(folder / "predictions.parquet", columns, PREDICTIONS_SCHEMA)
    error = float(np.std(hit, ddof=1)) / count**0.5
    found = {"benchmark": folder.name, "metric": metric, "examples": count, "floor": floor}
    found |= {metric: float(hit.mean()), f"{metric}_stderr": error}
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder


def hits(right: int, of: int = 100) -> list[int]:
    return [1] * right + [0] * (of - right)


def plain_loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """One sequence, one forward pass, all logits: what nobody can misread."""
    before, after = encode_pair(tokenizer, context, continuation)
    ids = torch.tensor([before + after])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(after))


def packed_logprobs(
    model: Any,
    documents: Sequence[Document],
    positions: Sequence[int],
    targets: Sequence[int],
    header: Header | None = None,
) -> torch.Tensor:
    """Log-probability of `targets[i]` after position `positions[i]` of a packed row."""
    states = packed_states(model, documents, distinct(positions), header)
    return target_logprobs(model, states, positions, targets)
