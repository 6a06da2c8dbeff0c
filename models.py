"""The models that are trained, out of a configuration: the policy, and PPO's critic; with adapters, sharded, loaded.

They come in two steps: without memory, but with everything in its place, which is all that plan.py needs; then loaded.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import fsdp_utils
import lora
from adapter_files import open_adapter
from configs.base import Config
from policy import Critic, Policy, make_log_z

UNSUPPORTED = ("logits_scaling", "logit_scale", "final_logit_softcapping", "attn_logit_softcapping")  # by policy.py


def build_policy(config: Config, folder: str, world: fsdp_utils.World, learns_log_z: bool = False) -> Policy:
    """The policy; without adapters (`lora_rank` 0), trained as a whole. `learns_log_z`: and FlowRL's log Z with it."""
    model = meta_model(folder, parameter_dtype(config, config.lora_rank))
    policy = meta_policy(config, model, world.device, learns_log_z)
    fsdp_utils.load_weights(model, folder, world.device, config.param_offload)
    if config.lora_rank:
        fill_adapters(model, config, world)
    return policy


def build_critic(config: Config, folder: str, world: fsdp_utils.World) -> Critic:
    """The critic, out of the policy's base; `critic_lora_rank` 0: trained as a whole."""
    model = meta_model(folder, parameter_dtype(config, config.critic_lora_rank))
    critic = meta_critic(config, model, world.device)
    fsdp_utils.load_weights(model, folder, world.device, config.param_offload)
    if config.critic_lora_rank:
        lora.init_adapters(model, config.seed, fill=fsdp_utils.fill)
    return critic


def parameter_dtype(config: Config, rank: int) -> torch.dtype:
    """Of a base with adapters of that rank. Without any (0), it is trained, and a small update of bfloat16 is none."""
    return getattr(torch, config.dtype) if rank else torch.float32


# ---- Without memory -------------------------------------------------------------------------------------------


def read_config(folder: str) -> PretrainedConfig:
    """A model's configuration. Raises ValueError for what is not implemented here; see also `meta_model`."""
    with fsdp_utils.reading(f"model {folder!r}"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not hasattr(config, "vocab_size"):
        raise ValueError(f"model {folder!r} is a {config.model_type}, and must be a language model and nothing more")
    for name in UNSUPPORTED:
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"model {folder!r} has {name} {getattr(config, name)}, which is not implemented here")
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)  # what learns has to be what samples; adapters have a dropout of their own
    return config


def meta_model(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters that have shapes but no memory. Raises ValueError if it cannot be trained here."""
    config = read_config(folder)
    with fsdp_utils.reading(f"model {folder!r}"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    check_supported(model, folder)
    return model


def check_supported(model: PreTrainedModel, folder: str) -> None:
    """Raises ValueError for a model with parts that are not implemented here."""
    head, what = model.get_output_embeddings(), f"model {folder!r} is a {type(model).__name__}, which"
    if not isinstance(getattr(model.base_model, "layers", None), nn.ModuleList):
        raise ValueError(f"{what} has no decoder blocks named `layers`")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2:  # experts, convolutions
            raise ValueError(f"{what} is not implemented here: {name} has {parameter.ndim} dimensions")
    for name, _ in model.named_buffers():
        if not hasattr(model.get_submodule(name.rpartition(".")[0]), "config"):
            raise ValueError(f"{what} is not implemented here: nothing says how its {name} is computed")
    if head is None or getattr(head, "bias", None) is not None:
        raise ValueError(f"{what} is not implemented here: its head is not a matrix alone")


def meta_policy(config: Config, model: PreTrainedModel, device: torch.device, learns_log_z: bool) -> Policy:
    """The sharded policy around a meta model of `parameter_dtype`."""
    if config.lora_adapter_path:
        with open_adapter(config.lora_adapter_path):
            pass  # a bad folder is refused now, before the weights are read
    if config.ref_adapter_path:
        with open_adapter(config.ref_adapter_path) as file:
            scale = {"rank": file.rank, "alpha": file.alpha, "rslora": file.rslora}
            lora.inject(model, file.paths, **scale, name=lora.REFERENCE, trainable=False)
    if config.lora_rank:
        adapt(model, config, config.lora_rank)
    policy = Policy(model, make_log_z(model.config.hidden_size, config.seed, device) if learns_log_z else None)
    spread(policy, config, config.lora_rank, device)
    return policy


def meta_critic(config: Config, model: PreTrainedModel, device: torch.device) -> Critic:
    """The sharded critic around a meta model of `parameter_dtype`."""
    critic = Critic(model, device)
    if config.critic_lora_rank:
        adapt(model, config, config.critic_lora_rank)
    spread(critic, config, config.critic_lora_rank, device)
    return critic


def adapt(model: PreTrainedModel, config: Config, rank: int) -> None:
    """Freezes the base, stores it as `base_dtype` says, and gives it the adapters that are trained."""
    if config.base_dtype == "nf4":
        lora.quantize_base(model)
    options = {"rslora": config.use_rslora, "dropout": config.lora_dropout, "merged": config.lora_forward == "merged"}
    lora.inject(model, config.target_modules, rank, config.lora_alpha, **options)


def spread(module: Policy | Critic, config: Config, rank: int, device: torch.device) -> None:
    """Shards the module; what is trained as a whole (`rank` 0) is multiplied in `dtype`."""
    model: PreTrainedModel = module.train().model
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fsdp_utils.shard(
        module,
        model.base_model.layers,
        device,
        config.fsdp_size,
        compute_dtype=None if rank else getattr(torch, config.dtype),
        reshard_after_forward=config.reshard_after_forward,
        param_offload=config.param_offload,
    )


# ---- Values ---------------------------------------------------------------------------------------------------


def fill_adapters(model: PreTrainedModel, config: Config, world: fsdp_utils.World) -> None:
    """Puts values into the policy's adapters: from their folders, or those that change nothing."""
    if config.ref_adapter_path:
        lora.load_adapter(model, config.ref_adapter_path, name=lora.REFERENCE, fill=fsdp_utils.fill)
    if not config.lora_adapter_path:
        lora.init_adapters(model, config.seed, fill=fsdp_utils.fill)
        return
    lost = lora.load_adapter(model, config.lora_adapter_path, seed=config.seed, fill=fsdp_utils.fill)
    if world.rank == 0:
        less = f", cut to rank {config.lora_rank}: {lost:.2%} of its update is lost" if lost else ""
        print(f"starts from adapter {config.lora_adapter_path}{less}")
