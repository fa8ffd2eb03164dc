"""What the HTTP layer is told once, at start."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.request import LogprobsMode


@dataclass(frozen=True, slots=True)
class ApiOptions:
    api_keys: tuple[str, ...] = ()  # any of them opens every route but the admin ones; none: no key is asked for
    admin_keys: tuple[str, ...] = ()  # open these, too; none: see `security.Gate`
    max_body: int = 8 * 2**20  # bytes
    body_seconds: float = 60.0  # a body must have arrived by then
    max_request_seconds: float = 3600.0  # a request must be answered by then; its `timeout` may ask for less
    first_byte_seconds: float = 10.0  # a stream starts by then, also without a token, so that pings can flow
    ping_seconds: float = 15.0  # silence on a stream before a comment line is sent
    stream_timeout: float = 60.0  # a reader that takes nothing for so long is aborted
    heartbeat_seconds: float = 10.0  # an engine silent for longer is not healthy
    ignore_unknown_fields: bool = False  # True: a warning header instead of a 400
    max_logprobs: int = 20  # most alternatives per token
    logprobs_mode: LogprobsMode = "raw"  # where the request does not say
    weights_root: str | None = None  # the directory that weights are read from; None: none are
    preferences: str | None = None  # the file that rankings are appended to; None: none are taken
