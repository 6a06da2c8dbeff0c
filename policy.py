"""The model as RL sees it: packed tokens in, logprobs or values out. No padding, and no (tokens, vocabulary) matrix.

Whole sequences stand one after the other in a single row (runtime/packing.py). Only the positions that predict a
trained token reach the head, so nothing that follows needs a mask.

Shapes: T tokens of a packed row, R of them predicted (the trained ones), S sequences, D hidden, V vocabulary. t, r
and s are this rank's share of T, R and S: all of them, unless the row is spread over several ranks.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import lora
from runtime.packing import Packed, keep_sequences_apart

# Logits that the head holds at a time, in float32. On a GPU 256 MiB: with fewer rows, reading W takes longer than
# multiplying. On a CPU 64 MiB, 110 rows of Qwen2.5's vocabulary: the fastest of 16 to 512 MiB.
LOGITS_AT_ONCE = 1 << (26 if torch.cuda.is_available() else 24)


# ---- RMSNorm --------------------------------------------------------------------------------------------------


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm (arXiv 1910.07467) of x (..., D): divided by its root mean square, rounded, times the weight (D,).

    transformers computes the same by six operations, most of them on float32 copies of x. On a GPU this is one kernel
    and one product; on a CPU it saves nothing.
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


# ---- Recomputation, and the MLP -------------------------------------------------------------------------------


def recompute(model: PreTrainedModel, mode: str) -> None:
    """Sets what the backward computes again instead of keeping it.

    mode: "full", all of a block but its input; "selective", what lies between the products of an MLP, which is large
    and cheap to compute; "none", nothing. On a GPU, gated MLPs run as one kernel in all three.

    Raises ValueError if there is nothing to select, as in experts.
    """
    mlps = [module for module in model.modules() if is_gated_mlp(type(module))]
    for mlp in mlps:
        mlp.forward = partial(gated_mlp, mlp, selective=mode == "selective")
    if mode == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mode == "selective" and (not mlps or lora.mixtures(model)):
        raise ValueError(
            "gradient_checkpointing selective: this model has no gated MLP, or has experts; set it to full"
        )


def gated_mlp(mlp: nn.Module, x: Tensor, selective: bool = False) -> Tensor:
    """(act(x Gᵀ) · x Uᵀ) Dᵀ (arXiv 2002.05202) of x (..., D), as transformers computes it.

    A GPU's kernel rounds once less. `selective` keeps x Gᵀ and x Uᵀ alone. The backward forms act(x Gᵀ) · x Uᵀ again,
    and there recomputing ends: that is what the last linear saves (`Inputs` in low_rank.py).
    """

    def down(gate: Tensor, up: Tensor) -> Tensor:
        activate = one_kernel() if gate.is_cuda else activated
        return mlp.down_proj(activate(mlp.act_fn, gate, up))

    if not selective:
        return down(mlp.gate_proj(x), mlp.up_proj(x))
    return checkpoint(down, mlp.gate_proj(x), mlp.up_proj(x), use_reentrant=False, preserve_rng_state=False)


def activated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) · up"""
    return act(gate) * up


@cache
def one_kernel() -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """`activated` as one kernel, and its backward as another, which PyTorch's compiler writes at the first call."""
    return torch.compile(activated, dynamic=True)


@cache
def is_gated_mlp(kind: type[nn.Module]) -> bool:
    """Whether modules of this class compute `gated_mlp`, bit for bit."""
    if not kind.__name__.endswith("MLP"):
        return False
    x, *weights = torch.randn(4, 8, 8, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    linears = {
        f"{name}_proj": partial(F.linear, weight=weight) for name, weight in zip(("gate", "up", "down"), weights)
    }
    mlp = SimpleNamespace(**linears, act_fn=F.silu)
    try:
        return torch.equal(kind.forward(mlp, x), gated_mlp(mlp, x))
    except (AttributeError, TypeError):  # it has other parts, or other inputs
        return False


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
        keep_sequences_apart(model)

    def forward(self, batch: Packed, temperature: float = 1.0, entropy_gradient: bool = False) -> PolicyOutput:
        """The completions' logprobs at that temperature; the entropy has a gradient only if asked for."""
        if batch.owners is not None:
            lora.route(self.model, batch.owners)
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
        keep_sequences_apart(model)
        model.set_output_embeddings(nn.Identity())
        self.model = model
        self.value = nn.Linear(model.config.hidden_size, 1, bias=False, device=device, dtype=torch.float32)
        nn.init.zeros_(self.value.weight)  # the first values are 0

    def forward(self, batch: Packed) -> Tensor:
        """(R,) float32."""
        states = last_states(self.model, batch)[batch.rows]  # (r, D)
        return batch.spread_rows.join(states.float() @ self.value.weight[0].float())
