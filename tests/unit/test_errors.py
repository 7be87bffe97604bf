"""The error tree: what it says of itself, how it travels, and which texts of the engine become which class."""

from __future__ import annotations

import builtins
import copy
import errno
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from lance.fragment import write_fragments
from ray.exceptions import RayTaskError

import lance_ray
from lance_ray import errors
from lance_ray.errors import (
    CommitConflictError,
    CommitOutcomeUnknownError,
    InvalidArgumentError,
    LanceRayError,
    OperationFailedError,
    RowCoverageError,
    SchemaMismatchError,
    SnapshotChangedError,
    StorageError,
    TableExistsError,
    TableNotFoundError,
    TaskFailedError,
    UnsupportedCallError,
    UnsupportedVersionError,
    VersionNotFoundError,
    WorkerEnvironmentError,
    redact,
    storage_error_kind,
    translate,
    translate_errors,
    unwrap,
)
from lance_ray.table import TableRef
from tests.blocks import SECRET, dead_s3, rows, s3_answering

EXAMPLES: list[LanceRayError] = [
    LanceRayError("plain", answer=42),
    InvalidArgumentError("mode", "upsort", "must be one of ['append']"),
    TableNotFoundError("s3://b/t", "the store holds none"),
    VersionNotFoundError("s3://b/t", "v1"),
    UnsupportedCallError("drop_table of glue namespace table db.t: not supported"),
    TableExistsError("s3://b/t"),
    SchemaMismatchError("does not fit", columns=["a", "b"], expected="int64", actual="string"),
    StorageError("slow down", kind="transient", target="s3://b/t"),
    RowCoverageError(duplicate=1, unknown=2, missing=3, examples={"unknown": [7]}),
    SnapshotChangedError("moved on", planned=3, current=5),
    TaskFailedError("fragment 3", 2, ValueError("boom")),
    OperationFailedError("2 of 3 failed", failures=[TaskFailedError("fragment 1", 1, "boom")], completed=1),
    CommitConflictError("lost", retryable=True, read_version=7),
    CommitOutcomeUnknownError("no answer", operation_id="4f"),
    WorkerEnvironmentError(["node a: lacks pylance", "node b: does not see /data"]),
    UnsupportedVersionError("pylance", "13.0.0", "14.0.0"),
]
CLASSES = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, LanceRayError)}


def name_of(value: Any) -> str:
    return type(value).__name__


# The tree


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    drawn = dict(re.findall(r"[├└]── (\w+)(?: +\((\w+)\))?", errors.__doc__ or ""))
    assert set(drawn) == {cls.__name__ for cls in CLASSES} - {"LanceRayError"}
    for name, builtin in drawn.items():
        cls = getattr(errors, name)
        assert cls.__bases__ == (LanceRayError, *([getattr(builtins, builtin)] if builtin else []))


def test_every_class_is_public():
    assert {cls.__name__ for cls in CLASSES} <= set(lance_ray.__all__)


def test_there_is_an_example_of_every_class():
    assert {type(error) for error in EXAMPLES} == CLASSES


# Between processes


def data_of(error: LanceRayError) -> dict[str, Any]:
    """The attributes of an error, those that are errors themselves (which compare by identity) as text."""
    return {key: str(value) if key == "failures" else value for key, value in vars(error).items()}


@pytest.mark.parametrize("error", EXAMPLES, ids=name_of)
@pytest.mark.parametrize("clone", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_a_class_travels_with_its_message_its_data_and_its_notes(error: LanceRayError, clone: Callable[[Any], Any]):
    error = copy.copy(error)
    error.add_note("gave up after 3 attempts")
    came = clone(error)
    assert type(came) is type(error)
    assert str(came) == str(error) != ""
    assert data_of(came) == data_of(error)
    assert came.__notes__ == ["gave up after 3 attempts"]


def test_an_error_keeps_what_it_is_caught_as_after_pickling():
    came = pickle.loads(pickle.dumps(StorageError("slow down", kind="transient")))
    assert isinstance(came, StorageError)
    assert isinstance(came, OSError)
    assert came.retryable


def test_the_error_of_this_package_is_found_inside_what_ray_raises():
    own = StorageError("disk full", kind="full")
    task = RayTaskError("write", "traceback", own).as_instanceof_cause()
    outer = RuntimeError("the pipeline failed")
    outer.__cause__ = task
    assert unwrap(outer) is own
    assert unwrap(own) is own
    foreign = KeyError("x")
    assert unwrap(foreign) is foreign


def test_an_argument_of_any_length_makes_a_short_message():
    error = InvalidArgumentError("columns", ["name"] * 10_000, "must be known")
    assert len(str(error)) < 400
    assert "columns=['name'," in str(error)
    assert "(80000 characters)" in str(error)


# What the engine says


def translated(action: Callable[[], Any], *, version: Any = None, secrets: Any = ()) -> Exception:
    with pytest.raises(Exception) as caught, translate_errors("open", "the table", secrets=secrets, version=version):  # noqa: PT011 - the type is what each test asserts
        action()
    return caught.value


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors") / "table"
    lance.write_dataset(rows(0, 3), path)
    return path


def test_a_missing_table(tmp_path: Path):
    error = translated(lambda: lance.dataset(str(tmp_path / "none")))
    assert isinstance(error, TableNotFoundError)
    assert error.target == "the table"


def test_a_folder_that_is_no_table(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no table here")
    assert isinstance(translated(lambda: lance.dataset(str(tmp_path))), TableNotFoundError)


def test_a_path_that_is_a_file_is_not_called_a_missing_table_nor_goes_it_by_its_name(tmp_path: Path):
    (tmp_path / "conflict").write_text("x")
    error = translated(lambda: lance.dataset(str(tmp_path / "conflict")))
    assert isinstance(error, StorageError)
    assert (error.kind, error.retryable) == ("invalid", False)


def test_a_damaged_manifest_is_not_called_a_missing_table(tmp_path: Path):
    (tmp_path / "_versions").mkdir()
    (tmp_path / "_versions" / "1.manifest").write_text("not a manifest")
    assert isinstance(translated(lambda: lance.dataset(str(tmp_path))), StorageError)


@pytest.mark.parametrize("version", [99, "nightly"])
def test_a_missing_version_or_tag(table: Path, version: Any):
    error = translated(lambda: lance.dataset(str(table), version), version=version)
    assert isinstance(error, VersionNotFoundError)
    assert error.version == version
    assert repr(version) in str(error)


def test_an_unknown_scheme_names_the_known_ones():
    error = translated(lambda: lance.dataset("gopher://x/y"))
    assert isinstance(error, StorageError)
    assert error.kind == "invalid"
    assert "s3" in str(error)


def test_an_existing_table(table: Path):
    error = translated(lambda: lance.write_dataset(rows(0, 1), table, mode="create"))
    assert isinstance(error, TableExistsError)


@pytest.mark.parametrize("text", ["no_such_column = 3", "id ==="])
def test_a_filter_that_does_not_fit_is_the_callers_mistake(table: Path, text: str):
    assert isinstance(translated(lambda: lance.dataset(str(table)).to_table(filter=text)), InvalidArgumentError)


def test_a_conflict_that_nothing_can_be_rebased_over(table: Path):
    old = lance.dataset(str(table))
    fragments = write_fragments(rows(9, 1), old, mode="append")
    lance.write_dataset(rows(0, 3), table, mode="overwrite")
    error = translated(lambda: lance.LanceDataset.commit(old, lance.LanceOperation.Append(fragments), old.version))
    assert isinstance(error, CommitConflictError)
    assert not error.retryable


BESIDE: dict[str, Callable[[lance.LanceDataset], Any]] = {
    "append": lambda table: lance.write_dataset(rows(9, 1), table.uri, mode="append"),
    "delete": lambda table: table.delete("id = 1"),
    "change of the schema": lambda table: table.add_columns({"more": "id + 1"}),
    "compaction": lambda table: table.optimize.compact_files(),
    "overwrite": lambda table: lance.write_dataset(rows(0, 3), table.uri, mode="overwrite"),
}
CHANGES: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "delete": (lambda table: table.delete("id = 0"), {"overwrite"}),
    "drop": (lambda table: table.drop_columns(["text"]), {"change of the schema", "overwrite"}),
    "rename": (lambda table: table.alter_columns({"path": "text", "name": "t"}), {"change of the schema", "overwrite"}),
    "cast": (lambda table: table.alter_columns({"path": "id", "data_type": pa.int32()}), set(BESIDE)),
    "restore": (lambda table: table.checkout_version(1).restore(), set()),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_conflicts_with_what_its_docstring_says(tmp_path: Path, change: str, beside: str):
    uri = str(tmp_path / "table")
    lance.write_dataset(rows(0, 6), uri, max_rows_per_file=3)
    lance.dataset(uri).delete("id = 2")
    old = lance.dataset(uri)
    BESIDE[beside](lance.dataset(uri))
    act, conflicts = CHANGES[change]
    if beside in conflicts:
        assert isinstance(translated(lambda: act(old)), CommitConflictError)
    else:
        act(old)


def refusal(options: dict[str, str]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        TableRef.fold("s3://bucket/table", {"storage_options": options}).pin()
    return caught.value


@pytest.fixture(scope="module")
def refusals() -> dict[int, StorageError]:
    """What opening a table raises, by the answer that the store gives to everything (0: nobody listens)."""
    with ExitStack() as servers:
        options = {status: servers.enter_context(s3_answering(status)) for status in (403, 404, 503)} | {0: dead_s3()}
        # At the same time, because the engine itself tries each for some seconds.
        with ThreadPoolExecutor(len(options)) as pool:
            return dict(zip(options, pool.map(refusal, options.values()), strict=True))


@pytest.mark.parametrize(
    ("answer", "kind"), [(403, "denied"), (404, "missing"), (503, "transient"), (0, "unreachable")]
)
def test_a_store_that_does_not_serve_is_no_missing_table(refusals: dict[int, StorageError], answer: int, kind: str):
    error = refusals[answer]
    assert (error.kind, error.retryable) == (kind, kind == "transient")
    assert error.target == "s3://bucket/table"
    assert SECRET not in f"{error!r} {error.__cause__!r}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("LanceError(IO): Unable to copy data to file: No space left on device (os error 28)", "full"),
        ("LanceError(IO): Disk quota exceeded (os error 122)", "full"),
        ("LanceError(IO): Permission denied (os error 13)", "denied"),
        ("LanceError(IO): Read-only file system (os error 30)", "denied"),
        ("Server returned non-2xx status code: 400 Bad Request: <Code>ExpiredToken</Code>", "denied"),
        ("Server returned non-2xx status code: 400 Bad Request: <Code>RequestTimeout</Code> timed out", "transient"),
        ("Server returned non-2xx status code: 500 Internal Server Error", "transient"),
        ("Server returned non-2xx status code: 429 Too Many Requests", "transient"),
        ("HTTP error: connection reset by peer", "transient"),
        ("max_retries: 3, retry_timeout: 180s - HTTP error: error sending request", "unreachable"),
        ("tcp connect error: Connection refused (os error 111)", "unreachable"),
        ("IO error for operation on /f/_versions: Not a directory (os error 20)", "invalid"),
        ("something that nobody has seen before", "other"),
    ],
)
def test_the_kind_of_a_failure_follows_from_its_text(text: str, kind: str):
    assert storage_error_kind(text) == kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "Wrapped error: Commit result for version 11 is unknown: the commit may or may not have been applied; check"
            " the table state before retrying: commit reported a conflict but the manifest could not be read back",
            "other",
        ),
        ("Namespace error: Service unavailable: Service unavailable: busy, src/namespace.rs:1569:18", "transient"),
        (
            'Namespace error: Service unavailable: Failed to execute request: ConnectError("tcp connect error",'
            " 127.0.0.1:9, Os { code: 111, kind: ConnectionRefused }), src/namespace.rs:1569:18",
            "unreachable",
        ),
    ],
)
@pytest.mark.parametrize("raised", [OSError, ValueError])
def test_what_a_catalog_or_a_commit_without_an_outcome_says_is_a_failure_of_the_store_and_no_conflict(
    raised: type[Exception], text: str, kind: str
):
    if raised is ValueError and "Commit result" in text:
        text = f"LanceError(IO): {text}"
    error = translate(raised(text), "commit", "t")
    assert isinstance(error, StorageError)
    assert error.kind == kind
    assert ".rs:" not in str(error)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "full"),
        (PermissionError(errno.EACCES, "Permission denied"), "denied"),
        (ConnectionResetError("reset"), "transient"),
        (TimeoutError("too late"), "transient"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Exception) else value,
)
def test_errors_of_the_operating_system_go_by_type(raised: OSError, kind: str):
    def act() -> None:
        raise raised

    error = translated(act)
    assert isinstance(error, StorageError)
    assert error.kind == kind
    assert error.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyError("x"), ZeroDivisionError("x"), pa.ArrowInvalid("no engine text")])
def test_what_the_engine_did_not_raise_passes(raised: Exception):
    def act() -> None:
        raise raised

    assert translated(act) is raised


def test_source_locations_of_the_engine_are_left_out_of_messages(table: Path):
    error = translated(lambda: lance.dataset(str(table), 99), version=99)
    assert ".rs:" not in str(error)
    assert ".rs:" in str(error.__cause__)  # there for whoever wants to look


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://b/t?X-Amz-Signature={SECRET}&x=1",
        f"GET https://b/t?X-Amz-Security-Token={SECRET}",
        f"GET https://account/t?sv=1&sig={SECRET}",
        f"header Authorization: Bearer {SECRET}",
        f"header Authorization: AWS4-HMAC-SHA256 Credential=AKID/x, Signature={SECRET}",
        f"api_key={SECRET}",
        f'{{"api_key": "{SECRET}"}}',
        f"https://user:{SECRET}@host/bucket",
    ],
)
def test_what_looks_like_a_credential_is_blanked_out_unasked(text: str):
    assert SECRET not in redact(text)


@pytest.mark.parametrize("password", [SECRET, "with/slash"])
def test_no_error_shows_a_password_in_an_address(password: str):
    target = f"s3://user:{password}@bucket/t"
    errors = [
        TableNotFoundError(target),
        VersionNotFoundError(target, 3),
        LanceRayError(f"commit {target}: gave up"),
        InvalidArgumentError("uri", target, "no"),
    ]
    for error in errors:
        assert password not in f"{error} {vars(error)}"
        assert "s3://user:***@bucket/t" in str(error)


def test_given_secrets_are_blanked_out_wherever_they_stand():
    assert redact(f"key {SECRET}, again {SECRET}!", [SECRET]) == "key ***, again ***!"


def test_a_secret_that_holds_another_is_blanked_out_whole():
    assert redact("abcdefgh-tail", ["abcdefgh", "abcdefgh-tail"]) == "***"


def test_short_values_do_not_blank_out_ordinary_words():
    assert redact("true story", ["true", ""]) == "true story"


def test_an_ordinary_message_stays_as_it_is():
    text = "column 'signal' of /data/sigma.lance has 3 keys: api, key; bearer of news"
    assert redact(text) == text


def test_no_secret_is_in_a_message_nor_in_its_cause():
    def act() -> None:
        raise OSError(f"LanceError(IO): the key {SECRET} was refused")

    error = translated(act, secrets=[SECRET])
    assert SECRET not in f"{error!s} {error!r} {error.__cause__!s} {error.__cause__!r}"
    assert "was refused" in str(error.__cause__)
