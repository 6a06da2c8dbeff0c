"""What a model is asked: the problem, an instruction, a system turn; and what is too long is said."""

from pathlib import Path

import pytest
from conftest import TINY
from transformers import AutoTokenizer

import fsdp_utils
import reward
from configs.base import Config
from runtime import setup

TEMPLATE = "{% for m in messages %}[{{ m.role }}|{{ m.content | trim }}]{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
DROPS = TEMPLATE.replace("%}[", "if m.role != 'system' %}[", 1)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function from options and a chat template to the texts of the prompts, of "2+2?" and a longer problem."""
    monkeypatch.setattr(fsdp_utils, "on_first_rank", lambda work: work())
    for split in ("train", "test"):
        rows = '{"question": "2+2?", "answer": "#### 4"}\n{"question": "' + "long " * 50 + '", "answer": "#### 4"}\n'
        Path(tmp_path, f"{split}.jsonl").write_text(rows)

    def texts(template: str | None = None, **options: object) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        tokenizer.chat_template = template
        train, test = setup.load_prompts(Config(task="gsm8k", data_dir=str(tmp_path), **options), tokenizer)
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
    with pytest.raises(ValueError) as error:
        asked(template, system_prompt="You add.")
    assert words in str(error.value) and "or put its text into instruction" in str(error.value)
    assert "\n" not in str(error.value) and asked(template), "without one it is a model like any other"


def test_prompts_that_are_too_long_are_counted(asked, capsys):
    assert len(asked(max_prompt_length=512)) == 2 and capsys.readouterr().out == ""
    assert len(asked(max_prompt_length=128)) == 1
    line = "prompts over max_prompt_length, 128 tokens, are left out: 1 of 2 to train on, 1 of 2 held out\n"
    assert capsys.readouterr().out == line
    with pytest.raises(ValueError, match="no prompt fits in max_prompt_length, 8 tokens"):
        asked(max_prompt_length=8)
