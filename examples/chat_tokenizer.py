"""The tokenizer and chat template that a GGUF file carries. Runs in the driver only.

``transformers.AutoTokenizer.from_pretrained(..., gguf_file=...)`` gives the same ids, after 10 s of import and
conversion; building the ``tokenizers`` object directly takes 0.2 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gguf_file import GgufFile
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_CONTROL = 3  # a token type of GGUF


class ChatTokenizer:
    """Turns a user's message into the model's input ids, and output ids into text.

    Attributes:
        eos_token_id: the token that ends an answer.
    """

    def __init__(self, file: GgufFile) -> None:
        metadata = file.metadata
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        self.eos_token_id: int = metadata["tokenizer.ggml.eos_token_id"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        self._tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
        # SmolLM also splits digits apart, but its vocabulary has no token of two digits: the ids are the same.
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        # The options are those for which chat templates are written.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(metadata["tokenizer.chat_template"])

    def encode_chat(self, message: str) -> list[int]:
        """The ids of a conversation that starts with ``message``, up to where the assistant's answer begins."""
        messages = [{"role": "user", "content": message}]
        text = self._template.render(messages=messages, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of ``token_ids``, without control tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def decode_stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """The text as it grows; a character whose bytes are spread over several tokens comes with the last of them."""
        seen: list[int] = []
        shown = 0
        for token_id in token_ids:
            seen.append(token_id)
            text = self.decode(seen)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[shown:]
                shown = len(text)
