"""Options of stores: each row of the table, the examples of the issue, what is refused, and that nothing shows."""

from __future__ import annotations

import json
import logging
import os
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any

import boto3
import lance
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from moto.server import ThreadedMotoServer

from lance_ray.errors import InvalidArgumentError
from lance_ray.stores import (
    AzureConfig,
    GCSConfig,
    IOConfig,
    OSSConfig,
    S3Config,
    storage_options_of,
    translation_table,
)
from tests.leaks import secret

SECRET = secret("the key of stores", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEZ")
SERVICE_ACCOUNT = json.dumps({"type": "service_account", "private_key": SECRET})
URIS = {"s3": "s3://bucket/t", "gcs": "gs://bucket/t", "azure": "az://container/t", "oss": "oss://bucket/t"}
URIS["tos"] = "tos://bucket/t"
CONFIGS = {"S3Config": S3Config, "GCSConfig": GCSConfig, "AzureConfig": AzureConfig, "OSSConfig": OSSConfig}
KINDS = {"S3Config": "s3", "GCSConfig": "gcs", "AzureConfig": "azure", "OSSConfig": "oss", "DLF": "oss"}
KINDS |= {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure", "ossfs": "oss", "tosfs": "tos", "fsspec": "s3"}


def options(given: Any, uri: str = "s3://bucket/t") -> dict[str, str] | None:
    found = storage_options_of(given, uri)
    return None if found is None else dict(found)


def refused(make: Any, *args: Any, **kwargs: Any) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        make(*args, **kwargs)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return caught.value


# The table, a case per row: whose name, the name, a value, and what the engine gets


COMPANIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("S3Config", "key_id"): {"access_key": "S"},
    ("S3Config", "access_key"): {"key_id": "K"},
    ("S3Config", "session_token"): {"key_id": "K", "access_key": "S"},
    ("AzureConfig", "client_secret"): {"client_id": "c", "tenant_id": "t"},
    ("OSSConfig", "access_key_id"): {"access_key_secret": "S"},
    ("OSSConfig", "access_key_secret"): {"access_key_id": "K"},
    ("OSSConfig", "security_token"): {"access_key_id": "K", "access_key_secret": "S"},
    ("s3fs", "key"): {"secret": "S"},
    ("s3fs", "secret"): {"key": "K"},
    ("s3fs", "username"): {"password": "S"},
    ("s3fs", "password"): {"username": "K"},
    ("s3fs", "token"): {"key": "K", "secret": "S"},
    ("s3fs", "client_kwargs.aws_access_key_id"): {"secret": "S"},
    ("s3fs", "client_kwargs.aws_secret_access_key"): {"key": "K"},
    ("s3fs", "client_kwargs.aws_session_token"): {"key": "K", "secret": "S"},
    ("adlfs", "client_secret"): {"client_id": "c", "tenant_id": "t"},
    ("ossfs", "key"): {"secret": "S"},
    ("ossfs", "secret"): {"key": "K"},
    ("ossfs", "token"): {"key": "K", "secret": "S"},
    ("tosfs", "key"): {"secret": "S"},
    ("tosfs", "secret"): {"key": "K"},
    ("tosfs", "session_token"): {"key": "K", "secret": "S"},
}
CONNECTION = "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5PT0==;EndpointSuffix=core.chinacloudapi.cn;"
CASES: dict[tuple[str, str], tuple[Any, dict[str, str]]] = {
    ("S3Config", "region_name"): ("eu-west-1", {"aws_region": "eu-west-1"}),
    ("S3Config", "endpoint_url"): ("http://h:1", {"aws_endpoint": "http://h:1", "allow_http": "true"}),
    ("S3Config", "key_id"): ("K", {"aws_access_key_id": "K"}),
    ("S3Config", "access_key"): ("S", {"aws_secret_access_key": "S"}),
    ("S3Config", "session_token"): ("T", {"aws_session_token": "T"}),
    ("S3Config", "anonymous"): (True, {"aws_skip_signature": "true"}),
    ("S3Config", "force_virtual_addressing"): (True, {"aws_virtual_hosted_style_request": "true"}),
    ("S3Config", "verify_ssl"): (False, {"allow_invalid_certificates": "true"}),
    ("S3Config", "use_ssl"): (True, {"allow_http": "false"}),
    ("S3Config", "requester_pays"): (True, {"aws_request_payer": "true"}),
    ("S3Config", "connect_timeout_ms"): (1500, {"connect_timeout": "1500ms"}),
    ("S3Config", "read_timeout_ms"): (1500, {"read_timeout": "1500ms"}),
    ("S3Config", "num_tries"): (3, {"client_max_retries": "2"}),
    ("GCSConfig", "project_id"): ("p", {}),
    ("GCSConfig", "credentials"): ("/key.json", {"google_application_credentials": "/key.json"}),
    ("GCSConfig", "token"): ("T", {"google_storage_token": "T"}),
    ("GCSConfig", "anonymous"): (True, {"google_skip_signature": "true"}),
    ("GCSConfig", "connect_timeout_ms"): (1, {"connect_timeout": "1ms"}),
    ("GCSConfig", "read_timeout_ms"): (1, {"read_timeout": "1ms"}),
    ("GCSConfig", "num_tries"): (1, {"client_max_retries": "0"}),
    ("AzureConfig", "storage_account"): ("acc", {"azure_storage_account_name": "acc"}),
    ("AzureConfig", "access_key"): ("S", {"azure_storage_account_key": "S"}),
    ("AzureConfig", "sas_token"): ("?sv=1", {"azure_storage_sas_key": "?sv=1"}),
    ("AzureConfig", "bearer_token"): ("T", {"azure_storage_token": "T"}),
    ("AzureConfig", "tenant_id"): ("t", {"azure_storage_tenant_id": "t"}),
    ("AzureConfig", "client_id"): ("c", {"azure_storage_client_id": "c"}),
    ("AzureConfig", "client_secret"): ("S", {"azure_storage_client_secret": "S"}),
    ("AzureConfig", "use_fabric_endpoint"): (True, {"azure_use_fabric_endpoint": "true"}),
    ("AzureConfig", "anonymous"): (True, {"azure_skip_signature": "true"}),
    ("AzureConfig", "endpoint_url"): ("https://h/acc", {"azure_storage_endpoint": "https://h/acc"}),
    ("AzureConfig", "use_ssl"): (True, {"allow_http": "false"}),
    ("OSSConfig", "endpoint"): ("http://h", {"oss_endpoint": "http://h"}),
    ("OSSConfig", "access_key_id"): ("K", {"oss_access_key_id": "K"}),
    ("OSSConfig", "access_key_secret"): ("S", {"oss_secret_access_key": "S"}),
    ("OSSConfig", "security_token"): ("T", {"oss_security_token": "T"}),
    ("OSSConfig", "region"): ("cn-hangzhou", {"oss_region": "cn-hangzhou"}),
    ("OSSConfig", "anonymous"): (True, {"allow_anonymous": "true"}),
    ("s3fs", "key"): ("K", {"aws_access_key_id": "K"}),
    ("s3fs", "username"): ("K", {"aws_access_key_id": "K"}),
    ("s3fs", "secret"): ("S", {"aws_secret_access_key": "S"}),
    ("s3fs", "password"): ("S", {"aws_secret_access_key": "S"}),
    ("s3fs", "token"): ("T", {"aws_session_token": "T"}),
    ("s3fs", "anon"): (True, {"aws_skip_signature": "true"}),
    ("s3fs", "endpoint_url"): ("https://h", {"aws_endpoint": "https://h"}),
    ("s3fs", "use_ssl"): (True, {"allow_http": "false"}),
    ("s3fs", "requester_pays"): (False, {"aws_request_payer": "false"}),
    ("s3fs", "client_kwargs.endpoint_url"): ("http://h", {"aws_endpoint": "http://h", "allow_http": "true"}),
    ("s3fs", "client_kwargs.region_name"): ("r", {"aws_region": "r"}),
    ("s3fs", "client_kwargs.verify"): (False, {"allow_invalid_certificates": "true"}),
    ("s3fs", "client_kwargs.use_ssl"): (True, {"allow_http": "false"}),
    ("s3fs", "client_kwargs.aws_access_key_id"): ("K", {"aws_access_key_id": "K"}),
    ("s3fs", "client_kwargs.aws_secret_access_key"): ("S", {"aws_secret_access_key": "S"}),
    ("s3fs", "client_kwargs.aws_session_token"): ("T", {"aws_session_token": "T"}),
    ("s3fs", "config_kwargs.region_name"): ("r", {"aws_region": "r"}),
    ("s3fs", "config_kwargs.connect_timeout"): (2, {"connect_timeout": "2000ms"}),
    ("s3fs", "config_kwargs.read_timeout"): (0.5, {"read_timeout": "500ms"}),
    ("s3fs", "config_kwargs.retries.max_attempts"): (0, {"client_max_retries": "0"}),
    ("s3fs", "config_kwargs.retries.total_max_attempts"): (4, {"client_max_retries": "3"}),
    ("s3fs", "config_kwargs.s3.addressing_style"): ("path", {"aws_virtual_hosted_style_request": "false"}),
    ("gcsfs", "token"): ("anon", {"google_skip_signature": "true"}),
    ("gcsfs", "project"): ("p", {}),
    ("gcsfs", "endpoint_url"): ("http://h", {"google_base_url": "http://h", "allow_http": "true"}),
    ("adlfs", "account_name"): ("acc", {"azure_storage_account_name": "acc"}),
    ("adlfs", "account_key"): ("S", {"azure_storage_account_key": "S"}),
    ("adlfs", "sas_token"): ("sv=1", {"azure_storage_sas_key": "sv=1"}),
    ("adlfs", "connection_string"): (
        CONNECTION,
        {
            "azure_storage_account_name": "acc",
            "azure_storage_account_key": "a2V5PT0==",
            "azure_storage_endpoint": "https://acc.blob.core.chinacloudapi.cn",
        },
    ),
    ("adlfs", "tenant_id"): ("t", {"azure_storage_tenant_id": "t"}),
    ("adlfs", "client_id"): ("c", {"azure_storage_client_id": "c"}),
    ("adlfs", "client_secret"): ("S", {"azure_storage_client_secret": "S"}),
    ("adlfs", "anon"): (True, {"azure_skip_signature": "true"}),
    ("adlfs", "account_host"): ("a.blob.example", {"azure_storage_endpoint": "https://a.blob.example"}),
    ("adlfs", "connection_timeout"): (3, {"connect_timeout": "3000ms"}),
    ("adlfs", "read_timeout"): (3, {"read_timeout": "3000ms"}),
    ("ossfs", "key"): ("K", {"oss_access_key_id": "K"}),
    ("ossfs", "secret"): ("S", {"oss_secret_access_key": "S"}),
    ("ossfs", "token"): ("T", {"oss_security_token": "T"}),
    ("ossfs", "endpoint"): ("http://h", {"oss_endpoint": "http://h"}),
    ("tosfs", "key"): ("K", {"tos_access_key_id": "K"}),
    ("tosfs", "secret"): ("S", {"tos_secret_access_key": "S"}),
    ("tosfs", "session_token"): ("T", {"tos_security_token": "T"}),
    ("tosfs", "endpoint"): ("h", {"tos_endpoint": "https://h"}),
    ("tosfs", "region"): ("r", {"tos_region": "r"}),
    ("DLF", "oss_access_key_secret"): ("S", {"oss_secret_access_key": "S"}),
}


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]  # the loop has run at least once


def write(source: str, name: str, value: Any) -> Any:
    """The option as its source has it: a configuration, or an fsspec mapping that is known by another name in it."""
    companions = COMPANIONS.get((source, name), {})
    if source in CONFIGS:
        return CONFIGS[source](**{name: value, **companions})
    marker = {} if source in ("DLF", "fsspec") or "key" in companions else {"skip_instance_cache": True}
    return {**marker, **companions, **nested(name, value)}


def test_every_row_of_the_table_has_a_case():
    rows = translation_table()
    assert len({(source, name) for source, name, _ in rows}) == len(rows)
    taken = {(source, name) for source, name, key in rows if source != "fsspec" and not key.startswith("refused:")}
    assert taken == set(CASES)


@pytest.mark.parametrize(("row", "case"), CASES.items(), ids=lambda item: ".".join(map(str, item))[:60])
def test_a_row_says_what_happens(row: tuple[str, str], case: tuple[Any, dict[str, str]]):
    value, expected = case
    found = options(write(*row, value), URIS[KINDS[row[0]]]) or {}
    extra = {key for key, text in found.items() if key not in expected and text not in ("K", "S", "c", "t")}
    assert (expected.items() <= found.items(), extra) == (True, set())
    key = next(key for source, name, key in translation_table() if (source, name) == row)
    assert key.startswith("nothing:") if not expected else any(name in key for name in expected)


@pytest.mark.parametrize("row", [row for row in translation_table() if row[2].startswith("refused:")], ids=str)
def test_what_the_engine_cannot_do_is_refused_with_the_reason(row: tuple[str, str, str]):
    source, name, key = row
    error = refused(lambda: options(write(source, name, SECRET), URIS[KINDS[source]]))
    assert name in error.parameter
    assert key.removeprefix("refused: ") in str(error)


def test_what_only_fsspec_does_changes_nothing():
    given = {name: object() for source, name, _ in translation_table() if source == "fsspec"}
    assert options({**given, "anon": True}) == {"aws_skip_signature": "true"}


# The examples of Daft's and DLF's documentation


def test_public_s3_and_a_service_account_of_gcs():
    s3_config = S3Config(region_name="us-west-2", anonymous=True)
    gcs_config = GCSConfig(credentials="/path/to/gcp-service-account.json")
    io_config = IOConfig(s3=s3_config, gcs=gcs_config)
    assert options(io_config, "s3://daft-public-data/lance/words-test-dataset") == {
        "aws_region": "us-west-2",
        "aws_skip_signature": "true",
    }
    assert options(io_config, "gs://my-bucket/lance/my-dataset") == {
        "google_application_credentials": "/path/to/gcp-service-account.json"
    }
    assert options(io_config, "az://container/table") is None
    assert options(io_config, "/data/table") is None


def test_volcengine_tos_by_s3_puts_the_bucket_into_the_host():
    region = "cn-beijing"  # Region of your TOS bucket
    bucket_name = "my-tos-bucket"  # Name of your TOS bucket
    io_config = IOConfig(
        s3=S3Config(
            endpoint_url=f"https://tos-s3-{region}.ivolces.com",
            region_name=region,
            force_virtual_addressing=True,
            verify_ssl=True,
            key_id="your-access-key-id",
            access_key="your-secret-access-key",
        )
    )
    expected = {
        "aws_access_key_id": "your-access-key-id",
        "aws_secret_access_key": "your-secret-access-key",
        "aws_region": "cn-beijing",
        "aws_endpoint": "https://my-tos-bucket.tos-s3-cn-beijing.ivolces.com",
        "aws_virtual_hosted_style_request": "true",
        "allow_invalid_certificates": "false",
    }
    assert options(io_config, f"s3://{bucket_name}/lance-path") == expected
    assert io_config.s3 is not None
    again = replace(io_config.s3, endpoint_url=expected["aws_endpoint"])
    assert options(again, f"s3://{bucket_name}/lance-path") == expected


@pytest.mark.parametrize("secret", ["oss_secret_access_key", "oss_access_key_secret"])
def test_what_dlf_vends_becomes_the_engines_without_the_environment(secret: str):
    before = dict(os.environ)
    vended = {
        "oss_endpoint": "oss-cn-hangzhou.aliyuncs.com",
        "oss_access_key_id": "STS.id",
        secret: SECRET,
        "oss_security_token": "token",
        "oss_region": "cn-hangzhou",
    }
    expected = {name: text for name, text in vended.items() if name != secret} | {"oss_secret_access_key": SECRET}
    assert options(vended, "oss://bucket/path/to/table") == expected
    assert dict(os.environ) == before


# Mappings


@pytest.mark.parametrize("uri", [*URIS.values(), "/data/t", "file:///t", "memory://t", "rest://namespace/t"])
def test_the_engines_own_keys_pass_as_they_are(uri: str):
    given = {"aws_endpoint": "h", "aws_virtual_hosted_style_request": "true", "timeout": "60s", "token": None, "x": 1}
    expected = {"aws_endpoint": "h", "aws_virtual_hosted_style_request": "true", "timeout": "60s", "x": "1"}
    assert options(given, uri) == expected


@pytest.mark.parametrize(
    ("uri", "given"),
    [
        ("s3://b/t", {"token": "T", "endpoint_url": "http://h", "region": "r"}),
        ("az://c/t", {"account_name": "acc", "account_key": "S", "timeout": "60s"}),
        ("oss://b/t", {"endpoint": "h", "access_key_id": "K", "access_key_secret": "S"}),
        ("tos://b/t", {"endpoint": "h", "region": "r"}),
    ],
)
def test_names_that_the_engine_shares_with_fsspec_do_not_make_a_mapping_fsspecs(uri: str, given: dict[str, str]):
    assert options(given, uri) == given


@pytest.mark.parametrize("given", [None, {}, {"key": None}, IOConfig(), S3Config()])
def test_nothing_is_none(given: Any):
    assert storage_options_of(given, "s3://bucket/t") is None


def test_the_engines_keys_may_stand_beside_fsspecs():
    given = {"key": "K", "secret": "S", "aws_endpoint_url": "http://h", "timeout": "60s", "headers.x-a": "b"}
    assert options(given) == {
        "aws_access_key_id": "K",
        "aws_secret_access_key": "S",
        "aws_endpoint": "http://h",
        "allow_http": "true",
        "timeout": "60s",
        "headers.x-a": "b",
    }


@pytest.mark.parametrize("scheme", ["s3", "s3a", "S3"])
def test_s3_has_several_schemes(scheme: str):
    assert options({"anon": True}, f"{scheme}://bucket/t") == {"aws_skip_signature": "true"}


def test_the_scheme_says_what_key_and_token_are():
    key = {"key": "K", "secret": "S", "token": "T"}
    assert options(key, "s3://b/t") == {
        "aws_access_key_id": "K",
        "aws_secret_access_key": "S",
        "aws_session_token": "T",
    }
    assert options(key, "oss://b/t") == {
        "oss_access_key_id": "K",
        "oss_secret_access_key": "S",
        "oss_security_token": "T",
    }
    assert options({"token": "T"}, "gs://b/t") == {"google_storage_token": "T"}


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("/keys/account.json", {"google_application_credentials": "/keys/account.json"}),
        ("account.json", {"google_application_credentials": "account.json"}),
        ("ya29.a0Af/x", {"google_storage_token": "ya29.a0Af/x"}),
        (json.loads(SERVICE_ACCOUNT), {"google_service_account_key": SERVICE_ACCOUNT}),
        (SERVICE_ACCOUNT, {"google_service_account_key": SERVICE_ACCOUNT}),
        ("google_default", {}),
    ],
)
def test_gcsfs_token_is_many_things(token: Any, expected: dict[str, str]):
    assert (options({"token": token}, "gs://bucket/t") or {}) == expected


def test_a_connection_string_may_name_its_endpoint():
    given = {"connection_string": "BlobEndpoint=http://127.0.0.1:10000/acc;SharedAccessSignature=sv=1&sig=x"}
    assert options(given, "az://container/t") == {
        "azure_storage_endpoint": "http://127.0.0.1:10000/acc",
        "azure_storage_sas_key": "sv=1&sig=x",
        "allow_http": "true",
    }


# Filesystems: stand-ins with the attributes of the real ones


@dataclass
class Filesystem:
    protocol: Any
    storage_options: dict[str, Any]
    storage_args: tuple[Any, ...] = ()
    _endpoint: str | None = field(default=None, kw_only=True)


def test_filesystems_are_read_by_their_protocol():
    s3 = Filesystem(("s3", "s3a"), {"key": "K", "secret": "S", "asynchronous": True})
    assert options(s3, "s3://b/t") == {"aws_access_key_id": "K", "aws_secret_access_key": "S"}
    gcs = Filesystem(("gs", "gcs"), {"token": "anon", "project": "p"})
    assert options(gcs, "gs://b/t") == {"google_skip_signature": "true"}
    azure = Filesystem(("abfs", "az", "abfss"), {"account_name": "a", "account_key": "S"})
    expected = {"azure_storage_account_name": "a", "azure_storage_account_key": "S"}
    assert options(azure, "abfss://c@a.dfs.core.windows.net/t") == expected
    oss = Filesystem("oss", {"key": "K", "secret": "S"}, _endpoint="http://oss-cn-hangzhou.aliyuncs.com")
    assert options(oss, "oss://b/t") == {
        "oss_access_key_id": "K",
        "oss_secret_access_key": "S",
        "oss_endpoint": "http://oss-cn-hangzhou.aliyuncs.com",
    }


def test_a_filesystem_reads_even_shared_names_as_fsspec_does():
    given = Filesystem(("s3", "s3a"), {"endpoint_url": "h:9000", "use_ssl": False})
    assert options(given) == {"aws_endpoint": "http://h:9000", "allow_http": "true"}


@pytest.mark.parametrize("uri", ["/data/t", "file:///data/t", "relative/t"])
def test_the_local_filesystem_needs_no_options(uri: str):
    assert storage_options_of(LocalFileSystem(auto_mkdir=True), uri) is None


@pytest.mark.parametrize(
    ("filesystem", "uri"),
    [
        (LocalFileSystem(), "s3://bucket/t"),
        (Filesystem(("s3", "s3a"), {"secret": SECRET}), "gs://bucket/t"),
        (Filesystem("dir", {"path": "x"}), "s3://bucket/t"),
        (Filesystem(("s3", "s3a"), {}, (False, None, SECRET)), "s3://bucket/t"),
    ],
)
def test_other_filesystems_are_refused(filesystem: Any, uri: str):
    assert refused(storage_options_of, filesystem, uri, "filesystem").parameter == "filesystem"


# What is refused


@pytest.mark.parametrize(
    ("given", "uri", "names"),
    [
        ({"key": "K", "secret": SECRET, "sekret": SECRET, "oops": 1}, "s3://b/t", "['oops', 'sekret']"),
        ({"anon": True, "account_name": "a"}, "s3://b/t", "account_name"),
        ({"anon": True, "client_kwargs": {"endpoint_url": "http://h", "proxy": SECRET}}, "s3://b/t", "proxy"),
        ({"client_kwargs": {"proxy": SECRET}}, "s3://b/t", "client_kwargs.proxy"),
        ({"client_kwargs": {"endpoint_url": {"a": SECRET}}}, "s3://b/t", "client_kwargs.endpoint_url"),
        ({"anon": True, "extra": {"a": SECRET}}, "s3://b/t", "extra"),
        ({"aws_region": "r", "extra": {"a": SECRET}}, "s3://b/t", "extra"),
        ({"aws_region": ["r", SECRET]}, "/data/t", "aws_region"),
        ({"client_kwargs": {"endpoint_url": "http://h"}}, "gs://b/t", "client_kwargs"),
        ({"key": "K", "secret": SECRET, "aws_secret_access_key": "other"}, "s3://b/t", "aws_secret_access_key"),
        ({"key": "K"}, "s3://b/t", "secret"),
        ({"secret": SECRET}, "oss://b/t", "key"),
        ({"anon": True, "key": "K", "secret": SECRET}, "s3://b/t", "['key', 'anon']"),
        ({"anon": True, "use_ssl": False}, "s3://b/t", "use_ssl"),
        ({"anon": True, "endpoint_url": "http://h", "use_ssl": True}, "s3://b/t", "['endpoint_url', 'use_ssl']"),
        ({"anon": "yes"}, "s3://b/t", "True or False"),
        ({"client_kwargs": {"verify": "/ca.pem"}}, "s3://b/t", "no file"),
        ({"config_kwargs": {"s3": {"addressing_style": SECRET}}}, "s3://b/t", "addressing_style"),
        ({"config_kwargs": {"connect_timeout": -1}}, "s3://b/t", "connect_timeout"),
        ({"token": "cloud"}, "gs://b/t", "log in"),
        ({"token": object()}, "gs://b/t", "holds credentials"),
        ({"token": {"type": "authorized_user", "refresh_token": SECRET}}, "gs://b/t", "path of a file"),
        ({"token": "{" + SECRET}, "gs://b/t", "JSON"),
        ({"connection_string": f"AccountName=a;AccountKey=b;{SECRET}"}, "az://c/t", "1 part"),
        ({"account_key": SECRET, "sas_token": SECRET, "anon": False}, "az://c/t", "['account_key', 'sas_token']"),
        ({"client_secret": SECRET, "client_id": "c", "anon": False}, "az://c/t", "tenant_id"),
        ({"key": "K", "secret": SECRET, "endpoint": "http://h"}, "tos://b/t", "https"),
        ({1: SECRET}, "s3://b/t", "keys must be strings"),
        (SECRET, "s3://b/t", "must be a mapping"),
        ([("key", SECRET)], "s3://b/t", "must be a mapping"),
        (S3Config(key_id="K", access_key=SECRET), "gs://b/t", "gs://"),
        (S3Config(key_id="K", access_key=SECRET), "/data/t", "path"),
        (S3Config(key_id="K", access_key=SECRET), "tos://b/t", "force_virtual_addressing"),
        (IOConfig(s3=S3Config(key_id="K", access_key=SECRET)), "tos://b/t", "force_virtual_addressing"),
        (IOConfig(s3=S3Config(key_id="K", access_key=SECRET)), "rest://ns/t", "location"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: Any, uri: str, names: str):
    assert names in str(refused(storage_options_of, given, uri))


@pytest.mark.parametrize(
    ("make", "values", "names"),
    [
        (S3Config, {"region_name": 5}, "S3Config.region_name"),
        (S3Config, {"region_name": " "}, "S3Config.region_name"),
        (S3Config, {"anonymous": "yes"}, "S3Config.anonymous"),
        (S3Config, {"num_tries": 0}, "S3Config.num_tries"),
        (S3Config, {"connect_timeout_ms": 1.5}, "S3Config.connect_timeout_ms"),
        (S3Config, {"access_key": SECRET}, "key_id"),
        (S3Config, {"session_token": SECRET}, "key_id"),
        (S3Config, {"anonymous": True, "key_id": "K", "access_key": SECRET}, "['key_id', 'anonymous']"),
        (S3Config, {"use_ssl": False, "endpoint_url": "https://h"}, "['endpoint_url', 'use_ssl']"),
        (S3Config, {"use_ssl": False}, "endpoint"),
        (GCSConfig, {"token": SECRET, "credentials": "/key.json"}, "['token', 'credentials']"),
        (GCSConfig, {"credentials": json.dumps({"type": "external_account", "x": SECRET})}, "GCSConfig.credentials"),
        (GCSConfig, {"credentials": {"private_key": SECRET}}, "GCSConfig.credentials"),
        (AzureConfig, {"access_key": SECRET, "bearer_token": SECRET}, "['access_key', 'bearer_token']"),
        (AzureConfig, {"client_secret": SECRET}, "['client_id', 'tenant_id']"),
        (OSSConfig, {"access_key_secret": SECRET}, "access_key_id"),
        (IOConfig, {"s3": GCSConfig(token=SECRET)}, "IOConfig.s3"),
        (IOConfig, {"oss": {"access_key_secret": SECRET}}, "IOConfig.oss"),
    ],
)
def test_a_configuration_that_makes_no_sense_cannot_be_made(make: Any, values: dict[str, Any], names: str):
    assert names in str(refused(make, **values))


# Values


FULL = (
    S3Config(endpoint_url="h", key_id=SECRET, access_key=SECRET, session_token=SECRET),
    GCSConfig(token=SECRET),
    GCSConfig(credentials=SERVICE_ACCOUNT),
    AzureConfig(storage_account="a", access_key=SECRET),
    AzureConfig(sas_token=SECRET),
    AzureConfig(bearer_token=SECRET),
    AzureConfig(tenant_id="t", client_id="c", client_secret=SECRET),
    OSSConfig(endpoint="h", access_key_id=SECRET, access_key_secret=SECRET, security_token=SECRET),
)


@pytest.mark.parametrize("config", FULL, ids=lambda config: type(config).__name__)
def test_configurations_are_values_that_show_no_secret(config: Any):
    assert SECRET not in f"{config!r} {config} {IOConfig(**{KINDS[type(config).__name__]: config})!r}"
    assert pickle.loads(pickle.dumps(config)) == config == replace(config)
    assert hash(config) == hash(replace(config))
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(config)[0].name, "other")


def test_an_endpoint_without_a_scheme_is_https():
    assert options(S3Config(endpoint_url="minio:9000")) == {"aws_endpoint": "https://minio:9000"}


def test_a_path_of_credentials_may_be_a_path(tmp_path: Any):
    assert options(GCSConfig(credentials=tmp_path), "gs://b/t") == {"google_application_credentials": str(tmp_path)}


# A real server


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def client(s3_server: str) -> Any:
    keys = {"aws_access_key_id": "K", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    made = boto3.client("s3", endpoint_url=s3_server, **keys)
    made.create_bucket(Bucket="stores")
    return made


TABLE = pa.table({"id": [1, 2, 3]})


def from_config(server: str, **more: Any) -> dict[str, str] | None:
    return options(S3Config(endpoint_url=server, region_name="us-east-1", num_tries=1, **more), "s3://stores/t")


def test_the_engine_reads_and_writes_with_a_configuration(s3_server: str, client: Any):
    found = from_config(s3_server, key_id="K", access_key=SECRET, connect_timeout_ms=5000, read_timeout_ms=20_000)
    lance.write_dataset(TABLE, "s3://stores/config", storage_options=found)
    assert lance.dataset("s3://stores/config", storage_options=found).to_table() == TABLE


def test_the_engine_reads_and_writes_with_fsspecs_options(s3_server: str, client: Any):
    given = {
        "key": "K",
        "secret": SECRET,
        "client_kwargs": {"endpoint_url": s3_server, "region_name": "us-east-1", "verify": True},
        "config_kwargs": {"read_timeout": 20, "s3": {"addressing_style": "path"}},
    }
    found = options(given, "s3://stores/fsspec")
    lance.write_dataset(TABLE, "s3://stores/fsspec", storage_options=found)
    assert lance.dataset("s3://stores/fsspec", storage_options=found).to_table() == TABLE


def test_the_engine_reads_anonymously_what_is_public_and_nothing_else(s3_server: str, client: Any):
    uri = "s3://stores/public"
    lance.write_dataset(TABLE, uri, storage_options=from_config(s3_server, key_id="K", access_key=SECRET))
    anonymous = from_config(s3_server, anonymous=True)
    with pytest.raises(ValueError, match="403 Forbidden"):
        lance.dataset(uri, storage_options=anonymous)
    for item in client.list_objects_v2(Bucket="stores", Prefix="public/")["Contents"]:
        client.put_object_acl(Bucket="stores", Key=item["Key"], ACL="public-read")
    assert lance.dataset(uri, storage_options=anonymous).to_table() == TABLE
