"""Several tasks in one run, an adapter each: each is what a run of its own gives, on real vLLM, to rounding."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, on_ranks, read_rows, refused, torchrun, train
from safetensors.torch import load_file
from test_generators import train_on_one_thread
from test_resume import NOISE
from torch import Tensor, nn

import lora
from configs.base import Config
from runtime.models import add_adapters, meta_model
from tools import evaluate
from train_grpo import configure

TASKS = ("arithmetic", "near")
# The sum; and how near an answer comes to it, on the same problems in another order: the two learn different things.
CONFIG = f"""
import sys
sys.path.insert(0, "{ROOT}")
import dataclasses
import reward
from configs.arithmetic_cpu import config

def near(completion, answer):
    return max(0.0, 1 - abs(float(reward.extract_answer(completion) or "inf") - float(answer)) / 50)

reward.TASKS["near"] = reward.Task(lambda split: reward.arithmetic_problems(split)[::-1], near)
config = dataclasses.replace(
    config, task="arithmetic,near", algorithm="reinforce_pp_baseline", kl_coef=0.01, updates_per_rollout=2,
    prompts_per_step=16, group_size=4, tokens_per_microbatch=512, gradient_checkpointing="full", sync="adapter",
    dtype="float32", steps=3, lr_schedule="constant", save_every=1, eval_every=3, eval_samples=1, eval_problems=24,
)
"""


def command(folder: Path, *options: str) -> str:
    """Of a short run on both tasks, whose advantages, weights of tokens and clipping depend on the whole batch."""
    folder.mkdir()
    (folder / "config.py").write_text(CONFIG)
    return " ".join(["train_grpo.py", "--config", f"{folder}/config.py", *options])


def adapter(run: Path, name: str, kind: str = "", step: int = 3) -> Tensor:
    """All values of an adapter in a checkpoint, or of one kind of its optimizer's state."""
    state = load_file(run / f"checkpoints/step_{step:06d}/state.safetensors")
    keys = [key for key in state if f".adapters.{name}." in key and key.endswith(("lora_A" + kind, "lora_B" + kind))]
    return torch.cat([state[key].flatten() for key in sorted(keys)])


def rows(run: Path, name: str = "metrics") -> list[dict]:
    """A log of a run, without what may differ between equal runs."""
    return [
        {key: value for key, value in row.items() if not key.startswith(NOISE)}
        for row in read_rows(run / f"{name}.jsonl")
    ]


def close(found: Tensor, expected: Tensor, size: Tensor, share: float) -> bool:
    return bool((found - expected).norm() <= share * size.norm())


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder of a run on both tasks, on two ranks."""
    folder = tmp_path_factory.mktemp("tasks") / "together"
    return train(2, command(folder), folder)[1]


@pytest.mark.parametrize("task", [pytest.param("arithmetic", marks=pytest.mark.slow), "near"])
def test_each_adapter_is_that_of_a_run_of_its_own(together, tmp_path, task):
    """The same tokens, metrics and gradients. Where a gradient is all rounding, Adam makes a whole step of it, so
    weights are compared with how far the last step moved them.
    """
    own = command(tmp_path / "alone", "--task", task, "--prompts_per_step", "8")
    metrics_alone, alone = train(1, own, tmp_path / "alone")
    for step, step_alone in zip(rows(together), metrics_alone, strict=True):
        names = [name for name in step_alone if name.startswith(("reward/", "completion/", "eval/"))]
        assert names and all(step[f"{name}/{task}"] == pytest.approx(step_alone[name]) for name in names)
    samples, first = rows(together, "samples"), 8 * TASKS.index(task)
    assert [sample for i, sample in enumerate(samples) if first <= i % 16 < first + 8] == rows(alone, "samples")
    for kind in ("/exp_avg", "/exp_avg_sq"):
        moments = adapter(alone, lora.POLICY, kind)
        assert close(adapter(together, task, kind), moments, moments, 1e-3), kind
    weights = adapter(alone, lora.POLICY)
    assert close(adapter(together, task), weights, weights - adapter(alone, lora.POLICY, step=2), 0.01)


@pytest.mark.slow
def test_several_tasks_resume_are_sampled_elsewhere_and_evaluated(together, tmp_path):
    """Resumed, the run is the same bit for bit; so are the samples of processes that only generate."""
    resumed, elsewhere = tmp_path / "resumed", tmp_path / "elsewhere"
    again = command(resumed, "--resume", f"{resumed}/run/checkpoints/step_000002")
    shutil.copytree(together, resumed / "run")
    train(2, again, resumed)
    assert rows(resumed / "run") == rows(together)
    assert all(torch.equal(adapter(resumed / "run", task), adapter(together, task)) for task in TASKS)

    apart = command(elsewhere, "--rollout_ranks", "1", "--output_dir", f"{elsewhere}/run")
    on_ranks(2, train_on_one_thread, apart, folder=elsewhere)
    assert rows(elsewhere / "run", "samples") == rows(together, "samples")

    expected = rows(together)[-1]
    config = ["--config", str(together.parent / "config.py"), "--eval_problems", "24", "--out", f"{tmp_path}/out"]
    for what, names in (
        (["--run_folder", str(together)], [f"accuracy/{task}" for task in TASKS]),
        (["--run_folder", str(together), "--task", "near"], ["accuracy"]),
    ):
        done = torchrun(1, "tools/evaluate.py", *config, *what)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
        shutil.rmtree(tmp_path / "out")
        for name in names:
            assert found[name] == pytest.approx(expected[f"eval/{name}" if "/" in name else f"eval/{name}/near"])
    alone, *_ = evaluate.parse(["--adapter", f"{together}/checkpoints/step_000003/adapter/near"])
    assert (alone.task, alone.dtype) == ("near", "float32"), "as the run that trained it"


def test_a_token_passes_through_its_own_adapter():
    """Output and gradients in float64, next to each adapter's on its tokens alone; one has none, and gradients of 0."""
    names, owners = ["a", "b", "c"], torch.tensor([2, 0, 0, 2, 0])
    model = nn.ModuleDict({"up": nn.Linear(6, 4)})
    for name in names:
        lora.inject(model, ["up"], 2, 4.0, name=name)
    model.double()
    layer, x = model["up"], torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = {name: list(layer.adapters[name].parameters()) for name in names}
    for parameter in [x, *layer.parameters()]:
        nn.init.normal_(parameter)
    expected = torch.empty(1, 5, 4, dtype=torch.float64)
    for place, name in enumerate(names):
        A, B = parameters[name]
        chosen = x[:, owners == place]
        expected[:, owners == place] = layer.base(chosen) + 2.0 * chosen @ A.T @ B.T
    lora.activate(model, *names)
    lora.route(model, owners)
    found, trained = layer(x), [x, *(parameter for name in ("a", "c") for parameter in parameters[name])]
    torch.testing.assert_close(found, expected)
    weights = torch.randn(4, dtype=torch.float64)
    gradients = torch.autograd.grad((expected @ weights).sin().sum(), trained)
    (found @ weights).sin().sum().backward()
    for parameter, gradient in zip(trained, gradients):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad.eq(0).all() for parameter in parameters["b"])
    with lora.disabled(model):
        torch.testing.assert_close(layer(x), layer.base(x))


REFUSED = {
    "--task arithmetic,arithmetic": ("twice", "arithmetic,arithmetic"),
    "--task arithmetic,reference": ("'reference'", "adapter's name"),
    "--task arithmetic,": ("''", "letters"),
    "--prompts_per_step 3": ("prompts_per_step", "multiple of 2", "not 3"),
    "--prompts_per_step 8 --updates_per_rollout 8": ("multiple of 16", "not 8"),
    "--data sums.csv": ("data", "reward.TASKS"),
    "--task arithmetic,own": ("data", "reward.TASKS"),
    "--lora_adapter_path x": ("lora_adapter_path", "2 tasks"),
    "--sync merged": ("sync adapter",),
    "--lora_rank 0": ("lora_rank",),
    "--dtype nf4": ("nf4",),
    "--algorithm reinforce_pp --group_size 1 --prompts_per_step 2": ("nothing to compare it with", "exceed 2"),
    "--algorithm flowrl": ("flowrl", "one task"),
    "--algorithm dapo": ("dapo", "one task"),
}


@pytest.mark.parametrize("name", ["training", "update"])
def test_a_task_whose_name_pytorch_uses_is_refused(name):
    with refused(name, "rename the task"):
        add_adapters(meta_model(str(TINY), torch.bfloat16), Config(task=f"arithmetic,{name}"))


@pytest.mark.parametrize("options", REFUSED)
def test_what_several_tasks_cannot_have(options):
    with refused(*REFUSED[options]):
        configure(["--task", "arithmetic,gsm8k", *options.split()])
