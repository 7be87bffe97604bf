"""The examples of catalogs and stores: each runs from end to end, and shows no secret."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lance.namespace import RestAdapter

import lance_ray
from examples import catalog_dlf, catalogs_rest, store_s3
from tests import catalog_servers, leaks
from tests.faults.stores import BUCKET, KEY_ID, S3, SECRET


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_rest_catalog_from_its_creation_to_its_end(capsys, tmp_path):
    adapter = RestAdapter("dir", {"root": str(tmp_path)}, port=0)
    adapter.start()
    try:
        for arguments in ([], ["--server", f"http://127.0.0.1:{adapter.port}"]):
            catalogs_rest.main(arguments)
            lines = capsys.readouterr().out.splitlines()
            assert lines[:3] == [
                "written    3 rows, version 2",
                "read       Graz, Wien",
                "listed     [('lance_ray_example', 'cities')]",
            ]
            assert "3 rows, columns name, people, thousands" in lines[3]
            assert lines[4:] == ["dropped"]
        served: dict[str, Any] = {"namespace_impl": "dir", "namespace_properties": {"root": str(tmp_path)}}
        assert lance_ray.list_tables(["lance_ray_example"], **served) == []
    finally:
        adapter.stop()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_one_table_on_s3_by_three_ways_to_write_its_options(capfd, monkeypatch, s3: S3):
    store_s3.main([])
    output = capfd.readouterr().out
    assert "written    3 rows, version 1" in output
    assert "appended   1 rows, version 2" in output
    assert "read       Linz, Ulm," in output
    assert "example-secret" not in output
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store_s3.main(["--uri", f"s3://{BUCKET}/cities", "--endpoint", s3.server])
    assert "read       Linz, Ulm," in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--endpoint", "http://x"], "goes with --uri"),
        (["--uri", "s3://bucket/t"], "needs AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_store_that_cannot_be_asked_is_refused(arguments, complaint, capsys, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    with pytest.raises(SystemExit):
        store_s3.main(arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_table_of_dlf_by_a_configuration_from_a_file(capfd, tmp_path, s3: S3):
    catalog_dlf.main([])
    assert set(json.loads(capfd.readouterr().out)) >= {"uri", "warehouse", "token.provider", "dlf.region"}
    with catalog_servers.running("dlf", tmp_path, s3) as catalog:
        config = tmp_path / "dlf.json"
        config.write_text(json.dumps(catalog.properties))
        options = json.dumps(catalog.storage_options)  # the server has no names for buckets
        catalog_dlf.main(["--config", str(config), "--database", *catalog.database, "--storage-options", options])
        output = capfd.readouterr().out
        assert "read       [(202, 'ray-b'), (203, 'ray-c'), (204, 'ray-d')]" in output
        assert "oss_secret_access_key" in output
        assert leaks.names_in(output) == set()
        assert lance_ray.list_tables(catalog.database, **catalog.namespace) == []
