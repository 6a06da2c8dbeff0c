"""The model as RL sees it: packed tokens in, logprobs or values out. No padding, and no (tokens, vocabulary) matrix.

Whole sequences stand one after the other in a single row, longest first. Attention and recurrent layers keep them
apart; every other layer works on tokens and never notices. Only the positions that predict a trained token reach the
head, so nothing that follows needs a mask. A row may be spread over several ranks (runtime/sequence_parallel.py).

Shapes: T tokens of a packed row, R of them predicted (the trained ones), S sequences, D hidden, V vocabulary; t, r and
s are this rank's of them, which are all unless the row is spread.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress, groupby, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from runtime.sequence_parallel import Slices, attend_to_all, group_size, spread, spread_like

# Logits that the head holds at a time, in float32. On a GPU 256 MiB: with fewer rows, reading W takes longer than
# multiplying. On a CPU 64 MiB, 110 rows of Qwen2.5's vocabulary: the fastest of 16 to 512 MiB.
LOGITS_AT_ONCE = 1 << (26 if torch.cuda.is_available() else 24)

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
    spread_tokens: Slices  # what each rank has of T,
    spread_prompts: Slices  # of S
    spread_rows: Slices  # and of R


def pack(
    prompts: list[list[int]],
    completions: list[list[int]],
    device: torch.device,
    trained: list[list[bool]] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Packed:
    """Packs prompt + completion of each sequence. What is predicted follows from lengths, never from token ids.

    trained: which tokens of each completion are predicted; None: all. The others are only read.
    group: the ranks that the row is spread over, which all pack the same; None: this one has the whole row.

    >>> packed = pack([[1, 2, 3], [4]], [[5, 6], [7, 8]], torch.device("cpu"))
    >>> packed.input_ids.tolist(), packed.rows.tolist(), packed.targets.tolist()
    ([1, 2, 3, 5, 6, 4, 7, 8], [2, 3, 5, 6], [5, 6, 7, 8])
    """
    input_ids, position_ids, starts, prompt_ends, rows, targets = [], [], [0], [], [], []
    trained = trained or [[True] * len(completion) for completion in completions]
    for prompt, completion, chosen in zip(prompts, completions, trained, strict=True):
        first = len(input_ids) + len(prompt) - 1  # the prompt's last token predicts the completion's first
        prompt_ends.append(first)
        rows += compress(range(first, first + len(completion)), chosen)
        targets += compress(completion, chosen)
        input_ids += prompt + completion
        position_ids += range(len(prompt) + len(completion))
        starts.append(len(input_ids))
    while len(input_ids) < group_size(group):  # no rank may be without a token: a sequence of one, which counts nowhere
        input_ids.append(0)
        position_ids.append(0)
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


def prepare_layers(model: PreTrainedModel) -> None:
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


# ---- RMSNorm --------------------------------------------------------------------------------------------------


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of x (..., D): divided by its root mean square, rounded, times the weight (D,).

    That is what transformers computes by six operations, most of them on float32 copies of x. Here a GPU has one
    kernel and one product; a CPU does the same as before.
    """
    return norm.weight * F.rms_norm(x, x.shape[-1:], eps=norm.variance_epsilon)


@cache
def is_rms_norm(kind: type[nn.Module]) -> bool:
    """Whether modules of this class compute `rms_norm`, bit for bit. Others scale by 1 + weight, or round otherwise."""
    signatures = [list(inspect.signature(function).parameters) for function in (kind, kind.forward)]
    if not kind.__name__.endswith("RMSNorm") or signatures[0][1:] != ["eps"] or len(signatures[1]) != 2:
        return False
    norm, generator = kind(64), torch.Generator("cpu").manual_seed(0)
    if set(norm.state_dict()) != {"weight"} or not hasattr(norm, "variance_epsilon"):
        return False
    weight, *x = torch.randn(5, 64, generator=generator, device="cpu").bfloat16()
    norm.weight = nn.Parameter(weight)
    return all(torch.equal(norm.forward(row), rms_norm(norm, row)) for row in x)


def use_rms_norm(model: nn.Module) -> None:
    """Makes a model's modules run `rms_norm` where that is what they compute."""
    for module in model.modules():
        if is_rms_norm(type(module)):
            module.forward = partial(rms_norm, module)


# ---- The logprob head -----------------------------------------------------------------------------------------


# How models differ between h Wᵀ and the softmax: fields of their configurations, and what they mean for a `Head`.
LOGITS = {
    "logit_scale": lambda scale: {"scale": scale},  # Cohere
    "logits_scaling": lambda divisor: {"scale": 1 / divisor},  # Granite
    "final_logit_softcapping": lambda cap: {"cap": cap},  # Gemma
}


class Head(NamedTuple):
    """From a last hidden state h to logits: s (h Wᵀ + b) or, with a cap c, c tanh(s (h Wᵀ + b) / c)."""

    weight: Tensor  # W (V, D)
    bias: Tensor | None = None  # b (V,)
    scale: float = 1.0  # s
    cap: float | None = None  # c

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """A model's head, which is a linear, with what its configuration says about logits."""
        linear, settings = model.get_output_embeddings(), {}
        for name, meaning in LOGITS.items():
            if value := getattr(model.config, name, None):
                settings |= meaning(value)
        return cls(linear.weight, linear.bias, **settings)

    def logits(self, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """hidden (R, D) -> logits / τ (R, V), float32, and of capped logits their tanh, which gives their slope."""
        logits = F.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cap is None:
            gain = self.scale / temperature
            return (logits if gain == 1 else logits.mul_(gain)), None
        tanh = logits.mul_(self.scale / self.cap).tanh_()
        return tanh * (self.cap / temperature), tanh


class FrozenHead(torch.autograd.Function):
    """Logprob and entropy of softmax(z) for a head that is not trained, in two GEMMs and one pass; z = logits / τ.

    With p = softmax(z) and z = (s / τ) h Wᵀ, the gradient of logprob_y with respect to h is v = (W_y - p W) s / τ,
    which needs the same p as the logprob does. So the forward computes both, for a chunk of rows at a time, and keeps
    v (R, D): the backward is a product of two small things. The logits of all rows never exist. The entropy H has a
    gradient only if asked for, since it costs one more GEMM: -(p ⊙ (log p + H)) W s / τ. With a cap, what multiplies a
    row of W is also multiplied by its logit's slope, 1 - tanh².
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Head, targets: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """hidden (R, D), targets (R,) -> logprobs and entropy (R,), float32."""
        weight, gain = head.weight, head.scale / temperature
        logprobs = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.empty_like(logprobs)
        directions = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        entropy_directions = torch.empty_like(hidden) if ctx.needs_input_grad[0] and entropy_gradient else None
        for rows in chunks(len(hidden), len(weight)):
            logits, tanh = head.logits(hidden[rows], temperature)  # (chunk, V), the largest thing here: few passes
            slope = None if tanh is None else tanh.square_().neg_().add_(1)
            p = logits.softmax(-1)
            log_norm = logits.amax(-1) - p.amax(-1).log()  # for p = exp(logits - log_norm)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - log_norm
            entropy[rows] = log_norm - torch.einsum("rv,rv->r", p, logits)
            if directions is not None:
                directions[rows] = direction(p, targets[rows, None], slope, weight).mul_(-gain)
            if entropy_directions is not None:
                dlogits = p.mul_(logits.add_((entropy[rows] - log_norm)[:, None])).neg_()
                dlogits = dlogits if slope is None else dlogits.mul_(slope)
                entropy_directions[rows] = dlogits.to(weight.dtype) @ weight * gain
        ctx.save_for_backward(directions, entropy_directions)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs: Tensor, dentropy: Tensor):
        directions, entropy_directions = ctx.saved_tensors
        dhidden = directions * dlogprobs[:, None].to(directions.dtype)
        if entropy_directions is not None:
            dhidden.addcmul_(entropy_directions, dentropy[:, None].to(directions.dtype))
        return dhidden, None, None, None, None


def direction(p: Tensor, targets: Tensor, slope: Tensor | None, weight: Tensor) -> Tensor:
    """(p - 1 at the targets) W, each logit times its slope: (R, V), (R, 1) -> (R, D). p is afterwards as before.

    The difference is formed in p's float32: in bfloat16, a p above 0.998 is 1.
    """
    right = p.gather(1, targets)
    p.scatter_(1, targets, right - 1)
    dlogits = p if slope is None else p * slope
    found = dlogits.to(weight.dtype) @ weight
    p.scatter_(1, targets, right)
    return found


def trained_head(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As `FrozenHead`, for a head that is trained too: each chunk's logits are computed again in the backward."""

    def logprobs_of(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logp = head.logits(hidden, temperature)[0].log_softmax(-1)
        seen = logp if entropy_gradient else logp.detach()
        return logp.gather(1, targets[:, None])[:, 0], -torch.einsum("rv,rv->r", seen.exp(), seen)

    parts = [
        checkpoint(logprobs_of, hidden[rows], targets[rows], use_reentrant=False)
        for rows in chunks(len(hidden), len(head.weight))
    ]
    logprobs, entropy = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropy)


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of the rows, each holding about `LOGITS_AT_ONCE` logits; of no rows, an empty one."""
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + size) for start in range(0, max(rows, 1), size)]


def last_states(model: PreTrainedModel, batch: Packed) -> Tensor:
    """(t, D) final hidden states, after the last norm."""
    forward = model.get_decoder().forward  # not __call__: vLLM replaces that of models whose classes it uses
    return forward(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], packed=batch, use_cache=False
    ).last_hidden_state[0]


class PolicyOutput(NamedTuple):
    """The policy's output for a packed row."""

    logprobs: Tensor  # (R,) float32, of each target
    entropy: Tensor  # (R,) float32, of the distribution it was drawn from
    prompt_values: Tensor | None = None  # (S,) the prompt head's output for each prompt


class Policy(nn.Module):
    """A causal language model whose `forward` gives the logprobs of completion tokens.

    Backbone and head share one forward because FSDP gathers a weight for the forward of the module that holds it. An
    algorithm may add a prompt head, from the last hidden state (S, D) of each prompt to a number (S, 1).
    """

    def __init__(self, model: PreTrainedModel, prompt_head: nn.Module | None = None):
        super().__init__()
        self.model, self.prompt_head = model, prompt_head
        prepare_layers(model)

    def forward(self, batch: Packed, temperature: float = 1.0, entropy_gradient: bool = False) -> PolicyOutput:
        """The completions' logprobs at that temperature; the entropy has a gradient only if asked for."""
        states, head = last_states(self.model, batch), Head.of(self.model)
        score = trained_head if head.weight.requires_grad else FrozenHead.apply
        scores = score(states[batch.rows], head, batch.targets, temperature, entropy_gradient)  # (r,), both
        logprobs, entropy = map(batch.spread_rows.join, scores)
        if self.prompt_head is None:
            return PolicyOutput(logprobs, entropy)
        prompt_states = states.detach()[batch.prompt_ends]  # (s, D); the prompt head does not train the policy
        values = self.prompt_head(prompt_states.to(next(self.prompt_head.parameters()).dtype))
        values = values[:, 0].float().clone()  # (s,); a clone: FSDP warns of views
        return PolicyOutput(logprobs, entropy, batch.spread_prompts.join(values))


class Critic(nn.Module):
    """A language model with one linear in place of its head: the value of the state before each completion token."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        super().__init__()
        prepare_layers(model)
        model.set_output_embeddings(nn.Identity())
        self.model = model
        self.value = nn.Linear(model.config.hidden_size, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.value.weight)  # the first values are 0

    def forward(self, batch: Packed) -> Tensor:
        """(R,) float32."""
        states = last_states(self.model, batch)[batch.rows]  # (r, D)
        return batch.spread_rows.join(states.float() @ self.value.weight[0].float())
