"""Dialogues: three formats give the same messages, bad records are named, long ones are cut as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_md.data.builder import build_corpus
from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.dialogues import ChatSettings, dialogues, tokenise_dialogue
from megatron_md.data.entries import Dialogue, Entry, Message, Record, Rejection
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.data.writer import Tokenised

QUESTION, ANSWER = Message("user", "a = 1"), Message("assistant", "b")
SYSTEM, TOOL = Message("system", "s"), Message("tool", "3")


def turns(*messages: Message) -> list[dict[str, Any]]:
    return [dict(vars(message)) for message in messages]


def read(*records: dict[str, Any], turns: Any = "all") -> list[Entry]:
    return list(dialogues((Record(f"r{number}", fields) for number, fields in enumerate(records)), turns))


PARTS = [{"type": "text", "text": "a ="}, {"type": "text", "text": " 1"}]
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "a = 1"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("fields", "messages", "first_answer"),
    [
        ({"messages": turns(SYSTEM, QUESTION, ANSWER), "id": 3}, (SYSTEM, QUESTION, ANSWER), 0),
        ({"conversations": SHAREGPT}, (SYSTEM, QUESTION, ANSWER), 0),
        ({"prompt": "a = 1", "completion": "b"}, (QUESTION, ANSWER), 1),
        ({"prompt": turns(QUESTION, ANSWER, QUESTION), "completion": turns(ANSWER)}, (QUESTION, ANSWER) * 2, 3),
        # What nobody answers is left out.
        ({"messages": turns(QUESTION, ANSWER, QUESTION)}, (QUESTION, ANSWER), 0),
        ({"messages": turns(QUESTION, ANSWER, TOOL, TOOL, ANSWER)}, (QUESTION, ANSWER, TOOL, TOOL, ANSWER), 0),
        (
            {"messages": [{"role": "user", "content": PARTS}, *turns(ANSWER)], "prompt": "ignored"},
            (QUESTION, ANSWER), 0,
        ),
    ],
)  # fmt: skip
def test_formats(fields: dict[str, Any], messages: tuple[Message, ...], first_answer: int) -> None:
    assert read(fields) == [Dialogue("r0", messages, first_answer)]


def test_split_is_one_row_per_answer() -> None:
    whole = (SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER)
    assert read({"messages": turns(*whole)}, turns="split") == [
        Dialogue("r0@2", whole[:3], 2),
        Dialogue("r0@4", whole, 4),
    ]
    fields = {"prompt": turns(*whole[:4]), "completion": "b"}
    assert read(fields, turns="split") == [Dialogue("r0@4", whole, 4)]


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        ({"messages": turns(QUESTION)}, "no assistant turn", ""),
        ({"messages": []}, "no assistant turn", ""),
        ({"prompt": turns(QUESTION, ANSWER), "completion": turns(QUESTION)}, "no assistant turn", ""),
        ({"prompt": "x", "completion": " \n"}, "empty answer", ""),
        ({"messages": turns(ANSWER)}, "roles out of order", "assistant after nothing"),
        ({"messages": turns(QUESTION, ANSWER, ANSWER)}, "roles out of order", "assistant after assistant"),
        ({"messages": turns(QUESTION, SYSTEM, ANSWER)}, "roles out of order", "system after user"),
        ({"messages": turns(QUESTION, QUESTION, ANSWER)}, "roles out of order", "user after user"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role", "'narrator'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role", "['user']"),
        ({"messages": "hello"}, "malformed dialogue", "its turns are no list of objects"),
        ({"messages": [3]}, "malformed dialogue", "its turns are no list of objects"),
        ({"prompt": None, "completion": "x"}, "malformed dialogue", "its turns are no list of objects"),
        ({"messages": [{"role": "user", "content": 3}]}, "malformed dialogue", "the content of a turn is no text"),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
            "malformed dialogue",
            "a turn without content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "malformed dialogue",
            "the content of a turn is no text",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "tool calls",
            "only text can be learnt: write the calls into the content",
        ),
        ({"prompt": "\ud800", "completion": "x"}, "not encodable as UTF-8", ""),
        ({"text": 1}, "unknown format", "its keys are text, known are messages; prompt and completion; conversations"),
    ],
)
def test_bad_records_are_rejected(fields: dict[str, Any], reason: str, detail: str) -> None:
    good = {"prompt": "a = 1", "completion": "b"}
    for form in ("all", "split"):
        _, *found = read(good, fields, turns=form)
        assert found == [Rejection("r1", reason, detail)]


def test_an_unknown_format_is_refused_with_its_keys() -> None:
    with pytest.raises(
        ValueError, match="r0: not a dialogue: its keys are question, answer, known are messages; prompt"
    ):
        read({"question": "x", "answer": "y"})
    assert read({"messages": []}, {"question": "x"})[1] == Rejection(
        "r1", "unknown format", "its keys are question, known are messages; prompt and completion; conversations"
    )
    # Other entries pass.
    assert list(dialogues([Rejection("x", "not decodable")], "all")) == [Rejection("x", "not decodable")]


def tokenised(tokenizer: Tokenizer, messages: list[Message], first_answer: int = 0, **settings: Any) -> Any:
    chat = ChatSettings(ChatTemplate.of(tokenizer, "plain"), **settings)
    return tokenise_dialogue(tokenizer, chat, Dialogue("x", tuple(messages), first_answer), 5, check=True)


def text_and_answers(tokenizer: Tokenizer, found: Tokenised) -> tuple[str, list[str]]:
    assert found.answers is not None and found.fingerprint == 5
    answers = [tokenizer.decode(found.tokens[start:stop], show_special=True) for start, stop in found.answers]
    return tokenizer.decode(found.tokens, show_special=True), answers


def test_documents_end_with_their_last_answer(tokenizer: Tokenizer) -> None:
    whole = [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER]
    text = "System:\ns\nUser:\na = 1\nAssistant:\nb<eos>\nUser:\na = 1\nAssistant:\nb<eos>"
    found = tokenised(tokenizer, whole)
    assert text_and_answers(tokenizer, found) == (text, ["b<eos>", "b<eos>"])
    assert found.answer_tokens == 4 and found.text_bytes == len(text) + 1
    assert text_and_answers(tokenizer, tokenised(tokenizer, whole, first_answer=4)) == (text, ["b<eos>"])


def test_truncation(tokenizer: Tokenizer) -> None:
    long = Message("user", "value = index")
    whole = [SYSTEM, long, ANSWER, TOOL, ANSWER, QUESTION, Message("assistant", "self.alpha")]
    size = len(tokenised(tokenizer, whole).tokens)
    assert len(tokenised(tokenizer, whole, max_tokens=size).tokens) == size
    rejected = Rejection("x", "longer than max-tokens", f"{size} tokens")
    assert tokenised(tokenizer, whole, max_tokens=size - 1) == rejected
    # The first question goes with all that answers it, the system message stays.
    left = tokenised(tokenizer, whole, max_tokens=size - 1, truncate="left")
    short = "System:\ns\nUser:\na = 1\nAssistant:\nself.alpha<eos>"
    assert text_and_answers(tokenizer, left) == (short, ["self.alpha<eos>"])
    split = tokenised(tokenizer, whole, first_answer=6, max_tokens=size - 1, truncate="left")
    assert split.tokens.tolist() == left.tokens.tolist() and split.answers.tolist() == left.answers.tolist()
    # A single question stays, and is too long then.
    tokens = len(left.tokens)
    assert tokenised(tokenizer, whole, max_tokens=tokens - 1, truncate="left").detail == f"{tokens} tokens"
    right = tokenised(tokenizer, whole, max_tokens=size - 2, truncate="right")
    assert len(right.tokens) == size - 2 and right.answers[-1, 1] == size - 2 and len(right.answers) == 3
    assert tokenised(tokenizer, whole, max_tokens=5, truncate="right") == Rejection(
        "x", "all prompt", f"of {size} tokens"
    )


def test_a_template_that_fails_rejects_its_record(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('is bad') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(source + "{{ m.role + m.content }}\n{% endfor %}")
    template = ChatTemplate.of(tokenizer, str(tmp_path / "own.jinja"))
    dialogue = Dialogue("x", (Message("user", "bad"), ANSWER))
    found = tokenise_dialogue(tokenizer, ChatSettings(template), dialogue, 0, check=False)
    assert found == Rejection("x", "template fails", "chat template own.jinja: is bad")


def test_texts_survive_the_tokenizer_or_are_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda *_, **__: "lossy")
    with pytest.raises(ValueError, match="does not keep the text of x, turn 0"):
        tokenised(tokenizer, [QUESTION, ANSWER])


def test_nothing_left_is_one_clear_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [{"messages": turns(QUESTION)}, {"prompt": "x", "completion": ""}]
    (tmp_path / "in.jsonl").write_bytes(
        b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b'{"prompt": "\xff", "completion": "b"}\n[]\n'
    )
    chat = ChatSettings(ChatTemplate.of(tokenizer, "plain"))
    with pytest.raises(ValueError, match=r"no document to write \(1 empty answer, 1 no assistant turn, 1 not a JSON "):
        build_corpus([tmp_path / "in.jsonl"], tokenizer.path, tmp_path / "out", chat=chat)
    assert not (tmp_path / "out").exists()
    for name in ("in.txt", "in.idx"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=rf"{name}: no file of dialogues, which are \.jsonl, "):
            build_corpus([tmp_path / name], tokenizer.path, tmp_path / "out", chat=chat)
