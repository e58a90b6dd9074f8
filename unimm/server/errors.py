"""What the server answers when it does not do what was asked: errors in OpenAI's shape, one line each."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse

from unimm.console import one_line
from unimm.errors import UserError

LONGEST_LINE = 500  # characters of an error's line
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_PARAM = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*): ")


class APIError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: a line for the person.
        code: a word for programs.
        param: the field that is wrong.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """Return it as OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        line = one_line(str(self))
        line = line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"
        return {"error": {"message": line, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer that says it."""
        headers = {"Cache-Control": "no-store"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: BaseException, status: int = 400) -> APIError:
    """Return what a request is answered with that failed for an error.

    Args:
        error: a mistake of the user gives its line, anything else says nothing of the program.
        status: of a mistake of the user.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, UserError):
        line = str(error)
        found = _PARAM.match(line)
        return APIError(status, line, "invalid_value", found[1] if found else None)
    return APIError(500, "the server failed at this request; its log says why", "internal_error")
