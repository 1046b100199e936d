"""What the tests of all commands share."""

from __future__ import annotations

from hf_compress.cli import run


def failure(capsys, *argv):
    """The message of a command that must fail: one line, no traceback."""
    assert run([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
