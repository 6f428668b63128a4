"""What is told on stderr: for people, or one JSON object a line for log collectors."""

from __future__ import annotations

import datetime
import json
import logging
import sys

PROGRESS = "embeam.progress"  # its lines go to the log only where that is JSON
_ERRORS = "embeam"
_FIELDS = "counts"  # numbers beside a message


class JsonFormatter(logging.Formatter):
    """One object a line, under the names that Google Cloud's and most other collectors know."""

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
    """Our own warnings in one line each; what Beam says of a failed run is said once, at the end. May be repeated.

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
    """Keeps back what a job service says of a job, which Beam passes on by the root logger, tracebacks and all."""
    return record.module != "portable_runner"


def is_json() -> bool:
    """Whether the log is one of JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def report_error(message: str) -> None:
    """Says why a command ends."""
    if is_json():
        logging.getLogger(_ERRORS).error(message)
    else:
        print(f"embeam: {message}", file=sys.stderr)


def report_news(message: str) -> None:
    """Says something good to know while a run lasts."""
    if is_json():
        logging.getLogger(PROGRESS).info(message)
    else:
        print(f"embeam: {message}", file=sys.stderr, flush=True)


def report_progress(line: str, counts: dict[str, int]) -> None:
    """Tells a JSON log how far a run is."""
    logging.getLogger(PROGRESS).info(line, extra={_FIELDS: counts})
