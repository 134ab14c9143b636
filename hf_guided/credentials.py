"""Removes credentials from everything that is written or shown: passwords in URLs, and tokens of the Hub."""

import logging
import re
from typing import Any

# A user or password ends at the last @ before the first slash. A user and a colon without a port may be followed by a
# key with slashes of its own (s3://key:sec/ret@bucket). A revision (hf://datasets/user/name@v1/...) is neither.
_USER = r"(?:[^\s/@]*@|[^\s/?#@:]*:(?!\d+(?:/|\Z)|:)[^\s?#]*@)+"
_USER_IN_ADDRESS = re.compile(rf"([A-Za-z][\w+.-]+:/+){_USER}")
# Any query parameter may be a secret, whatever its name.
_QUERY_IN_ADDRESS = re.compile(r"([A-Za-z][\w+.-]+:/+[^\s?#'\"<>`]*)(?:\?|#(?=[^\s'\"<>`]*=))[^\s'\"<>`]*")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def without_credentials(content: Any) -> Any:
    """The text without user, password and query in its URLs, and without tokens of the Hub; also of all in dicts, lists
    and tuples.

    `"https://user:token@host/cats.parquet?sig=1"` becomes `"https://host/cats.parquet"`.
    """
    if isinstance(content, str):
        return _TOKEN.sub("hf_...", _QUERY_IN_ADDRESS.sub(r"\1", _USER_IN_ADDRESS.sub(r"\1", content)))
    if isinstance(content, dict):
        return {without_credentials(name): without_credentials(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(without_credentials(value) for value in content)
    return content


class FormatterWithoutCredentials(logging.Formatter):
    """Formats messages, of this package and of others, without credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def log_to_screen() -> None:
    """Shows messages from `INFO` up, unless the calling program has set up logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(FormatterWithoutCredentials("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
