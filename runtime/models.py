"""The policy and the critic: from a model's folder to shards with values.

A model is first made without memory (on `meta`), checked, given adapters and sharded. Each rank then reads its own
rows.
"""

import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

import fsdp_utils
import lora
from configs.base import Config
from policy import Critic, Policy, recompute, use_rms_norm
from runtime import adapter_files
from runtime.files import check_tied_head, find_model, one_line_errors
from runtime.packing import CONVOLUTIONS, RECURRENT, has_kernels

PromptHead = Callable[[int], nn.Module]  # from the model's hidden size to a module for `Policy`
Share = Callable[[PreTrainedModel], set[nn.Parameter]]  # gives some parameters of a meta model memory: returns these
MULTIMODAL = ("qwen3_5",)  # models that see images, too, of which the language model alone is trained
IN_FLOAT32 = ("A_log",)  # whatever the model's dtype: so are these parameters of recurrent layers in vLLM


def model_folder(config: Config) -> str:
    """The folder of the configured model; a model of the hub is downloaded if need be."""

    def find() -> str:
        folder = find_model(config.model_source)
        if getattr(read_model_config(folder), "tie_word_embeddings", False):
            check_tied_head(Path(folder))
        return folder

    return fsdp_utils.on_first_rank(find)


def build_policy(
    config: Config,
    folder: str,
    world: fsdp_utils.World,
    prompt_head: PromptHead | None = None,
    share: Share | None = None,
) -> Policy:
    """The sharded policy with its weights; without adapters (`lora_rank` 0), all of them are trained.

    What it is to `share` with vLLM (runtime/shared_base.py) is neither sharded nor loaded.
    """
    model = meta_model(folder, parameter_dtype(config))
    policy = meta_policy(config, model, world.device, prompt_head, share)
    fsdp_utils.load_weights(model, folder, world.device, config.offload == "all")
    if config.lora_rank:
        fill_adapters(model, config, world)
    return policy


def build_critic(config: Config, folder: str, world: fsdp_utils.World) -> Critic:
    """The critic, from the policy's base; trained as the policy is."""
    model = meta_model(folder, parameter_dtype(config))
    critic = meta_critic(config, model, world.device)
    fsdp_utils.load_weights(model, folder, world.device, config.offload == "all")
    if config.lora_rank:
        lora.init_adapters(model, config.seed, fill=fsdp_utils.fill)
    return critic


def parameter_dtype(config: Config) -> torch.dtype:
    """float32 if the base is trained (`lora_rank` 0): bfloat16 would round small updates away; else `compute_dtype`."""
    return getattr(torch, config.compute_dtype) if config.lora_rank else torch.float32


def active_parameters(model: PreTrainedModel) -> float:
    """Parameters of the base that one token passes through: of the experts of a layer, those that are chosen."""
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    return sum(
        math.prod(weight.shape) * (chosen / weight.shape[0] if fsdp_utils.is_experts(path) else 1)
        for path, weight in lora.base_weights(model)
    )


# ---- Models without memory -------------------------------------------------------------------------------------------


def read_model_config(folder: str) -> PretrainedConfig:
    """The configuration of a language model, or of the part of a larger one that is. Raises ValueError for models that
    are not supported; see also `check_supported`.
    """
    return read_whole_config(folder).get_text_config()


def read_whole_config(folder: str) -> PretrainedConfig:
    """A model's configuration, which may have parts, as those of models that also see images."""
    with one_line_errors(f"model {folder!r}"):
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = whole.get_text_config()
    if not hasattr(config, "vocab_size") or config is not whole and whole.model_type not in MULTIMODAL:
        raise ValueError(f"model {folder!r} is a {whole.model_type}, and must be a language model and nothing more")
    config.name_or_path = whole.name_or_path
    if cap := getattr(config, "attn_logit_softcapping", None):  # which PyTorch's attention kernels do not have
        raise ValueError(f"model {folder!r} has attn_logit_softcapping {cap}, which is not implemented here")
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)  # as in the sampler
    return whole


def meta_model(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters that have shapes but no memory. Raises ValueError if it cannot be trained here."""
    return meta_model_of(read_whole_config(folder), folder, dtype)


def meta_model_of(config: PretrainedConfig, folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """As `meta_model`, for a configuration; the folder is named in errors."""
    with one_line_errors(f"model {folder!r}"), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    decoder, model.config = model.get_decoder(), config.get_text_config()
    for name, part in list(model.base_model.named_children()) if model.base_model is not decoder else []:
        if part is not decoder:  # what is left has the checkpoint's names
            delattr(model.base_model, name)
    check_supported(model, folder)
    for name, parameter in model.named_parameters():
        if name.endswith(IN_FLOAT32):
            parameter.data = parameter.data.float()
    use_rms_norm(model)
    return model


def auto_class(config: PretrainedConfig) -> type:
    """The class of transformers that gives parameters the names of the checkpoint."""
    return AutoModelForImageTextToText if config.model_type in MULTIMODAL else AutoModelForCausalLM


def check_supported(model: PreTrainedModel, folder: str) -> None:
    """Raises ValueError for a model with parts that are not implemented here."""
    head, what = model.get_output_embeddings(), f"model {folder!r} is a {type(model).__name__}, which"
    if not isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList):
        raise ValueError(f"{what} has no decoder blocks named `layers`")
    for name, parameter in model.named_parameters():
        is_known = fsdp_utils.is_experts(name) or name.removesuffix(".weight").endswith(CONVOLUTIONS)
        if parameter.ndim > 2 and not is_known:
            raise ValueError(f"{what} is not implemented here: {name} has {parameter.ndim} dimensions")
    for name in sorted(model.state_dict().keys() & dict(model.named_buffers())):
        raise ValueError(f"{what} is not implemented here: its checkpoint has {name}, which is no parameter")
    if head is None:
        raise ValueError(f"{what} has no head")


def meta_policy(
    config: Config,
    model: PreTrainedModel,
    device: torch.device,
    prompt_head: PromptHead | None = None,
    share: Share | None = None,
) -> Policy:
    """The sharded policy around a meta model of `parameter_dtype`."""
    if config.lora_adapter_path:
        with adapter_files.open_adapter(config.lora_adapter_path):
            pass  # a bad folder is refused now, before the weights are read
    if config.reference_adapter:
        with adapter_files.open_adapter(config.reference_adapter) as file:
            scale = {"rank": file.rank, "alpha": file.alpha, "rslora": file.rslora}
            options = {"merged": config.straight_through, "trainable": False}
            lora.inject(model, file.paths, **scale, **options, name=lora.REFERENCE)
    if config.lora_rank:
        add_adapters(model, config)
    check_and_set_recomputation(model, config, device)
    policy = Policy(model, prompt_head and make_prompt_head(prompt_head, model.config.hidden_size, config.seed, device))
    shard(policy, config, device, ignored=share(model) if share else ())
    return policy


def make_prompt_head(prompt_head: PromptHead, hidden_size: int, seed: int, device: torch.device) -> nn.Module:
    """The head with the same values on every rank, in whatever state the random numbers are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return prompt_head(hidden_size).to(device)


def meta_critic(config: Config, model: PreTrainedModel, device: torch.device) -> Critic:
    """The sharded critic around a meta model of `parameter_dtype`."""
    critic = Critic(model, device)
    if config.lora_rank:
        add_adapters(model, config)
    check_and_set_recomputation(model, config, device)
    shard(critic, config, device)
    return critic


def add_adapters(model: PreTrainedModel, config: Config) -> None:
    """Freezes the base, stores it in `dtype`, and adds the adapters that are trained.

    Raises ValueError for a task whose name no adapter can have, and for several tasks with adapters of experts.
    """
    if config.dtype == "nf4":
        lora.quantize_base(model)
    for name in config.adapters:
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(f"task {name!r} cannot be an adapter's name, PyTorch's modules use it; rename the task")
        scale = {"rank": config.lora_rank, "alpha": config.lora_alpha}
        lora.inject(model, config.target_modules, **scale, merged=config.straight_through, name=name)
    adapted = {path for path, _ in lora.lora_layers(model, config.adapters[0]) if ".experts." in path}
    if adapted and len(config.adapters) > 1:
        raise ValueError("experts have adapters of one task only; name other target_modules, or one task")
    if adapted and config.sends_adapter and adapted != set(lora.expert_linears(model)):
        raise ValueError(
            "vLLM takes adapters of experts only on gate_proj, up_proj and down_proj together; name all three in "
            "target_modules, or set sync merged"
        )
    lora.activate(model, *config.adapters)


def check_and_set_recomputation(model: PreTrainedModel, config: Config, device: torch.device) -> None:
    """Chooses what the backward recomputes. Raises ValueError for a model that cannot be trained as configured."""
    check_spread(model, config.sequence_parallel_size)
    if not config.lora_rank and lora.mixtures(model):
        raise ValueError("a model with experts learns by adapters alone; set lora_rank above 0")
    if is_recurrent(model) and len(config.adapters) > 1 and not has_kernels(device.type):
        raise ValueError("several tasks: this model's recurrent layers need flash-linear-attention; train one task")
    recompute(model, config.gradient_checkpointing)


def shard(
    module: Policy | Critic, config: Config, device: torch.device, ignored: Collection[nn.Parameter] = ()
) -> None:
    """Shards a policy or critic, but for the `ignored` parameters.

    A base that is trained (`lora_rank` 0) is float32, and cast to `dtype` to compute.
    """
    model: PreTrainedModel = module.train().model
    fsdp_utils.shard(
        module,
        model.get_decoder().layers,
        device,
        config.fsdp_size,
        compute_dtype=None if config.lora_rank else getattr(torch, config.compute_dtype),
        param_offload=config.offload == "all",
        ignored=ignored,
    )


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some of its layers have a state, see runtime/packing.py."""
    return any(path.endswith(RECURRENT) for path, _ in model.named_modules())


def check_spread(model: PreTrainedModel, ranks: int) -> None:
    """Raises ValueError if so many ranks cannot share a row of the model's: for attention, they share its heads."""
    if ranks == 1:
        return
    heads, option = model.config.num_attention_heads, f"sequence_parallel_size {ranks}"
    if heads % ranks:
        raise ValueError(f"{option} does not divide the model's {heads} attention heads; choose a size that does")
    positions = " ".join(str(getattr(module, "rope_type", "")) for module in model.modules())
    if "dynamic" in positions or "longrope" in positions:
        raise ValueError(f"{option}: this model's rotary positions depend on the row's length; set it to 1")
    if is_recurrent(model):
        raise ValueError(f"{option}: this model's recurrent layers need their sequences whole; set it to 1")


# ---- Values ---------------------------------------------------------------------------------------------------


def fill_adapters(model: PreTrainedModel, config: Config, world: fsdp_utils.World) -> None:
    """Gives the policy's adapters their values: from folders, or B = 0. Prints why a folder may not fit the base."""
    for folder in filter(None, (config.reference_adapter, config.lora_adapter_path)):
        with adapter_files.open_adapter(folder) as file:
            for doubt in adapter_files.doubts(file, (config.model, config.model_source), config.dtype):
                if world.rank == 0:
                    print(f"adapter {folder}, {doubt}", flush=True)
    if config.reference_adapter:
        adapter_files.load_adapter(model, config.reference_adapter, name=lora.REFERENCE, fill=fsdp_utils.fill)
    if not config.lora_adapter_path:
        for name in config.adapters:
            lora.init_adapters(model, config.seed, name=name, fill=fsdp_utils.fill)
        return
    lost = adapter_files.load_adapter(model, config.lora_adapter_path, seed=config.seed, fill=fsdp_utils.fill)
    if world.rank == 0:
        less = f", cut to rank {config.lora_rank}: {lost:.2%} of its update is lost" if lost else ""
        print(f"starts from adapter {config.lora_adapter_path}{less}")
