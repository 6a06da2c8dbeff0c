"""What tests share: small models, and a way to run a function on several ranks."""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EPSILON = torch.finfo(torch.float32).eps  # of one rounding, relative
TINY = ROOT / "configs" / "tiny"  # the embedded default's model
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():  # as on a fresh machine, no C++ compiler is found, and nothing that was compiled
    os.environ |= {"CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor")}

WORKER = """
import pickle, sys
sys.path[:0] = [{root!r}, {tests!r}]
import importlib, os, torch
call = sys.argv[1]
module, name, args = pickle.load(open(call, "rb"))
result = getattr(importlib.import_module(module), name)(*args)
torch.save(result, call + "." + os.environ["RANK"])
if "vllm" not in sys.modules:  # which cleans up as the interpreter ends
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still needs its store
    os._exit(0)  # threads of gloo that outlive the interpreter would abort it
"""


def on_ranks(ranks: int, function: Callable, *args: Any, folder: Path, timeout: int = 300) -> list[Any]:
    """Runs a test module's top-level function under torchrun; the result of each rank.

    Only a fresh process can join a process group or hold a vLLM engine, so these tests start some.
    """
    call, script = folder / "call.pickle", folder / "worker.py"
    call.write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = torchrun(ranks, str(script), str(call), timeout=timeout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return [torch.load(f"{call}.{rank}", weights_only=False) for rank in range(ranks)]


def torchrun(ranks: int, *arguments: str, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """`torchrun --nproc-per-node=RANKS ARGUMENTS` from the project's root, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
    )


def complaints(runs: list[list[str]]) -> list[str]:
    """What each run's preparation says, in a process of its own."""
    import train_grpo

    said = []
    for arguments in runs:
        sys.argv[1:] = arguments
        try:
            train_grpo.prepare_grpo()
            said.append("nothing")
        except (ValueError, OSError) as error:
            said.append(str(error))
        except Exception:
            said.append(traceback.format_exc())
    return said


def fill_adapters(model, fill):
    """The same random values, wherever the model's tensors live.

    They are multiples of 1/64: sums of their products are exact in float32, in whatever order a processor adds.
    """
    import lora

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            for parameter in layer.adapters[lora.POLICY].parameters():
                fill(parameter, (torch.randn(parameter.shape, generator=generator) * 6.4).round() / 64)


def make_model(
    folder: Path, architecture: str = "qwen2", dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> Path:
    """Saves a small random model: "llama", "qwen2" (q, k, v biases), "qwen3" (q and k norms) or "mistral"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=architecture.startswith("qwen"),
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    config = AutoConfig.for_model(architecture, **(sizes | overrides))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that mistakes are seen
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """`model_folder("qwen2", ...)` is the folder of such a model, made once per session."""
    made: dict = {}

    def make(architecture: str = "qwen2", **overrides: Any) -> Path:
        key = (architecture, *sorted(overrides.items(), key=str))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(architecture), architecture, **overrides)
        return made[key]

    return make
