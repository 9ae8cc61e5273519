"""Attention within the documents of a packed row: one document at a time, or many in padded batches.

A loop over the documents is faster on a CPU. On a GPU every document costs a few kernel launches in every layer, which
in models below about 3B parameters take longer than the linear layers; there attention alone pads its documents.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

ATTENTION = "tailored_packed"  # among the attention functions of transformers

# Elements of each head's scores, keys and values in a padded batch, padding included: 0.3 GB in float32 for nine heads,
# 0.5 GB in bfloat16 for 32.
_BATCH_ELEMENTS = 2**23
_SHORT_ELEMENTS = 2**20  # scores of all heads; with more, memory is freed and faulted in again in every layer
_MASK_MULTIPLE = 8  # SDPA's fused kernels copy a mask in every layer unless its rows are this far apart

KeysValues = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, KeysValues, Tensor | None], Tensor]  # query, keys and values, mask → attended


@dataclass(frozen=True)
class Header:
    """Tokens before every document of a row."""

    length: int = 0
    states: dict[int, KeysValues] = field(default_factory=dict)  # of each layer, [1, heads, length, head_dim] each
    ids: Sequence[int] = ()  # the tokens themselves, for a model that cannot pack


@dataclass(frozen=True)
class Block:
    """One document's part of a row; `causal` if each of its tokens sees all tokens before it."""

    start: int
    stop: int
    causal: bool = True

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Row:
    """The facts about a packed row that attention needs. Tokens after the last block are padding."""

    blocks: Sequence[Block]
    header: Header
    positions: Tensor  # of every token in its own sequence, header included [row]
    parts: Tensor  # 0 for a document's prefix, and the number, from 1, of a branch [row]
    longest: int  # length of the longest sequence: header, prefix and one branch
    into: Header | None = None  # a longer header that receives the row's keys and values
    built: dict[Hashable, Any] = field(default_factory=dict)  # what the layers share

    def once(self, key: Hashable, build: Callable[..., Any], *arguments: Any) -> Any:
        """Return the value of `build`, which is called for the first layer that asks for this key."""
        if key not in self.built:
            self.built[key] = build(*arguments)
        return self.built[key]


def looped_attention(
    query: Tensor, kv: KeysValues, row: Row, before: KeysValues | None, window: int | None, attend: Attend
) -> Tensor:
    """Attention of one document at a time, [1, row, heads, head_dim], 0 where the row is padded.

    `query` is [1, heads, row, head_dim]; so are `kv`, the row's keys and values, which may have fewer heads. `before`
    are a header's in this layer. `window` says how many tokens back a token sees, itself included; None: all.
    """
    lengths = [*map(len, row.blocks), query.shape[2] - row.blocks[-1].stop]  # the last part is padding
    parts = []
    # split, since the gradient of a slice is as long as the row
    for block, q, k, v in zip(row.blocks, *(states.split(lengths, 2) for states in (query, *kv)), strict=False):
        tokens, key = slice(block.start, block.stop), ("mask", block.start, window, query.device)
        mask = row.once(key, _mask, row, tokens, block.causal, window, query)
        parts.append(attend(q, _join(before, (k, v)), mask).transpose(1, 2))
    return torch.cat([*parts, query.new_zeros(1, lengths[-1], query.shape[1], kv[1].shape[3])], 1)


@dataclass(frozen=True)
class _Batch:
    """Documents padded to the longest of them. Padding repeats a document's last token, and no other token sees it."""

    tokens: Tensor  # indices into the row [documents, longest]
    real: Tensor  # the places in it, flattened, that are no padding
    causal: bool


def padded_attention(
    query: Tensor, kv: KeysValues, row: Row, before: KeysValues | None, window: int | None, attend: Attend
) -> Tensor:
    """The same as `looped_attention`, with one call of `attend` for many documents, longest first."""
    device = query.device
    batches = row.once(("batches", device), _batches, row, query.shape[3], device)
    parts = []
    for number, batch in enumerate(batches):
        mask = row.once(("mask", number, window, device), _mask, row, batch.tokens, batch.causal, window, query)
        queries, keys, values = (_gather(states, batch.tokens) for states in (query, *kv))
        attended = attend(queries, _join(before, (keys, values)), mask)
        parts.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, batch.real))
    tokens = row.once(("tokens", device), lambda: torch.cat([b.tokens.flatten()[b.real] for b in batches]))
    output = query.new_zeros(query.shape[2], query.shape[1], kv[1].shape[3])
    return output.index_copy(0, tokens, torch.cat(parts).to(output.dtype))[None]


def _batches(row: Row, head_dim: int, device: torch.device) -> list[_Batch]:
    """Documents of similar length together, at most `_BATCH_ELEMENTS` a head (but at least one document)."""
    blocks, batches = sorted(filter(len, row.blocks), key=len, reverse=True), list[_Batch]()
    while blocks:
        longest = len(blocks[0])
        elements = (row.header.length + longest) * (longest + 2 * head_dim)
        members = blocks[: max(1, _BATCH_ELEMENTS // elements)]
        first = torch.tensor([[block.start] for block in members])
        last = torch.tensor([[len(block) - 1] for block in members])
        tokens = first + torch.minimum(torch.arange(longest), last)
        real = torch.cat([torch.arange(len(block)) + longest * number for number, block in enumerate(members)])
        batches.append(_Batch(tokens.to(device), real.to(device), all(block.causal for block in members)))
        blocks = blocks[len(members) :]
    return batches


def _gather(states: Tensor, tokens: Tensor) -> Tensor:
    """[1, heads, row, head_dim] → [documents, heads, longest, head_dim]."""
    # index_select, since the gradient of states[:, :, tokens] sorts the indices in every layer
    selected = states[0].index_select(1, tokens.flatten())
    return selected.view(len(selected), *tokens.shape, -1).transpose(0, 1)


def _join(before: KeysValues | None, kv: KeysValues) -> KeysValues:
    if before is None:
        return kv
    joined = [torch.cat([b.expand(len(o), -1, -1, -1), o], dim=2) for b, o in zip(before, kv, strict=True)]
    return joined[0], joined[1]


def _mask(row: Row, tokens: Tensor | slice, causal: bool, window: int | None, like: Tensor) -> Tensor | None:
    """Additive mask: 0 for the header and the sequence up to a token, −∞ for later tokens and other branches.

    It is [documents, 1, length, header + length], with the device and the type of `like`; None for plain causal
    attention, which is faster without one. `tokens`: those of one document, or indices [documents, length].
    """
    header, device = row.header.length, like.device
    if causal and not header and window is None:
        return None
    positions, parts = (torch.atleast_2d(each.to(device)[tokens]) for each in (row.positions, row.parts))
    count, length = positions.shape
    visible = torch.ones(count, length, header + length, dtype=torch.bool, device=device).tril(header)
    visible[:, :, header:] &= (parts[:, :, None] == parts[:, None]) | (parts[:, None] == 0)
    if window is not None:
        keys = torch.cat([torch.arange(header, device=device).expand(count, -1), positions], dim=1)
        visible &= positions[:, :, None] < keys[:, None] + window
    width = header + length
    mask = like.new_zeros(count, 1, length, width + -width % _MASK_MULTIPLE)[..., :width]
    return mask.masked_fill_(~visible[:, None], -torch.inf)


def _attend(
    query: Tensor, kv: KeysValues, mask: Tensor | None, dropout: float, scale: float, softcap: float | None
) -> Tensor:
    """SDPA; explicit attention where it is faster, and for soft-capped scores (arXiv 2408.00118), which SDPA lacks."""
    key, value = kv
    elements = query.shape[1] * query.shape[2] * key.shape[2]
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and 0 < elements <= _SHORT_ELEMENTS
    if short and softcap is None and not dropout:
        attended: Tensor = _ShortAttention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
        return attended
    key, value = (repeat_kv(states, query.shape[1] // states.shape[1]) for states in kv)
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    if mask is None:
        mask = scores.new_full(scores.shape[2:], -torch.inf).triu(1)
    weights = (scores + mask).softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.dropout(weights.to(query.dtype), dropout, dropout > 0) @ value


class _ShortAttention(torch.autograd.Function):
    """Attention as five products with all scores in memory; SDPA's backward pass takes several times as long.

    Scores are in float32, as in SDPA; but under autocast, in which models are tuned, they are in bfloat16. Heads that
    share keys and values are rows of one product.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        count, heads, length, _ = query.shape
        groups = count * key.shape[1]
        query, key, value = (states.reshape(groups, -1, states.shape[3]) for states in (query, key, value))
        scores = torch.bmm(query.float(), key.float().transpose(1, 2)).mul_(scale)
        if mask is None:
            mask = scores.new_full((length, length), -torch.inf).triu(1)
        scores.view(count, heads, length, -1).add_(mask)
        weights = scores.softmax(-1).to(query.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.shape = scale, (count, heads, length, query.shape[2])
        return torch.bmm(weights, value).view(count, heads, length, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        gradient = gradient.reshape(*weights.shape[:2], -1)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        of_query = torch.bmm(of_scores, key).view(ctx.shape)
        of_key = torch.bmm(of_scores.transpose(1, 2), query)
        of_value = torch.bmm(weights.transpose(1, 2), gradient)
        of_key, of_value = (states.view(len(of_query), -1, *states.shape[1:]) for states in (of_key, of_value))
        return of_query, of_key, of_value, None, None


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_row: Row,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer of transformers: [1, heads, row, head_dim] → [1, row, heads, head_dim]."""
    row, header, layer = packed_row, packed_row.header, module.layer_idx
    before = (header.states[layer][0].to(key), header.states[layer][1].to(value)) if header.length else None
    window = sliding_window if sliding_window is not None and row.longest > sliding_window else None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    attend = partial(_attend, dropout=dropout, scale=scale, softcap=softcap)
    attention = padded_attention if query.device.type == "cuda" and len(row.blocks) > 1 else looped_attention
    output = attention(query, (key, value), row, before, window, attend)
    if row.into is not None:  # the pass that encodes a header has one block
        rows = slice(row.blocks[0].start, row.blocks[0].stop)
        row.into.states[layer] = _join(before, (key[:, :, rows], value[:, :, rows]))
    return output, None


AttentionInterface.register(ATTENTION, _forward)
