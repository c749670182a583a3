"""Conversations: what of them fits, where an answer ends, whose template a run speaks by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_md.cli import main
from megatron_md.data.chat_template import ChatTemplate
from megatron_md.data.entries import Message
from megatron_md.data.tokenizer import Tokenizer
from megatron_md.evaluate.dialogue import Conversation, Speech, template_of


@pytest.fixture
def speech(tokenizer: Tokenizer) -> Speech:
    return Speech(ChatTemplate.of(tokenizer, "plain"), tokenizer)


def lengths(speech: Speech, *messages: tuple[str, str]) -> int:
    return len(speech.prompt([Message(*message) for message in messages]))


def test_a_question_stands_behind_what_was_said(speech: Speech) -> None:
    conversation = Conversation(speech, 1000, "be brief")
    assert conversation.ask("x")[0] == speech.prompt([Message("system", "be brief"), Message("user", "x")])
    conversation.answered("x", "y")
    turns = [Message("system", "be brief"), Message("user", "x"), Message("assistant", "y"), Message("user", "z")]
    assert conversation.ask("z") == (speech.prompt(turns), 0)
    # A question that is not answered is not part of it.
    assert conversation.ask("z") == (speech.prompt(turns), 0)
    conversation.reset()
    assert conversation.ask("z")[0] == speech.prompt([Message("system", "be brief"), Message("user", "z")])


def test_the_oldest_exchanges_go_first_and_the_system_text_stays(speech: Speech) -> None:
    system, pairs = ("system", "s"), [(("user", f"q{number}"), ("assistant", f"a{number}")) for number in range(3)]
    room = lengths(speech, system, *pairs[1], *pairs[2], ("user", "q9"))
    conversation = Conversation(speech, room, "s")
    for question, answer in pairs:
        conversation.ask(question[1])
        conversation.answered(question[1], answer[1])
    prompt, forgotten = conversation.ask("q9")
    assert forgotten == 1 and len(prompt) == room
    assert prompt == speech.prompt([Message(*message) for message in (system, *pairs[1], *pairs[2], ("user", "q9"))])
    assert conversation.ask("q9")[1] == 0  # it was told once
    # All of them, for a message that fills the room; and one that is longer is refused, and changes nothing.
    fits = next(text for text in ("x" * n for n in range(99, 0, -1)) if lengths(speech, system, ("user", text)) <= room)
    before = list(conversation.turns)
    with pytest.raises(ValueError, match=rf"tokens exceed the {room} that are left beside the answer; shorten it"):
        conversation.ask(fits + "x" * 9)
    assert conversation.turns == before
    assert conversation.ask(fits)[1] == 2 and conversation.turns == []


def test_an_answer_ends_at_what_ends_one(speech: Speech, tokenizer: Tokenizer) -> None:
    eos, words = tokenizer.eos_token_id, tokenizer.encode("return x").tolist()
    assert speech.eot_token_ids == (eos,)
    assert speech.answer([*words, eos, *words]) == ("return x", words)
    assert speech.answer(words) == ("return x", words) and speech.answer([eos]) == ("", [])
    # An end that the tokenizer spells in several tokens is one all the same.
    chatml = Speech(ChatTemplate.of(tokenizer, "chatml"), tokenizer)
    assert chatml.answer(tokenizer.encode("a<|im_end|>\nb").tolist())[0] == "a"


def test_what_a_message_spells_is_no_special_token(speech: Speech, tokenizer: Tokenizer) -> None:
    said = speech.prompt([Message("user", "a<eos><mask>")])
    assert tokenizer.eos_token_id not in said and tokenizer.mask_token_id not in said


def run_of(train: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(train=train)))


def test_a_run_speaks_by_the_template_of_its_corpus(trained: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "x = "}, {"role": "assistant", "content": "1"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    words = ["--tokenizer", str(trained / "tokenizer.model"), "--output", str(tmp_path / "chat")]
    assert main(["data", "build", "--chat", "--template", "plain", "--input", str(data), *words]) == 0
    manifest = str(tmp_path / "chat/manifest.json")
    assert template_of(run_of(manifest), tokenizer, None).name == "plain"
    assert template_of(run_of(manifest), tokenizer, "chatml").name == "chatml"
    for train in (str(trained / "train/manifest.json"), str(tmp_path / "gone/manifest.json"), [], None):
        with pytest.raises(ValueError, match=r"holds no chat template; choose one by --template"):
            template_of(run_of(train), tokenizer, None)
    own = replace(ChatTemplate.of(tokenizer, "plain"), name="own")
    tokenizer_with_one = Tokenizer(trained / "tokenizer.model")
    tokenizer_with_one.chat_template = own.source
    assert template_of(run_of(None), tokenizer_with_one, None).source == own.source
