"""Sentences as their data sets have them, and as people write them."""

from __future__ import annotations

import re

import pytest

from megatron_md.evaluate.detokenize import RULES, detokenize

SENTENCES = [
    ("wikitext", " = Robert Boulter = ", "= Robert Boulter ="),
    (
        "wikitext",
        " He had a guest @-@ starring role in 2 @,@ 500 episodes ( 3 @.@ 5 % ) of The Bill . ",
        "He had a guest-starring role in 2,500 episodes (3.5%) of The Bill.",
    ),
    (
        "wikitext",
        "It was called \" Senjō no Valkyria 3 : Lost \" , and the player 's units did n't move ; the actors ' strike",
        "It was called \"Senjō no Valkyria 3: Lost\", and the player's units didn't move; the actors' strike",
    ),
    ("wikitext", "in the ' Big Top ' ( see [ 1 ] ) : yes", "in the 'Big Top' (see [1]): yes"),
    (
        "ptb",
        " the company 's shares do n't cost $ N million or N % of u.s. sales \n mr. <unk> said it is n't so",
        "the company's shares don't cost $N million or N% of u.s. sales\nmr. <unk> said it isn't so",
    ),
    (
        "lm1b",
        "He said \" it 's fine \" , but they don 't know ( yet ) that the drivers ' pay is $ 5 .",
        "He said \"it's fine\", but they don't know (yet) that the drivers' pay is $5.",
    ),
    (
        "lambada",
        "`` i do n't know , '' he said . “ why ? ” she 'd asked ",
        '"i don\'t know," he said. "why?" she\'d asked',
    ),
    (
        "ag_news",
        "Wall Street #39;s band of\\ultra-cynics &lt;b&gt;are&lt;/b&gt; back. quot;Yes,quot; said AT&amp;T of #36;5",
        'Wall Street\'s band of ultra-cynics are back. "Yes," said AT&T of $5',
    ),
    (
        "scientific",
        "we show that ( in @xmath0 ) the field , which is small , is n't zero [ see @xcite ] . \n",
        "we show that (in @xmath0) the field, which is small, isn't zero [see @xcite].\n",
    ),
]


@pytest.mark.parametrize(("name", "tokenised", "plain"), SENTENCES, ids=lambda text: text[:12])
def test_sentences_become_plain(name: str, tokenised: str, plain: str) -> None:
    assert detokenize(tokenised, name) == plain


@pytest.mark.parametrize("name", [name for name in RULES if name != "ag_news"])
def test_plain_text_and_every_word_stay(name: str) -> None:
    plain = "It's \"fine\", he said (twice): don't pay $5 for 3.5% of it.\n\nA second line; x = 1 and y.\n"
    assert detokenize(plain, name) == plain

    def letters(text: str) -> str:
        return re.sub(r"\W|_", "", text)

    for other, tokenised, _ in SENTENCES:
        if other != "ag_news":
            assert letters(detokenize(tokenised, name)) == letters(tokenised)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"detokenizer 'c4': unknown \(known: wikitext, ptb"):
        detokenize("", "c4")
