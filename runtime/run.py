"""A run: what every trainer here is made of, and what does not depend on the algorithm.

setup.py turns a configuration into a `Run`: prompts, the sharded policy, its optimizer, the vLLM engine, the log.
A trainer begins it and, in each step, takes prompts, samples, scores, learns, syncs, and concludes the step.
"""

import ctypes
import math
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

import fsdp_utils
import lora
import reward
from configs.base import Config
from policy import Policy
from rollout import Completion, Engine, Request
from runtime import adapter_files, checkpoint, files
from runtime.health import explain, explain_survival, reason_of_losses, reason_to_stop, rewards_differ
from runtime.signals import StopRequest
from runtime.tracking import LOW_SURVIVAL, RunLog, accuracy
from sync import WeightSync

SAMPLES_LOGGED = 8  # completions written to samples.jsonl per step and per evaluation
EXPLAINED_EVERY = 10  # steps within which a useless one is explained once, at full length


@dataclass(frozen=True)
class Prompt:
    """A problem as the model is asked it."""

    problem: reward.Problem
    token_ids: list[int]


@dataclass
class Progress:
    """How far a run has come, in whole steps; a checkpoint holds it."""

    step: int = 0
    prompts_taken: int = 0  # from the endless stream of training prompts
    updates_skipped: int = 0  # for a loss or gradients that were not finite, since the last step without any
    syncs_lost: int = 0  # in a row, in which merging lost more of the update than `min_survival` allows
    steps_useless: int = 0  # whose rewards did not differ, since the last one whose did
    best_accuracy: float = -1.0  # of the checkpoints that were evaluated,
    best_step: int = -1  # and which of them has it


@dataclass(frozen=True)
class Saved:
    """A checkpoint, for a run to go on from."""

    folder: Path
    progress: Progress
    log: dict[str, Any]  # how far the log had come


class Evaluation(NamedTuple):
    """What became of the held-out problems."""

    completions: list[Completion]  # `eval_samples` sampled ones of each problem, then a greedy one of each
    sampled: Tensor  # (problems, samples) scores, float64
    greedy: Tensor  # (problems, 1)
    seconds: float  # that vLLM took

    @property
    def scores(self) -> Tensor:
        """One per completion, in their order."""
        return torch.cat([self.sampled.flatten(), self.greedy.flatten()])

    def metrics(self) -> dict[str, float]:
        """Accuracy, sampled and greedy, with standard errors; and the mean score of sampled completions."""
        sampled = with_error("accuracy", is_right(self.sampled))
        greedy = with_error("accuracy_greedy", is_right(self.greedy))
        return sampled | greedy | {"reward": self.sampled.mean().item()}


@dataclass
class Evaluator:
    """A sampler and problems to test it on: what evaluation needs, in training and without it."""

    config: Config
    world: fsdp_utils.World
    tokenizer: PreTrainedTokenizerBase
    test_prompts: list[Prompt]
    engine: Engine

    def score(self, prompts: list[Prompt], completions: list[Completion]) -> Tensor:
        """(N,) rewards, float64. Each completion is scored by one rank, so that all agree even on a fickle reward."""
        rank, size = self.world.rank, self.world.size
        mine = fsdp_utils.on_every_rank(
            lambda: [self.score_one(prompts[c.request].problem, self.decode(c)) for c in completions[rank::size]]
        )
        shares: list = [None] * size
        dist.all_gather_object(shares, mine)
        rewards = torch.empty(len(completions), dtype=torch.float64)
        for rank, share in enumerate(shares):
            rewards[rank::size] = torch.tensor(share, dtype=torch.float64)
        return rewards

    def score_one(self, problem: reward.Problem, text: str) -> float:
        """A finite reward, or ValueError naming the problem and the completion."""
        try:
            value = reward.score(self.config.task, text, problem.answer, self.config.flexible)
            if isinstance(value, Real) and math.isfinite(value):
                return float(value)
            cause = f"returned {value!r}, which is no finite number"
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        raise ValueError(f"the reward of task {self.config.task!r} {cause}, on {problem!r} and completion {text!r}")

    def test(self) -> Evaluation:
        """Sampled and greedy completions of the held-out problems, in one call of the engine, and their scores.

        The seeds do not depend on the step: two evaluations differ by the policy alone.
        """
        config, prompts = self.config, self.test_prompts
        seeds = [request_seed(config.seed, i) for i in range(len(prompts))]
        sampled = [Request(p.token_ids, config.eval_samples, config.temperature, s) for p, s in zip(prompts, seeds)]
        greedy = [Request(p.token_ids, samples=1, temperature=0.0, seed=0) for p in prompts]
        start = time.perf_counter()
        completions = self.engine.generate(sampled + greedy, label="evaluation")
        seconds = time.perf_counter() - start
        rewards = self.score(prompts + prompts, completions)
        split = len(prompts) * config.eval_samples
        return Evaluation(completions, rewards[:split].view(len(prompts), -1), rewards[split:, None], seconds)

    def records(self, prompts: list[Prompt], completions: list[Completion], rewards: Tensor) -> list[dict[str, Any]]:
        """Completions as a person reads them."""
        extract = reward.find_task(self.config.task, self.config.flexible).extract
        return [
            {
                "prompt": prompts[completion.request].problem.prompt,
                "completion": (text := self.decode(completion)),
                "extracted": extract(text),
                "answer": prompts[completion.request].problem.answer,
                "reward": value,
                "truncated": completion.truncated,
            }
            for completion, value in zip(completions, rewards.tolist())
        ]

    def decode(self, completion: Completion) -> str:
        """The text of a completion, without its end-of-sequence token."""
        return self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


@dataclass
class Run(Evaluator):
    """An evaluator that learns."""

    train_prompts: list[Prompt]
    policy: Policy
    optimizer: torch.optim.Optimizer
    log: RunLog
    saved: Saved | None = None  # what it goes on from
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        self.learners = {"policy": (self.policy, self.optimizer)}  # what a checkpoint holds; a trainer may add to it
        self.progress = self.saved.progress if self.saved else Progress()
        self.upcoming = islice(endless(self.train_prompts, self.config.seed), self.progress.prompts_taken, None)
        self.taken = self.progress.prompts_taken
        self.saved_step = self.progress.step if self.saved else None
        self.explained = -math.inf  # the last step whose uselessness was explained
        self.samples: list[dict[str, Any]] = []  # that were logged of the last training rollout
        texts = [prompt.token_ids for prompt in self.test_prompts]
        self.weight_sync = WeightSync(self.policy, self.engine, self.config, texts, self.world.device)
        self.survival_said = False

    def take(self, count: int) -> list[Prompt]:
        """The next training prompts."""
        self.taken += count
        return list(islice(self.upcoming, count))

    def sample(self, prompts: list[Prompt], step: int, attempt: int = 0) -> list[Completion]:
        """`group_size` completions of each prompt; the run's seed, the step and the place in it decide the tokens."""
        config, first = self.config, attempt * len(prompts)
        requests = [
            Request(prompt.token_ids, config.group_size, config.temperature, request_seed(config.seed, step, place))
            for place, prompt in enumerate(prompts, start=first)
        ]
        return self.engine.generate(requests)

    def evaluate(self, step: int) -> dict[str, float]:
        """Tests the policy on the held-out problems, and logs a few samples; returns `eval/*` metrics."""
        evaluation, prompts = self.test(), self.test_prompts
        self.log_samples(step, "eval", prompts + prompts, evaluation.completions, evaluation.scores)
        return {f"eval/{name}": value for name, value in evaluation.metrics().items()}

    def log_samples(self, step: int, kind: str, prompts: list[Prompt], completions: list[Completion], rewards: Tensor):
        """The first few completions."""
        records = self.records(prompts, completions[:SAMPLES_LOGGED], rewards)
        records = [{"step": step, "kind": kind} | record for record in records]
        self.log.samples(records)
        if kind == "train":
            self.samples = records

    def begin(self) -> None:
        """Evaluates before the first step, unless the run is a resumed one."""
        if not self.saved:
            metrics = self.evaluate(step=0)
            self.log.record({"step": 0, **metrics})
            self.log.print("before training: held-out " + accuracy(metrics))
        self.finish_step(self.progress.step)
        if self.progress.step >= self.config.steps:
            self.log.print(f"all {self.config.steps} steps are done; to go on, add --steps to the command")

    def finish_step(self, step: int) -> None:
        """From here on, a checkpoint is one of this step, also if the next one has begun when it is written.

        What the next one draws (dropout, a reward of chance) depends on the seed, the step and the rank alone: a run
        that begins here, resumed, draws the same.
        """
        self.progress = replace(self.progress, step=step, prompts_taken=self.taken)
        self.position = self.log.position()
        set_seed(request_seed(self.config.seed, step, self.world.rank))

    def conclude(self, step: int, metrics: dict[str, float]) -> None:
        """Ends a step: evaluates and saves if it is time, logs, and stops the run if it was asked to stop."""
        config, last = self.config, step == self.config.steps
        if last or due(config.eval_every, step):
            metrics |= self.evaluate(step)
            give_memory_back()
        self.log.step(step, metrics)
        self.check_health(metrics)
        self.count_useless(step, metrics)
        if config.lora_forward == "factored":  # merged: what merging loses, the trainer does not have either
            self.count_losses(metrics.get("sync/update_survival", 1.0))
        reason = reason_to_stop(self.progress.steps_useless, metrics, self.samples, config)
        reason = reason or reason_of_losses(self.progress.syncs_lost, metrics, config)
        self.finish_step(step)
        self.log.phase("save")  # counted in the next step
        if last or reason or due(config.save_every, step):
            self.save(metrics.get("eval/accuracy"))
        if reason:
            raise RuntimeError(f"{reason}; the last step that was saved is {self.saved_step}")
        if not last:
            self.stop.check()

    def count_useless(self, step: int, metrics: dict[str, float]) -> None:
        """Counts the steps in a row whose rewards do not differ, and says so: why not, but not every time."""
        if rewards_differ(metrics):
            self.progress.steps_useless = 0
            return
        self.progress.steps_useless += 1
        if step >= self.explained + EXPLAINED_EVERY:
            self.log.print(f"  {explain(metrics, self.samples)}")
            self.explained = step
        else:
            count = self.progress.steps_useless
            self.log.print(f"  nothing to learn from, {count} step{'s' * (count > 1)} in a row")

    def check_health(self, metrics: dict[str, float]) -> None:
        """Raises RuntimeError for what training on would only make worse."""
        skipped = metrics.get("skipped_updates", 0) + metrics.get("critic/skipped_updates", 0)
        self.progress.updates_skipped = self.progress.updates_skipped + skipped if skipped else 0
        if self.progress.updates_skipped > self.config.max_skipped:
            names = ("loss", "grad_norm", "critic/loss", "critic/grad_norm")
            seen = ", ".join(f"{name} {metrics[name]}" for name in names if name in metrics)
            raise RuntimeError(
                f"loss or gradients were NaN or infinite in {self.progress.updates_skipped:.0f} updates, some in every "
                f"one of the last steps, more than max_skipped {self.config.max_skipped}; the last step had {seen}"
            )
        limit, mismatch = self.config.max_mismatch, metrics.get("mismatch/kl", 0.0)
        if limit and mismatch > limit:
            raise RuntimeError(
                f"sampler and trainer differ by {mismatch:.3g} nats per token, above max_mismatch {limit}"
            )

    def count_losses(self, survival: float) -> None:
        """Counts the syncs in a row whose merged weights kept too little of the update, and says so once."""
        if survival < LOW_SURVIVAL and not self.survival_said:
            self.survival_said = True
            self.log.print(f"  {explain_survival(survival)}")
        self.progress.syncs_lost = self.progress.syncs_lost + 1 if survival < self.config.min_survival else 0

    def end(self) -> None:
        """Closes the log, and says where everything is."""
        self.log.close()
        folder, kind = self.log.folder, "adapter" if self.config.lora_rank else "model"
        saved = self.saved_step and folder / "checkpoints" / f"step_{self.saved_step:06d}" / kind
        if self.saved_step != self.progress.step:
            raise OSError(f"step {self.progress.step} could not be saved; the last one that was: {saved or 'none'}")
        self.log.print(f"\n{kind:<8} {saved}")
        self.log.print(f"metrics  {folder / 'metrics.jsonl'}")
        self.log.print(f"samples  {folder / 'samples.jsonl'}")
        self.log.print(f"next     python tools/plot.py {folder}")

    def save(self, accuracy: float | None = None) -> None:
        """Writes a checkpoint of all finished steps; `accuracy`, if just measured, may make it the best so far.

        A disk that is full is said, and the run goes on.
        """
        progress = self.progress
        if accuracy is not None and (progress.best_step < 0 or accuracy > progress.best_accuracy):
            progress = replace(progress, best_accuracy=accuracy, best_step=progress.step)
        tensors = checkpoint.gather_state(self.learners, keep=self.world.rank == 0)
        state = {"progress": asdict(progress), "log": self.position, "config": asdict(self.config)}
        if fsdp_utils.on_first_rank(lambda: self.write_checkpoint(progress, state, tensors)):
            self.progress, self.saved_step = progress, progress.step

    def write_checkpoint(self, progress: Progress, state: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Whether there was room on the disk for it."""
        folder, more = self.log.folder, lambda to: self.export(to, tensors)
        try:
            self.log.flush()
            checkpoint.write(folder, progress.step, state, tensors, more)
            checkpoint.set_pointers(folder, progress.step, progress.best_step)
            checkpoint.prune(folder, self.config.keep_checkpoints, progress.best_step)
        except OSError as error:
            self.log.print(f"no checkpoint of step {progress.step}: {error}. The run goes on; older ones are whole.")
            return False
        return True

    def leave(self) -> None:
        """Saves what is not saved yet, for a run that was asked to stop, and says how to go on."""
        if self.saved_step != self.progress.step:
            self.save()
        self.log.close()
        saved = "saved" if self.saved_step == self.progress.step else "could not save"
        self.log.print(f"stopped after step {self.progress.step}, and {saved}. To go on, add --resume to the command.")

    def export(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """The policy for everybody else, out of its whole tensors: a peft folder, or without adapters a model's."""
        model = self.policy.model
        whole = {parameter: tensors.get(f"policy.model.{name}") for name, parameter in model.named_parameters()}
        if self.config.lora_rank:
            adapter_files.save_adapter(model, folder / "adapter", base_model=self.config.model_source, gather=whole.get)
        else:
            dtype = getattr(torch, self.config.dtype)
            weights = ((name, whole[parameter].to(dtype)) for name, parameter in lora.base_weights(model))
            files.write_model(weights, folder / "model", like=Path(self.tokenizer.name_or_path))


# ---- Scores ---------------------------------------------------------------------------------------------------


def is_right(scores: Tensor) -> Tensor:
    """1.0 where a completion is right, which a score of 1 or more says; less, as for good form alone, is wrong: 0.0."""
    return (scores >= 1).double()


def with_error(name: str, values: Tensor) -> dict[str, float]:
    """The mean of (problems, samples) values and, as NAME_stderr, its standard error over problems.

    Completions of one problem are alike, so a problem's mean is one observation (clustered standard errors, Miller
    2024, arXiv 2411.00640). A single problem has no standard error.
    """
    means = values.mean(1)
    error = {f"{name}_stderr": means.std().item() / math.sqrt(len(means))} if len(means) > 1 else {}
    return {name: means.mean().item()} | error


# ---- Order, seeds and learning rate: functions of the configuration and the step alone ------------------------


def due(every: int, step: int) -> bool:
    """Whether what happens every so many steps happens in this one; 0: never."""
    return every > 0 and step % every == 0


def endless(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    """All prompts in a random order, then all again in another, and so on."""
    epoch = 0
    while True:
        yield from random.Random(f"{seed}/{epoch}").sample(prompts, len(prompts))
        epoch += 1


def request_seed(*numbers: int) -> int:
    """One number out of several, well mixed; vLLM gives sample i of a request this plus i."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def schedule(step: int, steps: int, config: Config) -> float:
    """The share of the learning rate that step 1, 2, ... gets: a linear warm-up, then constant, linear or cosine."""
    if step <= config.warmup_steps:
        return step / (config.warmup_steps + 1)
    done = (step - 1 - config.warmup_steps) / (steps - config.warmup_steps)  # 0 at first, 1 after the last step
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, config: Config, wait: int = 0) -> float:
    """Gives the optimizer the step's learning rate, and returns it; the schedule begins after `wait` steps of 0."""
    rate = peak * schedule(max(step - wait, 0), config.steps - wait, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def give_memory_back() -> None:
    """Returns to the system what is free: glibc keeps it, in ever smaller pieces, 60 MB more in 100 steps of tensors on
    the CPU. Elsewhere there is nothing to do.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
