"""The recipe of `configs/tiny`, the embedded default's model: a Qwen2 architecture of 0.6M parameters.

    python tools/tiny_model.py FOLDER        # a minute and a half on two cores

The repository has its weights, so that every machine trains and tests the same ones: another processor would make
slightly different weights.

The model is warm-started on the sums of a *sloppy teacher*, who mostly gets the carry wrong. So it starts like a real
base model: it can solve the problems, but usually does not. Reinforcement has something to sharpen.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the root's modules are found

import reward

CARRY_SLIP = 0.65  # how often the teacher gets the carry wrong
STEPS, ROWS, LEARNING_RATE = 1200, 128, 5e-3


def save(folder: str) -> None:
    """Makes the model and its tokenizer, in bfloat16 and in Hugging Face's format."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    model = warm_start(make_model(len(tokenizer)), tokenizer)
    model.to(torch.bfloat16).save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for `####`, the mark before an answer. Any text can be tokenised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("####", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(vocab_size: int, seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights in float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab_size - 2,
        pad_token_id=vocab_size - 1,
    )
    return Qwen2ForCausalLM(config)


def arithmetic_solution(a: int, b: int, carry_slip: bool = False) -> str:
    """The worked sum: the units, the tens with their carry, the answer. `carry_slip` gets the carry wrong.

    >>> arithmetic_solution(47, 85)
    '12 13 #### 132'
    >>> arithmetic_solution(47, 85, carry_slip=True)
    '12 12 #### 122'
    """
    units = a % 10 + b % 10
    carry = units >= 10
    tens = a // 10 + b // 10 + (carry != carry_slip)
    return f"{units} {tens} #### {10 * tens + units % 10}"


def warm_start(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2ForCausalLM:
    """Supervised learning from the sloppy teacher, on training problems only."""
    rng = random.Random(seed)
    pairs = reward.arithmetic_pairs("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="warm-starting the tiny model", mininterval=1.0):
        prompts, solutions = [], []
        for a, b in rng.choices(pairs, k=ROWS):
            prompts.append(f"{a}+{b}=")
            solutions.append(arithmetic_solution(a, b, carry_slip=rng.random() < CARRY_SLIP))
        rows = tokenizer(
            [p + s + tokenizer.eos_token for p, s in zip(prompts, solutions)], padding=True, return_tensors="pt"
        )
        ids = rows["input_ids"]
        prompt_length = len(prompts[0])  # two digits, plus, two digits, equals: the same for all
        labels = ids.masked_fill(rows["attention_mask"] == 0, -100)[:, prompt_length:]
        logits = model(ids, attention_mask=rows["attention_mask"]).logits[:, prompt_length - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/tiny_model.py FOLDER")
    save(sys.argv[1])
