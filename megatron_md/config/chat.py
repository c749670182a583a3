"""How rows are made of dialogues: `data.chat`, of corpora that were built from conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megatron_md.config.schema import STRICT, Doc, PositiveInt

if TYPE_CHECKING:
    from megatron_md.config import Config

EosPadding = Literal["answer", "one", "ignore"]


@dataclass(frozen=True)
class ChatConfig:
    """Rows of chat corpora (`megatron-md data build --chat`); those of text do not depend on it."""

    __pydantic_config__ = STRICT

    rows: Annotated[
        Literal["padded", "packed"],
        Doc("a dialogue per row, all of a global batch as long as its longest; or several in rows of data.seq_length"),
    ] = "padded"
    eos_padding: Annotated[
        EosPadding | None,
        Doc(
            "<eos> behind a dialogue, which count as answers: answer fills the row with them (LLaDA), one is a single "
            "one, ignore none; null: answer, in packed rows one"
        ),
    ] = None
    eos_cap: Annotated[PositiveInt | None, Doc("most <eos> of eos_padding answer; null: up to the row's end")] = None
    length_multiple: Annotated[
        PositiveInt, Doc("padded rows are as long as a multiple of this, so that few shapes occur")
    ] = 64
    group_by_length: Annotated[
        PositiveInt | None,
        Doc("so many padded rows of similar length follow each other (train.global_batch_size saves most); null: none"),
    ] = None

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several dialogues."""
        return self.rows == "packed"

    @property
    def padding(self) -> EosPadding:
        """`eos_padding`, settled."""
        return self.eos_padding or ("one" if self.is_packed else "answer")

    def problems(self, run: Config) -> Iterator[str]:
        """What these keys contradict in each other or in the run, a line for each."""
        if self.eos_cap is not None and self.padding != "answer":
            yield f"data.chat.eos_cap belongs to data.chat.eos_padding answer, which is {self.padding}"
        if not self.is_packed:
            return
        if run.data.document_attention != "within_document":
            yield "data.chat.rows packed needs data.document_attention=within_document: dialogues see each other else"
        if self.padding == "answer" and self.eos_cap is None:
            yield "data.chat.rows packed with data.chat.eos_padding answer needs data.chat.eos_cap: <eos> per dialogue"
        if self.group_by_length is not None:
            yield "data.chat.group_by_length belongs to data.chat.rows padded: packed rows have one length"
