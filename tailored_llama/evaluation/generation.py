"""Written answers: greedy generation."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tailored_llama.data import check_room
from tailored_llama.errors import InputError
from tailored_llama.evaluation.settings import WrittenAnswer
from tailored_llama.models import encode, token_budget, within_memory
from tailored_llama.progress import Progress, silent

log = logging.getLogger(__name__)

LEAST_TOKENS = 4_096  # of a batch: each new token reads all weights, whether for one prompt or for several


def generate(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    until: WrittenAnswer,
    batch_tokens: int | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Continue every context greedily: only the tokens that end a text are taken from the checkpoint's own settings.

    Contexts of similar length share a left-padded batch of at most `batch_tokens` tokens, padding and new tokens
    included; None picks a budget for the device. When memory runs out, the budget is halved for the remaining batches.
    A context that is too long for the model loses its start.

    Raises:
        InputError: a context has no token, or the model's context cannot hold the new tokens.
    """
    new, limit = until.max_new_tokens, model.config.max_position_embeddings
    check_room(new, limit)
    whole = [encode(tokenizer, context) for context in contexts]
    encoded = [ids[new - limit :] for ids in whole]
    if cut := sum(map(len, whole)) - sum(map(len, encoded)):
        told = "%d tokens of prompts are cut off at their start: the context of %d has room for answers of %d"
        log.warning(told, cut, limit, new)
    if [] in encoded:
        empty = encoded.index([])
        raise InputError(f"prompt {empty}: got {contexts[empty]!r}; allowed: a text of at least one token")
    # Penalties and forbidden tokens would be in force without sampling, too. Servers that answer with a file have none.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    texts, done, budget = [""] * len(contexts), 0, batch_tokens or max(token_budget(None, model), LEAST_TOKENS)
    lengths, run = [len(ids) + new for ids in encoded], partial(_generate_batch, model, tokenizer, encoded, until)
    # On a CPU in bfloat16, torch multiplies a slice, such as the last states of several prompts, many times as slowly.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))
    try:
        for batch, continuations in within_memory(lengths, budget, run, padded=True):
            for index, text in zip(batch, continuations, strict=True):
                texts[index] = text
            progress(done := done + len(batch), len(contexts))
    finally:
        hook.remove()
    return texts


def _generate_batch(
    model: Any, tokenizer: Any, encoded: Sequence[list[int]], until: WrittenAnswer, batch: Sequence[int]
) -> list[str]:
    longest = max(len(encoded[i]) for i in batch)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = [[padding] * (longest - len(encoded[i])) + encoded[i] for i in batch]
    seen = [[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in batch]
    stops = [_StopInNewText(tokenizer, longest, until.stop)] if until.stop else []
    with torch.inference_mode():
        written = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            max_new_tokens=until.max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList(stops),
        )
    texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return [_until_stop(text, until.stop) for text in texts]


def _until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))]


class _StopInNewText(StoppingCriteria):
    """End a sequence once its new text has a stop string; transformers' own criterion also reads the prompt."""

    def __init__(self, tokenizer: Any, start: int, stop: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
