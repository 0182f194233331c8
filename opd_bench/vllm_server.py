"""Talking to a vLLM server, or one that speaks as it does, by HTTP: what passes is tried again, what it refuses is said in one line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from opd_bench.errors import RunError, UserError

TRIES = 5
WAIT_S = 1.0  # before the second try; doubles with each
MOST_WAIT_S = 120.0  # that a server may ask for


class PassingError(Exception):
    """No answer, or one after which another try may succeed, ``after_s`` seconds later at the earliest."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class RefusedError(Exception):
    """The server's reason for not doing what was asked; ``status`` is HTTP's, where it was that."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Server:
    """What serves at ``root``, the address that all paths follow; ``name`` is what messages call it.

    ``secrets`` are headers for it alone, which no redirection passes on. ``wait`` passes the time between two tries.
    """

    name: str
    root: str
    timeout_s: float
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    wait: Callable[[float], None] = time.sleep

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that it answers: a GET, or a POST of ``body``. PassingError or RefusedError if it does not."""
        try:
            request = Request(self.root + path, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"})
            for header, value in self.secrets.items():
                request.add_unredirected_header(header, value)
            with urlopen(request, timeout=self.timeout_s) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = f"HTTP {error.code} {_message(error)}"
            if error.code == 429 or error.code >= 500:
                raise PassingError(said, _after(error)) from None
            raise RefusedError(said, error.code) from None
        except (OSError, HTTPException) as error:
            raise PassingError(str(getattr(error, "reason", error)) or type(error).__name__) from None
        except ValueError as error:
            raise RefusedError(f"no address, or no JSON behind it ({error})") from None

    def persist(self, path: str, body: dict[str, Any]) -> Any:
        """The same in up to TRIES tries. RunError if it refuses, or answers none of them."""
        try:
            return self.insist(path, body)
        except RefusedError as reason:
            raise RunError(f"{self.name} refuses: {reason}; mend it and run the same command to resume") from None

    def insist(self, path: str, body: dict[str, Any]) -> Any:
        """The same, but RefusedError if it refuses."""
        reasons: list[str] = []
        while True:
            try:
                return self.ask(path, body)
            except PassingError as reason:
                reasons.append(str(reason))
                after_s = reason.after_s
            if len(reasons) == TRIES:
                break
            self.wait(max(WAIT_S * 2 ** (len(reasons) - 1), after_s))
        raise RunError(
            f"{self.name} did not answer in {TRIES} tries ({'; '.join(reasons)}); once it does, run the same command again to resume"
        )

    @contextmanager
    def checking(self) -> Iterator[None]:
        """What goes wrong in here is for the user to mend before anything trains. UserError."""
        try:
            yield
        except PassingError as reason:
            raise UserError(f"{self.name} does not answer ({reason}); start it, or mend its address") from None
        except RefusedError as reason:
            raise UserError(f"{self.name} cannot be used: {reason}") from None
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{self.name} is not a vLLM server; give the address of one") from None

    def check_context(self, model: str, longest: int, spare: int) -> None:
        """RefusedError unless it serves ``model`` with room for ``longest`` tokens and ``spare`` more."""
        served = {card["id"]: card["max_model_len"] for card in self.ask("/v1/models")["data"]}
        if model not in served:
            raise RefusedError(f"it serves {', '.join(served)}, not {model}; name what it serves")
        if served[model] < longest + spare:
            raise RefusedError(
                f"its context has {served[model]} tokens, and {longest + spare} are needed (the longest sequence has {longest}); "
                f"start it with --max-model-len {longest + spare} or lower max_response"
            )


def _after(error: HTTPError) -> float:
    """The seconds that a server asks to be left alone for; 0 where it doesn't, or gives a date."""
    asked = error.headers.get("Retry-After") or ""
    return min(MOST_WAIT_S, float(asked)) if asked.isdigit() else 0.0


def _message(error: HTTPError) -> str:
    """The reason that an error's body gives, in one line; all of the body if it is not vLLM's."""
    text = str(error.reason)
    with error, contextlib.suppress(OSError, HTTPException, ValueError, KeyError, TypeError):
        text = error.read().decode(errors="replace")
        text = json.loads(text)["error"]["message"]
    return " ".join(text.split())
