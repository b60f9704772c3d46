"""What a client is told, in OpenAI's form."""

from mmrecipes.errors import UserError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # others by the first digit


class Refused(UserError):
    """An HTTP status and OpenAI's {"error": {"message", "type", "param", "code"}}; `retry_after` in seconds."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int = 0):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after)} if self.retry_after else {}

    @property
    def body(self) -> dict[str, dict]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
