"""Undoing the tokenisation that benchmark texts were published with, for zero-shot perplexity (MDLM, arXiv 2406.07524).

A model that has read plain text should not be asked for the spaces that a tokeniser put around punctuation. Each
detokeniser is a list of rules, applied in order, for the conventions of its data set:

| name | conventions |
|---|---|
| `wikitext` | `@-@`, `@,@`, `@.@` in words and numbers; spaces around punctuation, quotes, brackets; `= Heading =` |
| `ptb` | Penn Treebank: `do n't`, `it 's`, `$ 5`; `N` for numbers and `<unk>` stay; hardly any punctuation |
| `lm1b` | spaces around punctuation; quotes as `"` with spaces on both sides; `don 't` and `it 's` |
| `lambada` | Penn Treebank quotes and curly ones, `do n't`, spaces before punctuation |
| `ag_news` | leftovers of HTML: `#39;`, `&lt;b&gt;`, `quot;`; backslashes for line ends |
| `scientific` | arXiv and PubMed: spaces before punctuation and around brackets; `@xmath0`, `@xcite` stay |

What cannot be known again (case, `<unk>`, `N`) stays. Words are counted on the text before it is touched, so that
perplexity per word means the same whatever is undone here.
"""

from __future__ import annotations

import re

from megatron_md.errors import UserError

Rule = tuple[str, str]

_CLINGS_LEFT: Rule = (r" +([.,:;!?%)\]}]+)(?=[\s\"'”’)\]}.,:;]|$)", r"\1")
_CLINGS_RIGHT: Rule = (r"(?:(?<=\s)|(?<=[\"'“‘(\[{])|^)([(\[{$£€#]) +", r"\1")
_PAIRED_DOUBLE: Rule = (r'" +([^"\n]*?) +"', r'"\1"')
_CONTRACTIONS: Rule = (r" +('(?:s|re|ve|ll|d|m|S|RE|VE|LL|D|M))(?!\w)", r"\1")
_NOT: Rule = (r" +(n't)(?!\w)", r"\1")
_POSSESSIVE: Rule = (r"(?<=s) +'(?= )", "'")
_OUTER_SPACES: Rule = (r"(?m)^ +| +$", "")

RULES: dict[str, tuple[Rule, ...]] = {
    "wikitext": (
        (r" ?@([-,.])@ ?", r"\1"),
        _PAIRED_DOUBLE,
        (r"(?<!\S)' ([^'\n]*?) '(?!\S)", r"'\1'"),
        _NOT,
        _CONTRACTIONS,
        _POSSESSIVE,
        _CLINGS_LEFT,
        _CLINGS_RIGHT,
        _OUTER_SPACES,
    ),
    "ptb": (
        (r"`` ?", '"'),
        (r" ?''(?= |$)", '"'),
        _NOT,
        _CONTRACTIONS,
        _POSSESSIVE,
        (r"([$£#]) +(?=[N\d])", r"\1"),
        _CLINGS_LEFT,
        _OUTER_SPACES,
    ),
    "lm1b": (
        (r"n 't(?!\w)", "n't"),
        _PAIRED_DOUBLE,
        _CONTRACTIONS,
        _POSSESSIVE,
        _CLINGS_LEFT,
        _CLINGS_RIGHT,
        _OUTER_SPACES,
    ),
    "lambada": (
        (r"`` ?|“ ?", '"'),
        (r" ?''(?=\s|$)| ?”", '"'),
        (r"[‘’]", "'"),
        _NOT,
        _CONTRACTIONS,
        _CLINGS_LEFT,
        _CLINGS_RIGHT,
        _OUTER_SPACES,
    ),
    "ag_news": (
        (r" ?(?:&(?:amp;)?)?#39;", "'"),
        (r"&lt;.*?&gt;", ""),
        (r"&?\bquot;", '"'),
        (r"&?\bamp;", "&"),
        (r"&?\bnbsp;", " "),
        (r"#36;", "$"),
        (r" *\\+ *", " "),
        (r" {2,}", " "),
        _OUTER_SPACES,
    ),
    "scientific": (_NOT, _CONTRACTIONS, _CLINGS_LEFT, _CLINGS_RIGHT, _OUTER_SPACES),
}


def detokenize(text: str, name: str) -> str:
    """Plain text again.

    Args:
        text: as its data set has it.
        name: of the data set's conventions, one of `RULES`.

    Raises:
        UserError: there are no rules of that name.
    """
    if name not in RULES:
        raise UserError(f"detokenizer {name!r}: unknown (known: {', '.join(RULES)})")
    for pattern, replacement in RULES[name]:
        text = re.sub(pattern, replacement, text)
    return text
