"""Prompts and stops: problems become tokens through the chat template, and completions end where a turn ends."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

import fsdp_utils
import reward
from configs.base import Config
from runtime.data import Problem, Source
from runtime.environment import Environment
from runtime.files import one_line_errors
from runtime.run import Prompt

Chat = list[dict[str, Any]]
OWN_VARIABLES = ("messages", "conversation", "add_generation_prompt", "tokenize", "return_dict")  # of a chat template


def load_tokenizer(folder: str, now: str = "", template_kwargs: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """A model's tokenizer. template_kwargs: variables for its chat template (the option chat_template_kwargs).

    now: the ISO time for templates that show a date ("": the clock's).
    """
    with one_line_errors(f"the tokenizer of model {folder!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    values = dict(template_value(text, tokenizer) for text in template_kwargs)
    if now:  # a run that is resumed on another day keeps its prompts
        values["strftime_now"] = datetime.fromisoformat(now).strftime
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **values)
    return tokenizer


def template_value(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Any]:
    """Reads NAME=JSON. Raises ValueError for anything else, and for a name that the chat template does not use."""
    name, equals, value = text.partition("=")
    try:
        value = json.loads(value)
    except ValueError:
        equals = ""
    if not (name.isidentifier() and equals):
        raise ValueError(f"chat_template_kwargs must be NAME=JSON, such as enable_thinking=false, not {text!r}")
    if name in OWN_VARIABLES:
        raise ValueError(f"chat_template_kwargs: {name!r} is set by the prompt itself; leave it out")
    if not re.search(rf"\b{name}\b", str(tokenizer.chat_template)):  # Jinja would ignore it
        raise ValueError(f"chat_template_kwargs: the chat template of {tokenizer.name_or_path!r} has no {name!r}")
    return name, value


def say(line: str) -> None:
    """Prints a line, from one rank. Collective."""
    fsdp_utils.on_first_rank(lambda: print(line, flush=True))


# ---- Prompts --------------------------------------------------------------------------------------------------


def load_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[list[Prompt]]:
    """Training and held-out prompts of at most `max_prompt_length` tokens, one task's after the other's. Collective."""
    tasks = [load_task(config, *names, tokenizer) for names in zip(config.tasks, config.adapters)]
    return [list(chain.from_iterable(splits)) for splits in zip(*tasks)]


def load_task(config: Config, task: str, adapter: str, tokenizer: PreTrainedTokenizerBase) -> list[list[Prompt]]:
    """`load_prompts` of one task, whose prompts that adapter answers; rank 0 loads the problems."""
    instruction = reward.find_task(task).instruction if config.instruction is None else config.instruction
    source = Source(config.data, config.prompt_field, config.answer_field)

    def load(split: str) -> list[Problem]:
        problems = [replace(problem, task=task) for problem in reward.load_problems(task, split, source)]
        return [instructed(problem, instruction) for problem in problems]

    splits = fsdp_utils.on_first_rank(lambda: (load("train"), load("test")))
    check_chats([problem for split in splits for problem in split], config.system_prompt, tokenizer)
    with one_line_errors(f"the tokenizer of model {tokenizer.name_or_path!r}"):
        prompts = [tokenize(problems, tokenizer, config.system_prompt) for problems in splits]
    prompts = [
        [replace(in_environment(prompt, config, tokenizer), adapter=adapter) for prompt in split] for split in prompts
    ]
    longest = config.max_prompt_length
    kept = [[prompt for prompt in split if len(prompt.token_ids) <= longest] for split in prompts]
    train, test = kept
    if not (train and test):
        raise ValueError(f"no prompt fits in max_prompt_length, {longest} tokens")
    if kept != prompts:
        counts = [f"{len(before) - len(after):,} of {len(before):,}" for before, after in zip(prompts, kept)]
        line = "prompts over max_prompt_length, {} tokens, are left out: {} to train on, {} held out"
        say(line.format(longest, *counts))
    return [train, test[: config.eval_problems]]


def instructed(problem: Problem, instruction: str) -> Problem:
    """The problem with the instruction after its text or its last message."""
    ending = f"\n{instruction}" if instruction else ""
    if isinstance(problem.prompt, str):
        return replace(problem, prompt=problem.prompt + ending)
    *earlier, last = problem.prompt
    return replace(problem, prompt=[*earlier, last | {"content": last["content"] + ending}])


def check_chats(problems: list[Problem], system_prompt: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for messages without a chat template, and for a `system_prompt` that would not be shown."""
    name, fix = tokenizer.name_or_path, "leave system_prompt out, or put its text into instruction"
    chats = [problem.prompt for problem in problems if not isinstance(problem.prompt, str)]
    if chats and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of model {name!r} has no chat template for prompts that are chat messages")
    if system_prompt is None:
        return
    if any(turn["role"] == "system" for turns in chats for turn in turns):
        raise ValueError(
            "prompts of the data have a system turn, and so has the configuration: leave system_prompt out"
        )
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of model {name!r} has no chat template for a system turn; {fix}")
    try:
        text = tokenizer.apply_chat_template(chat("?", system_prompt), tokenize=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the chat template of model {name!r} refuses a system turn ({reason}); {fix}") from error
    if system_prompt.strip() not in text:
        raise ValueError(f"the chat template of model {name!r} leaves a system turn out; {fix}")


def chat(prompt: str | Chat, system_prompt: str | None) -> Chat:
    """A conversation with the model's turn next."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)]


def tokenize(problems: list[Problem], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> list[Prompt]:
    """The problems as tokens, through the tokenizer's chat template if it has one. Collective."""
    prompts = [problem.prompt for problem in problems]
    if tokenizer.chat_template:
        chats = [chat(prompt, system_prompt) for prompt in prompts]
        ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = without_end_tokens(prompts, tokenizer(prompts)["input_ids"], tokenizer)
    return [Prompt(problem, tokens) for problem, tokens in zip(problems, ids)]


def in_environment(prompt: Prompt, config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt with the task's environment, if the task replies to the model."""
    task = reward.find_task(prompt.problem.task)
    if not task.reply:
        return prompt
    messages = chat(prompt.problem.prompt, config.system_prompt)
    return replace(prompt, environment=partial(Environment, task.reply, prompt.problem, messages, tokenizer))


def without_end_tokens(texts: list[str], ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Removes an end token that the tokenizer has appended, after which the model would not continue."""
    end = tokenizer.eos_token_id
    appended = [tokens[-1:] == [end] and not text.endswith(tokenizer.eos_token) for text, tokens in zip(texts, ids)]
    if any(appended):
        say(
            f"the tokenizer of {tokenizer.name_or_path!r} ends prompts with {tokenizer.eos_token!r}, which is taken off"
        )
    return [tokens[:-1] if drop else tokens for tokens, drop in zip(ids, appended)]


def check_prompts(config: Config, model: PretrainedConfig, prompts: list[Prompt]) -> None:
    """Raises ValueError for prompts without tokens, with unknown tokens, or too long for the model."""
    for prompt in prompts:
        if not prompt.token_ids:
            raise ValueError(f"the tokenizer of {config.model!r} makes no token of prompt {prompt.problem.prompt!r}")
        if max(prompt.token_ids) >= model.vocab_size:
            raise ValueError(
                f"the tokenizer of {config.model!r} makes token {max(prompt.token_ids)} of prompt "
                f"{prompt.problem.prompt!r}, but the model has only {model.vocab_size}"
            )
    longest = getattr(model, "max_position_embeddings", None) or math.inf
    stretched = (getattr(model, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if config.max_model_len > longest and not stretched:  # vLLM checks stretched positions
        raise ValueError(
            f"max_prompt_length {config.max_prompt_length} and max_completion_length {config.max_completion_length} "
            f"make {config.max_model_len} tokens; model {config.model!r} supports at most {longest}: lower one"
        )


# ---- The end of a completion ----------------------------------------------------------------------------------


class Stops(NamedTuple):
    """Where completions end, in addition to the model's end tokens, which vLLM knows."""

    texts: list[str] = []
    token_ids: list[int] = []


def find_stops(config: Config, tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig) -> Stops:
    """The option `stop`, and the chat template's end of a turn if the model has another end token. Collective.

    Without that, a completion would go on with invented turns until it is truncated.
    """
    special = tokenizer.get_added_vocab()
    token_ids = [special[text] for text in config.stop if text in special]
    end = end_of_turn(tokenizer)
    if end is not None and end not in {*end_tokens(tokenizer, model), *token_ids}:
        text = tokenizer.convert_ids_to_tokens(end)
        say(f"the chat template ends a turn by {text!r}, which is no end token of the model; it ends completions, too")
        token_ids.append(end)
    return Stops([text for text in config.stop if text not in special], token_ids)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token after a turn of the model, in the chat template; None if there is none."""
    if not tokenizer.chat_template:
        return None
    content = "Done"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    with one_line_errors(f"the chat template of model {tokenizer.name_or_path!r}"):
        rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(content)[2]
    special = set(tokenizer.get_added_vocab().values())
    return next((token for token in tokenizer(rest, add_special_tokens=False)["input_ids"] if token in special), None)


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig) -> set[int]:
    """The tokens at which vLLM stops by itself: the tokenizer's, and those of generation_config.json or config.json."""
    try:
        found = GenerationConfig.from_pretrained(model.name_or_path).eos_token_id
    except OSError:  # the model has no such file
        found = GenerationConfig.from_model_config(model).eos_token_id
    return {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])}
