"""The table of options of object stores: every name that is known, the engine's key for it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lance_ray import store_values as to


@dataclass(frozen=True, slots=True)
class Row:
    """One way to write an option: whose name it is, the name, the engine's key, and how its value changes."""

    source: str
    name: str
    key: str
    convert: Callable[[Any], str | dict[str, str]] = to.text


_NO_PROJECT = "nothing: only creating and listing buckets takes a project"
_KEY_FILE = "google_application_credentials (path) or google_service_account_key (JSON)"

_TABLE = (
    Row("S3Config", "region_name", "aws_region"),
    Row("S3Config", "endpoint_url", "aws_endpoint"),
    Row("S3Config", "key_id", "aws_access_key_id"),
    Row("S3Config", "access_key", "aws_secret_access_key"),
    Row("S3Config", "session_token", "aws_session_token"),
    Row("S3Config", "anonymous", "aws_skip_signature", to.flag),
    Row("S3Config", "force_virtual_addressing", "aws_virtual_hosted_style_request", to.flag),
    Row("S3Config", "verify_ssl", "allow_invalid_certificates", to.opposite),
    Row("S3Config", "use_ssl", "allow_http", to.opposite),
    Row("S3Config", "requester_pays", "aws_request_payer", to.flag),
    Row("S3Config", "connect_timeout_ms", "connect_timeout", to.millis),
    Row("S3Config", "read_timeout_ms", "read_timeout", to.millis),
    Row("S3Config", "num_tries", "client_max_retries", to.tries),
    Row("GCSConfig", "project_id", _NO_PROJECT, to.nothing),
    Row("GCSConfig", "credentials", _KEY_FILE, to.google_credentials),
    Row("GCSConfig", "token", "google_storage_token"),
    Row("GCSConfig", "anonymous", "google_skip_signature", to.flag),
    Row("GCSConfig", "connect_timeout_ms", "connect_timeout", to.millis),
    Row("GCSConfig", "read_timeout_ms", "read_timeout", to.millis),
    Row("GCSConfig", "num_tries", "client_max_retries", to.tries),
    Row("AzureConfig", "storage_account", "azure_storage_account_name"),
    Row("AzureConfig", "access_key", "azure_storage_account_key"),
    Row("AzureConfig", "sas_token", "azure_storage_sas_key"),
    Row("AzureConfig", "bearer_token", "azure_storage_token"),
    Row("AzureConfig", "tenant_id", "azure_storage_tenant_id"),
    Row("AzureConfig", "client_id", "azure_storage_client_id"),
    Row("AzureConfig", "client_secret", "azure_storage_client_secret"),
    Row("AzureConfig", "use_fabric_endpoint", "azure_use_fabric_endpoint", to.flag),
    Row("AzureConfig", "anonymous", "azure_skip_signature", to.flag),
    Row("AzureConfig", "endpoint_url", "azure_storage_endpoint"),
    Row("AzureConfig", "use_ssl", "allow_http", to.opposite),
    Row("OSSConfig", "endpoint", "oss_endpoint"),
    Row("OSSConfig", "access_key_id", "oss_access_key_id"),
    Row("OSSConfig", "access_key_secret", "oss_secret_access_key"),
    Row("OSSConfig", "security_token", "oss_security_token"),
    Row("OSSConfig", "region", "oss_region"),
    Row("OSSConfig", "anonymous", "allow_anonymous", to.flag),
    Row("s3fs", "key", "aws_access_key_id"),
    Row("s3fs", "username", "aws_access_key_id"),
    Row("s3fs", "secret", "aws_secret_access_key"),
    Row("s3fs", "password", "aws_secret_access_key"),
    Row("s3fs", "token", "aws_session_token"),
    Row("s3fs", "anon", "aws_skip_signature", to.flag),
    Row("s3fs", "endpoint_url", "aws_endpoint"),
    Row("s3fs", "use_ssl", "allow_http", to.opposite),
    Row("s3fs", "requester_pays", "aws_request_payer", to.flag),
    Row("s3fs", "client_kwargs.endpoint_url", "aws_endpoint"),
    Row("s3fs", "client_kwargs.region_name", "aws_region"),
    Row("s3fs", "client_kwargs.verify", "allow_invalid_certificates", to.verify),
    Row("s3fs", "client_kwargs.use_ssl", "allow_http", to.opposite),
    Row("s3fs", "client_kwargs.aws_access_key_id", "aws_access_key_id"),
    Row("s3fs", "client_kwargs.aws_secret_access_key", "aws_secret_access_key"),
    Row("s3fs", "client_kwargs.aws_session_token", "aws_session_token"),
    Row("s3fs", "config_kwargs.region_name", "aws_region"),
    Row("s3fs", "config_kwargs.connect_timeout", "connect_timeout", to.seconds),
    Row("s3fs", "config_kwargs.read_timeout", "read_timeout", to.seconds),
    Row("s3fs", "config_kwargs.retries.max_attempts", "client_max_retries", to.retries),
    Row("s3fs", "config_kwargs.retries.total_max_attempts", "client_max_retries", to.tries),
    Row("s3fs", "config_kwargs.s3.addressing_style", "aws_virtual_hosted_style_request", to.addressing),
    Row("gcsfs", "token", f"google_skip_signature ('anon'), {_KEY_FILE}, or google_storage_token", to.google_token),
    Row("gcsfs", "project", _NO_PROJECT, to.nothing),
    Row("gcsfs", "endpoint_url", "google_base_url"),
    Row("adlfs", "account_name", "azure_storage_account_name"),
    Row("adlfs", "account_key", "azure_storage_account_key"),
    Row("adlfs", "sas_token", "azure_storage_sas_key"),
    Row("adlfs", "connection_string", ", ".join(to.CONNECTION_PARTS.values()), to.connection_string),
    Row("adlfs", "tenant_id", "azure_storage_tenant_id"),
    Row("adlfs", "client_id", "azure_storage_client_id"),
    Row("adlfs", "client_secret", "azure_storage_client_secret"),
    Row("adlfs", "anon", "azure_skip_signature", to.flag),
    Row("adlfs", "account_host", "azure_storage_endpoint", to.host),
    Row("adlfs", "connection_timeout", "connect_timeout", to.seconds),
    Row("adlfs", "read_timeout", "read_timeout", to.seconds),
    Row("ossfs", "key", "oss_access_key_id"),
    Row("ossfs", "secret", "oss_secret_access_key"),
    Row("ossfs", "token", "oss_security_token"),
    Row("ossfs", "endpoint", "oss_endpoint"),
    Row("tosfs", "key", "tos_access_key_id"),
    Row("tosfs", "secret", "tos_secret_access_key"),
    Row("tosfs", "session_token", "tos_security_token"),
    Row("tosfs", "endpoint", "tos_endpoint"),
    Row("tosfs", "region", "tos_region"),
    Row("DLF", "oss_access_key_secret", "oss_secret_access_key"),
)

_BACKOFF = "the engine's pauses between tries are fixed; num_tries sets how many there are"
_PARALLEL = "the engine bounds its requests per process (LANCE_IO_THREADS), not per store"
_VENDING = "a function cannot be given to the engine; credentials that expire are vended by a namespace"
_PROFILE = "the engine takes a profile only from AWS_PROFILE in the environment of each process"

# In the order of the fields that stand for them, which exist to say this instead of "unexpected keyword".
REFUSED = {
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

FSSPEC_ONLY = frozenset(
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
    own = [("fsspec", name, "nothing: how fsspec itself caches and schedules") for name in sorted(FSSPEC_ONLY)]
    return taken + own + [(*name, f"refused: {reason}") for name, reason in REFUSED.items()]


ROWS: dict[str, dict[str, Row]] = {row.source: {} for row in _TABLE}
for _row in _TABLE:
    ROWS[_row.source][_row.name] = _row

KINDS = {
    **dict.fromkeys(("s3", "s3a", "s3+ddb"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
    "oss": "oss",
    "tos": "tos",
}
FSSPEC = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs", "oss": "ossfs", "tos": "tosfs"}
# What the engine itself understands by the same name and in the same sense, so that it tells no style of writing.
ENGINE_TOO = {
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
PREFIXES = {"s3": "aws_", "gcs": "google_", "azure": "azure_", "oss": "oss_", "tos": "tos_"}
CLIENT_KEYS = frozenset(
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
ALIASES = {
    "aws_default_region": "aws_region",
    "aws_endpoint_url": "aws_endpoint",
    "aws_token": "aws_session_token",
    "azure_endpoint": "azure_storage_endpoint",
    "azure_storage_access_key": "azure_storage_account_key",
    "azure_storage_sas_token": "azure_storage_sas_key",
}

ENDPOINT = {
    "s3": "aws_endpoint",
    "gcs": "google_base_url",
    "azure": "azure_storage_endpoint",
    "oss": "oss_endpoint",
    "tos": "tos_endpoint",
}
ANONYMOUS = {
    "s3": "aws_skip_signature",
    "gcs": "google_skip_signature",
    "azure": "azure_skip_signature",
    "oss": "allow_anonymous",
}
# What belongs together: with the first, all the others must be given, or the engine goes by other credentials.
TOGETHER = {
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
ALTERNATIVES = {
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
