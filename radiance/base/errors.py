"""Errors that a user can cause. All derive from `RadianceError`."""

MAX_MESSAGE_LENGTH = 2000  # characters


class RadianceError(Exception):
    """Base class of all errors that a user can cause.

    The message is one sentence: what is wrong, and what to do. Characters that cannot be printed
    are escaped and long texts are cut, because names of files and tensors are untrusted.
    """

    def __init__(self, message: str = ""):
        if len(message) > MAX_MESSAGE_LENGTH:  # what to do is at the end
            message = f"{message[: MAX_MESSAGE_LENGTH - 400]} … {message[-300:]}"
        super().__init__(escape_unprintable(message))


class ConfigError(RadianceError, ValueError):
    """A setting or an option that cannot work. The message names it."""


class DataError(RadianceError, ValueError):
    """A data set that cannot be used."""


class TextError(RadianceError, ValueError):
    """A prompt that cannot be encoded, or a file that is not text in UTF-8."""


class SamplingError(RadianceError, ValueError):
    """Sampled images that are not finite."""


class TrainingError(RadianceError, RuntimeError):
    """A training run that cannot continue."""


class CheckpointError(RadianceError, ValueError):
    """A checkpoint or weights file that cannot be read or does not fit the model."""


class OutputError(RadianceError):
    """An output that cannot be written, or a damaged output file of a run."""


def escape_unprintable(text: str) -> str:
    """Escape line breaks, control characters and undecodable bytes, so that a text is one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
