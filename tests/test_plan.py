"""plan.py against real runs: the same bytes, counted by other means (torch's profiler, the stream's own count)."""

import sys

import pytest
import torch
from conftest import ROOT, on_ranks
from transformers import AutoConfig

import fsdp_utils
import plan
from benchmarks.measuring import PeakBytes
from configs.base import Config

WAYS = {  # layers, and settings
    "plain": (3, dict(gradient_checkpointing=False)),
    "recomputed": (6, dict(gradient_checkpointing=True)),  # of the plan, three and four layers are run
    "kept whole": (3, dict(gradient_checkpointing=True, reshard_after_forward=False, sync_prefetch=True)),
    "four bits": (3, dict(gradient_checkpointing=True, base_dtype="nf4", lora_rank=2)),
    "merged": (3, dict(gradient_checkpointing=False, lora_forward="merged", sleep_level=2)),
    "everything trained": (3, dict(gradient_checkpointing=True, lora_rank=0)),
}


def settings(way: str, **others) -> Config:
    sizes = dict(lora_rank=8, max_prompt_length=64, max_completion_length=192, tokens_per_microbatch=2048)
    return Config(**(sizes | WAYS[way][1] | others))


def really(folders):
    """For each way, of this rank's policy as the trainer builds it: shards, peaks, and what a sync moves."""
    from prepare import build_policy
    from rollout import whole_modules
    from stream import SyncStats, summon_layers

    world, found = fsdp_utils.init_world(), {}
    for way, folder in folders.items():
        config = settings(way)
        policy = build_policy(config, str(folder), world)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        batch = plan.full_batch(config, world.device)

        def update(policy=policy, optimizer=optimizer, batch=batch):
            policy(batch).logprobs.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        update()  # the optimizer's state comes with its first step
        fsdp_utils.reshard(policy)
        with PeakBytes() as logprobs, torch.no_grad():
            policy(batch)
        fsdp_utils.reshard(policy)
        with PeakBytes() as whole:
            update()
        fsdp_utils.reshard(policy)
        stats, adapted = SyncStats(), [path for path, _ in plan.lora.lora_layers(policy.model)]
        modules = None if config.sleep_level == 2 or not adapted else whole_modules(adapted)
        dtype = getattr(torch, config.dtype)
        options = {"dtype": dtype, "prefetch": config.sync_prefetch, "release": True}
        for _ in summon_layers(policy.model, world.device, modules=modules, stats=stats, **options):
            pass
        size = {name: fsdp_utils.local(parameter).nbytes for name, parameter in policy.named_parameters()}
        state = sum(fsdp_utils.local(t).nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
        found[way] = {
            "base": sum(size[name] for name in size if ".adapters." not in name),
            "adapters": sum(size[name] for name in size if ".adapters." in name),
            "optimizer": state,
            "logprobs": logprobs.peak,
            "update": whole.peak,
            "streamed": stats.bytes,
            "streamed_peak": stats.peak_bytes,
        }
    return found


def peak(moments):
    """The largest moment, without what is there all the time."""
    return max(sum(ledger.values()) - ledger["optimizer"] for ledger in moments.values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks, ways", [(1, ["plain", "recomputed", "merged"]), (2, ["recomputed", *list(WAYS)[2:]])])
def test_bytes_are_those_of_a_real_run(ranks, ways, model_folder, tmp_path):
    sizes = dict(hidden_size=128, intermediate_size=352, vocab_size=4000)
    folders = {way: model_folder("qwen2", num_hidden_layers=WAYS[way][0], **sizes) for way in ways}
    results = on_ranks(ranks, really, folders, folder=tmp_path)
    for way, folder in folders.items():
        planned = plan.plan_trainer(settings(way), AutoConfig.from_pretrained(folder), ranks)
        for found in results:
            real = found[way]
            for exact in ("base", "adapters", "streamed", "streamed_peak"):
                assert getattr(planned, exact) == real[exact], (way, exact)
            assert 2 * planned.trained == real["optimizer"]
            assert peak(planned.logprobs) == pytest.approx(real["logprobs"], rel=0.03), way
            assert peak(planned.update) == pytest.approx(real["update"], rel=0.03), way


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """The command line's exit code, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with pytest.raises(SystemExit) as end:
        plan.main()
    return int(end.value.code), "".join(capsys.readouterr())


def test_the_72b_fits_on_eight_gpus_and_not_on_small_ones(monkeypatch, capsys):
    arguments = "--config", str(ROOT / "configs/qwen2_5_72b_gsm8k.py"), "--gpus", "8"
    code, text = run(monkeypatch, capsys, *arguments, "--gpu_memory_gb", "80")
    assert code == 0 and "72.7B parameters" in text and "It fits" in text
    code, text = run(monkeypatch, capsys, *arguments, "--gpu_memory_gb", "24", "--sleep_level", "0")
    assert code == 1 and "It does not fit" in text and "sleep_level" in text


def test_mistakes_are_one_line(monkeypatch, capsys):
    code, text = run(monkeypatch, capsys, "--config", str(ROOT / "configs/arithmetic_cpu.py"), "--gpu", "8")
    assert code == 2 and text.startswith("error: unknown option '--gpu'") and text.count("\n") == 1
