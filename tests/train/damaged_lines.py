"""Lines that no run writes, by what has happened to them."""

import pytest

DAMAGED = [
    pytest.param(b'{"step": 2, "loss": "\xff"}', id="no UTF-8"),
    pytest.param(b"5", id="number"),
    pytest.param(b"[]", id="list"),
    pytest.param(b"null", id="null"),
    pytest.param(b'{"tokens": 1}', id="no step"),
    pytest.param(b'{"step": 2.5}', id="half a step"),
    pytest.param(b'{"step": null}', id="null step"),
    pytest.param(b'{"step": ' + b"7" * 5000 + b"}", id="5000 digits"),
    pytest.param(b'{"step": 2, "tokens": ' + b"7" * 4000 + b"}", id="4000 digits"),
    pytest.param(b'{"step": 2, "loss": ' + b"[" * 100_000, id="deep"),
    pytest.param(b'{"step": 2, "loss": NaN}', id="NaN"),
    pytest.param(b'{"step": 2, "loss": 1e999}', id="infinite"),
    pytest.param(b'{"step": 2, "lo', id="torn"),
    pytest.param(b'{"step": 2, "lo{"step": 3}', id="torn and written on"),
    pytest.param(b"\0" * 512, id="zeros"),
]
