"""Every family of models that docs/models.md names, as a small random model with what makes it differ.

The trainer, with shards' loading and packed rows, against transformers and peft on one sequence at a time; and vLLM
against the trainer after a sync.
"""

import json
import shutil

import peft
import pytest
import torch
from conftest import EPSILON, TINY, on_ranks
from test_docs import DOCS, table

import fsdp_utils
import lora
from configs.base import Config
from policy import Policy
from runtime import adapter_files, models
from runtime.packing import pack

RANK, ALPHA = 4, 8.0
SHAPE = {"dtype": torch.float32, "hidden_size": 128}  # vLLM's attention on a CPU needs heads of 32, here 128 / 4
ENDS = list(range(100, 130))  # tokens that end a completion
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
RECURRENT = {  # vLLM's kernels for a CPU need heads of 64 or 128
    **{"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    **{"layer_types": ["linear_attention", "full_attention"]},
}
UNTIED = {"tie_word_embeddings": False}
# vLLM runs these in bfloat16 alone on a CPU, where rounding would make tokens choose other experts.
ALL_EXPERTS = EXPERTS | {"num_experts_per_tok": 6, "shared_expert_intermediate_size": 64}
IMAGES = {
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        **{"mrope_section": [1, 1, 2], "mrope_interleaved": True},
    },
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128},
}
PARTIAL = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {  # name -> transformers' name, and settings that make it differ
    "llama": ("llama", {}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "arcee": ("arcee", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "exaone4": ("exaone4", WINDOW),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 4.0},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True}),
    # vLLM's window for it is one token longer than transformers', so here it is longer than the texts.
    "cohere2": ("cohere2", {"logit_scale": 0.25, "tie_word_embeddings": True, **WINDOW, "sliding_window": 64}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2, scores not capped": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": 2.0, "tie_word_embeddings": True, **WINDOW},
    ),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32, **WINDOW}),
    "phi3": ("phi3", {"rope_parameters": PARTIAL, "sliding_window": 6}),
    "glm": ("glm", {"rope_parameters": PARTIAL, "attention_bias": True}),
    "glm4": ("glm4", {"rope_parameters": PARTIAL, "attention_bias": True}),
    "phi": ("phi", {"rope_parameters": PARTIAL}),
    "starcoder2": ("starcoder2", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "qwen3_next": ("qwen3_next", RECURRENT | ALL_EXPERTS | UNTIED),
    "qwen3_5": ("qwen3_5_text", RECURRENT | UNTIED),
    "qwen3_5, tied": ("qwen3_5_text", RECURRENT),
    "qwen3_5, sees images": ("qwen3_5", RECURRENT | IMAGES | UNTIED),
    "qwen3_5_moe": ("qwen3_5_moe_text", RECURRENT | ALL_EXPERTS | UNTIED),
}
SIZES = [(9, 12), (7, 14), (13, 8), (5, 9), (3, 1)]  # prompts and completions: three of one length, two others
PROMPTS, COMPLETIONS = (
    [
        torch.randint(3, 160, (length,), generator=torch.Generator().manual_seed(i + 9 * part)).tolist()
        for i, length in enumerate(column)
    ]
    for part, column in enumerate(zip(*SIZES))
)


def trainer(folder) -> Policy:
    """The policy as `models.build_policy` makes it, on one rank, with a random adapter."""
    model = models.meta_model(str(folder), torch.float32)
    lora.inject(model, ["all-linear"], RANK, ALPHA)
    model.to_empty(device="cpu").tie_weights()
    fsdp_utils.compute_buffers(model, torch.device("cpu"))
    fsdp_utils.read_checkpoint(model, str(folder))
    randomise(model)
    return Policy(model)


def randomise(model, seed: int = 0) -> None:
    """Gives the adapters values with a visible effect."""
    lora.init_adapters(model, seed, fill=fsdp_utils.fill)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            B = layer.adapters[lora.POLICY].lora_B
            fsdp_utils.fill(B, 0.1 * torch.randn(B.shape, generator=generator))


def plain_logprobs(model) -> torch.Tensor:
    """(R,) of the completions' tokens, one text at a time, through all logits."""
    logprobs = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logprobs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_transformers_and_peft(family, model_folder, tmp_path):
    """Without the adapter, and with it: peft reads what is written here, and differentiates the same function."""
    architecture, settings = FAMILIES[family]
    folder = model_folder(architecture, **SHAPE, **settings)
    policy, packed = trainer(folder), pack(PROMPTS, COMPLETIONS, torch.device("cpu"))
    kind = models.auto_class(models.read_whole_config(str(folder)))
    plain = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if "num_experts" in settings:
        plain.set_experts_implementation("eager")  # one expert after the other
    for name, buffer in policy.model.named_buffers():
        assert torch.equal(plain.get_buffer(name), buffer), name
    with torch.no_grad(), lora.disabled(policy.model):
        base = plain_logprobs(plain)
        assert relative(policy(packed).logprobs, base) < 100 * EPSILON

    adapter_files.save_adapter(policy.model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    found, expected = policy(packed).logprobs, plain_logprobs(adapted)
    assert relative(found, expected) < 100 * EPSILON < relative(base, expected) / 100
    upstream = torch.linspace(-1, 1, len(found))
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for path, layer in lora.lora_layers(policy.model):
        theirs = adapted.get_submodule(f"base_model.model.{path}")
        for kind in ("lora_A", "lora_B"):
            gradient = getattr(theirs, kind).default.weight.grad
            assert relative(getattr(layer.adapters[lora.POLICY], kind).grad, gradient) < 1e4 * EPSILON, (path, kind)


def test_experts_are_frozen(model_folder):
    """All-linear is attention; experts, a shared one among them, have adapters where they are named (test_experts.py);
    all weights are not trained.
    """
    folder = model_folder("qwen2_moe", **SHAPE, **FAMILIES["qwen2_moe"][1])
    for targets, names in (
        (["all-linear"], ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (["down_proj"], ["down_proj", "experts"]),
    ):
        model = models.meta_model(str(folder), torch.bfloat16)
        lora.inject(model, targets, RANK, ALPHA)
        assert lora.target_names(model) == names
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert all(name in frozen for name, _ in lora.base_weights(model))
    with pytest.raises(ValueError, match="learns by adapters alone"):
        models.check_and_set_recomputation(model, Config(lora_rank=0), torch.device("cpu"))


def test_the_page_has_every_family():
    assert [row["family"].strip("`") for row in table(DOCS / "models.md", "family")] == list(FAMILIES)


def arrives(folder, sync: str, dtype: str) -> tuple[dict[str, float], torch.Tensor, torch.Tensor, torch.Tensor, list]:
    """A sync's metrics; logprobs of the texts by the trainer before what was sent, and by it and vLLM after; and
    completions. sync: merged, adapter or, if all weights are trained, all.
    """
    from benchmarks.gpu_shared import bare_run
    from runtime.conversation import Request

    rank, how = (0, "merged") if sync == "all" else (RANK, sync)
    settings = dict(lora_rank=rank, lora_alpha=ALPHA, dtype=dtype, sync=how)
    config = Config(max_prompt_length=60, max_completion_length=4, **settings)
    run = bare_run(config, str(folder), PROMPTS)
    packed = pack(PROMPTS, COMPLETIONS, run.world.device)
    run.weight_sync.update_weights(verify=True, everything=sync == "merged")
    with torch.no_grad(), lora.disabled(run.policy.model):
        base = run.policy(packed).logprobs
    if sync == "all":
        change_all_but_linears(run.policy.model)
    randomise(run.policy.model)
    metrics = run.weight_sync.update_weights(verify=True)
    texts = zip(PROMPTS, COMPLETIONS)
    sampled = [logprob for p, c in texts for logprob in run.engine.logprobs(p + c)[len(p) - 1 :]]
    with torch.no_grad():
        trained = run.policy(packed).logprobs
    return metrics, base, trained, torch.tensor(sampled), run.engine.generate([Request(PROMPTS[0], 16, 1.0, seed=3)])


def change_all_but_linears(model) -> None:
    """Adds noise to convolutions, norms, and decays."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.ndim != 2:
                fsdp_utils.local(parameter).add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


# vLLM 0.32 expects gate_proj and up_proj in an adapter of GLM-4-0414, which has them as one linear.
NOT_IN_VLLM = [("glm4", "adapter")]
QUICK = [("gemma3", "adapter"), ("phi3", "merged"), ("qwen3_moe", "merged"), ("qwen3_moe", "adapter")]
QUICK += [("qwen3_5, sees images", "merged"), ("qwen3_5", "all")]


@pytest.mark.parametrize(
    "family, sync",
    [
        pytest.param(family, sync, marks=[] if (family, sync) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for sync in ("merged", "adapter", *(["all"] if family == "qwen3_5" else []))
        if (family, sync) not in NOT_IN_VLLM
    ],
)
def test_vllm_is_the_trainer_after_a_sync(family, sync, model_folder, tmp_path):
    architecture, settings = FAMILIES[family]
    dtype = "bfloat16" if "linear_key_head_dim" in settings else "float32"
    folder = model_folder(architecture, **SHAPE | {"dtype": getattr(torch, dtype)}, **settings)
    for file in TINY.glob("tokenizer*"):  # vLLM asks for one
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))  # the tokenizer has another
    ((metrics, base, trained, sampled, completions),) = on_ranks(1, arrives, folder, sync, dtype, folder=tmp_path)
    assert metrics["sync/read_back_frac"] == 1 or sync == "all"  # which sends norms, too
    if dtype == "float32":
        assert (trained - sampled).abs().max() < 1e-3
    else:  # against what training changed
        assert (trained - sampled).abs().mean() < 0.1 * (trained - base).abs().mean()
    for completion in completions:
        *before, last = completion.token_ids
        assert completion.truncated == (last not in ENDS) and not set(before) & set(ENDS)
    assert len({completion.truncated for completion in completions}) == 2
