"""`data.chat`: which padding is meant, and which keys do not go together."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_md.config import ChatConfig, config_from_mapping


def test_padding_follows_the_rows() -> None:
    assert ChatConfig().padding == "answer" and ChatConfig(rows="packed").padding == "one"
    assert ChatConfig(rows="packed", eos_padding="ignore").padding == "ignore"


@pytest.mark.parametrize(
    ("chat", "data", "message"),
    [
        ({"eos_cap": 4}, {}, None),
        (
            {"eos_cap": 4, "eos_padding": "one"},
            {},
            "data.chat.eos_cap belongs to data.chat.eos_padding answer",
        ),
        ({"rows": "packed"}, {}, "data.chat.rows packed needs data.document_attention=within_document"),
        ({"rows": "packed"}, {"document_attention": "within_document"}, None),
        (
            {"rows": "packed", "eos_padding": "answer"},
            {"document_attention": "within_document"},
            "packed with data.chat.eos_padding answer needs data.chat.eos_cap",
        ),
        ({"rows": "packed", "eos_padding": "answer", "eos_cap": 2}, {"document_attention": "within_document"}, None),
        (
            {"rows": "packed", "group_by_length": 8},
            {"document_attention": "within_document"},
            "data.chat.group_by_length belongs to data.chat.rows padded",
        ),
    ],
)
def test_keys_that_contradict_each_other(chat: dict[str, Any], data: dict[str, Any], message: str | None) -> None:
    lines = list(config_from_mapping({"data": {"chat": chat, **data}}).problems())
    assert len(lines) == (message is not None)
    assert message is None or message in lines[0]


def test_lengths_suit_the_layout() -> None:
    layout = {"tensor": 2, "context": 3}
    assert config_from_mapping({"data": {"chat": {"length_multiple": 4}}, "parallel": layout}).row_unit == 12
    assert config_from_mapping({}).row_unit == 64
