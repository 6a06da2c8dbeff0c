"""The environment's side of a conversation: a task's replies, as the tokens that follow a turn of the model.

The chat template renders the text between two turns: the end of the first, the reply, the beginning of the next. Only
that text is tokenised. Sampled tokens are never tokenised again: the model must train on the tokens that it chose.
"""

import json
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from reward import Message
from runtime.data import Problem, check_characters
from runtime.user_rewards import raised

TURN = "What the model said."  # a placeholder for the model's turn, after which the template's text begins


class Environment:
    """The conversation of one sample."""

    def __init__(self, reply: Callable, problem: Problem, prompt: list[Message], tokenizer: PreTrainedTokenizerBase):
        """reply: a `Task.reply`."""
        self.reply, self.problem, self.messages, self.tokenizer = reply, problem, list(prompt), tokenizer

    def __call__(self, turn: list[int]) -> list[int] | None:
        """The tokens between the model's turn and its next one; None ends the conversation.

        Raises ValueError (one line) if the reply fails or is wrong.
        """
        text = self.tokenizer.decode(turn, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        try:
            message = ask(self.reply, self.problem, self.messages)
            if message is None:
                return None
            self.messages.append(message)
            return tokens_of_reply(self.messages, self.tokenizer, end=turn[-1])
        except ValueError as error:
            raise ValueError(f"the reply {error}, on {self.problem!r} and turn {text!r}") from error


def ask(reply: Callable, problem: Problem, messages: list[Message]) -> Message | None:
    """The reply as a message. Raises ValueError if the task's function fails or returns something else."""
    try:
        said = reply(problem, [dict(message) for message in messages])
    except (Exception, SystemExit) as error:
        raise ValueError(raised(error)) from error
    if said is None:
        return None
    message = {"role": "user", "content": said} if isinstance(said, str) else said
    if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
        raise ValueError(f"is {said!r}, and must be a text, a message with role and content, or None")
    check_characters(message["content"], "is wrong", "content")
    return message


def tokens_of_reply(messages: list[Message], tokenizer: PreTrainedTokenizerBase, end: int) -> list[int]:
    """The tokens of the last message and of what the chat template puts around it.

    end: the last token of the model's turn, which the template renders again. Raises ValueError if the template
    leaves the reply out.
    """
    *before, turn, reply = messages
    text = reply["content"]
    if tokenizer.chat_template:
        chat = [*before, turn | {"content": TURN}, reply]
        try:
            whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise whatever it likes
            raise ValueError(f"of role {reply['role']!r} is refused by the chat template ({error})") from error
        text = whole.rpartition(TURN)[2].removeprefix(tokenizer.decode([end]))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = reply["content"].strip() in text or json.dumps(reply["content"], ensure_ascii=False) in text
    if not (tokens and shown):
        raise ValueError(f"{reply!r} is not seen by the model; the conversation goes on with {text!r}")
    return tokens
