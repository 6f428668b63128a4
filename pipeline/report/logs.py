"""Log output on stderr: text for people, or one JSON object per line for log collectors."""

from __future__ import annotations

import datetime
import json
import logging
import sys

PROGRESS = "embeam.progress"  # its messages are logged only if the log is JSON
_ERRORS = "embeam"
_FIELDS = "counts"  # numbers beside a message


class JsonFormatter(logging.Formatter):
    """One object per line, with the names that Google Cloud and most other log collectors use."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        entry = {
            "time": when.isoformat(timespec="milliseconds"),
            "severity": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if counts := getattr(record, _FIELDS, None):
            entry[_FIELDS] = counts
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(debug: bool = False, form: str = "") -> None:
    """Prints our warnings in one line each and hides Beam's log, whose error is reported at the end. May be repeated.

    Args:
      debug: whether Beam's log is shown.
      form: json; anything else is text.
    """
    logging.basicConfig(format="embeam: %(message)s")
    logging.getLogger().setLevel(logging.INFO if debug else logging.WARNING)
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
        logging.getLogger(PROGRESS).setLevel(logging.INFO)
    if debug:
        logging.getLogger("apache_beam").setLevel(logging.NOTSET)
        logging.getLogger().removeFilter(_is_no_job_message)
    else:
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL + 1)  # a job that is refused is critical to Beam
        logging.getLogger().addFilter(_is_no_job_message)


def _is_no_job_message(record: logging.LogRecord) -> bool:
    """Drops the messages of a job service, which Beam logs with tracebacks to the root logger."""
    return record.module != "portable_runner"


def is_json() -> bool:
    """Whether the log is JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def report_error(message: str) -> None:
    """Reports the error that ends a command."""
    if is_json():
        logging.getLogger(_ERRORS).error(message)
    else:
        print(f"embeam: {message}", file=sys.stderr)


def report_news(message: str) -> None:
    """Reports a fact while a run lasts."""
    if is_json():
        logging.getLogger(PROGRESS).info(message)
    else:
        print(f"embeam: {message}", file=sys.stderr, flush=True)


def report_progress(line: str, counts: dict[str, int]) -> None:
    """Reports the progress of a run to a JSON log."""
    logging.getLogger(PROGRESS).info(line, extra={_FIELDS: counts})
