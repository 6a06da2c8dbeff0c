"""Rewards of completions, and the evaluation on held-out problems."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import reward as tasks
from configs.base import Config
from fsdp_utils import World, on_every_rank
from runtime.conversation import Completion, by_adapter, mix_seeds
from runtime.data import Problem
from runtime.heap import release_free_memory
from runtime.run import Prompt, Run, Scorer, by_task, request_of
from runtime.signals import Stopped
from runtime.user_rewards import CORRECT, Reward, UserRewards, finite, named_parts, raised

SAMPLES_LOGGED = 8  # completions in samples.jsonl per step and per evaluation


# ---- Rewards --------------------------------------------------------------------------------------------------


def make_scorer(config: Config, problems: list[Problem]) -> Scorer:
    """The scorer of this run: the functions of `reward`, or its task's score.

    problems: all of them, to check that they have the columns that the functions need. Raises ValueError or OSError.
    """
    if not config.reward:
        for task in config.tasks:
            if not tasks.find_task(task).score:
                raise ValueError(
                    f"task {task!r} has no score of its own: add --reward FILE.py:FUNCTION, or a task that has"
                )
        return lambda completions: [task_reward(problem.task, problem, text) for problem, text in completions]
    functions = UserRewards(config.reward, config.reward_timeout)
    for problem in problems:
        functions.check_columns(reward_row(problem, ""))
    return lambda completions: functions.score([reward_row(problem, text) for problem, text in completions])


def reward_row(problem: Problem, text: str) -> dict[str, Any]:
    """A reward function's possible arguments: the data's columns, answer, prompt, completion."""
    answer = {} if problem.answer is None else {"answer": problem.answer}
    return problem.columns | answer | {"prompt": problem.prompt, "completion": text}


def task_reward(task: str, problem: Problem, text: str) -> Reward:
    """The reward by a task's score: a number, which also tells how right the answer is, or a dict of parts, of which
    "correct" tells that. Raises ValueError that names the problem and the completion.
    """
    try:
        value = tasks.score(task, text, problem.answer)
        if not isinstance(value, dict):
            return Reward(number := finite(value), correct=number)
        parts = named_parts(value)
        return Reward(sum(parts.values()), parts, parts.get(CORRECT))
    except (Exception, SystemExit) as error:
        where = f"{problem!r} and completion {text!r}"
        raise ValueError(f"the reward of task {task!r} {raised(error)}, on {where}") from None


def compute_rewards(
    prompts: list[Prompt],
    completions: list[Completion],
    score: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
) -> list[Reward]:
    """The reward of each completion, in order. Collective.

    One rank scores all completions of a prompt and shares the result, so that ranks agree even on random rewards.
    """
    mine = [i for i, completion in enumerate(completions) if completion.request % world.size == world.rank]
    texts = [(prompts[completions[i].request].problem, decode(completions[i], tokenizer)) for i in mine]
    own = on_every_rank(lambda: score(texts))
    shares: list = [None] * world.size
    dist.all_gather_object(shares, dict(zip(mine, own)))
    scored = {i: reward for share in shares for i, reward in share.items()}
    rewards = [scored[i] for i in range(len(completions))]
    if world.rank == 0:
        for name, count in Counter(name for reward in rewards for name in reward.timeouts).items():
            print(f"reward {name} took longer than reward_timeout: {count} of {len(rewards)} count as 0", flush=True)
    return rewards


def total_rewards(rewards: list[Reward]) -> Tensor:
    """(N,) float64."""
    return torch.tensor([reward.total for reward in rewards], dtype=torch.float64)


def groups_that_differ(scores: Tensor, group_size: int) -> Tensor:
    """(N,) -> (P,) bool: whether a group's scores are not all the same."""
    groups = scores.view(-1, group_size)
    return (groups != groups[:, :1]).any(1)


def rollout_metrics(completions: list[Completion], scores: Tensor, group_size: int | None) -> dict[str, float]:
    """Metrics of a step's completions; with several tasks, also of those of each.

    group_size: None if the algorithm does not compare groups.
    """
    metrics = {}
    if group_size:
        differ = groups_that_differ(scores, group_size)
        metrics |= {"rollout/groups": len(differ), "reward/mixed_groups_frac": differ.double().mean().item()}
    if len(scores) > 1:
        metrics["reward/std"] = scores.std().item()
    lengths = [completion.length for completion in completions]
    metrics |= {
        "reward/mean": scores.mean().item(),
        "reward/min": scores.min().item(),
        "reward/max": scores.max().item(),
        "rollout/tokens": sum(lengths),
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/truncated_frac": sum(completion.truncated for completion in completions) / len(completions),
    }
    return metrics | per_adapter(
        completions, lambda mine: rollout_metrics([completions[i] for i in mine], scores[mine], group_size)
    )


def per_adapter(completions: list[Completion], metrics_of: Callable[[list[int]], dict[str, float]]) -> dict[str, float]:
    """With several adapters, `metrics_of(indices)` of each, named NAME/ADAPTER; with one, nothing."""
    parts = by_adapter(completions)
    if len(parts) < 2:
        return {}
    return {f"{name}/{adapter}": value for adapter in parts for name, value in metrics_of(parts[adapter]).items()}


def part_metrics(rewards: list[Reward]) -> dict[str, float]:
    """Mean and standard deviation of each part (0 where a reward lacks it), and the number of timeouts."""
    names = dict.fromkeys(name for reward in rewards for name in reward.parts)
    late = sum(len(reward.timeouts) for reward in rewards)
    metrics: dict[str, float] = {"reward/timeouts": late} if names or late else {}
    for name in names:
        values = torch.tensor([reward.parts.get(name, 0.0) for reward in rewards], dtype=torch.float64)
        metrics[f"reward/{name}"] = values.mean().item()
        if len(values) > 1:
            metrics[f"reward/{name}_std"] = values.std().item()
    return metrics


def decode(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that is scored: a completion's last turn, without special tokens."""
    return tokenizer.decode(completion.last_turn, skip_special_tokens=True)


def transcript(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The whole conversation: all turns and replies, and the special tokens between them."""
    earlier = completion.token_ids[: len(completion.token_ids) - len(completion.last_turn)]
    return tokenizer.decode(earlier) + decode(completion, tokenizer)


# ---- Held-out problems ----------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Completions of held-out problems, and their rewards."""

    completions: list[Completion]  # first `eval_samples` sampled ones per problem, then one greedy one per problem
    rewards: list[Reward]  # of each
    problems: int
    seconds: float  # of generation

    def split(self, values: list[float]) -> tuple[Tensor, Tensor]:
        """Values of the completions -> (problems, samples) and (problems, 1) float64, sampled and greedy."""
        tensor = torch.tensor(values, dtype=torch.float64)
        return tensor[: -self.problems].view(self.problems, -1), tensor[-self.problems :, None]

    @property
    def right(self) -> tuple[Tensor, Tensor] | None:
        """1.0 for right answers and 0.0 for others, sampled and greedy; None if a task's rewards do not tell."""
        parts = [range(len(self.rewards)), *by_adapter(self.completions).values()]
        if any(all(self.rewards[i].correct is None for i in part) for part in parts):
            return None
        return self.split([float((reward.correct or 0.0) >= 1) for reward in self.rewards])

    def metrics(self) -> dict[str, float]:
        """Mean rewards and, if rewards tell which answers are right, accuracies with standard errors.

        With several tasks, also those of each.
        """
        sampled, greedy = self.split([reward.total for reward in self.rewards])
        metrics = {"reward": sampled.mean().item(), "reward_greedy": greedy.mean().item()}
        if self.right:
            for name, right in zip(("accuracy", "accuracy_greedy"), self.right):
                metrics |= mean_and_stderr(name, right)
        return metrics | per_adapter(self.completions, lambda mine: self.restricted_to(mine).metrics())

    def restricted_to(self, indices: list[int]) -> "Evaluation":
        """The evaluation restricted to some completions, which must be all completions of their problems."""
        completions, rewards = ([values[i] for i in indices] for values in (self.completions, self.rewards))
        problems = len({completion.request for completion in completions}) // 2
        return Evaluation(completions, rewards, problems, self.seconds)


def evaluate_prompts(run: Run) -> Evaluation:
    """Sampled and greedy completions of the held-out prompts, and their rewards. Collective.

    The seeds do not depend on the step: two evaluations differ only by the policy.
    """
    config, prompts = run.config, run.test_prompts
    sampled = [
        request_of(prompt, config.eval_samples, config.temperature, mix_seeds(config.seed, i))
        for task in by_task(prompts)
        for i, prompt in enumerate(task)
    ]
    greedy = [request_of(prompt, samples=1, temperature=0.0, seed=0) for prompt in prompts]
    start = time.perf_counter()
    completions = run.engine.generate(sampled + greedy, label="evaluation")
    seconds = time.perf_counter() - start
    rewards = compute_rewards(2 * prompts, completions, run.scorer, run.tokenizer, run.world)
    return Evaluation(completions, rewards, len(prompts), seconds)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Evaluates the policy on the held-out problems, and logs a few samples; returns `eval/*` metrics.

    A signal ends the evaluation without metrics. The weights have changed, so the run stops when the step is finished.
    """
    try:
        evaluation = evaluate_prompts(run)
    except Stopped:
        return {}
    log_samples(run, step, "eval", 2 * run.test_prompts, evaluation.completions, evaluation.rewards)
    release_free_memory()
    return {f"eval/{name}": value for name, value in evaluation.metrics().items()}


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
    run: Run, step: int, kind: str, prompts: list[Prompt], completions: list[Completion], rewards: list[Reward]
) -> None:
    """Logs the first few completions of each task. kind: "train" or "eval"."""
    chosen = [i for mine in by_adapter(completions).values() for i in mine[:SAMPLES_LOGGED]]
    records = sample_records(run, prompts, [completions[i] for i in chosen], [rewards[i] for i in chosen])
    records = [{"step": step, "kind": kind} | record for record in records]
    run.log.samples(records)
    if kind == "train":
        run.samples = records


def sample_records(
    run: Run, prompts: list[Prompt], completions: list[Completion], rewards: list[Reward]
) -> list[dict[str, Any]]:
    """Completions as text, with answers, rewards and the parts of rewards."""
    problems = [prompts[completion.request].problem for completion in completions]
    return [
        {
            "prompt": problem.prompt,
            "completion": transcript(completion, run.tokenizer),
            "extracted": tasks.find_task(problem.task).extract(decode(completion, run.tokenizer)),
            "answer": problem.answer,
            "reward": reward.total,
            "truncated": completion.truncated,
        }
        | ({"parts": reward.parts} if reward.parts else {})
        for problem, completion, reward in zip(problems, completions, rewards)
    ]
