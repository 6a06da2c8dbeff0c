"""What happens around the stream, and in which order."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fsdp_utils
import lora
import sync
from configs.base import Config
from runtime import checkpoint
from runtime.optimize import make_optimizer


class RecordingLLM:
    """Stands where vLLM's `LLM` stands, and notes what it is asked to do: a CPU's vLLM ignores sleep."""

    def __init__(self):
        self.calls = []

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def collective_rpc(self, method, kwargs):
        self.calls.append(f"load {len(list(kwargs['weights_iterator']))}")

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return True


def calls_of_a_step(sleep_level, monkeypatch):
    """Of a run whose model is two linears, the second with an adapter, after one rollout, update and sync."""
    from rollout import Engine

    engine = Engine.__new__(Engine)
    engine.llm, engine.sleep_level, engine.adapters, engine.copies_at_once = RecordingLLM(), sleep_level, {}, False
    engine.asleep = set()
    engine.for_packing = iter
    block = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4), "down": torch.nn.Linear(4, 4, bias=False)})
    model = torch.nn.ModuleDict({"block": block})
    lora.inject(model, ["down"], 2, 2.0)
    lora.init_adapters(model, 0)
    policy = torch.nn.Module()
    policy.model = model
    config = Config(sync="merged", sleep_level=sleep_level)
    weight_sync = sync.WeightSync(policy, engine, config, [[1]], torch.device("cuda"))
    streamed = fsdp_utils.summon_layers
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine.llm.calls.append("empty_cache"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(
        fsdp_utils, "summon_layers", lambda model, _, **options: streamed(model, torch.device("cpu"), **options)
    )
    weight_sync.probe = SimpleNamespace(check=lambda everything: engine.llm.calls.append("probe") or {})
    monkeypatch.setattr(sync.ReadBack, "check", lambda *_: engine.llm.calls.append("read back") or {})
    engine.sleep()
    engine.llm.calls.append("update")
    weight_sync.update_weights(verify=True)
    return engine.llm.calls


def test_sleep_and_wake_leave_each_other_room(monkeypatch):
    """The probe comes while vLLM sleeps, for its forwards need the memory of a training step."""
    around = ["update", "probe", "empty_cache"], ["reset_prefix_cache"]
    assert calls_of_a_step(0, monkeypatch) == [*around[0], "load 1", *around[1], "read back"]
    for level, weights in ((1, 1), (2, 3)):  # after level 2, vLLM has lost what does not change, too
        calls = [f"sleep {level}", *around[0], "wake weights", f"load {weights}", *around[1], "wake kv_cache"]
        assert calls_of_a_step(level, monkeypatch) == [*calls, "read back"]


def test_the_probe_leaves_the_gpu_to_either_side(monkeypatch):
    """The trainer scores while vLLM sleeps, and in the end vLLM sleeps and the policy is what it was."""
    calls, model = [], torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})
    lora.inject(model, ["up"], 2, 2.0)
    lora.init_adapters(model, 0)
    before = [parameter.clone() for parameter in model.parameters()]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    policy, engine = SimpleNamespace(model=model), SimpleNamespace(sleep=lambda: calls.append("sleep"))
    names = [lora.POLICY]
    probe = sync.Probe(policy, engine, lambda everything: calls.append(f"send {everything}"), [], None, names)

    def score() -> torch.Tensor:
        calls.append("score")
        return model["up"](torch.ones(4)) if model["up"].active else model["up"].base(torch.ones(4))

    def ask(everything: bool = False) -> torch.Tensor:
        probe.send(everything)
        engine.sleep()
        return model["up"](torch.ones(4))

    probe.trainer_logprobs, probe.sampler_logprobs = score, ask
    probe.check(everything=True)
    probe.check()
    assert calls[:3] == ["score", "send True", "sleep"] and calls[-4:] == ["send False", "sleep"] * 2
    assert set(calls[3:-4]) == {"score"}, "scaled while vLLM sleeps"
    assert all(map(torch.equal, before, model.parameters()))


def test_rounding_the_merged_probe_is_not_the_samplers_error(monkeypatch):
    """A sampler that runs exactly round(W + s B A): the trainer scores with that, too, if merged weights are sent."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)})
    lora.inject(model, ["up"], 2, 2.0)
    layer, x, errors = model["up"], torch.randn(16, 256).bfloat16(), {}
    adapter = layer.adapters[lora.POLICY]
    lora.init_adapters(model, 0)

    def merged() -> torch.Tensor:
        weight = layer.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
        return x @ weight.to(torch.bfloat16).T

    for way in (True, False):
        engine = SimpleNamespace(sleep=lambda: None)
        probe = sync.Probe(SimpleNamespace(model=model), engine, None, [], None, [lora.POLICY], way)
        probe.trainer_logprobs = lambda: layer(x).float().flatten()
        probe.sampler_logprobs = lambda everything=False: merged().float().flatten()
        errors[way] = probe.check()["sync/probe_error"]
        assert adapter.merged is False, "the policy is what it was"
    assert errors[True] < errors[False] / 3


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
@pytest.mark.parametrize("right", [0.01, 0.16, 1.0])
def test_the_probe_gets_its_strength_in_few_trials(monkeypatch, power, right):
    """Whatever power of the strength its effect is: on SmolLM2, 2.5 times the strength has 7 times the effect."""
    tried, target = [], 3.0
    monkeypatch.setattr(sync, "distance", lambda found, expected: found)
    probe = sync.Probe(SimpleNamespace(model=torch.nn.Module()), None, None, [], None, [lora.POLICY])
    probe.base, probe.set_adapters = 0.0, tried.append
    probe.trainer_logprobs = lambda: 1.4 * target * (tried[-1] / right) ** power
    probe.find_strength(target)
    assert target <= probe.expected <= 2 * target and len(tried) <= 6


def test_optimizer_state_is_on_the_gpu_only_for_its_step():
    seen = []
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(4, device="cuda"))
        optimizer = torch.optim.AdamW([parameter], foreach=False)
        fsdp_utils.offload_state(optimizer)
        for _ in range(2):
            parameter.grad = torch.empty(4, device="cuda")
            optimizer.step()  # raises if the state is not where the parameter is
            seen.append({name: value.device.type for name, value in optimizer.state[parameter].items()})
    assert seen == [{"step": "cpu", "exp_avg": "cpu", "exp_avg_sq": "cpu"}] * 2


def test_a_resumed_optimizer_state_is_in_host_memory():
    """From the start, not only after the first step."""
    with FakeTensorMode():
        module = torch.nn.ParameterList([torch.empty(4, device="cuda"), torch.empty(2, 3, device="cuda")])
        optimizer = make_optimizer(Config(offload="optimizer"), module, 1e-3)
        checkpoint.allocate_state(optimizer, list(module.parameters()))  # as `restore_state` does
    found = {value.device.type for state in optimizer.state.values() for value in state.values()}
    assert len(optimizer.state) == 2 and found == {"cpu"}


def test_optimizer_steps_are_the_same_with_its_state_elsewhere():
    stepped = []
    for offload in (False, True):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        if offload:
            fsdp_utils.offload_state(optimizer)
        for step in range(3):
            parameter.grad = torch.linspace(1, step, 7)
            optimizer.step()
        stepped.append(parameter.detach())
    assert torch.equal(*stepped)
