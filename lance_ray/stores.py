"""Options of object stores: every way to write them, turned into the keys of the engine by one table.

A user may give the engine's own keys, a typed configuration (:class:`IOConfig` and its parts), the options of an
fsspec filesystem (s3fs, gcsfs, adlfs, ossfs, tosfs), or such a filesystem. :func:`storage_options_of` turns each into
the engine's keys; :func:`translation_table` prints the table that it goes by. What the engine cannot do is refused
with the reason, nothing is dropped, and no environment variable is read or set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from lance_ray.errors import InvalidArgumentError
from lance_ray.options import Pairs, pairs


class _WrongValueError(Exception):
    """What is wrong with a value, never with the value in its text."""


# Converters: one value into that of the engine's key, or into several keys with their values.


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _WrongValueError("must be a text that is not empty")
    return value


def _flag(value: Any) -> str:
    if not isinstance(value, bool):
        raise _WrongValueError("must be True or False")
    return "true" if value else "false"


def _opposite(value: Any) -> str:
    return "false" if _flag(value) == "true" else "true"


def _verify(value: Any) -> str:
    if isinstance(value, str):
        raise _WrongValueError("must be True or False: the engine trusts the certificates of the system, and no file")
    return _opposite(value)


def _count(value: Any, low: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _WrongValueError(f"must be a whole number of at least {low}")
    return value


def _retries(value: Any) -> str:
    return str(_count(value))


def _tries(value: Any) -> str:
    return str(_count(value, 1) - 1)


def _millis(value: Any) -> str:
    return f"{_count(value, 1)}ms"


def _seconds(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise _WrongValueError("must be a number of seconds above zero")
    return f"{max(1, round(value * 1000))}ms"


def _addressing(value: Any) -> dict[str, str]:
    if value not in ("auto", "path", "virtual"):
        raise _WrongValueError("must be 'auto', 'path' or 'virtual'")
    return {} if value == "auto" else {"aws_virtual_hosted_style_request": _flag(value == "virtual")}


def _nothing(value: Any) -> dict[str, str]:
    del value
    return {}


def _host(value: Any) -> str:
    return f"https://{_text(value)}"


def _google_credentials(value: Any) -> dict[str, str]:
    """A path as it is, which every node must have; the text of a service account's key file as the key itself."""
    text = _text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if not text.lstrip().startswith("{"):
        return {"google_application_credentials": text}
    try:
        kind = json.loads(text).get("type")
    except json.JSONDecodeError:
        raise _WrongValueError("starts as JSON does, and is none") from None
    if kind != "service_account":
        raise _WrongValueError(
            "the engine takes only a service account's key as text; give others as the path of a file"
        )
    return {"google_service_account_key": text}


def _google_token(value: Any) -> dict[str, str]:
    """Gcsfs's many-sided ``token``: a way to log in, the content or path of a key file, or an access token."""
    if isinstance(value, Mapping):
        return _google_credentials(json.dumps(dict(value)))
    if not isinstance(value, (str, os.PathLike)):
        raise _WrongValueError(
            "must be a text or a dict: an object that holds credentials cannot be given to the engine"
        )
    text = _text(os.fspath(value))
    if text in ("cache", "cloud", "browser"):
        raise _WrongValueError("the engine knows no such way to log in; leave it out for what the machine offers")
    if text in ("anon", "google_default"):
        return {"google_skip_signature": "true"} if text == "anon" else {}
    is_path = not text.startswith("ya29") and (re.search(r"[/\\{]", text) or text.endswith(".json"))
    return _google_credentials(text) if is_path else {"google_storage_token": text}


_IRRELEVANT_PARTS = {"DefaultEndpointsProtocol", "EndpointSuffix", "QueueEndpoint", "TableEndpoint", "FileEndpoint"}
_CONNECTION_PARTS = {
    "AccountName": "azure_storage_account_name",
    "AccountKey": "azure_storage_account_key",
    "SharedAccessSignature": "azure_storage_sas_key",
    "BlobEndpoint": "azure_storage_endpoint",
}


def _connection_string(value: Any) -> dict[str, str]:
    split = (part.partition("=") for part in _text(value).split(";") if part.strip())
    parts = {name.strip(): text for name, _, text in split}
    if unknown := len(set(parts) - set(_CONNECTION_PARTS) - _IRRELEVANT_PARTS):  # not by name: a torn key is one
        raise _WrongValueError(f"has {unknown} part(s) that are not {sorted({*_CONNECTION_PARTS, *_IRRELEVANT_PARTS})}")
    found = {key: parts[name] for name, key in _CONNECTION_PARTS.items() if name in parts}
    suffix, account = parts.get("EndpointSuffix"), parts.get("AccountName")
    if suffix and account:
        protocol = parts.get("DefaultEndpointsProtocol", "https")
        found.setdefault("azure_storage_endpoint", f"{protocol}://{account}.blob.{suffix}")
    return found


@dataclass(frozen=True, slots=True)
class _Row:
    """One way to write an option: whose name it is, the name, the engine's key, and how its value changes."""

    source: str
    name: str
    key: str
    convert: Callable[[Any], str | dict[str, str]] = _text


_NO_PROJECT = "nothing: only creating and listing buckets takes a project"
_KEY_FILE = "google_application_credentials (path) or google_service_account_key (JSON)"

_TABLE = (
    _Row("S3Config", "region_name", "aws_region"),
    _Row("S3Config", "endpoint_url", "aws_endpoint"),
    _Row("S3Config", "key_id", "aws_access_key_id"),
    _Row("S3Config", "access_key", "aws_secret_access_key"),
    _Row("S3Config", "session_token", "aws_session_token"),
    _Row("S3Config", "anonymous", "aws_skip_signature", _flag),
    _Row("S3Config", "force_virtual_addressing", "aws_virtual_hosted_style_request", _flag),
    _Row("S3Config", "verify_ssl", "allow_invalid_certificates", _opposite),
    _Row("S3Config", "use_ssl", "allow_http", _opposite),
    _Row("S3Config", "requester_pays", "aws_request_payer", _flag),
    _Row("S3Config", "connect_timeout_ms", "connect_timeout", _millis),
    _Row("S3Config", "read_timeout_ms", "read_timeout", _millis),
    _Row("S3Config", "num_tries", "client_max_retries", _tries),
    _Row("GCSConfig", "project_id", _NO_PROJECT, _nothing),
    _Row("GCSConfig", "credentials", _KEY_FILE, _google_credentials),
    _Row("GCSConfig", "token", "google_storage_token"),
    _Row("GCSConfig", "anonymous", "google_skip_signature", _flag),
    _Row("GCSConfig", "connect_timeout_ms", "connect_timeout", _millis),
    _Row("GCSConfig", "read_timeout_ms", "read_timeout", _millis),
    _Row("GCSConfig", "num_tries", "client_max_retries", _tries),
    _Row("AzureConfig", "storage_account", "azure_storage_account_name"),
    _Row("AzureConfig", "access_key", "azure_storage_account_key"),
    _Row("AzureConfig", "sas_token", "azure_storage_sas_key"),
    _Row("AzureConfig", "bearer_token", "azure_storage_token"),
    _Row("AzureConfig", "tenant_id", "azure_storage_tenant_id"),
    _Row("AzureConfig", "client_id", "azure_storage_client_id"),
    _Row("AzureConfig", "client_secret", "azure_storage_client_secret"),
    _Row("AzureConfig", "use_fabric_endpoint", "azure_use_fabric_endpoint", _flag),
    _Row("AzureConfig", "anonymous", "azure_skip_signature", _flag),
    _Row("AzureConfig", "endpoint_url", "azure_storage_endpoint"),
    _Row("AzureConfig", "use_ssl", "allow_http", _opposite),
    _Row("OSSConfig", "endpoint", "oss_endpoint"),
    _Row("OSSConfig", "access_key_id", "oss_access_key_id"),
    _Row("OSSConfig", "access_key_secret", "oss_secret_access_key"),
    _Row("OSSConfig", "security_token", "oss_security_token"),
    _Row("OSSConfig", "region", "oss_region"),
    _Row("OSSConfig", "anonymous", "allow_anonymous", _flag),
    _Row("s3fs", "key", "aws_access_key_id"),
    _Row("s3fs", "username", "aws_access_key_id"),
    _Row("s3fs", "secret", "aws_secret_access_key"),
    _Row("s3fs", "password", "aws_secret_access_key"),
    _Row("s3fs", "token", "aws_session_token"),
    _Row("s3fs", "anon", "aws_skip_signature", _flag),
    _Row("s3fs", "endpoint_url", "aws_endpoint"),
    _Row("s3fs", "use_ssl", "allow_http", _opposite),
    _Row("s3fs", "requester_pays", "aws_request_payer", _flag),
    _Row("s3fs", "client_kwargs.endpoint_url", "aws_endpoint"),
    _Row("s3fs", "client_kwargs.region_name", "aws_region"),
    _Row("s3fs", "client_kwargs.verify", "allow_invalid_certificates", _verify),
    _Row("s3fs", "client_kwargs.use_ssl", "allow_http", _opposite),
    _Row("s3fs", "client_kwargs.aws_access_key_id", "aws_access_key_id"),
    _Row("s3fs", "client_kwargs.aws_secret_access_key", "aws_secret_access_key"),
    _Row("s3fs", "client_kwargs.aws_session_token", "aws_session_token"),
    _Row("s3fs", "config_kwargs.region_name", "aws_region"),
    _Row("s3fs", "config_kwargs.connect_timeout", "connect_timeout", _seconds),
    _Row("s3fs", "config_kwargs.read_timeout", "read_timeout", _seconds),
    _Row("s3fs", "config_kwargs.retries.max_attempts", "client_max_retries", _retries),
    _Row("s3fs", "config_kwargs.retries.total_max_attempts", "client_max_retries", _tries),
    _Row("s3fs", "config_kwargs.s3.addressing_style", "aws_virtual_hosted_style_request", _addressing),
    _Row("gcsfs", "token", f"google_skip_signature ('anon'), {_KEY_FILE}, or google_storage_token", _google_token),
    _Row("gcsfs", "project", _NO_PROJECT, _nothing),
    _Row("gcsfs", "endpoint_url", "google_base_url"),
    _Row("adlfs", "account_name", "azure_storage_account_name"),
    _Row("adlfs", "account_key", "azure_storage_account_key"),
    _Row("adlfs", "sas_token", "azure_storage_sas_key"),
    _Row("adlfs", "connection_string", ", ".join(_CONNECTION_PARTS.values()), _connection_string),
    _Row("adlfs", "tenant_id", "azure_storage_tenant_id"),
    _Row("adlfs", "client_id", "azure_storage_client_id"),
    _Row("adlfs", "client_secret", "azure_storage_client_secret"),
    _Row("adlfs", "anon", "azure_skip_signature", _flag),
    _Row("adlfs", "account_host", "azure_storage_endpoint", _host),
    _Row("adlfs", "connection_timeout", "connect_timeout", _seconds),
    _Row("adlfs", "read_timeout", "read_timeout", _seconds),
    _Row("ossfs", "key", "oss_access_key_id"),
    _Row("ossfs", "secret", "oss_secret_access_key"),
    _Row("ossfs", "token", "oss_security_token"),
    _Row("ossfs", "endpoint", "oss_endpoint"),
    _Row("tosfs", "key", "tos_access_key_id"),
    _Row("tosfs", "secret", "tos_secret_access_key"),
    _Row("tosfs", "session_token", "tos_security_token"),
    _Row("tosfs", "endpoint", "tos_endpoint"),
    _Row("tosfs", "region", "tos_region"),
    _Row("DLF", "oss_access_key_secret", "oss_secret_access_key"),
)

_BACKOFF = "the engine's pauses between tries are fixed; num_tries sets how many there are"
_PARALLEL = "the engine bounds its requests per process (LANCE_IO_THREADS), not per store"
_VENDING = "a function cannot be given to the engine; credentials that expire are vended by a namespace"
_PROFILE = "the engine takes a profile only from AWS_PROFILE in the environment of each process"

# In the order of the fields that stand for them, which exist to say this instead of "unexpected keyword".
_REFUSED = {
    ("S3Config", "max_connections"): _PARALLEL,
    ("S3Config", "retry_initial_backoff_ms"): _BACKOFF,
    ("S3Config", "retry_mode"): _BACKOFF,
    ("S3Config", "profile_name"): _PROFILE,
    ("S3Config", "credentials_provider"): _VENDING,
    ("S3Config", "buffer_time"): _VENDING,
    ("S3Config", "check_hostname_ssl"): "the engine checks the name with the certificate; verify_ssl is for both",
    ("GCSConfig", "max_connections"): _PARALLEL,
    ("GCSConfig", "retry_initial_backoff_ms"): _BACKOFF,
    ("s3fs", "profile"): _PROFILE,
    ("s3fs", "session"): _VENDING,
    ("s3fs", "s3_additional_kwargs"): "has no single meaning; encryption is asked for by the engine's keys aws_sse_*",
    ("s3fs", "config_kwargs.max_pool_connections"): _PARALLEL,
    ("s3fs", "config_kwargs.signature_version"): "the engine signs by version 4; anon=True is for no signature",
    ("gcsfs", "requester_pays"): "the engine names no project to bill",
    ("gcsfs", "session_kwargs"): "the engine has its own HTTP client",
    ("adlfs", "credential"): "an object that holds credentials cannot be given to the engine; give its values",
    ("adlfs", "timeout"): "the engine sends no time limit for the server; read_timeout is the client's",
    ("tosfs", "anon"): "the engine cannot ask TOS without credentials",
}

_FSSPEC_ONLY = frozenset(
    (
        "assume_container_exists",
        "asynchronous",
        "block_size",
        "blocksize",
        "cache_regions",
        "cache_timeout",
        "check_connection",
        "consistency",
        "default_block_size",
        "default_cache_type",
        "default_fill_cache",
        "fixed_upload_size",
        "listings_expiry_time",
        "local_expiry_check",
        "loop",
        "max_concurrency",
        "max_paths",
        "secure_serialize",
        "skip_instance_cache",
        "use_listings_cache",
        "version_aware",
    )
)


def translation_table() -> list[tuple[str, str, str]]:
    """Every name that is understood beside the engine's own keys, for documentation.

    Returns:
        Rows of whose name it is (a configuration class or an fsspec package), the name (with dots for what is nested),
        and the engine's key. The last begins with "nothing:" or "refused:" and a reason where there is no key.
    """
    taken = [(row.source, row.name, row.key) for row in _TABLE]
    own = [("fsspec", name, "nothing: how fsspec itself caches and schedules") for name in sorted(_FSSPEC_ONLY)]
    return taken + own + [(*name, f"refused: {reason}") for name, reason in _REFUSED.items()]


_ROWS: dict[str, dict[str, _Row]] = {row.source: {} for row in _TABLE}
for _row in _TABLE:
    _ROWS[_row.source][_row.name] = _row

_KINDS = {
    **dict.fromkeys(("s3", "s3a", "s3+ddb"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    "oss": "oss",
    "tos": "tos",
}
_FSSPEC = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs", "oss": "ossfs", "tos": "tosfs"}
# What the engine itself understands by the same name and in the same sense, so that it tells no style of writing.
_ENGINE_TOO = {
    "s3": {"token", "endpoint_url"},
    "azure": {
        "account_name",
        "account_key",
        "sas_token",
        "tenant_id",
        "client_id",
        "client_secret",
        "read_timeout",
        "timeout",
    },
    "oss": {"endpoint"},
    "tos": {"endpoint", "region"},
}
_PREFIXES = {"s3": "aws_", "gcs": "google_", "azure": "azure_", "oss": "oss_", "tos": "tos_"}
_CLIENT_KEYS = frozenset(
    (
        "allow_http",
        "allow_invalid_certificates",
        "client_max_retries",
        "client_retry_timeout",
        "connect_timeout",
        "default_content_type",
        "download_retry_count",
        "expires_at_millis",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_max_frame_size",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "refresh_offset_millis",
        "timeout",
        "use_opendal",
        "user_agent",
    )
)

# Other spellings of the engine, so that two of them cannot stand beside each other.
_ALIASES = {
    "aws_default_region": "aws_region",
    "aws_endpoint_url": "aws_endpoint",
    "aws_token": "aws_session_token",
    "azure_endpoint": "azure_storage_endpoint",
    "azure_storage_access_key": "azure_storage_account_key",
    "azure_storage_sas_token": "azure_storage_sas_key",
}

_ENDPOINT = {
    "s3": "aws_endpoint",
    "gcs": "google_base_url",
    "azure": "azure_storage_endpoint",
    "oss": "oss_endpoint",
    "tos": "tos_endpoint",
}
_ANONYMOUS = {
    "s3": "aws_skip_signature",
    "gcs": "google_skip_signature",
    "azure": "azure_skip_signature",
    "oss": "allow_anonymous",
}
# What belongs together: with the first, all the others must be given, or the engine goes by other credentials.
_TOGETHER = {
    "s3": (
        ("aws_access_key_id", "aws_secret_access_key"),
        ("aws_secret_access_key", "aws_access_key_id"),
        ("aws_session_token", "aws_access_key_id"),
    ),
    "azure": (("azure_storage_client_secret", "azure_storage_client_id", "azure_storage_tenant_id"),),
    "oss": (
        ("oss_access_key_id", "oss_secret_access_key"),
        ("oss_secret_access_key", "oss_access_key_id"),
        ("oss_security_token", "oss_access_key_id"),
    ),
    "tos": (
        ("tos_access_key_id", "tos_secret_access_key"),
        ("tos_secret_access_key", "tos_access_key_id"),
        ("tos_security_token", "tos_access_key_id"),
    ),
}
# Of several credentials the engine silently goes by one.
_ALTERNATIVES = {
    "s3": ("aws_access_key_id",),
    "gcs": ("google_storage_token", "google_application_credentials", "google_service_account_key"),
    "azure": (
        "azure_storage_account_key",
        "azure_storage_sas_key",
        "azure_storage_token",
        "azure_storage_client_secret",
    ),
    "oss": ("oss_access_key_id",),
    "tos": ("tos_access_key_id",),
}


def _checked(config: Any, kind: str, refused: Iterable[Any]) -> None:
    """The common end of a configuration's construction: everything that can be wrong is told now."""
    source = type(config).__name__
    names = (name for owner, name in _REFUSED if owner == source)
    for name, value in zip(names, refused, strict=True):
        if value is not None:
            raise InvalidArgumentError(f"{source}.{name}", "...", _REFUSED[source, name])
    _from_config(config, kind)


@dataclass(frozen=True, slots=True)
class S3Config:
    """How to reach S3, and what speaks its protocol (MinIO, R2, Volcengine TOS, ...). Immutable; secrets stay hidden.

    What is left as None is left to the engine: the credentials of the machine, the region that the store tells.

    Args:
        region_name: the bucket's region. Needed with an endpoint that cannot be asked for it.
        endpoint_url: the store's address. Without "https://" or "http://" it is https, or http with use_ssl=False.
        key_id: access key id; goes together with access_key.
        access_key: secret access key.
        session_token: for temporary credentials.
        anonymous: send requests without a signature, for public buckets.
        force_virtual_addressing: put the bucket into the host name, as Volcengine TOS wants it. The name is taken from
            the table's URI, so endpoint_url is given without it.
        verify_ssl: False accepts any certificate.
        use_ssl: False speaks plain http to endpoint_url.
        requester_pays: agree to pay for requests to a bucket that asks for it.
        connect_timeout_ms: milliseconds to wait for a connection.
        read_timeout_ms: milliseconds to wait for the next part of an answer.
        num_tries: how often the HTTP client tries one request; the engine repeats some of its reads above that.
        max_connections: refused, as are all that follow; the error says why.
        retry_initial_backoff_ms: refused.
        retry_mode: refused.
        profile_name: refused.
        credentials_provider: refused.
        buffer_time: refused.
        check_hostname_ssl: refused.

    Raises:
        InvalidArgumentError: a value of the wrong kind, values that contradict each other, or a refused one.
    """

    region_name: str | None = None
    endpoint_url: str | None = None
    key_id: str | None = field(default=None, repr=False)
    access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    anonymous: bool | None = None
    force_virtual_addressing: bool | None = None
    verify_ssl: bool | None = None
    use_ssl: bool | None = None
    requester_pays: bool | None = None
    connect_timeout_ms: int | None = None
    read_timeout_ms: int | None = None
    num_tries: int | None = None
    max_connections: InitVar[Any] = None
    retry_initial_backoff_ms: InitVar[Any] = None
    retry_mode: InitVar[Any] = None
    profile_name: InitVar[Any] = None
    credentials_provider: InitVar[Any] = None
    buffer_time: InitVar[Any] = None
    check_hostname_ssl: InitVar[Any] = None

    def __post_init__(self, *refused: Any) -> None:
        _checked(self, "s3", refused)


@dataclass(frozen=True, slots=True)
class GCSConfig:
    """How to reach Google Cloud Storage. Immutable; secrets stay hidden.

    Args:
        project_id: taken for the sake of other libraries; reading and writing objects needs no project.
        credentials: the path of a credentials file, which every node must have, or the JSON text of a service
            account's key, which travels with the job.
        token: an access token.
        anonymous: send requests without credentials, for public buckets.
        connect_timeout_ms: milliseconds to wait for a connection.
        read_timeout_ms: milliseconds to wait for the next part of an answer.
        num_tries: how often the HTTP client tries one request; the engine repeats some of its reads above that.
        max_connections: refused, the error says why.
        retry_initial_backoff_ms: refused.

    Raises:
        InvalidArgumentError: a value of the wrong kind, values that contradict each other, or a refused one.
    """

    project_id: str | None = None
    credentials: str | os.PathLike[str] | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    anonymous: bool | None = None
    connect_timeout_ms: int | None = None
    read_timeout_ms: int | None = None
    num_tries: int | None = None
    max_connections: InitVar[Any] = None
    retry_initial_backoff_ms: InitVar[Any] = None

    def __post_init__(self, *refused: Any) -> None:
        _checked(self, "gcs", refused)


@dataclass(frozen=True, slots=True)
class AzureConfig:
    """How to reach Azure Blob Storage, Data Lake or OneLake. Immutable; secrets stay hidden.

    Args:
        storage_account: the account's name; needed unless the URI has it (``abfss://container@account...``).
        access_key: the account's key.
        sas_token: a shared access signature, with or without its question mark.
        bearer_token: an access token.
        tenant_id: of a service principal, with client_id and client_secret.
        client_id: of a service principal, or of a managed identity.
        client_secret: of a service principal.
        use_fabric_endpoint: speak to OneLake instead of the account's own address.
        anonymous: send requests without a signature, for public containers.
        endpoint_url: the address of the account, in place of the usual one.
        use_ssl: False speaks plain http to endpoint_url.

    Raises:
        InvalidArgumentError: a value of the wrong kind, or values that contradict each other.
    """

    storage_account: str | None = None
    access_key: str | None = field(default=None, repr=False)
    sas_token: str | None = field(default=None, repr=False)
    bearer_token: str | None = field(default=None, repr=False)
    tenant_id: str | None = None
    client_id: str | None = None
    client_secret: str | None = field(default=None, repr=False)
    use_fabric_endpoint: bool | None = None
    anonymous: bool | None = None
    endpoint_url: str | None = None
    use_ssl: bool | None = None

    def __post_init__(self) -> None:
        _checked(self, "azure", ())


@dataclass(frozen=True, slots=True)
class OSSConfig:
    """How to reach Alibaba Cloud OSS. Immutable; secrets stay hidden.

    Args:
        endpoint: the address of the region, without the bucket. The engine asks for it.
        access_key_id: goes together with access_key_secret.
        access_key_secret: the secret.
        security_token: for temporary credentials, as DLF vends them.
        region: the region's name, for completeness: the engine goes by the endpoint.
        anonymous: send requests without a signature, for public buckets.

    Raises:
        InvalidArgumentError: a value of the wrong kind, or values that contradict each other.
    """

    endpoint: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    access_key_secret: str | None = field(default=None, repr=False)
    security_token: str | None = field(default=None, repr=False)
    region: str | None = None
    anonymous: bool | None = None

    def __post_init__(self) -> None:
        _checked(self, "oss", ())


@dataclass(frozen=True, slots=True)
class IOConfig:
    """Configurations of several stores in one value; the scheme of a table's URI picks the one that applies.

    Raises:
        InvalidArgumentError: a part is not of the class that its name says.
    """

    s3: S3Config | None = None
    gcs: GCSConfig | None = None
    azure: AzureConfig | None = None
    oss: OSSConfig | None = None

    def __post_init__(self) -> None:
        for kind, cls in _CONFIGS.items():
            given = getattr(self, kind)
            if not isinstance(given, (cls, type(None))):
                raise InvalidArgumentError(f"IOConfig.{kind}", type(given).__name__, f"must be a {cls.__name__}")


StoreConfig: TypeAlias = S3Config | GCSConfig | AzureConfig | OSSConfig
_CONFIGS: dict[str, type[StoreConfig]] = {"s3": S3Config, "gcs": GCSConfig, "azure": AzureConfig, "oss": OSSConfig}


_NOT_BY_CONFIG = {
    "rest": "needs the location that the catalog gives for the table",
    "tos": "a bucket of Volcengine TOS is s3:// for it, with force_virtual_addressing; tos:// takes options tos_*",
}


def storage_options_of(given: Any, uri: str, parameter: str = "storage_options") -> Pairs | None:
    """The engine's storage options for a table, from whatever way the user wrote them. Reads no environment.

    Args:
        given: None; a mapping of the engine's keys, which passes as it is; a mapping with fsspec's names, where the
            engine's may stand beside them; an :class:`IOConfig` or one of its parts; or an fsspec filesystem.
        uri: where the table lies, after a catalog said so. Its scheme tells how names are to be read, and its bucket
            is needed for virtual addressing.
        parameter: the argument's name, for errors.

    Returns:
        Options for the engine, or None when there are none for this store: an IOConfig without a part for it, or a
        filesystem that is the local disk.

    Raises:
        InvalidArgumentError: an unknown or unsupported name, a value of the wrong kind, values that contradict each
            other, or a configuration for another kind of store. No message shows a value.
    """
    scheme, kind, bucket = _place(uri)
    if isinstance(given, IOConfig):
        if scheme in _NOT_BY_CONFIG:
            raise InvalidArgumentError(parameter, "IOConfig", _NOT_BY_CONFIG[scheme])
        given = getattr(given, kind, None)
    if given is None:
        return None
    if isinstance(given, Mapping):
        flat = _flat(_named(given, parameter), kind, parameter)
        if not _is_fsspec(flat, kind):
            return pairs(_translated((("engine", name, value) for name, value in flat.items()), parameter), parameter)
        found = _from_fsspec(flat, kind, parameter)
    else:
        own, found = _from_object(given, parameter)
        if own != kind:
            reason = _NOT_BY_CONFIG.get(scheme, f"is not for a table at {scheme}://" if scheme else "is not for a path")
            raise InvalidArgumentError(parameter, type(given).__name__, reason)
    return pairs(_with_bucket(found, bucket), parameter)


def check_form(given: Any, parameter: str) -> None:
    """Refuse what :func:`storage_options_of` will not take for any table, where that is not known yet."""
    if given is not None and not isinstance(given, (Mapping, IOConfig)):
        _from_object(given, parameter)


def _place(uri: str) -> tuple[str, str, str]:
    """Scheme, kind of store and bucket of a URI; kind and bucket are empty for what the table does not cover."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri):
        return "", "", ""
    parts = urlsplit(uri)
    kind = _KINDS.get(parts.scheme, "")
    return parts.scheme, kind, parts.netloc if kind else ""


def _from_object(given: Any, parameter: str) -> tuple[str, dict[str, str]]:
    """Kind of store and options of a configuration or a filesystem."""
    kind = next((kind for kind, cls in _CONFIGS.items() if isinstance(given, cls)), None)
    if kind is not None:
        return kind, _from_config(given, kind)
    if hasattr(given, "protocol") and isinstance(getattr(given, "storage_options", None), Mapping):
        return _from_filesystem(given, parameter)
    allowed = "must be a mapping, an IOConfig, S3Config, GCSConfig, AzureConfig, OSSConfig or an fsspec filesystem"
    raise InvalidArgumentError(parameter, type(given).__name__, allowed)


def _from_config(config: Any, kind: str) -> dict[str, str]:
    source = type(config).__name__
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    found = _translated(((source, name, value) for name, value in values.items() if value is not None), source)
    return _settled(found, kind, source, source)


def _from_filesystem(filesystem: Any, parameter: str) -> tuple[str, dict[str, str]]:
    names = [filesystem.protocol] if isinstance(filesystem.protocol, str) else list(filesystem.protocol)
    if "file" in names or "local" in names:
        return "", {}
    kind = next((_KINDS[name] for name in names if name in _KINDS), None)
    if kind is None:
        raise InvalidArgumentError(parameter, names, f"no filesystem of this kind; known are those of {sorted(_KINDS)}")
    if getattr(filesystem, "storage_args", ()):
        raise InvalidArgumentError(
            parameter, names, "has arguments given without their names, which cannot be told apart"
        )
    options = dict(filesystem.storage_options)
    if kind == "oss" and options.get("endpoint") is None:  # it may have been set later
        options["endpoint"] = getattr(filesystem, "_endpoint", None)
    return kind, _from_fsspec(_flat(options, kind, parameter), kind, parameter)


def _named(given: Mapping[Any, Any], parameter: str) -> Mapping[str, Any]:
    if not all(isinstance(name, str) for name in given):
        pairs(given, parameter)  # refuses
    return given


def _is_fsspec(flat: Mapping[str, Any], kind: str) -> bool:
    """Whether some name is one that only fsspec has: the engine's own options pass without a look at each."""
    source = _FSSPEC.get(kind)
    if source is None:
        return False
    known = {*_ROWS[source], *(name for owner, name in _REFUSED if owner == source), *_FSSPEC_ONLY}
    nests = {name.partition(".")[0] for name in known if "." in name}
    told = {name for name in flat if name in known or name.partition(".")[0] in nests}
    return bool(told - _ENGINE_TOO.get(kind, set()))


def _from_fsspec(flat: dict[str, Any], kind: str, parameter: str) -> dict[str, str]:
    """Options with fsspec's names, and the engine's beside them; all others are refused by name."""
    source = _FSSPEC[kind]
    told: list[tuple[str, str, Any]] = []
    unknown: list[str] = []
    for name, value in flat.items():
        if name in _ROWS[source]:
            told.append((source, name, value))
        elif reason := _REFUSED.get((source, name)):
            raise InvalidArgumentError(f"{parameter}[{name!r}]", "...", reason)
        elif name.startswith((_PREFIXES[kind], "headers.", "lance_")) or name in _CLIENT_KEYS:
            told.append(("engine", _ALIASES.get(name, name), _plain(value)))
        elif name not in _FSSPEC_ONLY:
            unknown.append(name)
    if unknown:
        raise InvalidArgumentError(parameter, sorted(unknown), f"unknown beside options in the style of {source}")
    return _settled(_translated(told, parameter), kind, source, parameter)


def _flat(given: Mapping[str, Any], kind: str, parameter: str, prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names, without those that are None. Other values than plain ones are refused."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = f"{prefix}{key}"
        nests = any(known.startswith(f"{name}.") for known in _ROWS.get(_FSSPEC.get(kind, ""), ()))
        if isinstance(value, Mapping) and nests:
            found |= _flat(value, kind, parameter, f"{name}.")
        elif isinstance(value, (Mapping, list, tuple, set)) and not _takes_any(name, kind):
            raise InvalidArgumentError(f"{parameter}[{name!r}]", type(value).__name__, "must be a plain value")
        elif value is not None:
            found[name] = value
    return found


def _takes_any(name: str, kind: str) -> bool:
    """Whether the table itself has a word on nested values of this option."""
    return (kind, name) == ("gcs", "token") or (_FSSPEC.get(kind), name) in _REFUSED or name in _FSSPEC_ONLY


def _translated(told: Iterable[tuple[str, str, Any]], parameter: str) -> dict[str, str]:
    """The engine's keys and values of options given as (source, name, value)."""
    found: dict[str, str] = {}
    for source, name, value in told:
        where = f"{source}.{name}" if source in _ROWS and parameter == source else f"{parameter}[{name!r}]"
        for key, text in _engine_pairs(source, name, value, where):
            if found.setdefault(key, text) != text:
                raise InvalidArgumentError(where, "...", f"contradicts another option that sets {key}")
    return found


def _engine_pairs(source: str, name: str, value: Any, where: str) -> Iterator[tuple[str, str]]:
    row = _ROWS["DLF"].get(name) if source == "engine" else _ROWS[source][name]
    if row is None:
        yield name, str(value)
        return
    try:
        made = row.convert(value)
    except _WrongValueError as error:
        raise InvalidArgumentError(where, "...", str(error)) from None
    yield from made.items() if isinstance(made, dict) else ((row.key, made),)


def _plain(value: Any) -> str:
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def _settled(options: dict[str, str], kind: str, source: str, parameter: str) -> dict[str, str]:
    """Options with a complete endpoint, after a look at what contradicts itself or would silently not be used."""
    for first, *others in _TOGETHER.get(kind, ()):
        missing = [key for key in others if key not in options]
        if first in options and missing:
            reason = f"is of no use without {_names(source, missing)}"
            raise InvalidArgumentError(parameter, _names(source, [first]), reason)
    used = [key for key in _ALTERNATIVES[kind] if key in options]
    used += [key for key in (_ANONYMOUS.get(kind),) if key and options.get(key) == "true"]
    if len(used) > 1:
        raise InvalidArgumentError(
            parameter, _names(source, used), "contradict each other: give one kind of credentials"
        )
    return _with_scheme(options, kind, source, parameter)


def _names(source: str, keys: Iterable[str]) -> list[str]:
    """What the engine's keys are called in the user's way of writing."""
    return [next((row.name for row in _ROWS[source].values() if key in row.key), key) for key in keys]


def _with_scheme(options: dict[str, str], kind: str, source: str, parameter: str) -> dict[str, str]:
    """Options whose endpoint says http or https (the engine panics without), and is allowed to be plain http."""
    key, plain = _ENDPOINT[kind], options.get("allow_http")
    endpoint = options.get(key)
    if endpoint is None:
        if plain == "true":
            raise InvalidArgumentError(parameter, _names(source, ["allow_http"]), "plain http needs an endpoint")
        return options
    if "://" not in endpoint:
        endpoint = f"{'http' if plain == 'true' else 'https'}://{endpoint}"
    is_plain = endpoint.lower().startswith("http://")
    names = _names(source, [key, "allow_http"])
    if plain is not None and (plain == "true") != is_plain:
        raise InvalidArgumentError(parameter, names, "contradict each other on http and https")
    if is_plain and kind == "tos":
        raise InvalidArgumentError(parameter, names[:1], "the engine speaks only https to TOS")
    return options | {key: endpoint} | ({"allow_http": "true"} if is_plain and kind != "oss" else {})


def _with_bucket(options: dict[str, str], bucket: str) -> dict[str, str]:
    """Options whose endpoint has the bucket in its host for virtual addressing: the engine adds none."""
    endpoint = options.get(_ENDPOINT["s3"])
    if endpoint is None or options.get("aws_virtual_hosted_style_request") != "true":
        return options
    parts = urlsplit(endpoint)
    if not bucket or parts.netloc.startswith(f"{bucket}."):
        return options
    return options | {_ENDPOINT["s3"]: urlunsplit(parts._replace(netloc=f"{bucket}.{parts.netloc}"))}
