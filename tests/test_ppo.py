"""PPO's own parts: GAE, the value loss, the critic on several ranks, and a short run."""

import shutil

import pytest
import torch
from conftest import EPSILON, ROOT, TINY, on_ranks, train
from test_algorithms import F64, micro_batch

import fsdp_utils
from configs.base import Config
from runtime.models import build_critic
from runtime.packing import pack
from train_ppo import gae, normalize, value_loss

PROMPTS = [[5, 9, 2], [7, 7, 7, 7], [3], [11, 4]]
COMPLETIONS = [[8, 1, 30, 2], [6], [12, 13, 99], [14, 15]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.95, 0.0)])
def test_gae_is_the_sum_of_its_definition(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 7, 1, 7]
    rewards, values = torch.randn(2, sum(lengths), generator=generator, dtype=F64)
    expected = []
    for r, v in zip(rewards.split(lengths), values.split(lengths)):
        v = v.tolist() + [0.0]
        deltas = [r[t].item() + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected += [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(r))]
    found = gae(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))
    if gamma == lam == 1:  # what is still to come, less what was expected
        to_come = torch.cat([r.flip(0).cumsum(0).flip(0) for r in rewards.split(lengths)])
        torch.testing.assert_close(found, to_come - values)


def test_value_loss_by_hand():
    """Return 1, old value 0, clip 0.2: at 0.5 the error of the clipped value counts, so there is no gradient."""
    values = torch.tensor([0.1, 0.5, -0.5], requires_grad=True)
    loss, info = value_loss(values, torch.zeros(3), torch.ones(3), 0.2)
    assert loss.tolist() == pytest.approx([0.9**2 / 2, 0.8**2 / 2, 1.5**2 / 2])
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == pytest.approx([-0.9, 0.0, -1.5])
    assert info["clip_frac"].tolist() == [0, 1, 0]
    loss, _ = value_loss(values, torch.zeros(3), torch.ones(3), 0.0)
    assert loss.tolist() == pytest.approx([0.9**2 / 2, 0.5**2 / 2, 1.5**2 / 2])


def rank_share(rank, size):
    """The sequences of one rank, longest first."""
    mine = sorted(range(rank, len(PROMPTS), size), key=lambda i: -len(PROMPTS[i] + COMPLETIONS[i]))
    return [PROMPTS[i] for i in mine], [COMPLETIONS[i] for i in mine]


def critic_on_ranks(folder):
    """Values and gradients of a full critic, what a LoRA critic trains, and normalised advantages."""
    world = fsdp_utils.init_world()
    config = Config(dtype="float32", gradient_checkpointing="none", lora_rank=0)
    critic = build_critic(config, str(folder), world)
    with torch.no_grad():
        fsdp_utils.fill(critic.value.weight, torch.linspace(-1, 1, 64)[None])
    values = critic(pack(*rank_share(world.rank, world.size), world.device))
    (values.square().sum() * world.size).backward()
    gradients = {name: fsdp_utils.gather(p.grad) for name, p in critic.named_parameters() if p.grad is not None}

    adapted = build_critic(Config(lora_rank=4, target_modules=["q_proj"]), str(folder), world)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    dtypes = {p.dtype for name, p in adapted.named_parameters() if ".adapters." not in name and "value" not in name}

    options = dict(dtype="nf4", offload="all")
    obedient = build_critic(Config(lora_rank=4, lora_alpha=12.0, **options), str(folder), world)
    layer = obedient.model.model.layers[0].mlp.down_proj
    group = obedient.model.model.layers[0]._get_fsdp_state()._fsdp_param_group
    followed = (
        type(layer.weight).__name__,
        layer.adapters["policy"].scale,
        group.fsdp_params[0].offload_to_cpu,
        group._reshard_after_forward,
    )

    batches = [micro_batch([2, 1], [1.0 + world.rank, 5.0]), micro_batch([1], [100.0], [0.0])]
    normalize(batches, world)
    return values.detach(), gradients, trained, dtypes, followed, batches[0].advantages


def close(found, expected):
    """To a thousand roundings of float32, of the whole tensor."""
    assert (found - expected).norm() < 1000 * EPSILON * expected.norm()


def test_critic_is_the_plain_model_with_a_linear(tmp_path, model_folder):
    from transformers import AutoModelForCausalLM

    folder = model_folder("qwen2", dtype=torch.float32)
    results = on_ranks(2, critic_on_ranks, folder, folder=tmp_path)

    body = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    total = 0.0
    for rank, (values, *_) in enumerate(results):
        expected = []
        for prompt, completion in zip(*rank_share(rank, 2)):
            hidden = body(torch.tensor([prompt + completion])).last_hidden_state[0]
            expected.append(hidden[len(prompt) - 1 : -1] @ torch.linspace(-1, 1, 64))
        close(values, torch.cat(expected).detach())
        total = total + torch.cat(expected).square().sum()
    total.backward()
    gradients = results[0][1]
    assert len(gradients) == len(list(body.parameters())) + 1  # all, and the value's
    for name, parameter in body.named_parameters():
        close(gradients[f"model.model.{name}"], parameter.grad)

    _, _, trained, dtypes, followed, _ = results[0]
    assert len(trained) == 2 * 2 + 1 and all("q_proj.adapters" in n or n == "value.weight" for n in trained)
    assert dtypes == {torch.bfloat16}
    assert followed == ("NF4Weight", 3.0, True, True), "the critic obeys the same options as the policy"
    whole = torch.cat([advantages for *_, advantages in results])  # 1, 1, 5, 2, 2, 5 of the two ranks, no filler
    raw = torch.tensor([1, 1, 5, 2, 2, 5], dtype=F64)
    torch.testing.assert_close(whole, (raw - raw.mean()) / (raw.std(unbiased=False) + 1e-6))


def test_a_short_run(tmp_path):
    """The critic learns; the policy waits for it in the warm-up; KL may go into the rewards of tokens."""
    options = f"train_ppo.py --config {ROOT}/configs/arithmetic_cpu_ppo.py"
    options += " --steps 4 --eval_problems 32 --prompts_per_step 128"
    options += " --kl_coef 0.01 --kl_penalty k1_reward --epochs_per_rollout 2"
    (_before, *steps), _ = train(2, options, tmp_path)
    assert ["policy/kl_ref" in step for step in steps] == [False, False, True, True]
    assert [step["lr"] for step in steps] == [0.0, 0.0, 0.002, 0.001], "the policy waits, then begins at the peak rate"
    assert steps[3]["critic/error"] < 0.7 * steps[3]["reward/mean"]  # that is the error of expecting nothing
    assert steps[3]["critic/value"] == pytest.approx(steps[3]["critic/return"], abs=0.15)
    assert steps[3]["policy/clip_frac"] > 0 and steps[3]["policy/kl_ref"] != 0


def test_a_critic_of_a_family_whose_classes_vllm_changes(model_folder, tmp_path):
    """vLLM, once started, has put parts of its own into transformers' OLMo 2."""
    folder = shutil.copytree(model_folder("olmo2", vocab_size=300), tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)
    options = f"--config {ROOT}/configs/arithmetic_cpu_ppo.py --model {folder} --steps 2 --warmup_steps 1"
    (_before, *steps), _ = train(1, f"train_ppo.py {options} --eval_problems 2 --prompts_per_step 4", tmp_path)
    assert all("critic/grad_norm" in step for step in steps)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--algorithm grpo --group_size 2", "train_ppo.py has one algorithm, ppo"),
        ("--warmup_steps 60", "must be fewer than the 60 steps"),
    ],
)
def test_contradictions_are_refused(options, message, monkeypatch):
    import train_ppo

    arguments = ["train_ppo.py", "--config", str(ROOT / "configs/arithmetic_cpu_ppo.py"), *options.split()]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(ValueError, match=message):
        train_ppo.setup_ppo()
