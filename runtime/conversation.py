"""Requests to the sampler, their completions, and conversations of several turns.

Nothing here knows vLLM or tasks: runtime/environment.py turns a task's replies into tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import lora

# The environment's reply to a turn of the model: from the turn's tokens to those that follow; None ends it.
Reply = Callable[[list[int]], list[int] | None]


def single_turn() -> Reply:
    """An environment that never replies: the model's first turn is its last."""
    return lambda turn: None


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    samples: int
    temperature: float  # 0: greedy
    seed: int  # sample i uses seed + i, so the same request always gives the same tokens
    adapter: str = lora.POLICY  # a name given to `load_adapter`; the policy may be merged into the weights instead
    environment: Callable[[], Reply] = single_turn  # called once per sample: each has its own conversation


@dataclass(frozen=True)
class Completion:
    """One sample of a request: all turns of the model and, between them, the environment's replies."""

    request: int  # index of the request it answers
    prompt_ids: list[int]  # of that request
    token_ids: list[int]  # with end tokens and stop texts, and with the environment's replies
    logprobs: list[float | None]  # the sampler's, at the sampling temperature; None: a reply's token, not sampled
    truncated: bool  # cut off at max_completion_length
    adapter: str = lora.POLICY  # of that request

    @property
    def trained(self) -> list[bool]:
        """Which of `token_ids` the model sampled: only these are trained on."""
        return [logprob is not None for logprob in self.logprobs]

    @property
    def length(self) -> int:
        """The number of trained tokens, by which every mean over tokens divides."""
        return sum(self.trained)

    @property
    def last_turn(self) -> list[int]:
        """The tokens after the environment's last reply."""
        replied = [place for place, trained in enumerate(self.trained) if not trained]
        return self.token_ids[replied[-1] + 1 :] if replied else self.token_ids


@dataclass
class Conversation:
    """One sample of a request, while it is generated turn by turn."""

    index: int  # of the request
    request: Request
    sample: int
    max_length: int  # in tokens, of all turns and replies together
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    turns: int = 0
    truncated: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self.environment = self.request.environment()

    @property
    def name(self) -> str:
        """Unique among the conversations of a call."""
        return f"{self.index}.{self.sample}"

    @property
    def context(self) -> list[int]:
        """The tokens before the model's next turn; what it sampled is not tokenised again."""
        return self.request.prompt_ids + self.token_ids

    @property
    def seed(self) -> int:
        """The next turn's seed, which depends only on the request, the sample and the turn."""
        seed = self.request.seed + self.sample
        return mix_seeds(seed, self.turns) if self.turns else seed

    @property
    def tokens_left(self) -> int:
        return self.max_length - len(self.token_ids)

    def add_turn(self, output: Any) -> None:
        """Appends a turn of the model. output: a `vllm.CompletionOutput`."""
        self.turns += 1
        self.turn = list(output.token_ids)
        self.token_ids += self.turn
        self.logprobs += output.logprobs.logprobs
        self.truncated = output.finish_reason == "length"

    def reply(self) -> list[int] | None:
        """The environment's reply to the last turn; None for a turn that was cut off."""
        return None if self.truncated else self.environment(self.turn)

    def add_reply(self, reply: list[int] | None) -> None:
        """Appends a reply. Ends the conversation without one, or without room for it and one more token."""
        if reply is not None and len(reply) < self.tokens_left:
            self.token_ids += reply
            self.logprobs += [None] * len(reply)
        else:
            self.truncated |= reply is not None
            self.ended = True

    def completion(self) -> Completion:
        request = self.request
        return Completion(
            self.index, request.prompt_ids, self.token_ids, self.logprobs, self.truncated, request.adapter
        )


def by_adapter(parts: Sequence[Any]) -> dict[str, list[int]]:
    """The indices of each adapter's completions or prompts."""
    indices: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        indices.setdefault(part.adapter, []).append(i)
    return indices


def mix_seeds(*numbers: int) -> int:
    """Hashes several numbers into one seed of 32 bits (generators on a CPU ignore further bits)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
