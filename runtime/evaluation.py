"""Rewards of completions, and the evaluation on held-out problems."""

import ctypes
import math
import time
import traceback
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import reward
from configs.base import Config
from fsdp_utils import World, on_every_rank
from rollout import Completion, Engine, mix_seeds
from runtime.run import Prompt, Run, request_of

SAMPLES_LOGGED = 8  # completions in samples.jsonl per step and per evaluation


# ---- Rewards --------------------------------------------------------------------------------------------------


def compute_rewards(
    prompts: list[Prompt],
    completions: list[Completion],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> Tensor:
    """(N,) float64. One rank scores each completion, so all ranks agree even if a reward is random. Collective."""

    def score_share() -> list[float]:
        share = completions[world.rank :: world.size]
        return [compute_reward(prompts[c.request].problem, decode(c, tokenizer), config) for c in share]

    own = on_every_rank(score_share)
    shares: list = [None] * world.size
    dist.all_gather_object(shares, own)
    rewards = torch.empty(len(completions), dtype=torch.float64)
    for rank, share in enumerate(shares):
        rewards[rank :: world.size] = torch.tensor(share, dtype=torch.float64)
    return rewards


def compute_reward(problem: reward.Problem, text: str, config: Config) -> float:
    """A finite reward, or ValueError naming the problem and the completion."""
    try:
        value = reward.score(config.task, text, problem.answer)
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
        cause = f"returned {value!r}, which is no finite number"
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
    raise ValueError(f"the reward of task {config.task!r} {cause}, on {problem!r} and completion {text!r}")


def decode(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a completion's last turn, which is what is scored, without its end-of-sequence token."""
    return tokenizer.decode(completion.last_turn, skip_special_tokens=True)


def transcript(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole conversation: all turns and replies, with the special tokens that divide them."""
    earlier = completion.token_ids[: len(completion.token_ids) - len(completion.last_turn)]
    return tokenizer.decode(earlier) + decode(completion, tokenizer)


# ---- Held-out problems ----------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Completions of held-out problems, and their scores."""

    completions: list[Completion]  # `eval_samples` sampled ones per problem, then one greedy completion per problem
    sampled: Tensor  # (problems, samples) float64
    greedy: Tensor  # (problems, 1)
    seconds: float  # of generation

    @property
    def scores(self) -> Tensor:
        """One per completion, in their order."""
        return torch.cat([self.sampled.flatten(), self.greedy.flatten()])

    def metrics(self) -> dict[str, float]:
        """Accuracy, sampled and greedy, with standard errors; and the mean score of sampled completions."""
        sampled = mean_and_stderr("accuracy", is_correct(self.sampled))
        greedy = mean_and_stderr("accuracy_greedy", is_correct(self.greedy))
        return sampled | greedy | {"reward": self.sampled.mean().item()}


def evaluate_prompts(
    engine: Engine, prompts: list[Prompt], config: Config, tokenizer: PreTrainedTokenizerBase, world: World
) -> Evaluation:
    """Sampled and greedy completions of the prompts, from one call of the engine, and their scores. Collective.

    The seeds do not depend on the step: two evaluations differ only by the policy.
    """
    sampled = [
        request_of(prompt, config.eval_samples, config.temperature, mix_seeds(config.seed, i))
        for i, prompt in enumerate(prompts)
    ]
    greedy = [request_of(prompt, samples=1, temperature=0.0, seed=0) for prompt in prompts]
    start = time.perf_counter()
    completions = engine.generate(sampled + greedy, label="evaluation")
    seconds = time.perf_counter() - start
    rewards = compute_rewards(prompts + prompts, completions, config, tokenizer, world)
    split = len(prompts) * config.eval_samples
    return Evaluation(completions, rewards[:split].view(len(prompts), -1), rewards[split:, None], seconds)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Evaluates the policy on the held-out problems, and logs a few samples; returns `eval/*` metrics."""
    prompts = run.test_prompts
    evaluation = evaluate_prompts(run.engine, prompts, run.config, run.tokenizer, run.world)
    log_samples(run, step, "eval", prompts + prompts, evaluation.completions, evaluation.scores)
    release_free_memory()
    return {f"eval/{name}": value for name, value in evaluation.metrics().items()}


def is_correct(scores: Tensor) -> Tensor:
    """1.0 for scores of 1 or more, which mark a correct answer; 0.0 for less, such as a bonus for form alone."""
    return (scores >= 1).double()


def mean_and_stderr(name: str, values: Tensor) -> dict[str, float]:
    """The mean of (problems, samples) values and, as NAME_stderr, its standard error over problems.

    Completions of one problem are correlated, so a problem's mean is one observation (clustered standard errors,
    Miller 2024, arXiv 2411.00640). A single problem has no standard error.
    """
    means = values.mean(1)
    error = {f"{name}_stderr": means.std().item() / math.sqrt(len(means))} if len(means) > 1 else {}
    return {name: means.mean().item()} | error


# ---- Samples for people ---------------------------------------------------------------------------------------


def log_samples(
    run: Run, step: int, kind: str, prompts: list[Prompt], completions: list[Completion], rewards: Tensor
) -> None:
    """Logs the first few completions. kind: "train" or "eval"."""
    records = sample_records(prompts, completions[:SAMPLES_LOGGED], rewards, run.config, run.tokenizer)
    records = [{"step": step, "kind": kind} | record for record in records]
    run.log.samples(records)
    if kind == "train":
        run.samples = records


def sample_records(
    prompts: list[Prompt],
    completions: list[Completion],
    rewards: Tensor,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Completions as text, with answers and rewards."""
    extract = reward.find_task(config.task).extract
    return [
        {
            "prompt": prompts[completion.request].problem.prompt,
            "completion": transcript(completion, tokenizer),
            "extracted": extract(decode(completion, tokenizer)),
            "answer": prompts[completion.request].problem.answer,
            "reward": value,
            "truncated": completion.truncated,
        }
        for completion, value in zip(completions, rewards.tolist())
    ]


def release_free_memory() -> None:
    """Returns free memory to the system: glibc keeps it in ever smaller pieces, 60 MB more per 100 steps on a CPU."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:  # only glibc has it
        trim(0)
