"""What tests share: small models, and a way to run a function on several ranks."""

import http.server
import json
import multiprocessing.connection
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EPSILON = torch.finfo(torch.float32).eps  # of one rounding, relative
os.environ["WANDB_MODE"] = "disabled"  # also in the processes that tests start
TINY = ROOT / "configs" / "tiny"  # the embedded default's model
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():  # as on a fresh machine, no C++ compiler is found, and nothing that was compiled
    os.environ |= {"CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor")}

# What ranks import, once for all of them: they are forks of a process that has done so, and of nothing else.
PRELOADED = ["train_grpo", "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2"]
PRELOADED += ["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2"]
ranks_are = multiprocessing.get_context("forkserver")
ranks_are.set_forkserver_preload(PRELOADED)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backwards", action="store_true", help="run the tests in reversed order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("backwards"):
        items.reverse()


class Ranks:
    """Processes that run a test module's top-level function, as under torchrun.

    Only a fresh process can join a process group or hold a vLLM engine, so these tests start some.
    """

    def __init__(self, ranks: int, function: Callable, *args: Any, folder: Path) -> None:
        """folder: for what they print and return."""
        self.folder = folder
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        self.processes = []
        for rank in range(ranks):
            environment = {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            self.processes.append(ranks_are.Process(target=be_a_rank, args=(environment, folder, function, args)))
            self.processes[-1].start()

    def poll(self) -> int | None:
        """The exit code of a rank that has ended, if any, as `Popen.poll`."""
        return next((process.exitcode for process in self.processes if process.exitcode is not None), None)

    def kill(self) -> None:
        """SIGKILL to each."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self) -> str:
        """What all of them printed."""
        return "".join(path.read_text()[-8000:] for path in sorted(self.folder.glob("rank_*.txt")))

    def results(self, timeout: int = 300) -> list[Any]:
        """Waits for the end; what the function returned on each rank."""
        deadline = time.time() + timeout
        while running := [process.sentinel for process in self.processes if process.exitcode is None]:
            multiprocessing.connection.wait(running, deadline - time.time())
            if time.time() > deadline or any(process.exitcode for process in self.processes):
                self.kill()  # the others would wait for it
        late = f"no end after {timeout} s\n" if time.time() > deadline else ""
        assert not any(process.exitcode for process in self.processes), late + self.output()
        files = [self.folder / f"rank_{rank}.pt" for rank in range(len(self.processes))]
        return [torch.load(file, weights_only=False) for file in files]


def on_ranks(ranks: int, function: Callable, *args: Any, folder: Path, timeout: int = 300) -> list[Any]:
    """Runs a test module's top-level function on several ranks; the result of each."""
    return Ranks(ranks, function, *args, folder=folder).results(timeout)


def be_a_rank(environment: dict[str, str], folder: Path, function: Callable, args: tuple) -> None:
    """Runs in the process of a rank."""
    os.environ |= environment
    if environment["WORLD_SIZE"] != "1" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun has it
    name = f"rank_{environment['RANK']}"
    with open(folder / f"{name}.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.save(function(*args), folder / f"{name}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another is still connected
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):  # vLLM's, which it removes in an orderly exit alone
        left.unlink(missing_ok=True)
    sys.stdout.flush()
    os._exit(0)  # threads of gloo that outlive the interpreter would abort it


def torchrun_command(ranks: int, *arguments: str) -> list[str]:
    """The command `torchrun --nproc-per-node=RANKS ARGUMENTS`, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs that command from the project's root."""
    return subprocess.run(torchrun_command(ranks, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def train_on(command: str) -> None:
    """A training script with its options, on a rank."""
    import train_grpo
    import train_ppo

    script, *sys.argv[1:] = command.split()
    if script == "train_ppo.py":
        train_ppo.train(train_ppo.setup_ppo())
    else:
        train_grpo.train(train_grpo.setup_grpo())


def train(ranks: int, command: str, folder: Path) -> tuple[list[dict[str, float]], Path]:
    """Runs a training script on forked ranks, which start sooner than torchrun's: its metrics and its run folder."""
    on_ranks(ranks, train_on, f"{command} --output_dir {folder}/run", folder=folder)
    metrics = read_rows(folder / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(len(metrics)))
    return metrics, folder / "run"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextmanager
def serving(answer: Callable[[str, bytes], tuple[int, dict]]) -> Iterator[str]:
    """The address of a server on this machine. answer: from a request's path and body to a status and a reply."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, reply = answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with suppress(BrokenPipeError):  # who asked may be gone
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A real file system of that size at the folder; without the right to mount one, the test is skipped."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def check_line(line: str, words: Iterable[str]) -> None:
    """That it is one line, of a length that one reads, with those words in it."""
    assert "\n" not in line and len(line) < 700, line
    assert all(word in line for word in words), (words, line)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The block ends in a user's error: one line with those words in it."""
    with pytest.raises((ValueError, OSError)) as error:
        yield
    check_line(str(error.value), words)


def complaints(runs: list[list[str]]) -> list[str]:
    """What each run's preparation says, in a process of its own."""
    import train_grpo

    said = []
    for arguments in runs:
        sys.argv[1:] = arguments
        try:
            train_grpo.setup_grpo()
            said.append("nothing")
        except (ValueError, OSError) as error:
            said.append(str(error))
        except Exception:
            said.append(traceback.format_exc())
    return said


def sharded_policy(
    folder, world, dtype=torch.bfloat16, rank=4, nf4=False, checkpointing=False, load=True, targets=None, **options
):
    """The policy of a model's folder with adapters of scale 2, which have no values yet. options: of `shard`."""
    import fsdp_utils
    import lora
    from policy import Policy
    from runtime.models import meta_model

    model = meta_model(str(folder), dtype)
    if nf4:
        lora.quantize_base(model)
    lora.inject(model, targets or ["all-linear"], rank, 2.0 * rank)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model).train()
    fsdp_utils.shard(policy, model.base_model.layers, world.device, **options)
    if load:
        fsdp_utils.load_weights(model, str(folder), world.device)
    return policy


@torch.no_grad()
def plain_logprobs(model, prompts, completions) -> torch.Tensor:
    """(R,) of the completions' tokens by a Hugging Face model; one text at a time, through all logits."""
    logprobs = []
    for prompt, completion in zip(prompts, completions):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logprobs.append(logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logprobs)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean absolute difference, of logprobs in nats."""
    return (found - expected).abs().mean().item()


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
    """Saves a small random model: "llama", "qwen2" (q, k, v biases), "qwen3" (q and k norms) or "mistral".

    With a `vision_config` among the overrides, the others are of its language part.
    """
    from transformers import AutoConfig

    from runtime.models import auto_class

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
    settings = sizes | overrides
    if vision := settings.pop("vision_config", None):
        settings = {"text_config": settings, "vision_config": vision}
    config = AutoConfig.for_model(architecture, **settings)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32)
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
        key = f"{architecture} {sorted(overrides.items())}"
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(architecture), architecture, **overrides)
        return made[key]

    return make
