"""Every door, knocked on wrongly: whatever is wrong is said in one line that names it, and nothing is written.

Each case is a bad input and words that its line must have: what is wrong, and mostly what would be right.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, check_line, complaints, on_ranks, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora
import reward
from configs.base import Config
from configs.checks import LIMITS
from runtime import adapter_files, checkpoint
from runtime.command_line import parse_config
from runtime.data import Source

ARITHMETIC = ["--config", str(ROOT / "configs" / "arithmetic_cpu.py")]
FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}
NUMBERS = [name for name, kind in FIELDS.items() if kind in (int, float, int | None, float | None)]


# ---- The command line and configurations ----------------------------------------------------------------------

just_outside = [
    (f"--{field.name}={field.metadata[limit] + step}", [field.name, f"{LIMITS[limit][0]} {field.metadata[limit]}"])
    for field in dataclasses.fields(Config)
    for limit, step in (("least", -1), ("above", 0), ("most", 1))
    if limit in field.metadata
]
not_finite = [
    (f"--{name}={value}", [name, value]) for name in NUMBERS if "float" in str(FIELDS[name]) for value in ("nan", "inf")
]
no_number = [(f"--{name}=many", [name, "'many'"]) for name in NUMBERS]
too_large = [(f"--{name}={10**12}", [name, "at most 2147483647"]) for name in NUMBERS if "int" in str(FIELDS[name])]
no_choice = [
    (f"--{name}=bogus", [name, "bogus"]) for name, kind in FIELDS.items() if "Literal" in str(kind) or kind is bool
]
control = [(f"--{name}=a\x00b", [name, "printable", "'a\\x00b'"]) for name, kind in FIELDS.items() if kind is str]

OPTIONS = [
    *((f"--{name}=0", [name, "more than 0"]) for name in ("learning_rate", "lora_alpha")),
    ("--gpu_memory_utilization=1.01", ["gpu_memory_utilization", "at most 1", "1.01"]),
    ("--clip_low=1.5", ["clip_low", "at most 1", "1.5"]),
    ("--warmup_steps=100", ["warmup_steps", "fewer than the 100 steps"]),
    ("--updates_per_rollout=5", ["updates_per_rollout", "divide prompts_per_step", "5"]),
    ("--lora_rank=0 --lora_adapter_path=x", ["lora_adapter_path", "lora_rank above 0"]),
    ("--lora_rank=0 --ref_adapter_path=x", ["ref_adapter_path", "lora_rank above 0"]),
    ("--lora_rank=0 --sync=straight_through", ["straight_through", "use sync merged"]),
    ("--lora_rank=0 --dtype=nf4", ["dtype nf4", "lora_rank above 0"]),
    ("--lora_rank=0 --kl_coef=0.1", ["kl_coef", "set kl_coef 0"]),
    ("--lora_rank=0 --sync=adapter", ["sync adapter", "use sync merged"]),
    ("--lora_rank=600 --sync=adapter", ["vLLM's LoRA has ranks up to 512, not 600", "use sync merged"]),
    ("--dtype=nf4 --sync=adapter", ["nf4", "use sync merged"]),
    ("--sleep_level=2 --sync=adapter", ["sleep_level 2", "use sleep_level 1"]),
    *((f"--output_dir={folder}", ["output_dir", repr(folder)]) for folder in ("", "..", "elsewhere/..")),
    (f"--output_dir={'x' * 200}", ["output_dir", "128"]),
    ("--output_dir=~/runs/x", ["output_dir", "'~/runs/x'", "home"]),
    ("--resume=", ["--resume= names no checkpoint"]),
    ("--reward_timeout=1e9", ["reward_timeout", "at most"]),
    ("--output_dir=\udcff", ["output_dir", "printable"]),
    ("--model=", ["model", "''"]),
    ("--prompt_field=q", ["prompt_field", "set data"]),
    ("--answer_field=a", ["answer_field", "set data"]),
    ("--reward=", ["reward must be a list of texts", "['']"]),
    ("--stop a --stop b", ["--stop is given twice"]),
    ("--target-modules q_proj --target_modules v_proj", ["--target_modules is given twice"]),
    ("--chat_template_kwargs a=1 --chat_template_kwargs b=2", ["--chat_template_kwargs is given twice"]),
    ("--gradient_checkpointing=last", ["gradient_checkpointing", "last"]),
    *((f"--{name}=a\x00b", [name, "printable", "'a\\x00b'"]) for name in ("instruction", "system_prompt")),
    ("--target_modules", ["--target_modules"]),
    ("--target_modules=", ["target_modules", "['']"]),
    ("--sleep_level=3", ["sleep_level", "3"]),
    ("--stepz=3", ["--stepz", "--steps"]),
    ("--Steps=3", ["--Steps", "--steps"]),
    ("--step=3", ["--step", "--steps"]),
    ("--learning-rat=3", ["--learning-rat=3", "--learning_rate"]),
    ("--", ["--"]),
    ("-x", ["-x"]),
    ("stray", ["'stray'"]),
    ("=", ["'='"]),
    ("--steps", ["--steps", "expected one argument"]),
    ("--steps=", ["--steps", "''"]),
    ("--steps=1e3", ["--steps", "'1e3'"]),
    ("--steps=0x10", ["--steps", "'0x10'"]),
    ("--steps=三", ["--steps", "'三'"]),
    ("--learning_rate=1,5", ["--learning_rate", "'1,5'"]),
    ("--seed=None", ["--seed", "'None'"]),
    ("--config=nowhere.py", ["nowhere.py", "configs/"]),
    ("--config=configs", ["configs"]),
    ("--config=a\x00b.py", ["a\\x00b.py"]),
]


@pytest.mark.parametrize(
    "options, words", [*just_outside, *not_finite, *no_number, *too_large, *no_choice, *control, *OPTIONS]
)
def test_options(options, words):
    with refused(*words):
        parse_config([*ARITHMETIC, *options.split(" ")], "")


CONFIG_FILES = [
    (b"", ["must define config = Config(...)", "NoneType"]),
    (b"config = None", ["must define config", "NoneType"]),
    (b"config = {'steps': 3}", ["must define config", "dict"]),
    (b"config = (", ["SyntaxError"]),
    (b"\xff\xfe\x00", ["Error"]),
    (b"a\x00b", ["null bytes"]),
    (b"import nothing_of_that_name", ["ModuleNotFoundError", "nothing_of_that_name"]),
    (b"import sys; sys.exit(3)", ["SystemExit", "3"]),
    (b"raise KeyError('x')", ["KeyError", "x"]),
    (b"def f(): f()\nf()", ["RecursionError"]),
    (b"open('/nowhere/at/all')", ["FileNotFoundError", "/nowhere/at/all"]),
    (b"from configs.base import Config as config", ["must define config", "type"]),
]
BAD_CONFIGS = {  # the arguments of Config, and words of what is said of them
    "stepz=3": ["TypeError", "stepz"],
    "3, 4": ["output_dir must be str, not 3"],
    "steps=None": ["steps must be int, not None"],
    "steps=True": ["steps must be int, not True"],
    "steps=3.0": ["steps must be int, not 3.0"],
    "learning_rate='1'": ["learning_rate must be float, not '1'"],
    "learning_rate=10**400": ["learning_rate must be a number of at most"],
    "gradient_checkpointing=True": ["must be one of full, selective, none, not True"],
    "target_modules='q_proj'": ["target_modules must be", "'q_proj'"],
    "target_modules=[]": ["target_modules must be a list", "[]"],
    "target_modules=[1]": ["target_modules must be a list", "[1]"],
    "dtype=None": ["dtype must be one of", "None"],
    "clip_low='a'": ["clip_low must be float, not 'a'"],
    "tis_mode=3": ["tis_mode", "3"],
    "output_dir='a\\nb'": ["output_dir must be printable"],
}
CONFIG_FILES += [
    (f"from configs.base import Config\nconfig = Config({arguments})".encode(), words)
    for arguments, words in BAD_CONFIGS.items()
]


@pytest.mark.parametrize("text, words", CONFIG_FILES)
def test_config_files(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        parse_config(["--config", str(path)], "")
    check_line(" ".join(str(error.value).split()), [str(path), *words])


# ---- Data -----------------------------------------------------------------------------------------------------

GOOD = b'{"question": "q", "answer": "#### 1"}\n'
NOT_ONE_NUMBER = "2 1/2|6.02e23|12 000|- 5|10 - 12 = -2|12:30|1,5|5, 6|5 or 6|2 x 3|10^6|1 apple|1.5 million|1/0"


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{", ["not JSON"]),
        (b"}", ["not JSON"]),
        (b"question: q", ["not JSON"]),
        (b"{'question': 'q', 'answer': '#### 1'}", ["not JSON"]),
        (GOOD.strip() + b"," + GOOD.strip(), ["not JSON"]),
        (GOOD.strip() + GOOD.strip(), ["not JSON"]),
        (b'{"question": "q", "answer": "#### 1"', ["not JSON"]),
        (b'{"question": "q", "answer": "#### \n1"}', ["not JSON"]),
        (b"[" * 100_000, ["not JSON"]),
        (b'{"question": ' + b"9" * 5000 + b"}", ["not JSON"]),
        (b"\x00", ["not JSON"]),
        (b"\xff\xfe{", ["not UTF-8", "byte 1"]),
        ('{"question": "é", "answer": "#### 1"}'.encode("latin-1"), ["not UTF-8", "byte 15"]),
        (GOOD.decode().encode("utf-16"), ["not UTF-8"]),
        (b'{"question": "\xed\xa0\x80", "answer": "#### 1"}', ["not UTF-8"]),
        (b'{"question": "\\ud800", "answer": "#### 1"}', ["'question'", "half a surrogate pair"]),
        (b'{"question": "q", "answer": "\\udfff #### 1"}', ["'answer'", "half a surrogate pair"]),
        (b"null", ["must be an object with fields", "None"]),
        (b"3", ["must be an object with fields", "3"]),
        (b'"q"', ["must be an object with fields", "q"]),
        (b"[]", ["must be an object with fields", "[]"]),
        (b"{}", ["has no field", "'question'", "none"]),
        (b'{"Question": "q", "answer": "#### 1"}', ["has no field", "'question'", "Question"]),
        (b'{"question": "q"}', ["has no field 'answer'"]),
        (b'{"answer": "#### 1"}', ["has no field", "'question'"]),
        (b'{"question": null, "answer": "#### 1"}', ["'question' must be text", "None"]),
        (b'{"question": ["q"], "answer": "#### 1"}', ["'question' must be text, or chat messages", "['q']"]),
        (b'{"question": "q", "answer": true}', ["end in '#### N'", "True"]),
        (b'{"question": "q", "answer": ""}', ["'answer' is empty"]),
        (b'{"question": "q", "answer": "one"}', ["must be one number, or end in '#### N'", "'one'"]),
        (b'{"question": "q", "answer": "### 1"}', ["end in '#### N'"]),
        (b'{"question": "q", "answer": "#### none"}', ["end in '#### N'", "none"]),
        (b'{"question": "q", "answer": "\\\\boxed{1}"}', ["end in '#### N'", "boxed"]),
        *(
            (f'{{"question": "q", "answer": "#### {truth}"}}'.encode(), ["end in '#### N'", truth])
            for truth in (*NOT_ONE_NUMBER.split("|"), "9" * 70 + " 9")
        ),
        (b'{"question": "q", "answer": "' + b"x" * 10_000_000 + b'"}', ["end in '#### N'"]),
        (b'{"question": "' + b"x" * 10_000_000 + b'"}', ["has no field 'answer'"]),
        (b"x" * 10_000_000, ["not JSON"]),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_data_lines(tmp_path, line, words):
    (tmp_path / "train.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with refused("train.jsonl, line 3", *words):
        reward.load_problems("gsm8k", "train", Source(str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b"\xef\xbb\xbf", b" \t\r\n"])
def test_data_files_without_problems(tmp_path, content):
    for split, other in (("train", "test"), ("test", "train")):
        (tmp_path / f"{split}.jsonl").write_bytes(content)
        (tmp_path / f"{other}.jsonl").write_bytes(GOOD)
        with refused("gsm8k", f"no {split} problems", str(tmp_path)):
            reward.load_problems("gsm8k", split, Source(str(tmp_path)))


def test_data_folders(tmp_path):
    with refused("there is no .jsonl, .csv, .parquet file in", str(tmp_path)):
        reward.load_problems("gsm8k", "train", Source(str(tmp_path)))
    (tmp_path / "train.jsonl").mkdir()
    with refused(str(tmp_path / "train.jsonl")):
        reward.load_problems("gsm8k", "train", Source(str(tmp_path)))


def test_odd_but_good_data(tmp_path):
    """A byte order mark, carriage returns, no last newline, any script, a line of 10 MB."""
    texts = ["q", "日本語 🦊 \u0000 ﷽", "x" * 10_000_000]
    lines = [json.dumps({"question": text, "answer": "#### ١٢"}, ensure_ascii=i < 2) for i, text in enumerate(texts)]
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (tmp_path / "test.jsonl").write_bytes(GOOD)
    problems = reward.load_problems("gsm8k", "train", Source(str(tmp_path)))
    assert [problem.prompt for problem in problems] == texts
    assert {problem.answer for problem in problems} == {"12"}


# ---- Adapters -------------------------------------------------------------------------------------------------

SIZES = {"gate_proj": (128, 384), "up_proj": (128, 384), "down_proj": (384, 128)}  # inputs and outputs
PATHS = {f"model.layers.{layer}.mlp.{name}": sizes for layer in range(3) for name, sizes in SIZES.items()}
ADAPTER = {adapter_files.peft_key(path, "lora_A"): torch.ones(4, inside) for path, (inside, _) in PATHS.items()}
ADAPTER |= {adapter_files.peft_key(path, "lora_B"): torch.ones(outside, 4) for path, (_, outside) in PATHS.items()}
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(SIZES)}
ONE = adapter_files.peft_key("model.layers.1.mlp.up_proj", "lora_A")
UNSUPPORTED = {"bias": "all", "use_dora": True, "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}
UNSUPPORTED |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "alora_invocation_tokens": [5, 9]}
UNSUPPORTED |= {"new_variant": {"on": 1}}


def settings(**changes: object) -> tuple[dict, dict]:
    return PLAIN | changes, ADAPTER


def tensors(changes: dict) -> tuple[dict, dict]:
    return PLAIN, ADAPTER | changes


def renamed(old: str, new: str) -> tuple[dict, dict]:
    return PLAIN, {name.replace(old, new): tensor for name, tensor in ADAPTER.items()}


BROKEN_ADAPTERS = {  # name -> words of the message, adapter_config.json, adapter_model.safetensors; None: no such file
    "empty": (["no adapter_config.json"], None, None),
    "no settings": (["no adapter_config.json"], None, ADAPTER),
    "no tensors": (["no adapter_model.safetensors"], PLAIN, None),
    "settings empty": ([], b"", ADAPTER),
    "settings not JSON": ([], b"{", ADAPTER),
    "settings not text": ([], b"\xff\xfe", ADAPTER),
    "settings deep": ([], b"[" * 100_000, ADAPTER),
    "settings a list": (["not one of a LoRA (peft_type)"], [], ADAPTER),
    "settings of another kind": (["peft_type"], *settings(peft_type="IA3")),
    "settings without a kind": (["peft_type"], *settings(peft_type=None)),
    **{
        f"rank {value}": (["r in its adapter_config.json", repr(value)], *settings(r=value))
        for value in (None, 0, -4, 1.5, "4", True, [4])
    },
    **{
        f"alpha {value}": (
            ["lora_alpha in its adapter_config.json must be a", repr(value)],
            *settings(lora_alpha=value),
        )
        for value in (None, 0, -1, "8", False, float("nan"), float("inf"))
    },
    "rslora a word": (["use_rslora", "'no'"], *settings(use_rslora="no")),
    "base a number": (["base_model_name_or_path", "3"], *settings(base_model_name_or_path=3)),
    **{key: ([f"{key} = {value!r} is not supported"], *settings(**{key: value})) for key, value in UNSUPPORTED.items()},
    "pissa": (["pissa_niter_4", "convert"], *settings(init_lora_weights="pissa_niter_4")),
    "tensors empty": ([], PLAIN, b""),
    "tensors no file of their kind": ([], PLAIN, b"\xff" * 64),
    "a tensor less": (["lacks", ONE], PLAIN, {name: tensor for name, tensor in ADAPTER.items() if name != ONE}),
    "a tensor more": (["unexpected", "'x'"], *tensors({"x": torch.ones(1)})),
    "magnitudes": (["unexpected", "magnitude"], *tensors({ONE.replace("lora_A", "magnitude"): torch.ones(3)})),
    "no tensor at all": (["no matrices"], PLAIN, {}),
    "other prefix": (["model.layers.0"], *renamed("base_model.", "")),
    "other modules": (["also has 'model.language_model.layers.0"], *renamed(".layers", ".language_model.layers")),
    "one module more": (
        ["also has 'lm_head'"],
        *tensors({ONE[:17] + f"lm_head.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}),
    ),
    "a layer less": (["lacks", "model.layers.1"], PLAIN, {n: t for n, t in ADAPTER.items() if "layers.0" in n}),
    "other rank": (["at rank 4", "(3, 128)"], *tensors({ONE: torch.ones(3, 128)})),
    "three dimensions": (["(4, 128, 1)"], *tensors({ONE: torch.ones(4, 128, 1)})),
    "other width": (["127", "another base model"], *tensors({ONE: torch.ones(4, 127)})),
    "NaN": (["not finite"], *tensors({ONE: torch.full((4, 128), float("nan"))})),
    "integers": (["not finite"], *tensors({ONE: torch.ones(4, 128, dtype=torch.int8)})),
}


def write_adapter(folder: Path, settings: object, tensors: dict | bytes | None) -> Path:
    folder.mkdir(parents=True)
    if settings is not None:
        text = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
        (folder / "adapter_config.json").write_bytes(text)
    if isinstance(tensors, bytes):
        (folder / "adapter_model.safetensors").write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapted() -> torch.nn.Module:
    """The tiny model with adapters of its MLPs."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    lora.inject(model, list(SIZES), 4, 8)
    return model


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_adapters(adapted, tmp_path, name):
    words, *files = BROKEN_ADAPTERS[name]
    folder = write_adapter(tmp_path / "adapter", *files)
    with refused(str(folder), *words):
        adapter_files.load_adapter(adapted, folder)


# ---- What only a run's preparation can find out: models, adapters, checkpoints, and how all of it goes together

Case = tuple[list[str], list[str]]  # options, and the words of what is said


@pytest.mark.parametrize(
    "parts", ["settings data", pytest.param("models adapters checkpoints", marks=pytest.mark.slow)]
)
def test_what_only_a_run_can_find_out(tmp_path, parts):
    """One process prepares run after run; not one of them comes so far as to start vLLM or to write anything."""
    (tmp_path / "bad").mkdir()
    makers = {"settings": bad_settings, "data": bad_data, "models": bad_models, "adapters": bad_adapters}
    makers["checkpoints"] = bad_checkpoints
    cases = [case for part in parts.split() for case in makers[part](tmp_path / "bad")]
    before = sorted(tmp_path.rglob("*"))
    run = [*ARITHMETIC, "--output_dir", str(tmp_path / "runs/r")]
    (said,) = on_ranks(1, complaints, [run + options for options, _ in cases], folder=tmp_path)
    wrong = []
    for (options, words), line in zip(cases, said, strict=True):
        try:
            check_line(line, words)
        except AssertionError:
            wrong.append((options, words, line))
    assert not wrong, "\n".join(map(str, wrong))
    after = {path for path in tmp_path.rglob("*") if path.parent != tmp_path or not path.name.startswith("rank_")}
    after = {path for path in after if "__pycache__" not in path.parts}  # of reward files, Python's
    assert after == set(before), "nothing is written before everything is right"


def bad_settings(bad: Path) -> list[Case]:
    """What contradicts the world, the task or the algorithm."""
    (bad / "file").write_text("")
    (bad / "raises.py").write_text("1 / 0")
    older = bad / "older"  # a run's folder, which a new run would rename
    (older / "adapter").mkdir(parents=True)
    (older / "metrics.jsonl").touch()
    inside = ["--output_dir", str(older), "--lora_adapter_path", str(older / "adapter")]
    return [
        (inside, ["lora_adapter_path", str(older / "adapter"), "choose another output_dir"]),
        (["--task", "sums"], ["'sums'", "there are: arithmetic, times_tables, gsm8k"]),
        (["--task", "own"], ["'own' has no problems of its own", "add --data"]),
        (["--task", "own", "--data", str(ROOT / "examples/sums.csv"), "--prompt_field", "question"], ["add --reward"]),
        (["--reward", str(bad / "raises.py:score")], ["raises.py' raised ZeroDivisionError"]),
        (["--reward", str(ROOT / "examples/rewards.py:scores")], ["no function 'scores'; it has: score, short"]),
        (["--system_prompt", "Be brief."], ["no chat template", "system_prompt", "instruction"]),
        (["--algorithm", "gpro"], ["'gpro'", "there are: grpo"]),
        (["--algorithm", "ppo"], ["run train_ppo.py"]),
        (["--target_modules", "w_proj"], ["'w_proj'", "q_proj", "all-linear"]),
        (["--target_modules", "q_proj", "nothing"], ["'nothing'", "q_proj"]),
        (["--fsdp_size", "3"], ["fsdp_size 3", "1"]),
        (["--tensor_parallel_size", "3"], ["tensor_parallel_size 3", "1"]),
        (["--max_prompt_length", "2"], ["max_prompt_length, 2 tokens"]),
        (["--max_prompt_length", "1000", "--max_completion_length", "25"], ["1000", "25", "1025", "1024"]),
        (["--output_dir", str(bad / "file")], ["cannot write", str(bad / "file")]),
        (["--output_dir", str(TINY)], ["output_dir", str(TINY), "no run wrote them"]),
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--model", "no such model"], ["'no such model'"]),
        (["--model", str(bad)], ["config.json", str(bad)]),
        (["--model", str(bad / "file")], ["config.json", str(bad / "file")]),
    ]


def bad_data(bad: Path) -> list[Case]:
    """A folder in which one file is right and the other is not, and one whose only training problem is too long."""
    cases = []
    for name, train, test, words in (
        ("bad test", GOOD, b"{", ["test.jsonl, line 1", "not JSON"]),
        ("too long", GOOD.replace(b'"q"', b'"%s"' % (b"q" * 600)), GOOD, ["max_prompt_length, 512 tokens"]),
    ):
        folder = bad / "data" / name
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_bytes(train)
        (folder / "test.jsonl").write_bytes(test)
        cases.append((["--task", "gsm8k", "--max_prompt_length", "512", "--data", str(folder)], words))
    return cases


def bad_models(bad: Path) -> list[Case]:
    """The tiny model's folder with one thing wrong."""
    config = json.loads((TINY / "config.json").read_text())
    weights = load_file(TINY / "model.safetensors")
    first = "model.layers.0.mlp.down_proj.weight"
    whole = (TINY / "model.safetensors").read_bytes()
    cases = []

    def case(name: str, files: dict[str, bytes | dict | None], words: list[str]) -> None:
        folder = bad / "model" / name
        shutil.copytree(TINY, folder)
        for file, content in files.items():
            if content is None:
                (folder / file).unlink()
            elif file.endswith(".safetensors") and isinstance(content, dict):
                save_file(content, folder / file)
            else:
                (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        cases.append((["--model", str(folder)], [str(folder), *words] if words else [str(folder)]))

    def configured(name: str, words: list[str], **changes: object) -> None:
        case(name, {"config.json": config | changes}, words)

    case("empty config", {"config.json": b""}, [])
    case("config not JSON", {"config.json": b"{"}, [])
    case("config a list", {"config.json": b"[]"}, [])
    case("config without anything", {"config.json": b"{}"}, ["model_type"])
    case("config not text", {"config.json": b"\xff\xfe\x00"}, [])
    configured("unknown type", ["hal9000"], model_type="hal9000")
    configured("numeric type", [], model_type=3)
    configured("encoder-decoder", ["T5"], model_type="t5")
    configured("other blocks", ["GPT2LMHeadModel", "layers"], model_type="gpt2", n_embd=128, n_head=4, n_positions=1024)
    code = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    configured("own code", ["never run"], model_type="mine", auto_map=code)
    configured("size a word", ["hidden_size"], hidden_size="large")
    configured("size null", ["hidden_size"], hidden_size=None)
    configured("size 0", [], hidden_size=0)
    configured("negative layers", [], num_hidden_layers=-1)
    configured("no heads", [], num_attention_heads=0)
    configured("vocabulary a word", [], vocab_size="many")
    configured("other vocabulary", ["embed_tokens", "1000"], vocab_size=1000)
    configured("small vocabulary", ["tokenizer", "only 10"], vocab_size=10)
    configured("short", ["16", "24", "40", "at most 32"], max_position_embeddings=32)
    configured("other width", ["mlp", "999"], intermediate_size=999)
    configured("more layers", ["num_hidden_layers", "layer_types"], num_hidden_layers=4)
    layers = ["full_attention"] * 4
    configured("scaled logits", ["logits_scaling 8.0", "not implemented"], logits_scaling=8.0)
    configured("layers that are not there", ["model.layers.3."], num_hidden_layers=4, layer_types=layers)

    case("no tokenizer", {"tokenizer.json": None, "tokenizer_config.json": None}, ["tokenizer"])
    case("empty tokenizer", {"tokenizer.json": b""}, ["tokenizer"])
    case("tokenizer not JSON", {"tokenizer.json": b"{"}, ["tokenizer"])
    case("tokenizer without anything", {"tokenizer.json": b"{}"}, ["tokenizer"])
    case("tokenizer a list", {"tokenizer.json": b"[]"}, ["tokenizer"])
    case("tokenizer settings not JSON", {"tokenizer_config.json": b"{"}, ["tokenizer"])
    case("template not Jinja", {"chat_template.jinja": b"{% if %}"}, ["tokenizer"])
    case("template raises", {"chat_template.jinja": b"{{ raise_exception('no users here') }}"}, ["no users here"])
    case("template empty", {"chat_template.jinja": b"{# nothing #}"}, ["no token of prompt"])

    file = "model.safetensors"
    case("no weights", {file: None}, ["lacks", "embed_tokens"])
    case("a pickle", {file: None, "pytorch_model.bin": b"\x80\x04."}, ["lacks", "embed_tokens"])
    case("empty weights", {file: b""}, ["not a whole safetensors file"])
    case("half the weights", {file: whole[: len(whole) // 2]}, ["not a whole safetensors file"])
    case("weights too long", {file: whole + b"x"}, ["not a whole safetensors file"])
    case("no header", {file: b"\xff" * 100}, ["not a whole safetensors file"])
    case("header not JSON", {file: b"\x08" + b"\x00" * 7 + b"{{{{{{{{"}, ["not a whole safetensors file"])
    case("a tensor less", {file: {name: weights[name] for name in weights if name != first}}, ["lacks", first])
    case("a tensor too short", {file: weights | {first: weights[first][1:].clone()}}, [first, "(127, 384)"])
    case("a tensor too flat", {file: weights | {first: weights[first].flatten()}}, [first, "(49152,)"])
    case("a tensor of integers", {file: weights | {first: weights[first].to(torch.int8)}}, [first, "I8", "BF16"])
    index = "model.safetensors.index.json"
    head = weights["model.embed_tokens.weight"].flip(0).contiguous()
    case("another head", {file: weights | {"lm_head.weight": head}}, ["tie_word_embeddings", "another lm_head.weight"])
    case("index not JSON", {index: b"{"}, [index, "JSON"])
    case("index a list", {index: []}, [index])
    case("index without a map", {index: {}}, [index, "weight_map"])
    case("index with a bad map", {index: {"weight_map": {first: 3}}}, [index, "3"])
    case("index of other files", {index: {"weight_map": {first: "no.safetensors"}}}, [index, "'no.safetensors'"])
    outside = f"../config without anything/{file}"
    case("index of files outside", {index: {"weight_map": dict.fromkeys(weights, outside)}}, [index, outside])
    return cases


def bad_adapters(bad: Path) -> list[Case]:
    """A folder that cannot be opened, and one whose values are found out later; to start from, and as reference."""
    cases = []
    for name in ("a tensor more", "NaN"):
        words, settings, tensors = BROKEN_ADAPTERS[name]
        folder = write_adapter(bad / "adapter" / name, settings, tensors)
        targets = ["--target_modules", *SIZES]
        cases.append(([*targets, "--lora_adapter_path", str(folder)], [str(folder), *words]))
        cases.append(([*targets, "--kl_coef", "0.1", "--ref_adapter_path", str(folder)], [str(folder), *words]))
    return cases


def bad_checkpoints(bad: Path) -> list[Case]:
    """A run's checkpoint with one thing wrong, the run's only one or of another run."""
    run = bad.parent / "runs" / "r"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()  # a run wrote this folder
    now = parse_config([*ARITHMETIC, "--output_dir", "runs/r"], "")
    progress = {"step": 1, "prompts_drawn": 8}
    state = {
        "progress": progress,
        "config": dataclasses.asdict(now),
        "log": {"metrics": 0, "samples": 0, "wandb": None},
    }
    cases = []

    def case(where: Path, words: list[str], content: object = state, tensors: dict = {}, **files: bytes) -> Path:  # noqa: B006
        step = len(cases) + 1
        folder = checkpoint.write(where, step, content, tensors, lambda folder: None)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_bytes(text)
        cases.append((["--resume", str(folder)], words))
        return folder

    def without(key: str) -> dict:
        return {name: value for name, value in state.items() if name != key}

    for name, text in (
        ("checksums_json", b""),
        ("checksums_json", b"{"),
        ("checksums_json", b"[]"),
        ("checksums_json", b"{}"),
        ("checksums_json", b'{"../../latest": "0"}'),
        ("checksums_json", b'{"/etc/passwd": "0"}'),
        ("checksums_json", b'{"state.json": 3}'),
        ("state_json", b"{}"),
        ("state_safetensors", b""),
    ):
        case(run, ["cannot be used"], **{name: text})
    case(run, ["another version"], [])
    for key in state:
        case(run, ["another version", key], without(key))
    case(run, ["another version", "moon"], state | {"progress": progress | {"moon": 1}})
    case(run, ["another version"], state | {"progress": 3})
    case(run, ["another version", "'moon'"], state | {"config": state["config"] | {"moon": 1}})
    was = {"gradient_checkpointing": True}
    case(run, ["another version", "gradient_checkpointing"], state | {"config": state["config"] | was})
    for name in checkpoint.FIXED:
        case(run, [name, "'was'", "must keep"], state | {"config": state["config"] | {name: "was"}})
    case(run, ["lora_A", "None"])
    name = "policy.model.model.layers.0.self_attn.q_proj.adapters.policy.lora_A"
    case(run, [name, "[3, 3]"], state, {name: torch.zeros(3, 3)})
    case(bad / "runs" / "other", ["no checkpoint of the run", "set output_dir to its own"])
    cases.append((["--resume", str(run / "checkpoints" / "step_000777")], ["step_000777"]))
    cases.append((["--resume", str(run)], ["checksums.json"]))
    shutil.copytree(run, bad / "runs" / "harmed")
    for path in (bad / "runs" / "harmed").rglob("state.json"):
        path.write_text("{}")
    harmed = ["--output_dir", str(bad / "runs/harmed"), "--resume"]
    cases.append((harmed, ["is whole", "without --resume"]))
    return cases
