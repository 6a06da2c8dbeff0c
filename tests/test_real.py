"""A real pretrained model, SmolLM2-135M-Instruct, against transformers and peft: bf16 over thirty layers, a vocabulary
of words and a chat template, none of which the other tests' models have.

$SMOLLM2_DIR names its folder; without it, tools/real_model.py makes one in the cache. bfloat16 alone moves a logprob of
this model by 0.05 nats, so nothing here is compared with a fixed number: `Reference.noise` is measured first.
"""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import ROOT, distance, on_ranks, plain_logprobs, read_rows
from test_resume import await_step, finish, kill, rows, start
from transformers import AutoModelForCausalLM, AutoTokenizer

import fsdp_utils
import lora
from policy import Policy
from runtime import adapter_files
from runtime.packing import pack
from tools import adapter as export

CPU = torch.device("cpu")
RANK, ALPHA = 8, 16.0
EFFECT = 10.0  # of the random adapter on a logprob, in units of bfloat16's noise
END_OF_TURN = "<|im_end|>"
CHATS = {
    "What is the capital of France?": "The capital of France is Paris, which lies on the river Seine.",
    "Why is the sky blue?": "Air scatters blue light far more than red, so it reaches us from every part of the sky.",
    "Write a loop in Python that prints 1 to 3.": "for number in range(1, 4):\n    print(number)",
    "Say something that nobody has said before.": "Seventeen lilac tractors 0xF3 zum Mitnehmen, \u6771\u4eac!",
    "47+85=": "47 + 85 = 132",
}
COOL = 0.5  # a temperature at which answers are short
TOOL = {"role": "tool", "content": "The result is\n\n  4."}
SHORT_QUESTIONS = ["What is 1+1? Answer with one number.", "What is 2+3? Answer with one number."]
SMALL_RUN = "--steps 2 --max_prompt_length 128 --max_completion_length 16 --eval_problems 2"
SMALL_RUN += f" --eval_samples 1 --lora_rank {RANK} --lora_alpha {ALPHA} --learning_rate 1e-4"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model's folder."""
    folder = Path(os.environ.get("SMOLLM2_DIR") or ROOT / ".cache" / "smollm2")
    if not (folder / "config.json").exists():
        made = subprocess.run([sys.executable, "tools/real_model.py", folder], cwd=ROOT, capture_output=True, text=True)
        if made.returncode == 2:
            pytest.skip(made.stderr.splitlines()[-1])
        assert made.returncode == 0, made.stderr
    return folder


@dataclass(frozen=True)
class Reference:
    """What transformers and peft say of `CHATS`, in float32 unless otherwise said."""

    prompts: list[list[int]]  # longest text first
    completions: list[list[int]]  # each with the token that ends its turn
    base: torch.Tensor  # (R,) logprobs of all completions' tokens
    noise: float  # how far transformers in bfloat16 is from that, see `distance`
    adapter: Path  # a random adapter in peft's format, `EFFECT` times that strong
    adapted: torch.Tensor  # (R,) logprobs with it, left beside the base by peft


@pytest.fixture(scope="module")
def reference(smollm2, tmp_path_factory) -> Reference:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        (ask(tokenizer, question), tokenizer(answer + END_OF_TURN)["input_ids"]) for question, answer in CHATS.items()
    ]
    prompts, completions = zip(*sorted(texts, key=lambda text: -len(text[0] + text[1])))
    model = load(smollm2)
    base = plain_logprobs(model, prompts, completions)
    noise = distance(plain_logprobs(load(smollm2, torch.bfloat16), prompts, completions), base)

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    for matrix in matrices:
        torch.nn.init.normal_(matrix, std=0.05)
    for _ in range(2):  # the effect is proportional only while it is small
        effect = distance(plain_logprobs(model, prompts, completions), base)
        for matrix in matrices:
            matrix.data *= EFFECT * noise / effect
    adapter = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(adapter)
    adapted = plain_logprobs(model, prompts, completions)
    assert 0.7 * EFFECT < distance(adapted, base) / noise < 1.4 * EFFECT
    return Reference(prompts, completions, base, noise, adapter, adapted)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def ask(tokenizer, question: str) -> list[int]:
    """The token ids of a chat that waits for its first answer."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


# ---- The trainer ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_trainers_logprobs_are_those_of_transformers(smollm2, reference):
    """In float32 far closer than bfloat16's noise; in bfloat16 as close as transformers itself, with an adapter that
    peft wrote and without it.
    """
    packed = pack(reference.prompts, reference.completions, CPU)
    assert distance(Policy(load(smollm2))(packed).logprobs, reference.base) < reference.noise / 100

    policy = Policy(load(smollm2, torch.bfloat16))
    lora.inject(policy.model, ["all-linear"], RANK, ALPHA)
    adapter_files.load_adapter(policy.model, reference.adapter)
    assert distance(policy(packed).logprobs, reference.adapted) < 2 * reference.noise
    with lora.disabled(policy.model):
        assert distance(policy(packed).logprobs, reference.base) < 2 * reference.noise


@torch.no_grad()
def test_exports_are_what_peft_makes_of_the_adapter(smollm2, reference, tmp_path, monkeypatch):
    """The adapter that is written here, loaded by peft; and base plus adapter, loaded by transformers."""
    model = load(smollm2)
    lora.inject(model, ["all-linear"], RANK, ALPHA)
    adapter_files.load_adapter(model, reference.adapter)
    adapter_files.save_adapter(model, tmp_path / "adapter", base_model=str(smollm2))
    again = peft.PeftModel.from_pretrained(load(smollm2), tmp_path / "adapter")
    texts = reference.prompts, reference.completions
    torch.testing.assert_close(plain_logprobs(again, *texts), reference.adapted, rtol=1e-5, atol=1e-4)

    merged = again.merge_and_unload().bfloat16().float()  # rounded once, computed in float32
    arguments = f"export --base {smollm2} --adapter {tmp_path / 'adapter'} --out {tmp_path / 'model'}"
    monkeypatch.setattr(sys, "argv", ["adapter.py", *arguments.split()])
    export.main()
    exported, tokenizer = load(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    found, rounded = plain_logprobs(exported, *texts), plain_logprobs(merged, *texts)
    assert distance(found, rounded) < reference.noise / 10  # a sum half-way between two numbers may go either way
    assert distance(found, reference.adapted) < reference.noise
    assert ask(tokenizer, "47+85=") == ask(AutoTokenizer.from_pretrained(smollm2), "47+85=")


# ---- Runs on two ranks ----------------------------------------------------------------------------------------


def share_of_digits(completion: str, answer: str) -> float:
    """A reward that differs within nearly every group."""
    return sum(map(str.isdigit, completion)) / max(1, len(completion))


def two_runs(folder: Path, reference: Reference, short_questions: list[list[int]], out: Path) -> dict[str, dict]:
    """On each rank: two steps of GRPO with merged syncs, and of PPO with vLLM's own LoRA; and then, by each of these
    ways, the reference's adapter into vLLM.
    """
    import reward
    import train_grpo
    import train_ppo

    reward.TASKS["arithmetic"] = dataclasses.replace(reward.TASKS["arithmetic"], score=share_of_digits)
    ways = {
        "grpo": (train_grpo.setup_grpo, train_grpo.train, "arithmetic_cpu.py --prompts_per_step 2 --group_size 4"),
        "ppo": (
            train_ppo.setup_ppo,
            train_ppo.train,
            "arithmetic_cpu_ppo.py --prompts_per_step 8 --sync adapter --warmup_steps 0",
        ),
    }
    found, alive = {}, []  # an engine takes the process groups with it when it goes
    for name, (setup, train, options) in ways.items():
        command = f"--config {ROOT}/configs/{options} --model {folder} --output_dir {out}/{name} {SMALL_RUN}"
        sys.argv[1:] = command.split()
        run = setup()
        train(run)
        alive.append(run)
        prompts = [(prompt.problem.prompt, prompt.token_ids) for prompt in run.test_prompts]
        learned = any(bool(layer.adapters[lora.POLICY].lora_B.any()) for _, layer in lora.lora_layers(run.policy.model))
        found[name] = {"prompts": prompts, "learned": learned} | hand_over(run, reference)
    found["turns"] = turns(alive[0], short_questions)
    found["conversations"] = conversations(alive[0])
    return found


def hand_over(run, reference: Reference) -> dict[str, torch.Tensor]:
    """The trainer's logprobs with the reference's adapter, and vLLM's before and after a sync."""

    def sampler() -> torch.Tensor:
        texts = zip(reference.prompts, reference.completions)
        return torch.tensor([n for p, c in texts for n in run.engine.logprobs(p + c)[len(p) - 1 :]])

    before = sampler()
    adapter_files.load_adapter(run.policy.model, reference.adapter, fill=fsdp_utils.fill)
    with torch.no_grad():
        trainer = run.policy(pack(reference.prompts, reference.completions, run.world.device)).logprobs
    run.weight_sync.update_weights(verify=True)
    return {"before": before, "trainer": trainer, "sampler": sampler()}


def turns(run, questions: list[list[int]]) -> list[tuple]:
    """Completions, and what the update would train on: (completion, its targets, their weights)."""
    from runtime.batching import make_updates
    from runtime.conversation import Request
    from train_grpo import ALGORITHMS

    completions = run.engine.generate([Request(ids, 8, 1.0, seed=9 * i) for i, ids in enumerate(questions)])
    alone = fsdp_utils.World(0, 1, run.world.device)
    (batches,) = make_updates(completions, torch.ones(len(completions)), ALGORITHMS["grpo"].weight, run.config, alone)
    return [
        (completions[number], batch.packed.targets[batch.sequences == i], batch.weights[batch.sequences == i])
        for batch in batches
        for i, number in enumerate(batch.completions)
    ]


def say_more(problem, messages) -> dict[str, str] | str | None:
    """A tool's result for the first question, a user's doubt for the second; one reply each."""
    if len(messages) > 2:
        return None
    return TOOL if problem.prompt == SHORT_QUESTIONS[0] else "Are you sure?"


def conversations(run) -> list[tuple]:
    """Conversations of two turns, each with the trainer's logprobs of what the update would train on."""
    import reward
    from runtime.batching import make_updates
    from runtime.prompts import in_environment, tokenize
    from runtime.run import request_of
    from train_grpo import ALGORITHMS

    reward.TASKS["arithmetic"] = dataclasses.replace(reward.TASKS["arithmetic"], reply=say_more)
    run.engine.max_completion_length = 96
    prompts = tokenize(
        [reward.Problem(question, "", task=run.config.task) for question in SHORT_QUESTIONS], run.tokenizer, None
    )
    prompts = [in_environment(prompt, run.config, run.tokenizer) for prompt in prompts]
    completions = run.engine.generate([request_of(prompt, 8, COOL, seed=9 * i) for i, prompt in enumerate(prompts)])
    alone = fsdp_utils.World(0, 1, run.world.device)
    (batches,) = make_updates(completions, torch.ones(len(completions)), ALGORITHMS["grpo"].weight, run.config, alone)
    found = []
    for batch in batches:
        with torch.no_grad():
            logprobs = run.policy(batch.packed, COOL).logprobs
        found += [
            (completions[number], batch.packed.targets[batch.sequences == i], logprobs[batch.sequences == i])
            for i, number in enumerate(batch.completions)
        ]
    return found


@pytest.fixture(scope="module")
def runs(smollm2, reference, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of the two runs, and what each rank found."""
    folder, tokenizer = tmp_path_factory.mktemp("runs"), AutoTokenizer.from_pretrained(smollm2)
    questions = [ask(tokenizer, question) for question in SHORT_QUESTIONS]
    return folder, on_ranks(2, two_runs, smollm2, reference, questions, folder, folder=folder)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_two_steps_learn_and_are_finite(runs, reference, name):
    folder, found = runs
    _before, *steps = read_rows(folder / name / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
        assert step["reward/std"] > 0 and step["grad_norm"] > 0
        assert step["mismatch/abs_logprob_diff"] < 2 * reference.noise
        assert step["mismatch/kl"] < 4 * reference.noise**2  # about half the mean square of the difference
    assert all(rank[name]["learned"] for rank in found)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_vllm_is_the_trainer_after_a_sync(runs, reference, name):
    """Merged and as an adapter. Before the sync, vLLM is far away."""
    for rank in runs[1]:
        before, trainer, sampler = (rank[name][key] for key in ("before", "trainer", "sampler"))
        assert distance(before, trainer) > EFFECT / 2 * reference.noise
        assert distance(sampler, trainer) < 2.5 * reference.noise  # two implementations, and a rounded sum
        update = reference.adapted - reference.base
        arrived = (sampler - reference.base) @ update / update.square().sum()
        assert arrived.item() == pytest.approx(1, abs=0.1), "the share of the update, the reference being without noise"


def test_prompts_are_those_of_the_chat_template(runs, smollm2):
    """Its text, and each of its marks once: no second one at the beginning."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for question, token_ids in runs[1][0]["grpo"]["prompts"]:
        assert token_ids == ask(tokenizer, question)
        assert tokenizer.decode(token_ids) == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_the_end_of_a_turn_is_sampled_and_trained_on(runs, smollm2):
    """Once, as the last token; never in a completion that was cut off."""
    end = AutoTokenizer.from_pretrained(smollm2).convert_tokens_to_ids(END_OF_TURN)
    completions = runs[1][0]["turns"]
    assert len(completions) == 8 * len(SHORT_QUESTIONS)
    for completion, targets, weights in completions:
        ids = completion.token_ids
        assert (ids.count(end), ids[-1] == end) == ((0, False) if completion.truncated else (1, True))
        assert targets.tolist() == ids and (weights > 0).all()
    assert not all(completion.truncated for completion, *_ in completions)


def test_conversations_are_those_of_the_chat_template(runs, smollm2, reference):
    """With a tool's message and a user's: text and tokens are those of all messages, rendered at once; trained are the
    model's own, of which trainer and sampler think alike.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    whole = 0
    for completion, targets, logprobs in runs[1][0]["conversations"]:
        said = [token for token, trained in zip(completion.token_ids, completion.trained) if trained]
        assert targets.tolist() == said
        sampler = torch.tensor([logprob for logprob in completion.logprobs if logprob is not None])
        assert distance(sampler, logprobs) < 4 / COOL * reference.noise  # of few tokens
        if completion.truncated:
            continue
        question = SHORT_QUESTIONS[completion.request]
        first, rest = said[: said.index(tokenizer.eos_token_id)], completion.last_turn
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": tokenizer.decode(first)}]
        reply = say_more(SimpleNamespace(prompt=question), messages)
        messages.append(reply if isinstance(reply, dict) else {"role": "user", "content": reply})
        messages.append({"role": "assistant", "content": tokenizer.decode(rest, skip_special_tokens=True)})
        ids = completion.prompt_ids + completion.token_ids
        assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
        assert said == first + [tokenizer.eos_token_id] + rest
        before = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
        same = tokenizer(tokenizer.decode(first))["input_ids"] == first  # a model may sample "is" as "i" and "s"
        assert ids[: len(ids) - len(rest)] == before or not same
        whole += same
    assert whole, "of 16 conversations"


@pytest.mark.slow
def test_a_killed_run_of_a_real_model_resumes_bit_identically(smollm2, tmp_path):
    """As the tiny model's in test_resume.py; an entropy bonus teaches although no answer is right."""
    options = f"--model {smollm2} {SMALL_RUN} --steps 4 --save_every 1 --eval_every 0 --entropy_coef 0.01".split()
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    finish(start(quiet, *options))
    process = start(killed, *options)
    await_step(process, killed, 2)
    time.sleep(1)  # into the third step, or a slow disk's save of the second
    kill(process)
    assert "resumed after step" in finish(start(killed, *options, "--resume"))
    assert rows(killed) == rows(quiet) and sum(row.get("grad_norm", 0) for row in rows(quiet)) > 0
    assert rows(killed, "samples") == rows(quiet, "samples")
