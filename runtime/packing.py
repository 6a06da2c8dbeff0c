"""Whole sequences one after the other in a single row, longest first: packing, and the layers that keep them apart.

Attention and recurrent layers see more than one token, and are told where sequences begin; every other layer works on
tokens and never notices. A row may be spread over several ranks, see sequence_parallel.py.

Shapes: T tokens of a packed row, R of them predicted (the trained ones), S sequences; t, r and s are this rank's of
them, which are all unless the row is spread.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress, groupby, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from runtime.sequence_parallel import Slices, attend_to_all, ranks_sharing, spread, spread_like

# Fewer heads of keys and values than of queries: torch 2.11 takes them as they are, later ones want to be told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


# ---- Packing --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Sequences packed into one row, in the order given, which must be longest first."""

    lengths: list[int]  # of the sequences; their sum is T
    starts: Tensor  # (S + 1,) int32, the first position of each sequence, then T
    input_ids: Tensor  # (t,) this rank's, as is all that follows
    position_ids: Tensor  # (t,) each sequence counts from 0
    prompt_ends: Tensor  # (s,) place among the t of the last token of each prompt
    rows: Tensor  # (r,) places whose next token is a trained token of a completion
    targets: Tensor  # (r,) those tokens
    owners: Tensor | None  # (t,) the adapter that each token passes through, see `lora.route`; None: there is one
    spread_tokens: Slices  # what each rank has of T,
    spread_prompts: Slices  # of S
    spread_rows: Slices  # and of R


def pack(
    prompts: list[list[int]],
    completions: list[list[int]],
    device: torch.device,
    trained: list[list[bool]] | None = None,
    group: dist.ProcessGroup | None = None,
    adapters: list[int] | None = None,
) -> Packed:
    """Packs prompt + completion of each sequence. What is predicted follows from lengths, never from token ids.

    trained: which tokens of each completion are predicted; None: all. The others are only read.
    group: the ranks that the row is spread over, which all pack the same; None: this one has the whole row.
    adapters: of each sequence, the place among the active adapters of the one that it passes through.

    >>> packed = pack([[1, 2, 3], [4]], [[5, 6], [7, 8]], torch.device("cpu"))
    >>> packed.input_ids.tolist(), packed.rows.tolist(), packed.targets.tolist()
    ([1, 2, 3, 5, 6, 4, 7, 8], [2, 3, 5, 6], [5, 6, 7, 8])
    """
    input_ids, position_ids, starts, prompt_ends, rows, targets, owners = [], [], [0], [], [], [], []
    trained = trained or [[True] * len(completion) for completion in completions]
    places = adapters or [0] * len(completions)
    for prompt, completion, chosen, place in zip(prompts, completions, trained, places, strict=True):
        first = len(input_ids) + len(prompt) - 1  # the prompt's last token predicts the completion's first
        prompt_ends.append(first)
        rows += compress(range(first, first + len(completion)), chosen)
        targets += compress(completion, chosen)
        input_ids += prompt + completion
        position_ids += range(len(prompt) + len(completion))
        owners += [place] * (len(prompt) + len(completion))
        starts.append(len(input_ids))
    while len(input_ids) < ranks_sharing(group):  # no rank may have none: sequences of one, which count nowhere
        input_ids.append(0)
        position_ids.append(0)
        owners.append(0)
        starts.append(len(input_ids))
    lengths = [end - start for start, end in pairwise(starts)]
    if lengths != sorted(lengths, reverse=True):
        raise ValueError(f"sequences must be packed longest first, not {lengths}")
    as_tensor = partial(torch.tensor, dtype=torch.long, device=device)
    tokens = spread(len(input_ids), group)
    of_prompts, of_rows, first = spread_like(prompt_ends, tokens), spread_like(rows, tokens), tokens.own.start
    return Packed(
        lengths=lengths,
        starts=as_tensor(starts, dtype=torch.int32),
        input_ids=as_tensor(input_ids[tokens.own]),
        position_ids=as_tensor(position_ids[tokens.own]),
        prompt_ends=as_tensor(prompt_ends[of_prompts.own]) - first,
        rows=as_tensor(rows[of_rows.own]) - first,
        targets=as_tensor(targets[of_rows.own]),
        owners=as_tensor(owners[tokens.own]) if adapters else None,
        spread_tokens=tokens,
        spread_prompts=of_prompts,
        spread_rows=of_rows,
    )


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, packed: Packed | None = None, **more
):
    """Causal attention within each packed sequence; (1, heads, T, head size) in, (1, T, heads, head size) out.

    A token sees the `sliding_window` last ones, itself included; None: all. Raises ValueError for what is not known
    here: a model that does not pass `packed` on, attention sinks, and scores that are capped by tanh.
    """
    unknown = [
        what for name, what in {"s_aux": "sinks", "softcap": "capped scores"}.items() if more.get(name) is not None
    ]
    if packed is None or unknown:
        raise ValueError(f"{type(module).__name__} is not implemented here: {(unknown or ['no packed rows'])[0]}")
    if query.is_cuda and query.dtype != torch.float32:  # which the kernel does not know
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        of_queries_and_keys = (packed.starts, packed.starts, packed.lengths[0], packed.lengths[0])
        window = (sliding_window - 1 if sliding_window else -1, 0)
        out = varlen_attn(q, k, v, *of_queries_and_keys, scale=scaling, window_size=window, **GROUPED)
        return out[None], None
    # Sequences of one length stand together, so they are a batch without copying or padding anything. In float32,
    # since PyTorch's CPU kernel needs ten times as long for the backward of short sequences in bfloat16.
    wide = torch.promote_types(query.dtype, torch.float32)
    widened = [tensor.to(wide) for tensor in (query, key, value)]
    outputs, start = [], 0
    for length, group in groupby(packed.lengths):
        count = len(list(group))
        span = slice(start, start + count * length)
        q, k, v = (tensor[0, :, span].unflatten(1, (count, length)).transpose(0, 1) for tensor in widened)
        seen = None
        if sliding_window and sliding_window < length:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scaling, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = span.stop
    return torch.cat(outputs)[None].to(query.dtype), None


def row_attention(module, query, key, value, attention_mask, packed: Packed | None = None, **more):
    """`packed_attention` of the whole row: (1, heads, t, head size) in, (1, t, heads, head size) out."""
    attention = partial(packed_attention, module, attention_mask=attention_mask, packed=packed, **more)
    if packed is None or packed.spread_tokens.group is None:
        return attention(query, key, value)
    return attend_to_all(lambda *whole: attention(*whole)[0], query, key, value, packed.spread_tokens), None


AttentionInterface.register("lorl_packed", row_attention)


# ---- Recurrent layers -----------------------------------------------------------------------------------------


# Modules of a decoder block that hand a state on from token to token: a short convolution and gated linear attention.
RECURRENT = ("linear_attn",)
CONVOLUTIONS = ("linear_attn.conv1d",)  # in them
# The kernels with which these begin anew at each sequence. Without one of them, transformers takes a function of its
# own in its place, on any device, which ignores where sequences begin.
KERNELS = {"causal_conv1d": "causal_conv1d_fn", "fla.ops.gated_delta_rule": "chunk_gated_delta_rule"}


def recurrent_layers(config: PretrainedConfig) -> list[bool]:
    """Of each layer of a language model, whether it has a state instead of keys and values."""
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return [kind == "linear_attention" for kind in kinds]


def keep_sequences_apart(model: PreTrainedModel) -> None:
    """Makes the layers of a model that see more than one token keep packed sequences apart."""
    model.set_attn_implementation("lorl_packed")
    for path, module in model.named_modules():
        if path.endswith(RECURRENT):
            module.forward = partial(packed_recurrence, type(module).forward, module)


def packed_recurrence(
    forward: Callable[..., Tensor], module: nn.Module, hidden_states: Tensor, packed: Packed, **_
) -> Tensor:
    """A recurrent layer's own forward, begun anew at each packed sequence; (1, T, D) -> (1, T, D)."""
    if has_kernels(hidden_states.device.type):
        sequences = torch.arange(len(packed.lengths), dtype=torch.int32, device=hidden_states.device)
        seq_idx = sequences.repeat_interleave(packed.starts.diff(), output_size=hidden_states.shape[1])  # (T,)
        return forward(module, hidden_states, cu_seq_lens_q=packed.starts, seq_idx=seq_idx[None])
    groups = [(len(list(group)), length) for length, group in groupby(packed.lengths)]  # of one length: a batch
    batches = hidden_states[0].split([count * length for count, length in groups])
    outputs = [forward(module, batch.unflatten(0, group)).flatten(0, 1) for batch, group in zip(batches, groups)]
    return torch.cat(outputs)[None]


@cache
def has_kernels(device: str) -> bool:
    """Whether transformers runs all of `KERNELS` on that kind of device."""
    try:
        return device == "cuda" and all(
            hasattr(importlib.import_module(package), name) for package, name in KERNELS.items()
        )
    except Exception:  # whatever a broken installation raises, transformers does without it, too
        return False
