"""The model `tailored` of lm-evaluation-harness: its own `hf`, with log-likelihoods from packed rows.

Importing this module registers the model. It needs the extra `lm-eval`, so nothing else here imports it.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from tqdm import tqdm

from tailored_llama.errors import InputError
from tailored_llama.models import (
    LAYERED,
    LAYERED_PREFIX,
    Document,
    Header,
    encode_header,
    learnt_header,
    load_model,
    packed_attention,
    packed_logprobs,
    token_budget,
    within_memory,
)

Ids = tuple[int, ...]
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, and context and continuation as token ids
Answer = tuple[float, bool]  # the log-likelihood of a continuation, and whether it is the greedy one

# At about so many tokens attention costs as much as the linear layers: six times the hidden size of a small model.
_ATTENTION_COSTS = 4_096
_MOST = 128  # inputs in one document; more would save little, and choosing them would take longer


@register_model("tailored")
class TailoredLM(HFLM):  # type: ignore[misc]
    """HFLM with log-likelihoods from packed rows: equal to its own, several times sooner. All else is HFLM's.

    The probabilities are always taken in float32. HFLM's `batch_size` counts for generation and whole texts only.
    `pretrained` is a checkpoint folder, or whatever else HFLM loads. `adapter` is the folder of an adapter trained on
    it, which is merged into the weights.

    Raises:
        InputError: the architecture is not supported, the model is to be split across devices, or the adapter does
            not belong to the checkpoint.
    """

    def __init__(self, pretrained: Any, adapter: str | None = None, **options: Any) -> None:
        self._adapter = adapter
        super().__init__(pretrained, **options)

    def _get_backend(self, config: Any, backend: str = "default", **options: Any) -> None:
        """Check the architecture before weights are loaded."""
        kind = str(config.model_type)
        if kind.removeprefix(LAYERED_PREFIX) not in LAYERED:
            raise InputError(f"model_args: pretrained: architecture {kind}; allowed: {', '.join(LAYERED)}")
        # HFLM does not know per-layer models, and would warn that they may need remote code
        super()._get_backend(config, "causal" if backend == "default" else backend, **options)

    def _create_model(self, pretrained: str, dtype: Any = "auto", **options: Any) -> None:
        """Load the weights as HFLM does; with an adapter, as the other commands of this library do."""
        for name in ("parallelize", "tp_plan"):
            if options.get(name):
                raise InputError(f"model_args: {name}: got {options[name]!r}; allowed: one device")
        if self._adapter is None:
            super()._create_model(pretrained, dtype=dtype, **options)
            return
        for name in ("peft", "delta"):
            if options.get(name):
                raise InputError(f"model_args: {name}: got {options[name]!r} beside adapter; allowed: one of the two")
        model = load_model(Path(pretrained), Path(self._adapter))
        wanted = get_dtype(dtype)
        self._model = model if wanted == "auto" else model.to(wanted)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """The answers to all requests, in their order; `override_bs` has no meaning here."""
        found: dict[int, Answer] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        precision = self.mixed_precision_dtype
        with (
            bar,
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=precision, enabled=precision is not None),
            packed_attention(self.model),
        ):
            for index, answer in answers(self.model, requests, self.max_length):
                found[index] = answer
                if texts := requests[index][0]:  # windows of a text, which HFLM caches as a whole, have none
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update()
        return [found[index] for index in range(len(requests))]


@dataclass(frozen=True)
class _Packed:
    """A document, and its requests: the index, the positions within the document and the targets of each."""

    document: Document
    requests: list[tuple[int, list[int], list[int]]]


def answers(model: Any, requests: Sequence[Request], max_length: int) -> Iterator[tuple[int, Answer]]:
    """The index and the answer of every request, in the order in which they become known.

    A call has the requests of all tasks, as HFLM makes them: each task may have a header of its own, such as its solved
    examples. A request that is longer than `max_length` loses its start. `model` is inside `packed_attention`.

    Raises:
        InputError: a continuation has no token, or more than the context holds.
    """
    contexts: dict[Ids, list[int]] = defaultdict(list)  # what comes before the first scored position → its requests
    for index, request in enumerate(requests):
        texts, context, continuation = request
        if not context or not 0 < len(continuation) <= max_length:
            raise InputError(
                f"continuation {texts[1] if texts else ''!r:.80}: got {len(continuation)} tokens after a context of "
                f"{len(context)}; allowed: 1 to {max_length} tokens after at least 1"
            )
        contexts[_input(request, max_length)[: -len(continuation)]].append(index)
    if cut := sum(len(context) + len(continuation) > max_length + 1 for _, context, continuation in requests):
        logging.getLogger(__name__).warning(
            "%d of %d requests are longer than the context of %d tokens: they lose their start",
            cut,
            len(requests),
            max_length,
        )
    budget, learnt = token_budget(None, model), learnt_header(model)
    for start, members in by_header(contexts, budget).items():
        asked: dict[Ids, list[int]] = defaultdict(list)
        for index in chain.from_iterable(contexts[context] for context in members):
            asked[_input(requests[index], max_length)[len(start) :]].append(index)
        packed = [_pack(group, asked, requests) for group in documents(sorted(asked))]
        header = encode_header(model, start, budget, learnt)
        lengths = [len(item.document) for item in packed]
        for _, found in within_memory(lengths, budget, partial(_score_row, model, header, packed)):
            yield from found


def _input(request: Request, max_length: int) -> Ids:
    """What the model reads of a request: all but its last token, and no more than the context holds."""
    _, context, continuation = request
    return (*context, *continuation)[-(max_length + 1) : -1]


def by_header(contexts: Collection[Ids], worth: int) -> dict[Ids, list[Ids]]:
    """Different contexts by the header they follow, which is encoded once for all of them; it may be empty.

    A header must save `worth` tokens.
    """
    parts: dict[Ids, list[Ids]] = defaultdict(list)
    stack = [(0, sorted(contexts))] if contexts else []
    while stack:
        header, members = stack.pop()
        shared = _common(members[0], members[-1])  # what these two share, all that stand between them share
        if len(members) * (shared - header) - shared >= worth:
            header = shared
        part = parts[members[0][:header]]
        for token, group in groupby(members, itemgetter(slice(shared, shared + 1))):
            inside = list(group)
            if token and sum(map(len, inside)) - len(inside) * header >= worth:
                stack.append((header, inside))
            else:  # too little is left to share
                part += inside
    return parts


def documents(inputs: Sequence[Ids]) -> list[Sequence[Ids]]:
    """Cut sorted, different inputs into runs, each to become one document, so that all of them together cost least.

    The inputs of a document share their start, and so cost fewer tokens. But attention takes time with the square of a
    document's length.
    """
    common = [0, *(_common(one, other) for one, other in pairwise(inputs))]  # of an input and the one before
    costs, starts = [0.0], [0]  # of the cheapest cut of the first 0, 1, 2, … inputs, and where its last run starts
    for stop in range(1, len(inputs) + 1):
        shared, total = len(inputs[stop - 1]), 0
        choices: list[tuple[float, int]] = []
        for start in range(stop - 1, max(stop - _MOST, 0) - 1, -1):
            total += len(inputs[start])
            tokens = total - (stop - start - 1) * shared
            choices.append((costs[start] + tokens + tokens**2 / _ATTENTION_COSTS, start))
            shared = min(shared, common[start])
            if 16 * shared < len(inputs[stop - 1]):  # hardly anything to gain from here on
                break
        cost, start = min(choices)
        costs.append(cost)
        starts.append(start)
    runs: list[Sequence[Ids]] = []
    stop = len(inputs)
    while stop:
        runs.append(inputs[starts[stop] : stop])
        stop = starts[stop]
    return runs[::-1]


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two sequences start with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _pack(group: Sequence[Ids], asked: dict[Ids, list[int]], requests: Sequence[Request]) -> _Packed:
    """One document of some inputs, with the requests asked of each."""
    shared = _common(group[0], group[-1])
    document = Document(group[0][:shared], [ids[shared:] for ids in group])
    packed = _Packed(document, [])
    for branch, ids in enumerate(group):
        for index in asked[ids]:
            targets = requests[index][2]
            positions = range(len(ids) - len(targets), len(ids))
            packed.requests.append((index, [document.offset(branch, p) for p in positions], targets))
    return packed


def _score_row(model: Any, header: Header, packed: Sequence[_Packed], batch: Sequence[int]) -> list[tuple[int, Answer]]:
    """Run one forward pass: the answers to all requests of the batch's documents."""
    positions: list[int] = []
    targets: list[int] = []
    start = 0
    for item in (items := [packed[i] for i in batch]):
        for _, at, wanted in item.requests:
            positions += [start + p for p in at]
            targets += wanted
        start += len(item.document)
    likeliest = torch.empty(len(targets), dtype=torch.bool, device=model.device)
    values = packed_logprobs(model, [item.document for item in items], positions, targets, header, likeliest)
    logprobs, greedy = iter(values.tolist()), iter(likeliest.tolist())
    return [
        (index, (math.fsum(islice(logprobs, len(wanted))), all(list(islice(greedy, len(wanted))))))
        for item in items
        for index, _, wanted in item.requests
    ]
