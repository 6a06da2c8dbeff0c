"""What a model is asked: the problem, an instruction, a system turn; and what is too long is said."""

import json
import shutil
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest
from conftest import TINY, refused
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer

import fsdp_utils
import reward
from configs.base import Config
from runtime import prompts
from runtime.checkpoint import Progress

TEMPLATE = "{% for m in messages %}[{{ m.role }}|{{ m.content | trim }}]{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
DROPS = TEMPLATE.replace("%}[", "if m.role != 'system' %}[", 1)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """Collective functions need no process group here."""
    monkeypatch.setattr(fsdp_utils, "on_first_rank", lambda work: work())


@pytest.fixture
def asked(tmp_path):
    """A function from options and a chat template to the texts of the prompts, of "2+2?" and a longer problem."""
    for split in ("train", "test"):
        rows = '{"question": "2+2?", "answer": "#### 4"}\n{"question": "' + "long " * 50 + '", "answer": "#### 4"}\n'
        Path(tmp_path, f"{split}.jsonl").write_text(rows)

    def texts(template: str | None = None, **options: object) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        tokenizer.chat_template = template
        train, test = prompts.load_prompts(Config(task="gsm8k", data=str(tmp_path), **options), tokenizer)
        assert train == test
        return [tokenizer.decode(prompt.token_ids) for prompt in train]

    return texts


def test_an_instruction_follows_and_a_system_turn_precedes(asked):
    assert asked()[0] == "2+2?\n" + reward.BOXED, "the task's own"
    assert asked(instruction="")[0] == "2+2?"
    assert asked(instruction="Be\nbrief.")[0] == "2+2?\nBe\nbrief."
    assert asked(TEMPLATE, instruction="")[0] == "[user|2+2?]", "the template's own system turn: none"
    assert asked(TEMPLATE, instruction="", system_prompt="You\nadd.\n")[0] == "[system|You\nadd.][user|2+2?]"
    assert asked(TEMPLATE, instruction="", system_prompt="")[0] == "[system|][user|2+2?]"


@pytest.mark.parametrize(
    "template, words",
    [(None, "has no chat template"), (REFUSES, "no system role"), (DROPS, "leaves a system turn out")],
)
def test_a_system_turn_that_the_model_would_not_see_is_refused(asked, template, words):
    with refused(words, "or put its text into instruction"):
        asked(template, system_prompt="You add.")
    assert asked(template), "without one it is a model like any other"


def test_prompts_that_are_too_long_are_counted(asked, capsys):
    assert len(asked(max_prompt_length=512)) == 2 and capsys.readouterr().out == ""
    assert len(asked(max_prompt_length=128)) == 1
    line = "prompts over max_prompt_length, 128 tokens, are left out: 1 of 2 to train on, 1 of 2 held out\n"
    assert capsys.readouterr().out == line
    with pytest.raises(ValueError, match="no prompt fits in max_prompt_length, 8 tokens"):
        asked(max_prompt_length=8)


def prompt_by(folder: Path, template: str, *arguments: object) -> str:
    """The prompt of "2+2?" by a model with that chat template. arguments: the others of `load_tokenizer`."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = prompts.load_tokenizer(str(folder), *arguments)
    (prompt,) = prompts.tokenize([reward.Problem("2+2?", "4")], tokenizer, None)
    return tokenizer.decode(prompt.token_ids)


def test_a_date_in_the_chat_template_is_that_of_the_runs_start(tmp_path):
    started, today = Progress(started="2024-02-29T23:59:59").started, f"{datetime.now():%d %b %Y}"
    for now, date in ((started, "29 Feb 2024"), ("", today)):
        text = prompt_by(tmp_path, "{{ strftime_now('%d %b %Y') }}|" + TEMPLATE, now)
        assert text == f"{date}|[user|2+2?]"


def test_variables_of_the_chat_template(tmp_path):
    ask = partial(prompt_by, tmp_path, "{% if think is false %}quick{% endif %}" + TEMPLATE, "2024-02-29T23:59:59")
    for given, text in ((["think=false"], "quick[user|2+2?]"), (["think=true"], "[user|2+2?]"), ([], "[user|2+2?]")):
        assert ask(given) == text
    for wrong in ("think", "think=False", "=1", "a b=1"):
        with pytest.raises(ValueError, match=f"must be NAME=JSON, such as enable_thinking=false, not '{wrong}'"):
            ask([wrong])
    with pytest.raises(ValueError, match="the chat template of .* has no 'thin'"):
        ask(["thin=true"])
    with pytest.raises(ValueError, match="'add_generation_prompt' is set by the prompt itself"):
        ask(["add_generation_prompt=false"])


# ---- Chat messages of the data ----------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]


def test_messages_of_the_data_are_the_conversation(asked, tmp_path):
    """The instruction follows the last one; a second system turn, or none to show them with, is refused."""
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": MESSAGES, "answer": "2"}) + "\n")
    assert asked(TEMPLATE, instruction="Briefly.") == ["[system|Add.][user|1+1?\nBriefly.]"]
    with pytest.raises(ValueError, match="leave system_prompt out"):
        asked(TEMPLATE, system_prompt="You add.")
    with pytest.raises(ValueError, match="no chat template for prompts that are chat messages"):
        asked()


# ---- Where a prompt and a completion end ------------------------------------------------------------------------


def test_an_end_token_that_the_tokenizer_appends_is_taken_off(capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    problems = [reward.Problem("1+1=", "2"), reward.Problem("2+2=", "4")]
    plain = [prompt.token_ids for prompt in prompts.tokenize(problems, tokenizer, None)]
    assert capsys.readouterr().out == ""
    end = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=end)
    assert tokenizer("1+1=")["input_ids"] == [*plain[0], tokenizer.eos_token_id]
    assert [prompt.token_ids for prompt in prompts.tokenize(problems, tokenizer, None)] == plain
    assert "ends prompts with '<eos>', which is taken off" in capsys.readouterr().out
    (kept,) = prompts.tokenize([reward.Problem("1+1=<eos>", "2")], AutoTokenizer.from_pretrained(TINY), None)
    assert kept.token_ids[-1] == tokenizer.eos_token_id, "the user's own"


CHATML = "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content }}<|e|>\n{% endfor %}"


def test_completions_end_where_the_chat_template_ends_a_turn(capsys):
    """Many models are published with an end token that their template does not use."""
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoConfig.from_pretrained(TINY)
    assert prompts.find_stops(Config(), tokenizer, model) == prompts.Stops(), "no template"
    tokenizer.chat_template = TEMPLATE
    assert prompts.find_stops(Config(), tokenizer, model) == prompts.Stops(), "no special token in it"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>"]})
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|e|>")
    assert prompts.find_stops(Config(), tokenizer, model) == prompts.Stops([], [end])
    assert "ends a turn by '<|e|>', which is no end token of the model" in capsys.readouterr().out
    config = Config(stop=["<|e|>", "Question:"])
    assert prompts.find_stops(config, tokenizer, model) == prompts.Stops(["Question:"], [end])
    tokenizer.chat_template = CHATML.replace("<|e|>", "<eos>")
    assert prompts.find_stops(Config(), tokenizer, model) == prompts.Stops() and capsys.readouterr().out == ""
