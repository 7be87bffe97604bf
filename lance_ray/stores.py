"""Options of object stores: every way to write them, turned into the keys of the engine by one table.

A user may give the engine's own keys, a typed configuration (:class:`IOConfig` and its parts), the options of an
fsspec filesystem (s3fs, gcsfs, adlfs, ossfs, tosfs), or such a filesystem. :func:`storage_options_of` turns each into
the engine's keys; :func:`translation_table` prints the table that it goes by. What the engine cannot do is refused
with the reason, nothing is dropped, and no environment variable is read or set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from lance_ray.errors import InvalidArgumentError
from lance_ray.options import Pairs, pairs
from lance_ray.store_keys import KINDS, REFUSED, translation_table
from lance_ray.store_options import (
    flattened,
    from_config,
    from_filesystem,
    from_fsspec,
    is_fsspec,
    named,
    translated,
    with_bucket,
)

__all__ = [
    "AzureConfig",
    "GCSConfig",
    "IOConfig",
    "OSSConfig",
    "S3Config",
    "StoreConfig",
    "storage_options_of",
    "translation_table",
]


def _checked(config: Any, kind: str, refused: Iterable[Any]) -> None:
    """The common end of a configuration's construction: everything that can be wrong is told now."""
    source = type(config).__name__
    names = (name for owner, name in REFUSED if owner == source)
    for name, value in zip(names, refused, strict=True):
        if value is not None:
            raise InvalidArgumentError(f"{source}.{name}", "...", REFUSED[source, name])
    from_config(config, kind)


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
        flat = flattened(named(given, parameter), kind, parameter)
        if not is_fsspec(flat, kind):
            return pairs(translated((("engine", name, value) for name, value in flat.items()), parameter), parameter)
        found = from_fsspec(flat, kind, parameter)
    else:
        own, found = _from_object(given, parameter)
        if own != kind:
            reason = _NOT_BY_CONFIG.get(scheme, f"is not for a table at {scheme}://" if scheme else "is not for a path")
            raise InvalidArgumentError(parameter, type(given).__name__, reason)
    return pairs(with_bucket(found, bucket), parameter)


def check_form(given: Any, parameter: str) -> None:
    """Refuse what :func:`storage_options_of` will not take for any table, where that is not known yet."""
    if given is not None and not isinstance(given, (Mapping, IOConfig)):
        _from_object(given, parameter)


def _place(uri: str) -> tuple[str, str, str]:
    """Scheme, kind of store and bucket of a URI; kind and bucket are empty for what the table does not cover."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri):
        return "", "", ""
    parts = urlsplit(uri)
    kind = KINDS.get(parts.scheme, "")
    return parts.scheme, kind, parts.netloc if kind else ""


def _from_object(given: Any, parameter: str) -> tuple[str, dict[str, str]]:
    """Kind of store and options of a configuration or a filesystem."""
    kind = next((kind for kind, cls in _CONFIGS.items() if isinstance(given, cls)), None)
    if kind is not None:
        return kind, from_config(given, kind)
    if hasattr(given, "protocol") and isinstance(getattr(given, "storage_options", None), Mapping):
        return from_filesystem(given, parameter)
    allowed = "must be a mapping, an IOConfig, S3Config, GCSConfig, AzureConfig, OSSConfig or an fsspec filesystem"
    raise InvalidArgumentError(parameter, type(given).__name__, allowed)
