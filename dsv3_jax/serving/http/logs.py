"""Log lines, each with the id of the request that it is about."""

import contextvars
import logging
import sys

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


class _WithRequestId(logging.Filter):
    """Adds `request_id`: what the caller passed as `extra`, or the one of the request at hand."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = REQUEST_ID.get()
        return True


def log_to_stderr() -> None:
    """Sends log lines of the project, and warnings of others, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_WithRequestId())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s [%(request_id)s] %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("dsv3_jax").setLevel(logging.INFO)
