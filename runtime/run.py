"""The state of a run. runtime/setup.py makes it; the training scripts and runtime/steps.py change it."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

import lora
from configs.base import Config
from fsdp_utils import World
from policy import Policy
from runtime.batching import MicroBatch
from runtime.checkpoint import Progress, Saved
from runtime.conversation import Reply, Request, by_adapter, mix_seeds, single_turn
from runtime.data import Problem
from runtime.generators import AnyEngine
from runtime.health import HealthMonitor
from runtime.progress_bar import progress_bar
from runtime.signals import StopRequest
from runtime.tracking import RunLog
from runtime.user_rewards import Reward
from sync import WeightSync

Scorer = Callable[[list[tuple[Problem, str]]], list[Reward]]  # scores completions (texts), each with its problem


@dataclass(frozen=True)
class Prompt:
    """A problem as the model sees it."""

    problem: Problem
    token_ids: list[int]
    environment: Callable[[], Reply] = single_turn  # see runtime/environment.py
    adapter: str = lora.POLICY  # the adapter that answers it


@dataclass
class Run:
    config: Config
    world: World
    tokenizer: PreTrainedTokenizerBase
    train_prompts: list[Prompt]
    test_prompts: list[Prompt]
    scorer: Scorer
    engine: AnyEngine
    policy: Policy
    optimizer: torch.optim.Optimizer
    log: RunLog
    progress: Progress = field(default_factory=Progress)
    saved: Saved | None = None  # the checkpoint from which the run resumes
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        self.learners = {"policy": (self.policy, self.optimizer)}  # what a checkpoint saves; PPO adds its critic
        self.saved_step = self.progress.step if self.saved else None
        self.prompts_drawn = self.progress.prompts_drawn
        streams = [endless(prompts, self.config.seed) for prompts in by_task(self.train_prompts)]
        share = self.config.prompts_per_step // len(self.config.tasks)
        self.upcoming = islice(in_turns(streams, share), self.prompts_drawn, None)
        self.samples: list[dict[str, Any]] = []  # the logged ones of the last training rollout
        self.log_position: dict[str, Any] | None = None  # at the end of the last finished step; None: before the first
        self.engine.stop = self.stop  # a signal also ends a rollout
        self.health = HealthMonitor(self.config, self.log)
        prompts = [prompt.token_ids for prompt in self.test_prompts]
        self.weight_sync = WeightSync(self.policy, self.engine, self.config, prompts, self.world.device)

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next training prompts, in an order that the seed decides: of several tasks, each one's share."""
        self.prompts_drawn += count
        return list(islice(self.upcoming, count))

    def prefetch_rollout(self, step: int) -> None:
        """With `max_staleness` 1, has the generators sample a step's first rollout with the weights that they have now.

        Its prompts are not drawn yet: a run that resumes before that step samples it anew.
        """
        if self.config.max_staleness and step <= self.config.steps:
            prompts = list(islice(self.upcoming, self.config.prompts_per_step))
            self.upcoming = chain(prompts, self.upcoming)
            self.engine.prefetch(rollout_requests(prompts, self.config, step))

    def complete_step(self, step: int) -> None:
        """From here on, a checkpoint is one of this step, even if the next step has begun when it is written.

        Random numbers of the next step (of a random reward) depend on seed, step and rank alone, so a run that
        resumes here draws the same.
        """
        self.progress = replace(self.progress, step=step, prompts_drawn=self.prompts_drawn)
        self.log_position = self.log.position()
        set_seed(mix_seeds(self.config.seed, step, self.world.rank))


def micro_batches(run: Run, batches: list[MicroBatch], label: str, may_stop: bool = True) -> Iterator[MicroBatch]:
    """The batches one after the other, with a progress bar of that label. Between two, a signal may stop the run: it
    raises Stopped on all ranks.
    """
    with progress_bar(label, len(batches), "micro-batches") as bar:
        for batch in batches:
            if may_stop:
                run.stop.check()
            yield batch
            bar.update()


# ---- Order and seeds: functions of the configuration and the step alone -----------------------------------------


def rollout_requests(prompts: list[Prompt], config: Config, step: int, attempt: int = 0) -> list[Request]:
    """`group_size` samples of each prompt. Seed, step and the place among the task's prompts decide the tokens."""
    first = attempt * len(prompts)
    return [
        request_of(prompt, config.group_size, config.temperature, mix_seeds(config.seed, step, place))
        for task in by_task(prompts)
        for place, prompt in enumerate(task, start=first)
    ]


def request_of(prompt: Prompt, samples: int, temperature: float, seed: int) -> Request:
    """A request for completions of a prompt, in its environment."""
    return Request(prompt.token_ids, samples, temperature, seed, prompt.adapter, prompt.environment)


def environments(prompts: Iterable[Prompt]) -> list[Callable[[], Reply]]:
    """Those of the prompts, each once."""
    return list(dict.fromkeys(prompt.environment for prompt in prompts))


def by_task(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """The prompts of each task."""
    return [[prompts[i] for i in mine] for mine in by_adapter(prompts).values()]


def in_turns(streams: list[Iterator[Prompt]], share: int) -> Iterator[Prompt]:
    """`share` prompts of each stream in turn, endlessly."""
    while True:
        for stream in streams:
            yield from islice(stream, share)


def endless(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    """All prompts in random order, epoch after epoch, each in an order of its own."""
    epoch = 0
    while True:
        yield from random.Random(f"{seed}/{epoch}").sample(prompts, len(prompts))
        epoch += 1


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens in this step."""
    return every > 0 and step % every == 0
