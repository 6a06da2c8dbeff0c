"""plan.py against real runs: the same bytes, counted by other means (torch's profiler, the stream's own count)."""

import dataclasses
import sys
import time

import pytest
import torch
from conftest import ROOT, on_ranks
from transformers import AutoConfig

import fsdp_utils
import lora
from benchmarks.measuring import PeakBytes
from configs.base import Config
from runtime import models
from tools import plan
from train_grpo import log_z_head

WAYS = {  # layers, and settings
    "plain": (3, dict(gradient_checkpointing="none")),
    "selective": (3, dict(gradient_checkpointing="selective")),
    "recomputed": (6, dict(gradient_checkpointing="full")),  # of the plan, three and four layers are run
    "three layers recomputed": (3, dict(gradient_checkpointing="full")),
    "four bits": (3, dict(gradient_checkpointing="full", dtype="nf4", lora_rank=2)),
    "merged": (3, dict(gradient_checkpointing="none", sync="straight_through", sleep_level=2)),
    "everything trained": (3, dict(gradient_checkpointing="full", lora_rank=0)),
    "log Z": (3, dict(algorithm="flowrl")),
    "critic": (6, dict(algorithm="ppo", lora_rank=0, tokens_per_microbatch=4096)),
    "critic with adapters": (3, dict(algorithm="ppo", lora_rank=4, dtype="nf4")),
    "spread over two ranks": (3, dict(sequence_parallel_size=2, tokens_per_microbatch=1024)),
}


def settings(way: str, **others) -> Config:
    sizes = dict(lora_rank=8, max_prompt_length=64, max_completion_length=192, tokens_per_microbatch=2048)
    return Config(**(sizes | WAYS[way][1] | others))


def exchange_slowly(*tensors, exchange=torch.distributed.all_to_all_single, **options):
    """Gives gloo's thread the time to let go of the tensors first: the profiler does not see what that thread frees."""
    exchange(*tensors, **options)
    time.sleep(0.02)


def really(folders):
    """For each way, of this rank's models as the trainer builds them: shards, peaks, and what a sync moves."""
    from fsdp_utils import SyncStats, summon_layers, to_send

    world, found = fsdp_utils.init_world(), {}
    torch.distributed.all_to_all_single = exchange_slowly
    for way, folder in folders.items():
        config = settings(way)
        policy = models.build_policy(config, str(folder), world, log_z_head if config.algorithm == "flowrl" else None)
        found[way] = {"policy": learner(config, policy)}
        if config.algorithm == "ppo":
            found[way]["critic"] = learner(config, models.build_critic(config, str(folder), world))
        fsdp_utils.reshard(policy)
        modules, stats = to_send(policy.model, everything=config.sleep_level == 2), SyncStats()
        dtype = getattr(torch, config.compute_dtype)
        options = {"dtype": dtype, "release": True}
        for _ in summon_layers(policy.model, world.device, modules=modules, stats=stats, **options):
            pass
        found[way] |= {"streamed": stats.bytes, "streamed_peak": stats.peak_bytes}
        if config.sends_adapter:  # and no weights
            names = [name for name, _ in policy.named_parameters() if f".adapters.{lora.POLICY}." in name]
            sizes = [fsdp_utils.gather(policy.get_parameter(name)).nbytes for name in names]
            found[way] |= {"streamed": sum(sizes), "streamed_peak": max(sizes)}
    return found


def learner(config, module):
    """What a policy or a critic holds, and the peaks of its forward and of its update."""
    from runtime.optimize import make_optimizer

    optimizer = make_optimizer(config, module, 1e-5)
    batch = plan.full_batch(config)

    def update():
        for _ in range(2):
            plan.backward(module(batch))
        optimizer.step()
        optimizer.zero_grad()

    update()  # the optimizer's state comes with its first step
    fsdp_utils.reshard(module)
    with PeakBytes() as forward, torch.no_grad():
        module(batch)
    fsdp_utils.reshard(module)
    updates = []
    for _ in range(3):  # gloo's thread lets go of a buffer a little late, sometimes
        with PeakBytes() as whole:
            update()
        updates.append(whole.peak)
    size = {name: fsdp_utils.local(parameter).nbytes for name, parameter in module.named_parameters()}
    return {
        "base": sum(size[name] for name in size if ".adapters." not in name),
        "adapters": sum(size[name] for name in size if ".adapters." in name),
        "optimizer": sum(fsdp_utils.local(t).nbytes for s in optimizer.state.values() for t in s.values() if t.ndim),
        "forward": forward.peak,
        "update": min(updates),
    }


def peak(moments):
    """The largest moment, without what is there all the time."""
    return max(sum(ledger.values()) - ledger["optimizer"] for ledger in moments.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, ways", [(1, ["plain", "selective", "recomputed", "merged", "critic"]), (2, ["recomputed", *list(WAYS)[2:]])]
)
def test_bytes_are_those_of_a_real_run(ranks, ways, model_folder, tmp_path):
    sizes = dict(hidden_size=128, intermediate_size=352, vocab_size=4000)
    folders = {way: model_folder("qwen2", num_hidden_layers=WAYS[way][0], **sizes) for way in ways}
    results = on_ranks(ranks, really, folders, folder=tmp_path)
    for way, folder in folders.items():
        shape, prompt_head = AutoConfig.from_pretrained(folder), log_z_head if way == "log Z" else None
        planned = plan.plan_trainer(settings(way), shape, ranks, prompt_head, on_gpu=False)
        ours, *_ = found = [result[way] for result in results]  # the plan is of the first rank; others may lack a row
        assert (planned.streamed, planned.streamed_peak) == (ours["streamed"], ours["streamed_peak"]), way
        learners = {"policy": planned.policy} | ({"critic": planned.critic} if planned.critic else {})
        assert learners.keys() == ours.keys() - {"streamed", "streamed_peak"}
        for which, learner in learners.items():
            assert (learner.base, learner.adapters) == (ours[which]["base"], ours[which]["adapters"]), (way, which)
            assert 2 * learner.trained == ours[which]["optimizer"], (way, which)
            for one in found:
                assert peak(learner.forward) == pytest.approx(one[which]["forward"], rel=0.03), (way, which)
                assert peak(learner.update) == pytest.approx(one[which]["update"], rel=0.03), (way, which)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """The command line's exit code, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with pytest.raises(SystemExit) as end:
        plan.main()
    return int(end.value.code), "".join(capsys.readouterr())


def test_the_72b_fits_on_eight_gpus_and_not_on_small_ones(monkeypatch, capsys):
    arguments = "--config", str(ROOT / "configs/qwen2_5_72b_gsm8k.py"), "--gpus", "8"
    code, text = run(monkeypatch, capsys, *arguments, "--gpu_memory_gb", "80")
    assert code == 0 and "72.7B parameters" in text and "It fits" in text and "critic" not in text
    code, text = run(monkeypatch, capsys, *arguments, "--gpu_memory_gb", "24", "--sleep_level", "0")
    assert code == 1 and "It does not fit" in text and "sleep_level" in text


def test_sequences_can_be_as_many_times_longer_as_ranks_share_them(model_folder):
    """A sequence of four times the length, on four ranks: each of them keeps as much of it."""
    shape = AutoConfig.from_pretrained(model_folder("qwen2", num_hidden_layers=3, num_key_value_heads=4))
    kept = []
    for sharing in (1, 4):
        sizes = dict(max_completion_length=sharing * 2048 - 64, tokens_per_microbatch=1, sequence_parallel_size=sharing)
        # On a GPU it is a tenth more: attention's output is kept as it is made, and as it is exchanged.
        planned = plan.plan_trainer(settings("plain", **sizes), shape, gpus=4, on_gpu=False)
        kept.append(max(ledger["activations"] for ledger in planned.policy.update.values()))
    assert kept[1] == pytest.approx(kept[0], rel=0.03)


@pytest.mark.slow
def test_a_critic_is_there_in_every_phase(monkeypatch, capsys):
    """Trained as a whole, it has float32 weights and Adam's two moments of each."""
    arguments = "--config", str(ROOT / "configs/qwen2_5_7b_gsm8k.py"), "--gpus", "8", "--gpu_memory_gb", "80"
    _, text = run(monkeypatch, capsys, *arguments, "--algorithm", "ppo", "--lora_rank", "0")
    (row,) = [line.split() for line in text.splitlines() if line.startswith("critic  ")]
    assert all(float(value) == pytest.approx(3 * 4 * 7.07 / 8, rel=0.01) for value in row[1:]), "7.62B without the head"


def test_a_mixture_of_experts_has_total_and_active_parameters(tmp_path, monkeypatch, capsys):
    """Of Qwen3-30B-A3B, which are published as 30.5B and 3.3B; here the active ones are counted by hand, 3.35B."""
    sizes = dict(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    sizes |= dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936)
    AutoConfig.for_model("qwen3_moe", **sizes, tie_word_embeddings=False).save_pretrained(tmp_path)
    config = "--config", str(ROOT / "configs/qwen2_5_3b_gsm8k.py"), "--model", str(tmp_path)
    _, text = run(monkeypatch, capsys, *config, "--gpus", "8")
    attention, experts, router = 2048 * 128 * (32 + 4 + 4 + 32), 8 * 3 * 2048 * 768, 2048 * 128
    active = 48 * (attention + experts + router) + 2 * 151936 * 2048  # and some norms
    assert f"30.5B parameters, of which {active / 1e9:.1f}B are active for a token" in text


def test_layers_with_a_state_are_counted_by_periods():
    """Of two recurrent layers and one with keys and values (Qwen3.5 has three and one): six tell what nine need."""
    sizes = dict(hidden_size=128, intermediate_size=352, vocab_size=4000, num_hidden_layers=9, num_attention_heads=4)
    sizes["layer_types"] = ["linear_attention", "linear_attention", "full_attention"] * 3
    heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=16)
    shape = AutoConfig.for_model("qwen3_5_text", **sizes, **heads, num_key_value_heads=2, head_dim=32)
    config = settings("recomputed", tokens_per_microbatch=64, max_prompt_length=16, max_completion_length=48)
    planned = plan.plan_trainer(config, shape, 1)
    with plan.fake_ranks(1):
        whole = plan.measure(config, shape, None)
    assert (planned.policy.base, planned.streamed) == (whole.policy.base, whole.streamed)
    assert planned.active == planned.model == whole.model
    assert peak(planned.policy.update) == pytest.approx(peak(whole.policy.update), rel=0.01)
    keys_and_values, states = 3 * 2 * 2 * 32 * 2, 6 * 4 * 32 * 16 * 4
    assert plan.bytes_per_sequence(config, shape) == 64 * keys_and_values + states


def test_mistakes_are_one_line(monkeypatch, capsys):
    code, text = run(monkeypatch, capsys, "--config", str(ROOT / "configs/arithmetic_cpu.py"), "--gpu", "8")
    assert code == 2 and text.startswith("error: unknown option '--gpu'") and text.count("\n") == 1
    code, text = run(monkeypatch, capsys, "--config", str(ROOT / "configs/qwen2_5_72b_gsm8k.py"), "--gpus", "4")
    assert code == 2 and text == "error: tensor_parallel_size 8 does not divide the 4 GPUs\n"


def test_the_largest_micro_batch_fills_the_budget():
    config = Config(max_prompt_length=512, max_completion_length=8192, tokens_per_microbatch=17_500)
    assert plan.full_batch(config).lengths == [8704, 8704, 92]
    assert plan.full_batch(dataclasses.replace(config, tokens_per_microbatch=1)).lengths == [8704]
