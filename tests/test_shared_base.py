"""One copy of the base: the trainer runs on vLLM's own tensors, bit for bit as on a copy.

On a CPU vLLM packs its linears; here it is kept from that, so that it holds them as on a GPU.
"""

import dataclasses
import os
import shutil
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, complaints, on_ranks, refused
from test_families import COMPLETIONS as TEXTS
from test_families import FAMILIES, PROMPTS, SHAPE, randomise
from transformers import AutoConfig

import fsdp_utils
import lora
from configs.base import Config
from runtime.packing import pack
from runtime.shared_base import share, shares_base
from tools import plan

CONFIG = Config(lora_rank=4, max_prompt_length=60, max_completion_length=4, fsdp_size=1)
RUN = f"--model {TINY} --task arithmetic --steps 2 --prompts_per_step 8 --group_size 8 --max_prompt_length 16"
RUN += " --max_completion_length 14 --lora_rank 4 --learning_rate 1e-2 --eval_problems 4 --fsdp_size 1"


def do_not_pack() -> None:
    import vllm.model_executor.layers.utils as layers

    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", F.linear)


def place(tensor: torch.Tensor) -> int:
    return fsdp_utils.local(tensor).untyped_storage().data_ptr()


def grpo(folder, sharing: bool):
    """Two steps: the trained adapter; the base's parameters that are not vLLM's; those of vLLM's that have changed."""
    import train_grpo
    from sync import held_weights

    do_not_pack()
    os.environ["SHARE_BASE"] = str(int(sharing))
    sys.argv[1:] = [*RUN.split(), "--output_dir", str(folder)]
    run = train_grpo.setup_grpo()
    held = held_weights(run.engine).parameters
    before, places = {name: each.clone() for name, each in held.items()}, set(map(place, held.values()))
    train_grpo.train(run)
    adapter = {name: fsdp_utils.local(p) for name, p in run.policy.named_parameters() if p.requires_grad}
    assert not sharing or sum(fsdp_utils.own_bytes(run.policy).values()) == sum(p.nbytes for p in adapter.values())
    own = [name for name, parameter in lora.base_weights(run.policy.model) if place(parameter) not in places]
    return adapter, own, [name for name, value in before.items() if not torch.equal(held[name], value)]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_learns_the_same_bit_for_bit(ranks, tmp_path):
    """With several ranks, each shares with its own engine."""
    found = []
    for sharing in (False, True):
        folder = tmp_path / str(sharing)
        folder.mkdir()
        found.append(on_ranks(ranks, grpo, folder / "run", sharing, folder=folder))
    for (alone, all_own, _), (adapter, own, changed) in zip(*found):
        assert all(torch.equal(alone[name], adapter[name]) for name in alone | adapter)
        assert any(name.endswith("lora_B") and each.any() for name, each in adapter.items()), "something was learned"
        assert all_own and not own and not changed


def beside_a_copy(folder):
    """Of a policy with a copy of its own and of one that shares: logprobs and gradients; and what is not shared."""
    from runtime import models, setup
    from runtime.prompts import Stops

    do_not_pack()
    world, folder = fsdp_utils.init_world(), str(folder)
    found, bases = [], []

    def engine_for(model):
        return setup.build_engine(CONFIG, folder, Stops(), lora.target_names(model))

    for how in (None, partial(share, engine_for=engine_for, world=world)):
        policy = models.build_policy(CONFIG, folder, world, share=how)
        randomise(policy.model)
        logprobs = policy(pack(PROMPTS, TEXTS, world.device)).logprobs
        logprobs.sum().backward()
        found.append([logprobs.detach()] + [p.grad.to_local() for p in policy.parameters() if p.requires_grad])
        bases.append(dict(lora.base_weights(policy.model)))
    own = [name for name in bases[1] if name in fsdp_utils.own_bytes(policy.model)]
    changed = [name for name in bases[0] if not torch.equal(*(fsdp_utils.local(base[name]) for base in bases))]
    return found, own, changed


QUICK = ["phi3"]  # one matrix of q, k and v in the checkpoint, too


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES])
def test_families_share_all_but_experts(family, model_folder, tmp_path):
    architecture, settings = FAMILIES[family]
    folder = model_folder(architecture, **SHAPE | {"dtype": torch.bfloat16}, **settings)
    for file in TINY.glob("tokenizer*"):  # vLLM asks for one
        shutil.copy(file, folder)
    (((alone, shared), own, changed),) = on_ranks(1, beside_a_copy, folder, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not changed and all(fsdp_utils.is_experts(name) for name in own), own


def complaint(arguments):
    os.environ["SHARE_BASE"] = "1"
    return complaints([arguments])[0]


@pytest.mark.slow
def test_packed_weights_are_refused(tmp_path):
    (said,) = on_ranks(1, complaint, [*RUN.split(), "--output_dir", str(tmp_path / "run")], folder=tmp_path)
    assert said == "SHARE_BASE=1: vLLM has packed its weights, as it does on CPUs; leave it out"


def test_the_plan_counts_the_base_once(model_folder, monkeypatch):
    shape = AutoConfig.from_pretrained(model_folder("qwen2", num_hidden_layers=3))
    twice = plan.plan_trainer(CONFIG, shape, 2)
    monkeypatch.setenv("SHARE_BASE", "1")
    once = plan.plan_trainer(CONFIG, shape, 2)
    assert twice.policy.base == twice.engine == once.engine and once.policy.base == 0
    assert once.policy.adapters == twice.policy.adapters == once.policy.trained
    peaks = [max(sum(ledger.values()) for ledger in each.policy.update.values()) for each in (once, twice)]
    assert peaks[0] < peaks[1], "nothing of the base is gathered, or counted a second time"
    for option, value in {"fsdp_size": 2, "sync": "merged", "sleep_level": 1, "offload": "all"}.items():
        with refused("SHARE_BASE=1 needs", option):
            shares_base(dataclasses.replace(CONFIG, **{option: value}), 2)
