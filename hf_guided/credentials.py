"""Addresses and tokens: what is written or shown holds none of their secrets."""

import logging
import re
from typing import Any

# Before the last @ that stands before the first slash is a user or a password; after a user and a colon that begin no
# port, a key with slashes of its own (s3://key:sec/ret@bucket). A revision (hf://datasets/user/name@v1/...) is neither.
_USER = r"(?:[^\s/@]*@|[^\s/?#@:]*:(?!\d+(?:/|\Z)|:)[^\s?#]*@)+"
_USER_IN_ADDRESS = re.compile(rf"([A-Za-z][\w+.-]+:/+){_USER}")
# Any parameter may be a secret, whatever it is called.
_QUERY_IN_ADDRESS = re.compile(r"([A-Za-z][\w+.-]+:/+[^\s?#'\"<>`]*)(?:\?|#(?=[^\s'\"<>`]*=))[^\s'\"<>`]*")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def without_credentials(content: Any) -> Any:
    """Leaves user, password and query out of the addresses in a text, and a token of the Hub wherever it stands.

    Args:
        content: A text, or a dict, list or tuple of what may be one. Anything else is returned as it is.

    Returns:
        The same without credentials: `"https://user:token@host/cats.parquet?sig=1"` becomes
        `"https://host/cats.parquet"`.
    """
    if isinstance(content, str):
        return _TOKEN.sub("hf_...", _QUERY_IN_ADDRESS.sub(r"\1", _USER_IN_ADDRESS.sub(r"\1", content)))
    if isinstance(content, dict):
        return {without_credentials(name): without_credentials(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(without_credentials(value) for value in content)
    return content


class FormatterWithoutCredentials(logging.Formatter):
    """Shows messages, of this package and of others, as they are but for credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


def log_to_screen() -> None:
    """Shows messages from `INFO` up, unless the program that uses this package shows them already."""
    handler = logging.StreamHandler()
    handler.setFormatter(FormatterWithoutCredentials("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
