"""Errors that a client of the server gets, with the body that OpenAI's API gives them."""

import http
from typing import Any

from deepseek_jax.errors import UserError

TYPES = {429: "rate_limit_error", 401: "authentication_error"}


class RequestError(UserError):
  """A request that is refused or failed.

  Args:
    status: of HTTP.
    message: for people: what was expected, what came, what to do.
    param: field of the body that it is about.
    code: for programs.
    retry_after: seconds, for the header Retry-After.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.retry_after = retry_after

  @property
  def headers(self) -> dict[str, str]:
    """Headers of the response."""
    headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
    if self.status == http.HTTPStatus.UNAUTHORIZED:
      headers["WWW-Authenticate"] = "Bearer"
    return headers

  def to_json(self) -> dict[str, Any]:
    """The body {"error": {...}}."""
    kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
