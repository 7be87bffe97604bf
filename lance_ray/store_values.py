"""One value of a store's option, changed into that of the engine's key, or into several keys with their values."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any


class WrongValueError(Exception):
    """What is wrong with a value, never with the value in its text."""


def text(value: Any) -> str:
    """A text that says something."""
    if not isinstance(value, str) or not value.strip():
        raise WrongValueError("must be a text that is not empty")
    return value


def flag(value: Any) -> str:
    """True or False."""
    if not isinstance(value, bool):
        raise WrongValueError("must be True or False")
    return "true" if value else "false"


def opposite(value: Any) -> str:
    """The other of True and False, where the engine asks the question the other way round."""
    return "false" if flag(value) == "true" else "true"


def verify(value: Any) -> str:
    """Whether certificates are looked at; a file of others cannot be given."""
    if isinstance(value, str):
        raise WrongValueError("must be True or False: the engine trusts the certificates of the system, and no file")
    return opposite(value)


def count(value: Any, low: int = 0) -> int:
    """A whole number that is not below ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise WrongValueError(f"must be a whole number of at least {low}")
    return value


def retries(value: Any) -> str:
    """How often something is tried again."""
    return str(count(value))


def tries(value: Any) -> str:
    """How often something is tried at all, as the engine counts: without the first time."""
    return str(count(value, 1) - 1)


def millis(value: Any) -> str:
    """Milliseconds."""
    return f"{count(value, 1)}ms"


def seconds(value: Any) -> str:
    """Seconds, to the millisecond."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise WrongValueError("must be a number of seconds above zero")
    return f"{max(1, round(value * 1000))}ms"


def addressing(value: Any) -> dict[str, str]:
    """Where the bucket is named: in the path or in the host."""
    if value not in ("auto", "path", "virtual"):
        raise WrongValueError("must be 'auto', 'path' or 'virtual'")
    return {} if value == "auto" else {"aws_virtual_hosted_style_request": flag(value == "virtual")}


def nothing(value: Any) -> dict[str, str]:
    """What has no meaning for the engine."""
    del value
    return {}


def host(value: Any) -> str:
    """The name of a host, as an address."""
    return f"https://{text(value)}"


def google_credentials(value: Any) -> dict[str, str]:
    """A path as it is, which every node must have; the text of a service account's key file as the key itself."""
    said = text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not said.lstrip().startswith("{"):
        return {"google_application_credentials": said}
    try:
        kind = json.loads(said).get("type")
    except json.JSONDecodeError:
        raise WrongValueError("starts as JSON does, and is none") from None
    if kind != "service_account":
        raise WrongValueError(
            "the engine takes only a service account's key as text; give others as the path of a file"
        )
    return {"google_service_account_key": said}


def google_token(value: Any) -> dict[str, str]:
    """Gcsfs's many-sided ``token``: a way to log in, the content or path of a key file, or an access token."""
    if isinstance(value, Mapping):
        return google_credentials(json.dumps(dict(value)))
    if not isinstance(value, (str, os.PathLike)):
        raise WrongValueError(
            "must be a text or a dict: an object that holds credentials cannot be given to the engine"
        )
    said = text(os.fspath(value))
    if said in ("cache", "cloud", "browser"):
        raise WrongValueError("the engine knows no such way to log in; leave it out for what the machine offers")
    if said in ("anon", "google_default"):
        return {"google_skip_signature": "true"} if said == "anon" else {}
    is_path = not said.startswith("ya29") and (re.search(r"[/\\{]", said) or said.endswith(".json"))
    return google_credentials(said) if is_path else {"google_storage_token": said}


_IRRELEVANT_PARTS = {"DefaultEndpointsProtocol", "EndpointSuffix", "QueueEndpoint", "TableEndpoint", "FileEndpoint"}
CONNECTION_PARTS = {
    "AccountName": "azure_storage_account_name",
    "AccountKey": "azure_storage_account_key",
    "SharedAccessSignature": "azure_storage_sas_key",
    "BlobEndpoint": "azure_storage_endpoint",
}


def connection_string(value: Any) -> dict[str, str]:
    """What Azure's portal shows for copying: several options in one text."""
    split = (part.partition("=") for part in text(value).split(";") if part.strip())
    parts = {name.strip(): rest for name, _, rest in split}
    if unknown := len(set(parts) - set(CONNECTION_PARTS) - _IRRELEVANT_PARTS):  # not by name: a torn key is one
        raise WrongValueError(f"has {unknown} part(s) that are not {sorted({*CONNECTION_PARTS, *_IRRELEVANT_PARTS})}")
    found = {key: parts[name] for name, key in CONNECTION_PARTS.items() if name in parts}
    suffix, account = parts.get("EndpointSuffix"), parts.get("AccountName")
    if suffix and account:
        protocol = parts.get("DefaultEndpointsProtocol", "https")
        found.setdefault("azure_storage_endpoint", f"{protocol}://{account}.blob.{suffix}")
    return found
