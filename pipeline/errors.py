"""The errors that a user can cause. Their messages say value, rule, fix, flag."""


class EmbeamError(Exception):
    """A problem that the user can fix; its message says how. The command line prints it without a traceback."""


class ConfigError(EmbeamError, ValueError):
    """A setting that cannot work. It is raised before anything is read or encoded."""


class InputError(EmbeamError):
    """Input that cannot be read at all: no file matches, or no format fits."""


class EncoderError(EmbeamError):
    """A folder or handle without a usable encoder or preprocessor."""


class TableError(EmbeamError):
    """An output folder that is not a table, or a table that cannot be read or written."""


class RunError(EmbeamError):
    """A run that was stopped on purpose: too many dead letters, a full disk, no documents."""


class ValidationError(RunError):
    """A finished snapshot that must not become the live one."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; TensorFlow's messages have dozens of lines."""
    return (str(error) or type(error).__name__).splitlines()[0]


def as_line(text: str) -> str:
    """A text on one line: what cannot be printed is escaped, such as a line break in the name of a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
