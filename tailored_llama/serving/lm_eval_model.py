"""The model `tailored` of lm-evaluation-harness: its own `hf`, with log-likelihoods from packed rows.

Importing this module registers the model. It needs the extra `lm-eval`, so nothing else here imports it.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype
from tqdm import tqdm

from tailored_llama.data import Score, choice_scores, encode_choices, shared_header
from tailored_llama.errors import InputError
from tailored_llama.models import LAYERED, LAYERED_PREFIX, Encoded, batches, load_model, packed_attention, token_budget

Ids = tuple[int, ...]
Asked = tuple[list[int], Encoded]  # the requests of one context, by index, and their document
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # the texts, and context and continuation as token ids

_ALIKE = 64  # contexts that start with as many tokens alike are looked at for a common header
_TOGETHER = 512  # tokens after a context in one document: attention takes time with the square of its length


@register_model("tailored")
class TailoredLM(HFLM):  # type: ignore[misc]
    """HFLM with log-likelihoods from packed rows: equal to its own, several times sooner. All else is HFLM's.

    The probabilities are always taken in float32. HFLM's `batch_size` counts for generation and whole texts only.
    `pretrained` is a checkpoint folder, or whatever else HFLM loads. `adapter` is the folder of an adapter trained on
    it, which is merged into the weights. Other architectures, and several devices, are refused.
    """

    def _get_backend(self, config: Any, backend: str = "default", **options: Any) -> None:
        """Check the architecture before weights are loaded."""
        kind = str(config.model_type)
        if kind.removeprefix(LAYERED_PREFIX) not in LAYERED:
            raise InputError(f"model_args: pretrained: architecture {kind}; allowed: {', '.join(LAYERED)}")
        # HFLM does not know per-layer models, and would warn that they may need remote code
        super()._get_backend(config, "causal" if backend == "default" else backend, **options)

    def _create_model(self, pretrained: str, dtype: Any = "auto", adapter: str | None = None, **options: Any) -> None:
        """Load the weights as HFLM does; with an adapter, as the other commands of this library do."""
        refused = {"parallelize": "; allowed: one device", "tp_plan": "; allowed: one device"}
        if adapter is not None:
            refused |= dict.fromkeys(("peft", "delta"), " beside adapter; allowed: one of the two")
        for name, allowed in refused.items():
            if options.get(name):
                raise InputError(f"model_args: {name}: got {options[name]!r}{allowed}")
        if adapter is None:
            super()._create_model(pretrained, dtype=dtype, **options)
            return
        model = load_model(Path(pretrained), Path(adapter))
        wanted = get_dtype(dtype)
        self._model = model if wanted == "auto" else model.to(wanted)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        """The answers to all requests, in their order; `override_bs` has no meaning here."""
        found: dict[int, Score] = {}
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


def answers(model: Any, requests: Sequence[Request], max_length: int) -> Iterator[tuple[int, Score]]:
    """The index and the answer of every request of all tasks, in the order in which they become known.

    Each task may have a header of its own, such as its solved examples. A request that is longer than `max_length`
    loses its start; a continuation that has no token, or more than that, is refused. `model` is inside
    `packed_attention`.
    """
    contexts: dict[Ids, list[int]] = defaultdict(list)  # what comes before the first scored position → its requests
    inputs: list[list[int]] = []
    for index, (texts, context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= max_length:
            raise InputError(
                f"continuation {texts[1] if texts else ''!r:.80}: got {len(continuation)} tokens after a context of "
                f"{len(context)}; allowed: 1 to {max_length} tokens after at least 1"
            )
        inputs.append([*context, *continuation][-(max_length + 1) : -1])
        contexts[tuple(inputs[index][: -len(continuation)])].append(index)
    if cut := sum(len(context) + len(continuation) > max_length + 1 for _, context, continuation in requests):
        warning = "%d of %d requests are longer than the context of %d tokens: they lose their start"
        logging.getLogger(__name__).warning(warning, cut, len(requests), max_length)
    alike: dict[Ids, list[Asked]] = defaultdict(list)
    for start, members in contexts.items():
        ordered = sorted(members, key=inputs.__getitem__)  # those that go on alike stand together
        for part in batches([len(inputs[i]) - len(start) for i in ordered], _TOGETHER):
            asked = [ordered[i] for i in part]
            encoded = encode_choices([inputs[i] for i in asked], [requests[i][2] for i in asked])
            alike[start[:_ALIKE]].append((asked, encoded))
    budget = token_budget(None, model)
    groups: list[list[Asked]] = [[]]
    for group in alike.values():
        saved = len(shared_header([encoded for _, encoded in group])) * (len(group) - 1)
        if saved >= budget:  # a header that saves at least one full pass gets passes of its own
            groups.append(group)
        else:
            groups[0] += group
    for group in groups:
        for number, scores in choice_scores(model, [encoded for _, encoded in group], budget):
            yield from zip(group[number][0], scores, strict=True)
