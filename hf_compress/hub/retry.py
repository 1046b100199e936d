"""Requests to the Hub that are repeated where the fault passes: a server's error, a lost connection, another push."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each repetition
_STALE = 412  # the revision has moved since its head was read
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, _STALE)
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]  # of the client, for faults without an answer too
_T = TypeVar("_T")


class Retry:
    """Calls what can be called again from the start.

    Attributes:
        met_another_push: whether a revision moved while it was written to.
    """

    def __init__(self) -> None:
        self.met_another_push = False

    def __call__(self, request: Callable[[], _T]) -> _T:
        """What the request returns, at the latest at its fifth try.

        Raises:
            OSError: if the Hub refuses, or still fails at the last try.
        """
        waits = iter(WAITS)
        while True:
            try:
                return request()
            except Exception as error:
                fault, wait = _http_fault(error), next(waits, None)
                if fault is None or not _passes(fault):
                    raise
                status, name = _status(fault), type(fault).__name__
                if wait is None and status is not None:
                    raise
                if wait is None:
                    raise ConnectionError(
                        f"the Hub cannot be reached ({name}: {fault}); what was sent is kept, push again later"
                    ) from error
                self.met_another_push |= status == _STALE
                what = f"answered {status}" if status else f"cannot be reached ({name})"
                logger.warning(f"the Hub {what}; trying again in {wait:g} s")
                time.sleep(wait)


def _http_fault(error: BaseException | None) -> BaseException | None:
    """The client's error, which an upload hides behind one of its own; None for others."""
    while error is not None and not isinstance(error, _HTTPError):
        error = error.__cause__
    return error


def _status(fault: BaseException) -> int | None:
    return getattr(getattr(fault, "response", None), "status_code", None)


def _passes(fault: BaseException) -> bool:
    status = _status(fault)
    return status is None or status in _PASSING
