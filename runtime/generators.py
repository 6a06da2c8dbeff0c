"""Processes that only generate, beside others that only train (`rollout_ranks`), and what goes between them.

The last processes of torchrun form a world of their own. Each of the two worlds has its own ranks and groups, so in
both everything runs as if the other did not exist: FSDP among the trainers, tensor parallelism among the generators. A
link joins the first trainer to all generators:

    trainers     run `train` as ever; their engine is a `RemoteEngine`, which has the generators do what an Engine does
    generators   run `Generator.serve`, which does with a real Engine what the trainers ask

The trainers' weights are merged as they are gathered and go over the link one tensor at a time, or their adapter alone.

A rollout that was prefetched (`max_staleness` 1) is generated while the trainers update the policy. Whatever they ask
then waits until it is complete, so weights arrive between rollouts and never in the middle of one.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_map_only
from transformers import set_seed

import fsdp_utils
import lora
from rollout import Engine
from runtime.conversation import Completion, Reply, Request, mix_seeds
from runtime.heap import release_free_memory
from runtime.shared_memory import first_on_host, shared_folder
from runtime.signals import Stopped, StopRequest

Environments = list[Callable[[], Reply]]  # those of all prompts, in the same order in both worlds


# ---- Two worlds and their link --------------------------------------------------------------------------------


def init_worlds(rollout_ranks: int) -> tuple[fsdp_utils.World, "Link | None"]:
    """The world of this process, the trainers' or the generators', and the link; with 0, one world and no link.

    Raises ValueError if no process is left to train.
    """
    if not rollout_ranks:
        return fsdp_utils.init_world(), None
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainers = ranks - rollout_ranks
    if trainers < 1:
        raise ValueError(
            f"rollout_ranks {rollout_ranks} of {ranks} process(es) leaves none to train; lower it, or start more"
        )
    store, *_ = next(iter(dist.rendezvous("env://")))
    generates = rank >= trainers
    name, rank, size = ("generators", rank - trainers, rollout_ranks) if generates else ("trainers", rank, trainers)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}  # vLLM reads them, too
    world = fsdp_utils.init_world(dist.PrefixStore(name, store))
    if rank > 0 and not generates:
        return world, Link(None, generates)
    return world, Link(new_link_group(store, rank + generates, 1 + rollout_ranks), generates)


def new_link_group(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    """A process group across worlds, for which torch has no public function: made as its own new groups are."""
    group, _ = distributed_c10d._new_process_group_helper(
        size, rank, [], dist.get_backend_config(), store, group_name="link", timeout=fsdp_utils.LONGEST_WAIT
    )
    distributed_c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


@dataclass(frozen=True)
class Link:
    """Joins the first trainer, rank 0 of its group, to the generators, ranks 1 and up."""

    group: dist.ProcessGroup | None  # None on all other trainers, which have no part in it
    generates: bool  # whether this process is a generator

    def broadcast(self, message: Any = None) -> Any:
        """The first trainer's message, on all generators."""
        box = [message]
        with self.naming_peers():
            dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]

    def answer(self, value: Any) -> None:
        """Sends a value from the first generator to the first trainer; others send nothing."""
        if self.group.rank() == 1:
            with self.naming_peers():
                dist.send_object_list([value], group=self.group, group_dst=0)

    def receive_answer(self) -> Any:
        """On the first trainer, the other end of `answer`."""
        box = [None]
        with self.naming_peers():
            dist.recv_object_list(box, group=self.group, group_src=1)
        return box[0]

    def send_tensor(self, name: str, tensor: Tensor) -> None:
        """From the first trainer to all generators, to be followed by others, and at last by `broadcast(None)`."""
        self.broadcast((name, tensor.shape, tensor.dtype))
        with self.naming_peers():
            dist.broadcast(tensor.contiguous(), group=self.group, group_src=0)

    def receive_tensors(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """On a generator, the other end of `send_tensor`. The stream must be exhausted."""
        while header := self.broadcast():
            name, shape, dtype = header
            tensor = torch.empty(shape, dtype=dtype, device=device)
            with self.naming_peers():
                dist.broadcast(tensor, group=self.group, group_src=0)
            yield name, tensor
            del tensor  # this generator must not keep it while the next one arrives

    @contextmanager
    def naming_peers(self) -> Iterator[None]:
        """Raises RuntimeError that names the other side if it is gone."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"lost the {'trainers' if self.generates else 'generators'}: {error}") from error


# ---- The trainers' side ---------------------------------------------------------------------------------------


class RemoteEngine:
    """The generators' engines, with what a run needs of `rollout.Engine`. All trainers call it alike, as an Engine."""

    sleep_level, copies_at_once = 0, True  # a tensor has been sent when `load_weights` asks for the next one

    def __init__(self, link: Link, environments: Environments, started: str, _folder: str, **options: Any):
        """started: see `Progress`. options: of the generators' Engines; each finds the model's folder itself."""
        self.link, self.stop = link, StopRequest()
        self.places = {environment: place for place, environment in enumerate(environments)}
        self.prefetched: list[Request] | None = None  # the requests of a rollout that nobody has asked for yet
        self.under_way = False  # whether the generators still sample it
        self.rollout = None  # what they sent: its completions, or an exception
        self.weights_changed, self.staleness = False, 0.0  # since it was requested, in steps
        self.trainer_wait = self.generator_wait = 0.0  # seconds in this step
        if link.group:
            link.broadcast((started, options, len(environments)))
        self.dtype, self.kv_cache_tokens, self.engines = self.ask("describe")

    def generate(self, requests: list[Request], label: str = "rollout") -> list[Completion]:
        """As `Engine.generate`; if the same requests were prefetched, those completions, as soon as they are there."""
        if requests != self.prefetched:
            return self.ask("generate", self.numbered(requests), label)
        self.finish_rollout()
        self.prefetched, self.staleness = None, float(self.weights_changed)
        return result(self.rollout)

    def prefetch(self, requests: list[Request]) -> None:
        """Has the generators begin a rollout with the weights that they have now, and does not wait for it."""
        self.finish_rollout()
        self.send("generate", self.numbered(requests), "rollout")
        self.prefetched, self.under_way, self.weights_changed = requests, True, False

    def numbered(self, requests: list[Request]) -> list[Request]:
        """The requests with numbers for environments, which may hold what cannot be sent."""
        return [replace(request, environment=self.places[request.environment]) for request in requests]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """As `Engine.run`: `function(engine, *arguments)` of each generator. The function must be a module's."""
        return self.ask("run", function, *tree_map_only(Tensor, Tensor.cpu, arguments))

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """As `Engine.load_weights`."""
        self.finish_rollout()
        self.send("load_weights")
        for name, tensor in stream:
            if self.link.group:
                self.link.send_tensor(name, tensor)
            del tensor
        if self.link.group:
            self.link.broadcast(None)
        result(self.receive())
        self.weights_changed = True

    def load_adapter(self, folder: str, name: str = lora.POLICY) -> None:
        """As `Engine.load_adapter`; the folder may be on the trainers' machine alone."""
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()} if self.link.group else {}
        self.ask("load_adapter", files, name)
        self.weights_changed = True

    def sleep(self) -> None:
        """Nothing: no trainer's memory is the sampler's."""

    def wake(self, part: str) -> None:
        """Nothing, as `sleep`."""

    def close(self) -> None:
        """Ends the generators, when they have finished what they are doing."""
        self.finish_rollout()
        if self.link.group:
            self.link.broadcast(None)

    def metrics(self) -> dict[str, float]:
        """How many steps the prefetched rollout was behind the policy that learned from it, and the seconds that each
        side waited since the last call.
        """
        waited = {"time/trainer_wait": self.trainer_wait, "time/generator_wait": self.generator_wait}
        metrics = {"rollout/staleness": self.staleness} | waited
        self.trainer_wait = self.generator_wait = self.staleness = 0.0
        return metrics

    # Commands and answers

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a Generator's method, on all trainers; its ValueError, OSError or Stopped is raised here."""
        self.finish_rollout()
        self.send(method, *arguments)
        return result(self.receive())

    def send(self, method: str, *arguments: Any) -> None:
        if self.link.group:
            self.link.broadcast((method, arguments))

    def receive(self) -> Any:
        """The generators' answer, on all trainers; counts how long both sides waited."""
        start = time.perf_counter()
        answer, waited = fsdp_utils.on_first_rank(self.link.receive_answer)
        self.trainer_wait += time.perf_counter() - start
        if isinstance(answer, Stopped):  # a signal came there, and is one to this process, too
            self.stop.time = min(self.stop.time, time.monotonic())
        self.generator_wait += waited
        return answer

    def finish_rollout(self) -> None:
        """Waits for the rollout that is under way, if one is, and keeps it."""
        if self.under_way:
            self.rollout, self.under_way = self.receive(), False


def result(answer: Any) -> Any:
    """The answer; raises it if it is an exception."""
    if isinstance(answer, Exception):
        raise answer
    return answer


AnyEngine = Engine | RemoteEngine  # of one interface


# ---- The generators' side -------------------------------------------------------------------------------------


class Generator:
    """A process that only generates: its methods are the trainers' commands, which all generators do together."""

    def __init__(self, engine: Engine, link: Link, environments: Environments, device: torch.device):
        self.engine, self.link, self.environments, self.device = engine, link, environments, device

    def serve(self) -> None:
        """Does what the trainers ask, until they close the engine."""
        ready = time.perf_counter()
        while command := self.link.broadcast():
            waited = time.perf_counter() - ready
            method, arguments = command
            try:
                answer = getattr(self, method)(*arguments)
            except (ValueError, OSError, Stopped) as error:
                answer = error
            ready = time.perf_counter()  # from here on it waits: trainers that are busy take the answer later
            self.link.answer((self.agreed(answer), waited))

    def agreed(self, answer: Any) -> Any:
        """This generator's answer, unless one of them has an exception. Collective."""
        errors: list[Exception | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, answer if isinstance(answer, Exception) else None)
        return next(filter(None, errors), answer)

    def describe(self) -> tuple[torch.dtype, int, int]:
        return self.engine.dtype, self.engine.kv_cache_tokens, self.engine.engines

    def generate(self, requests: list[Request], label: str) -> list[Completion]:
        set_seed(mix_seeds(requests[0].seed, dist.get_rank()))  # of tools that are random: the same after a resume
        if label == "evaluation":
            release_free_memory()
        requests = [replace(request, environment=self.environments[request.environment]) for request in requests]
        return self.engine.generate(requests, label)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function makes of each generator's engine; the first has all of it."""
        try:
            found = function(self.engine, *arguments)
        except (ValueError, OSError) as error:  # the others wait here
            found = error
        answers: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(found, answers if dist.get_rank() == 0 else None)
        for answer in answers:
            result(answer)
        return answers

    def load_weights(self) -> None:
        """Of the trainers' stream, to its end."""
        stream = self.link.receive_tensors(self.device)
        try:
            self.engine.load_weights(stream)
        finally:
            deque(stream, maxlen=0)  # after an error, what the trainers still send

    def load_adapter(self, files: dict[str, bytes], name: str) -> None:
        """From the contents of its files."""
        with shared_folder(sum(map(len, files.values()))) as folder:
            mine = files if first_on_host() else {}
            fsdp_utils.on_every_rank(lambda: [(folder / file).write_bytes(mine[file]) for file in mine])
            self.engine.load_adapter(str(folder), name)
