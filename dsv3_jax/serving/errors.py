"""Why an engine refuses a request."""

from dsv3_jax.config.check import UserError


class RequestError(UserError, ValueError):
    """A request that cannot be answered as it is: `param` names the field at fault (HTTP 400)."""

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.param = param


class Overloaded(UserError):
    """Too many requests wait (HTTP 429); try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(UserError):
    """The engine is not ready yet, is ending, or has failed (HTTP 503)."""

    def __init__(self, message: str, *, retry_after: int = 5):
        super().__init__(message)
        self.retry_after = retry_after
