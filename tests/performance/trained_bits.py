"""Is it worth training for few bits? A tuned model, distilled from itself with its weights rounded in the forward pass.

    PYTHONPATH=tests:tests/performance python tests/performance/trained_bits.py FOLDER 'SmolLM2 135M=CHECKPOINT' …

All matrices are in `iq4_nl`, those of down and o projections in `q3_k` where their rows allow it. The forward pass
rounds the weights of all layers to nearest; gradients go straight through. The loss is the divergence from the model's
own 16 bits on every token of train examples, whose answers are not used. The files before and after are rounded for the
job, and scored by their weights in transformers on train examples that nothing else reads. `FOLDER/trained-bits.csv`
gets a row for each.
"""

import csv
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer
from gguf.quants import IQ4_NL
from torch import Tensor, nn

from fewer_bits import COLUMNS, JOB, kept, read, row, scored, write
from tailored_llama.config import validate_config
from tailored_llama.data import PromptSettings, draw_train, encode_prompt, load_template, render, without
from tailored_llama.data.benchmarks import load_examples
from tailored_llama.models import load_model, load_tokenizer
from tailored_llama.pipeline import FolderExecutor, steps
from tailored_llama.serving import gguf
from tailored_llama.serving.export import dequantise
from tailored_llama.serving.job import job_of
from tensor_types import LOW, SKIP, raised

NARROW, TYPE = r"(ffn_down|attn_output)\.", "q3_k"
EXAMPLES, BATCH = 600, 8


def to_nearest(weight: Tensor, levels: Tensor, block: int) -> Tensor:
    """A matrix in blocks of its rows: their largest weight is the first level, the others the nearest level."""
    blocks = weight.reshape(-1, block)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = largest / levels[0]
    scaled = blocks / step.where(step != 0, 1.0)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * step).reshape(weight.shape)


@contextmanager
def rounded_forward(model: nn.Module) -> Iterator[None]:
    """Every projection of the layers computes with rounded weights; gradients reach the weights themselves."""
    wide, narrow = torch.tensor(IQ4_NL.kvalues, dtype=torch.float32), torch.arange(-4.0, 4.0)

    def forward(module: nn.Linear, is_narrow: bool, values: Tensor) -> Tensor:
        weight = module.weight
        with torch.no_grad():
            error = to_nearest(weight, narrow if is_narrow else wide, 16 if is_narrow else 32) - weight
        return nn.functional.linear(values, weight + error, module.bias)

    projections = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in name
    ]
    for name, module in projections:
        is_narrow = name.endswith(("down_proj", "o_proj")) and not module.in_features % 256
        module.forward = partial(forward, module, is_narrow)  # type: ignore[method-assign]
    yield
    for _, module in projections:
        del module.forward


def train(checkpoint: Path, texts: Sequence[Sequence[int]], steps_: int, rate: float, out: Path) -> dict[str, Any]:
    """Train for few bits, write the checkpoint in 16 bits, and say the divergence at the beginning and the end."""
    torch.manual_seed(0)
    model, teacher = load_model(checkpoint).float(), load_model(checkpoint).float()
    trained = [weight for name, weight in model.named_parameters() if "layers." in name]
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers." in name)
    optimiser, start, losses = torch.optim.Adam(trained, lr=rate, betas=(0.9, 0.99)), time.process_time(), []
    draw = random.Random(0)
    with rounded_forward(model):
        for step in range(steps_):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps_)
            ids = [torch.tensor(text) for text in draw.sample(texts, BATCH)]
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
            asked = {"input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True), "attention_mask": mask}
            with torch.no_grad():
                right = teacher(**asked).logits[mask == 1].log_softmax(-1)
            own = model(**asked).logits[mask == 1].log_softmax(-1)
            loss = nn.functional.kl_div(own, right, log_target=True, reduction="batchmean")
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss))
            if not step % 10:
                print(f"step {step}: {sum(losses[-10:]) / len(losses[-10:]):.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    load_tokenizer(checkpoint).save_pretrained(out)
    return {"first": sum(losses[:10]) / 10, "last": sum(losses[-10:]) / 10, "seconds": time.process_time() - start}


def main(
    folder: Path,
    checkpoints: list[str],
    benchmark: str = "csqa",
    limit: int = 1000,
    steps_: int = typer.Option(150, "--steps"),
    rate: float = 2e-5,
) -> None:
    folder.mkdir(exist_ok=True)
    rows = []
    for given in checkpoints:
        model, _, source = given.partition("=")
        checkpoint, own = Path(source), folder / model.replace(" ", "-")
        own.mkdir(exist_ok=True)
        run = validate_config({"benchmarks": [benchmark], "model": {"source": source}})
        (asking,) = run.benchmarks
        rest = load_examples(asking, "train", run.store.downloads)
        _, tuned, held = draw_train(PromptSettings.of(run, asking, "train"), rest)
        rest = without(rest, tuned + held)
        random.Random(run.seed).shuffle(rest)
        template, tokenizer = load_template(run.prompts.template), load_tokenizer(checkpoint)
        asked = {benchmark: [render(asking, template, example) for example in rest[SKIP : SKIP + limit]]}
        further = [render(asking, template, example) for example in rest[SKIP + limit :][:EXAMPLES]]
        texts: list[list[int]] = []
        for document in (encode_prompt(tokenizer, prompt, 4096).document for prompt in further):
            texts.append([*document.prefix, *random.Random(len(texts)).choice(document.branches)])
        taught = own / "trained"
        found = read(own / "training.json", partial(train, checkpoint, texts, steps_, rate, taught))
        print(found, flush=True)
        before = scored(own / "bf16", checkpoint, asked)
        for name, made_of in {"as it is": checkpoint, "trained": taught}.items():
            with tempfile.TemporaryDirectory(dir=own) as scratch:
                runner = FolderExecutor(Path(scratch), run.store.downloads, run.execution)
                prompts = runner.open(steps.render_all(run).train[benchmark])
                job, file = job_of(made_of, {benchmark: prompts}, run.execution), own / name.replace(" ", "-")
                assert job
                layout: Any = partial(raised, NARROW, TYPE)
                with patch.object(gguf, "parts_of", layout):
                    made = partial(write, made_of, LOW, JOB, job, file.with_suffix(".gguf"))
                    written = read(file.with_suffix(".json"), made)
                    (weights := Path(scratch) / file.name).mkdir()
                    if not all(path.is_file() for path in kept(file, asked)):
                        dequantise(made_of, file.with_suffix(".gguf"), weights)
                after = scored(file, weights, asked)[benchmark] | written
            rows.append(row(model, benchmark, name, JOB, asked[benchmark], before[benchmark], after))
            print(rows[-1], flush=True)
    with (folder / "trained-bits.csv").open("w", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(
            [f"{v:{digits}}" for v, digits in zip(astuple(one), COLUMNS.values(), strict=True)] for one in rows
        )


if __name__ == "__main__":
    typer.run(main)
