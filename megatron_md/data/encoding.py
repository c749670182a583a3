"""Bytes to text: in UTF-8 unless something else is asked for; where that fails, the byte is named."""

from __future__ import annotations

import io
import tokenize
from dataclasses import dataclass
from typing import Literal

from megatron_md.errors import UserError

Errors = Literal["strict", "replace", "ignore"]

WAY_OUT = "say --encoding NAME if such files are in another one (latin-1, cp1252, ...), or --errors replace"


class NotDecodableError(ValueError):
    """Bytes that are no text in the encoding, with the place of the first of them."""


@dataclass(frozen=True)
class Encoding:
    """How the bytes of text files become text.

    Attributes:
        name: Python's name of the encoding; None: UTF-8, and what a Python file declares.
        errors: `strict` refuses bytes that are not of it, `replace` makes them U+FFFD, `ignore` leaves them out.

    Raises:
        UserError: there is no such encoding.
    """

    name: str | None = None
    errors: Errors = "strict"

    def __post_init__(self) -> None:
        if self.name is not None:
            try:
                b"\n".decode(self.name)
            except LookupError:
                raise UserError(
                    f"--encoding {self.name}: no encoding that Python knows; give one like latin-1, cp1252 or utf-16"
                ) from None
            except UnicodeError:
                pass  # an encoding of more than a byte per character

    def check_lines(self, name: str) -> None:
        """Check that a file's lines can be told apart before they are decoded.

        Raises:
            UserError: the encoding writes line breaks otherwise than ASCII.
        """
        if self.name is not None and b"\n".decode(self.name, "replace") != "\n":
            raise UserError(f"{name}: JSON lines in {self.name} cannot be read; convert the file to UTF-8")

    def decode(self, data: bytes, *, is_python: bool = False) -> str:
        """The text of a file, or of a part of it.

        Raises:
            NotDecodableError: the bytes are not in the encoding.
        """
        codec = self.name or (self._declared(data) if is_python else "utf-8-sig")
        try:
            return data.decode(codec, self.errors)
        except UnicodeDecodeError as error:
            # Without a byte order mark in front, which the codec counts out.
            place = len(data) - len(error.object) + error.start
            shown = "UTF-8" if codec in ("utf-8", "utf-8-sig") else codec
            raise NotDecodableError(f"byte {place} (0x{data[place]:02x}) is not {shown}") from None
        except (LookupError, ValueError):
            raise NotDecodableError(f"cannot be read as {codec}") from None

    def _declared(self, data: bytes) -> str:
        """The encoding that a Python file declares, UTF-8 if none."""
        try:
            return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
        except SyntaxError:
            Encoding(errors=self.errors).decode(data)  # the first lines may be it, which declare nothing then
            if self.errors == "strict":
                raise NotDecodableError("its first lines declare an encoding that Python does not know") from None
            return "utf-8-sig"
