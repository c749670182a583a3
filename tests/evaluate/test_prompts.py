"""Prompts: files line by line, refusals by line number, placeholders, batches, and lines that every rank gets."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_md.data.entries import Message
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.evaluate.prompts import batches, canvas_of, read_prompts, typed_prompts
from megatron_md.parallel import World
from tests.ranks import run_ranks


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_of_a_text_are_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.txt", "\ufeffone\r\n\n  two \u2028still two\n   \nthree")
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts] == ["one", "  two \u2028still two", "three"]
    assert [prompt.where for prompt in prompts] == [f"{path} line {number}" for number in (1, 3, 5)]


def test_json_lines_may_hold_any_text(tmp_path: Path) -> None:
    texts = ["two\nlines", "", "naïve"]
    lines = "\n\n".join(json.dumps({"prompt": text, "other": 1}) for text in texts)
    assert [prompt.text for prompt in read_prompts(write(tmp_path / "prompts.jsonl", lines + "\n"))] == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such file"),
        ("a.txt", " \n\n", "holds no prompt"),
        ("a.txt", b"good\n\n\xff", "line 3: not UTF-8"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "line 2: malformed JSON"),
        ("a.jsonl", '\n{"text": "x"}', 'line 2: no text under "prompt"'),
        ("a.jsonl", '{"prompt": 3}', 'line 1: no text under "prompt"'),
        ("a.jsonl", '["x"]', 'line 1: no text under "prompt"'),
    ],
)
def test_bad_files_are_refused_by_line(name: str, content: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_line_may_hold_a_dialogue_of_a_chat(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    path = write(tmp_path / "chat.jsonl", json.dumps({"messages": messages, "id": 7}) + '\n{"prompt": "x"}\n')
    first, second = read_prompts(path, chat=True)
    assert (first.text, first.messages) == ("q", (Message("system", "s"), Message("user", "q")))
    assert (second.text, second.messages) == ("x", ())
    with pytest.raises(ValueError, match='line 1: no text under "prompt"'):
        read_prompts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": []}', "line 1: asks for no answer"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: asks for no answer"),
        ('{"messages": [{"role": "user"}]}', "line 1: messages: 0: content: Field required"),
        (
            '{"messages": [{"role": "user", "content": 3}]}',
            "line 1: messages: 0: content: Input should be a valid string",
        ),
        ('{"messages": "x"}', "line 1: messages: Input should be a valid"),
    ],
)
def test_bad_dialogues_are_refused_by_line(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(write(tmp_path / "chat.jsonl", line), chat=True)
    assert 'write {"messages": [{"role": "user", "content": "..."}]} on each line' in str(error.value)


def test_a_placeholder_is_as_many_mask_tokens(trained: Path) -> None:
    tokenizer = Tokenizer(trained / "tokenizer.model")
    mask = [tokenizer.mask_token_id]
    canvas = canvas_of("[[2]]value = [[1]][[3]]\n[x[[y]]]", tokenizer)
    parts = [tokenizer.encode(text).tolist() for text in ("value = ", "\n[x[[y]]]")]
    assert canvas == [*mask * 2, *parts[0], *mask * 4, *parts[1]]
    assert canvas_of("<mask>[[1]]", tokenizer).count(mask[0]) == 1  # a written name is text
    for text, message in (
        ("x = [[ 5 ]] [[]]", "no placeholder"),
        ("[[0]]", "a number from 1"),
        ("[[999999999]]", "a number from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            canvas_of(text, tokenizer)


def test_batches_hold_equal_keys_in_the_order_of_the_first() -> None:
    assert batches([3, 5, 3, 3, 5, 3], 2) == [[0, 2], [3, 5], [1, 4]]
    assert batches([], 2) == []


def typed(text: str) -> list[str]:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    sys.stdin = io.StringIO(text if rank == 0 else "not for this rank\n")
    return [prompt.text for prompt in typed_prompts(World(rank, size, torch.device("cpu"), 0, 1, True))]


@pytest.mark.distributed
def test_every_rank_gets_the_lines_up_to_an_empty_one() -> None:
    assert run_ranks(typed, 2, "one\n two \r\n\nthree\n") == [["one", " two "]] * 2
    assert run_ranks(typed, 1, "one\ntwo") == [["one", "two"]]
