"""The vLLM engine inside the training processes: generate, receive weights, sleep.

Every rank of torchrun builds an `Engine`. Ranks that share one engine (tensor parallelism) are neighbours and pass it
the same requests. Engines divide the requests among them; afterwards every rank holds all completions.
"""

import runtime.quiet  # noqa: F401, I001  before torch

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must run inside this process
if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # otherwise vLLM compiles some C++: 2 s, and it needs g++

import vllm  # noqa: E402  loads most of itself on first use, so --help stays quick
from vllm.distributed import get_tp_group  # noqa: E402
from vllm.inputs import tokens_input  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

import lora  # noqa: E402
from fsdp_utils import on_every_rank, on_first_rank  # noqa: E402
from runtime.conversation import Completion, Conversation, Request  # noqa: E402
from runtime.files import one_line_errors, other_weights  # noqa: E402
from runtime.progress_bar import progress_bar  # noqa: E402
from runtime.signals import StopRequest  # noqa: E402
from runtime.vllm_on_cpu import drop_expert_kernels, prepare_cpu  # noqa: E402

AGREE_EVERY = 16  # engine steps; then the ranks of one engine agree whether a signal has come
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's LoRA kernels; others use the next larger one


class Engine:
    """vLLM under torchrun, one per `tensor_parallel_size` ranks."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        max_completion_length: int,
        stop_texts: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.4,
        sleep_level: int = 0,
        max_lora_rank: int = 0,
        max_loras: int = 1,
        lora_targets: list[str] | None = None,
        seed: int = 0,
    ):
        """max_loras, max_lora_rank: how many adapters `load_adapter` takes, and their largest rank; rank 0: none.
        lora_targets: names of the modules that adapters may have; None: all that vLLM knows, experts included.
        stop_texts, stop_token_ids: end a completion and stay its last part; the model's own end tokens also end it.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.max_completion_length = max_completion_length
        self.stop_texts, self.stop_token_ids = list(stop_texts), list(stop_token_ids)
        self.engines = world_size // tensor_parallel_size
        self.tensor_parallel_size = tensor_parallel_size
        self.index, self.tensor_parallel_rank = divmod(rank, tensor_parallel_size)
        self.sleep_level, self.asleep, self.adapters = sleep_level, set(), {}
        self.stop = StopRequest()  # a signal ends a rollout that is under way
        on_cpu = not torch.cuda.is_available()
        self.copies_at_once = not on_cpu  # see load_weights
        options = prepare_cpu(model, dtype, tensor_parallel_size, max_lora_rank > 0, lora_targets) if on_cpu else {}
        self.llm = start_vllm(
            model,
            dtype=dtype,
            language_model_only=True,  # of a model that also sees images
            load_format="safetensors",  # never pickles, and never code that comes with a model
            trust_remote_code=False,
            seed=seed,  # the same on every rank: the ranks of one engine must agree
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_sleep_mode=sleep_level > 0 and not on_cpu,  # its allocator needs CUDA
            enable_lora=max_lora_rank > 0,
            max_lora_rank=next(rank for rank in VLLM_RANKS if rank >= max_lora_rank),
            max_loras=max_loras,
            lora_target_modules=lora_targets,
            logprobs_mode="processed_logprobs",  # at the sampling temperature, as the trainer's are
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )
        self.group = get_tp_group().cpu_group  # the ranks of this engine

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the adapters in vLLM."""
        return self.llm.llm_engine.model_config.dtype

    @property
    def kv_cache_tokens(self) -> int:
        """How many tokens, of all sequences together, the engine has room for."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def generate(self, requests: list[Request], label: str = "rollout") -> list[Completion]:
        """All ranks pass the same requests and get all completions, in the order of the requests.

        label: of the progress bar. On every rank, raises ValueError if an environment does on one, and Stopped if a
        signal came meanwhile.
        """
        mine = range(self.index, len(requests), self.engines)
        conversations = [
            Conversation(i, requests[i], sample, self.max_completion_length)
            for i in mine
            for sample in range(requests[i].samples)
        ]
        on_every_rank(lambda: self.converse(conversations, label))
        self.stop.check()
        completions = [conversation.completion() for conversation in conversations]
        shares: list[list[Completion]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, completions if self.tensor_parallel_rank == 0 else [])
        return sorted(chain.from_iterable(shares), key=lambda completion: completion.request)

    def converse(self, conversations: list[Conversation], label: str) -> None:
        """Runs the engine until all conversations have ended, or a signal drops those that have not.

        A conversation starts its next turn as soon as its last one is done, while others still generate.
        """
        label += f" (engine 1 of {self.engines})" if self.engines > 1 else ""  # the bar is the first rank's
        with progress_bar(label, len(conversations), "sequences") as bar:
            running = {conversation.name: conversation for conversation in conversations}
            for conversation in conversations:
                self.start_turn(conversation)
            for step in count():
                if not running or self.stopped_before(step):
                    break
                outputs = [output for output in self.llm.llm_engine.step() if output.finished]
                for output in outputs:
                    running[output.request_id].add_turn(output.outputs[0])
                finished = [running[output.request_id] for output in outputs]
                self.add_replies(finished)
                for conversation in finished:
                    if conversation.ended:
                        del running[conversation.name]
                        bar.update()
                    else:
                        self.start_turn(conversation)
            self.llm.llm_engine.abort_request(list(running))

    def start_turn(self, conversation: Conversation) -> None:
        """Gives the engine the conversation's next turn to do."""
        request = conversation.request
        params = vllm.SamplingParams(
            temperature=request.temperature,
            seed=conversation.seed,
            max_tokens=conversation.tokens_left,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            stop=self.stop_texts,
            stop_token_ids=self.stop_token_ids,
            detokenize=bool(self.stop_texts),  # texts are looked for in text
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(conversation.context)
        adapter = self.adapter(request.adapter)
        self.llm.llm_engine.add_request(conversation.name, prompt, params, lora_request=adapter)

    def add_replies(self, conversations: list[Conversation]) -> None:
        """Asks the environments, on one rank: those that share an engine must go on alike, even if a tool is random."""
        if conversations:
            replies = on_first_rank(lambda: [conversation.reply() for conversation in conversations], self.group)
            for conversation, reply in zip(conversations, replies):
                conversation.add_reply(reply)

    def stopped_before(self, step: int) -> bool:
        """Whether a signal has come. The ranks of one engine must make the same steps, so they agree now and then."""
        if self.tensor_parallel_size == 1:
            return self.stop.came
        return step % AGREE_EVERY == 0 and self.stop.asked(self.group)

    def logprobs(self, token_ids: list[int], adapter: str = lora.POLICY) -> list[float]:
        """Logprob of every token after the first, by the weights in vLLM, at temperature 1."""
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = vllm.TokensPrompt(prompt_token_ids=token_ids)
        (output,) = self.llm.generate([prompt], params, lora_request=self.adapter(adapter), use_tqdm=False)
        return [entry[token].logprob for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:])]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """[`function(engine, *arguments)`] of this engine; a `RemoteEngine` has the result of each generator's."""
        return [function(self, *arguments)]

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces weights by a stream of (Hugging Face name, whole tensor); all ranks of an engine pass the same.

        Weights that are not in the stream are not changed. The parts of one fused module must follow each other: a CPU
        packs a module as soon as all of its parts have arrived. A GPU writes each in place (`copies_at_once`).
        """
        if self.copies_at_once:
            self.llm.apply_model(lambda model: model.load_weights(stream))
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.for_packing(stream)})
        self.reset_prefix_cache()

    def for_packing(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream as vLLM needs it on a CPU, where it packs weights.

        A tied embedding is sent a second time under the head's name, since vLLM packs its own copy. The kernels of
        experts are dropped before new experts arrive, or vLLM would not pack them again.
        """
        (model,), has_kernels = self.llm.apply_model(lambda model: model), True
        tied = self.llm.llm_engine.model_config.hf_text_config.tie_word_embeddings and hasattr(
            getattr(model, "language_model", model), "lm_head"
        )
        for name, tensor in stream:
            if has_kernels and ".experts." in name:
                drop_expert_kernels(model)
                has_kernels = False
            yield name, tensor
            if tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor
            del tensor  # this generator must not keep it while the next one is gathered

    def load_adapter(self, folder: str, name: str = lora.POLICY) -> None:
        """Loads a peft folder, in place of an earlier adapter of that name; vLLM has read it when this returns."""
        known = self.adapters.get(name)
        number = known.lora_int_id if known else len(self.adapters) + 1
        try:
            self.llm.llm_engine.add_lora(LoRARequest(name, number, folder, load_inplace=True))
        except ValueError as error:
            raise ValueError(f"vLLM does not take this model's adapter, use sync merged: {str(error)[:300]}") from error
        # Without load_inplace, which would read the folder for every request.
        self.adapters[name] = LoRARequest(name, number, folder)
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Drops cached keys and values: they were computed with the old weights."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, which holds keys and values of the old weights")

    def adapter(self, name: str) -> LoRARequest | None:
        """vLLM's request for an adapter; None for a policy that is merged. Raises ValueError for unknown names."""
        if name not in self.adapters and name != lora.POLICY:
            raise ValueError(f"vLLM has no adapter {name!r}; there are: {', '.join(self.adapters) or 'none'}")
        return self.adapters.get(name)

    def adapter_slot(self, name: str) -> int:
        """The index of an adapter in vLLM's stacks of adapters."""
        return self.adapter_manager.lora_index_to_id.index(self.adapters[name].lora_int_id)

    @cached_property
    def adapter_manager(self) -> Any:
        """vLLM's adapter manager, which knows where in its stacks each adapter is."""
        (worker,) = self.llm.collective_rpc(lambda worker: worker)
        return worker.model_runner.lora_manager._adapter_manager

    def sleep(self) -> None:
        """Frees GPU memory for training: drops the KV cache, and moves (level 1) or drops (2) the weights."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = {"weights", "kv_cache"}

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes back the memory of one part. After level 2 the weights are undefined until they are loaded."""
        if part in self.asleep:
            self.llm.wake_up([part])
            self.asleep.remove(part)

    def finish_rollout(self) -> None:
        """Does nothing: this engine generates nothing ahead. See `RemoteEngine` (runtime/generators.py)."""

    def metrics(self) -> dict[str, float]:
        """None: only a `RemoteEngine` waits."""
        return {}

    def close(self) -> None:
        """Does nothing: this engine ends with its process."""


def start_vllm(model: str, **options: Any) -> "vllm.LLM":
    """vLLM with a model's folder. Raises ValueError, of one line, for a model or options that it refuses.

    vLLM reads all safetensors files of a folder that has no index: if some are not the model's, it gets a folder of
    links to the others.
    """
    others = other_weights(Path(model))
    with tempfile.TemporaryDirectory(prefix="lorl-") as links, one_line_errors(f"model {model!r} in vLLM"):
        for path in set(Path(model).iterdir()).difference(others) if others else ():
            Path(links, path.name).symlink_to(path.absolute())
        return vllm.LLM(links if others else model, **options)
