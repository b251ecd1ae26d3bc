"""Logs as one JSON object per line on stderr."""

import json
import logging
import sys
from datetime import datetime, timezone

LOGGER = logging.getLogger("flowad.service")


class _JsonLines(logging.Formatter):
    """Write a record's time, level, message and the mapping in its `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def set_up() -> None:
    """Send the service's log and uvicorn's to stderr, uvicorn's from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in ((LOGGER.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def event(message: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one event of the service."""
    LOGGER.log(level, message, extra={"fields": fields})
