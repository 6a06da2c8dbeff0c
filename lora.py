"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear W plus a low-rank update that is learned.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ        W (out, in) frozen    A (r, in), B (out, r) float32    s = alpha / r

`inject` replaces the linears of a Hugging Face model; a layer can hold several named adapters on its one W, and
`using(model, name)` picks the one that runs, `disabled(model)` none: that is the reference policy of RL. If several
are active, each token passes through its own (`route`). In a mixture of experts, each expert's linears may have
adapters of their own (`LoRAExperts`).

The products and their gradients are in low_rank.py. W may be stored in four bits (`quantize_base`, see nf4.py).
Adapter folders are read and written by runtime/adapter_files.py, in peft's format. Nothing here knows of shards: where
a tensor may be sharded, the caller passes in `fill`, which puts a whole tensor into it.

Shapes: T tokens, r rank; x (..., in) and y (..., out) may have any leading dimensions. E experts, of which each token
chooses k; S = T·k pairs of a token and an expert.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from low_rank import GroupedLinear, low_rank_linear
from nf4 import NF4Linear, NF4Weight

POLICY = "policy"  # the name of the adapter that is trained
REFERENCE = "reference"  # the name of the frozen adapter that is the KL reference, if there is one
# The linears of an expert. transformers stacks those of all experts, in this order, as (E, out, in).
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


# ---- The layer ------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """The two matrices of one update; B = 0 at the start, so that training begins exactly at the base.

    `merged` is explained at `LowRankLinear` (low_rank.py), `rslora` at `scaling`. All adapters of one name are alike
    but for shapes.
    """

    def __init__(
        self,
        layer: "LoRALayer",
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        merged: bool = False,
        trainable: bool = True,
    ):
        super().__init__()
        self.rank, self.alpha, self.rslora, self.merged = rank, alpha, rslora, merged
        empty = {"dtype": torch.float32, "device": next(layer.parameters(), layer.weight).device}
        A, B = (rank, layer.in_features), (layer.out_features, rank)
        self.lora_A = nn.Parameter(torch.empty(*layer.stack, *A, **empty), requires_grad=trainable)
        self.lora_B = nn.Parameter(torch.empty(*layer.stack, *B, **empty), requires_grad=trainable)

    @property
    def scale(self) -> float:
        return scaling(self.rank, self.alpha, self.rslora)


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """The s of s·B A: alpha / r, or alpha / √r (rank-stabilised, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRALinear(nn.Module):
    """A linear whose W and b are frozen, with named adapters beside them, of which one, several or none are active.

    It stands where the `nn.Linear` stood and keeps its `weight` and `bias`, so names stay those of the checkpoint.
    """

    stack = ()  # the leading dimensions of A and B; for experts (E,)

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.mask: Tensor | None = None  # see `route`

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        if not self.active:
            return self.base(x)
        first, *others = adapters = [self.adapters[name] for name in self.active]
        A, B, mask = first.lora_A, first.lora_B, None
        if others:  # n adapters of rank r run as one of rank n·r; the mask leaves each token its own r
            assert self.mask is not None, "several adapters are active: call `route` first"
            A, B = torch.cat([each.lora_A for each in adapters]), torch.cat([each.lora_B for each in adapters], dim=1)
            mask = self.mask
        return low_rank_linear(x, self.weight, self.bias, A, B, first.scale, first.merged, mask)

    def base(self, x: Tensor) -> Tensor:
        """The frozen linear alone."""
        linear = NF4Linear.apply if isinstance(self.weight, NF4Weight) else F.linear
        return linear(x, self.weight, self.bias)


class LoRAExperts(nn.Module):
    """One linear of all experts of a mixture, each with adapters of its own: A (E, r, in), B (E, out, r).

    W stays where transformers has it: some rows of a parameter of its module of experts, see `EXPERTS`. The layers of
    that module are its children, and `run_experts` takes the place of its forward.
    """

    def __init__(self, experts: nn.Module, parameter: str, part: int):
        super().__init__()
        self.__dict__["experts"] = experts  # not a child of this module, but its parent
        self.parameter = parameter
        count, out, self.in_features = getattr(experts, parameter).shape
        self.stack, self.out_features = (count,), out // len(EXPERTS[parameter])
        self.rows = slice(part * self.out_features, (part + 1) * self.out_features)
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    @property
    def weight(self) -> Tensor:
        """W (E, out, in), a view."""
        return getattr(self.experts, self.parameter)[:, self.rows]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """(S, in) -> (S, out). Rows are sorted by expert; those of expert e end before `ends[e]`; ends (E,) int32."""
        if not self.active:
            return GroupedLinear.apply(x, self.weight, ends, None, None, 0.0, False)
        (adapter,) = (self.adapters[name] for name in self.active)
        A, B = adapter.lora_A, adapter.lora_B
        return GroupedLinear.apply(x, self.weight, ends, A, B, adapter.scale, adapter.merged)


def run_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' module of experts computes, with adapters: (T, D) and two of (T, k) -> (T, D)."""
    chosen, order = top_k_index.flatten().sort(stable=True)  # (S,), by expert
    ends = torch.searchsorted(chosen, torch.arange(experts.num_experts, device=chosen.device), right=True).int()
    x, each = hidden_states[order // top_k_index.shape[1]], experts.each
    x = experts._apply_gate(torch.cat([each["gate_proj"](x, ends), each["up_proj"](x, ends)], dim=-1))
    y = each["down_proj"](x, ends) * top_k_weights.flatten()[order, None]
    return y[order.argsort()].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


LoRALayer = LoRALinear | LoRAExperts


# ---- In a model -----------------------------------------------------------------------------------------------


def inject(
    model: nn.Module, target_modules: list[str], rank: int, alpha: float, *, name: str = POLICY, **options: float | bool
) -> None:
    """Freezes the base and gives every targeted linear an adapter; those of that name become the active ones.

    `target_modules` are module names or their endings (`q_proj`), or `["all-linear"]`: every linear but the head,
    experts, and what stands beside them (a router, shared experts). `gate_proj` also means that of experts, as in the
    checkpoint; `experts.gate_proj` means theirs alone. Experts cannot be named singly: one name stands for all of them.
    `options` are those of `Adapter`. The values are undefined until `init_adapters` or `load_adapter`. Raises
    ValueError if a target matches nothing.
    """
    linears = [*base_linears(model), *expert_linears(model)]
    everything = target_modules == ["all-linear"]
    targeted = {path for path in linears if not path.startswith(mixtures(model))} if everything else set()
    names = {re.sub(r"\bexperts\.(\d+\.)?", "experts.each.", target): target for target in target_modules}
    for name_here, target in names.items() if not everything else ():
        matches = {path for path in linears if f".{path}".endswith(f".{name_here}")}
        if not matches:
            there_are = sorted({path.rpartition(".")[2] for path in linears})
            raise ValueError(
                f"target module {target!r} matches no linear; there are: {', '.join(there_are)}, or all-linear"
            )
        targeted |= matches
    freeze_base(model)
    for path in linears:
        if path in targeted:
            layer = as_lora_layer(model, path)
            layer.adapters[name] = Adapter(layer, rank, alpha, **options)
    activate(model, name)


def quantize_base(model: nn.Module) -> None:
    """Stores W of every linear but the head in NF4: QLoRA, whether the linear has an adapter or not."""
    freeze_base(model)
    for path in base_linears(model):
        layer = as_lora_layer(model, path)
        weight = NF4Weight(layer.weight)
        del layer.weight
        layer.weight = weight


def freeze_base(model: nn.Module) -> None:
    """Freezes all parameters except those of adapters."""
    for path, parameter in model.named_parameters():
        if ".adapters." not in path:
            parameter.requires_grad_(False)


def base_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear but the head, with or without adapters, by name, in the model's order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, LoRALinear)) and module is not head
    }


def expert_linears(model: nn.Module) -> list[str]:
    """The linears that `LoRAExperts` can be, by name: `model.layers.0.mlp.experts.each.gate_proj`."""
    return [
        f"{path}.each.{linear}"
        for path, module in model.named_modules()
        if path.endswith(".experts")
        for parameter, linears in EXPERTS.items()
        if hasattr(module, parameter)
        for linear in linears
    ]


def mixtures(model: nn.Module) -> tuple[str, ...]:
    """What the names of all modules in a mixture of experts start with: `model.layers.0.mlp.`, for each layer."""
    return tuple(path.removesuffix("experts") for path, _ in model.named_modules() if path.endswith(".experts"))


def as_lora_layer(model: nn.Module, path: str) -> LoRALayer:
    """The LoRA layer of that name; it is made first if need be, in place of an `nn.Linear` or beside W of experts."""
    if ".experts.each." in path:
        experts = model.get_submodule(path.rpartition(".each.")[0])
        if not hasattr(experts, "each"):
            parts = [(name, parameter, i) for parameter, names in EXPERTS.items() for i, name in enumerate(names)]
            experts.each = nn.ModuleDict({name: LoRAExperts(experts, parameter, i) for name, parameter, i in parts})
            experts.forward = partial(run_experts, experts)
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALayer):
        layer = LoRALinear(layer)
        model.set_submodule(path, layer)
    return layer


def lora_layers(model: nn.Module, name: str = POLICY) -> Iterator[tuple[str, LoRALayer]]:
    """The layers that hold an adapter of that name, with their names, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALayer) and name in module.adapters:
            yield path, module


def weight_name(path: str, layer: LoRALayer) -> str:
    """The name of the parameter that holds this layer's W: its `.weight` or, of experts, the stacked one."""
    experts, each, _ = path.rpartition(".each.")
    return f"{experts}.{layer.parameter}" if each else f"{path}.weight"


def stored_names(path: str, layer: LoRALayer) -> list[str]:
    """The names in the checkpoint, and in an adapter's folder, of what the layer of that name is: one or E linears."""
    return [path.replace(".each.", f".{expert}.") for expert in range(*layer.stack)] if layer.stack else [path]


def adapter_of(path: str) -> str:
    """The name of the adapter that a trained parameter belongs to; what belongs to none is the policy's.

    >>> adapter_of("model.layers.0.mlp.up_proj.adapters.gsm8k.lora_A"), adapter_of("prompt_head.0.weight")
    ('gsm8k', 'policy')
    """
    return path.partition(".adapters.")[2].partition(".")[0] or POLICY


def target_names(model: nn.Module, name: str = POLICY) -> list[str]:
    """The last names of the modules that hold an adapter of that name, see `last_names`."""
    return last_names(path for path, _ in lora_layers(model, name))


def last_names(paths: Iterable[str]) -> list[str]:
    """The last names of modules as vLLM has them, where all linears of experts are one module."""
    return sorted({"experts" if ".experts." in path else path.rpartition(".")[2] for path in paths})


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | NF4Weight]]:
    """The base's weights under their names in the checkpoint, in the model's order; tied parameters once."""
    quantized = {path: module for path, module in model.named_modules() if isinstance(module, NF4Weight)}
    for path, parameter in model.named_parameters():
        owner = path.rpartition(".")[0]
        if owner in quantized:
            if path.endswith(".packed"):
                yield owner, quantized[owner]
        elif ".adapters." not in path:
            yield path, parameter


def fresh_A(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initial values of an A (..., in), U(±1/√in), on the CPU."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def init_adapters(
    model: nn.Module, seed: int, *, name: str = POLICY, fill: Callable[[Tensor, Tensor], None] = Tensor.copy_
) -> None:
    """A ~ U(±1/√in), B = 0. `fill(parameter, whole_tensor)` puts a whole tensor into a parameter."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model, name):
        adapter = layer.adapters[name]
        fill(adapter.lora_A, fresh_A(adapter.lora_A.shape, generator))
        fill(adapter.lora_B, torch.zeros(adapter.lora_B.shape))


def activate(model: nn.Module, *names: str) -> None:
    """Switches to the adapters of these names; layers without one run the base alone."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.active = tuple(name for name in names if name in module.adapters)


def route(model: nn.Module, owners: Tensor) -> None:
    """Sets which adapter each token passes through, where several of one rank are active.

    owners (T,): the index of each token's adapter among the active ones. It holds until the next call, so a backward
    that recomputes activations must run before that.
    """
    mask = None
    for module in model.modules():
        if isinstance(module, LoRALinear) and len(module.active) > 1:
            if mask is None:
                rank = module.adapters[module.active[0]].rank
                columns = torch.arange(len(module.active) * rank, device=owners.device)
                mask = owners[:, None] == columns // rank  # (T, n·r)
            module.mask = mask


@contextmanager
def using(model: nn.Module, *names: str) -> Iterator[None]:
    """A context in which the adapters of these names run, see `activate`; of none, the base alone.

    If activations are recomputed in the backward, the backward must run within it, too.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    before = [layer.active for layer in layers]
    try:
        activate(model, *names)
        yield
    finally:
        for layer, active in zip(layers, before):
            layer.active = active


def disabled(model: nn.Module):
    """A context in which the model is its base."""
    return using(model)


def reference(model: nn.Module):
    """A context in which the model is the KL reference: the frozen adapter of that name, else the base."""
    return using(model, REFERENCE)
