"""The files of the page as the server gives them out: which there are, their policy, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
from starlette.testclient import TestClient

from unimm.errors import UserError
from unimm.server.app import create_app
from unimm.server.assets import INDEX, read_assets
from unimm.server.service import Service
from unimm.server.settings import ServerSettings

MOST_LINES = 500
HTML = {"Accept": "text/html"}


def no_model() -> Any:
    raise UserError("there is no model here")


@pytest.fixture(scope="module")
def client() -> TestClient:
    service = Service(ServerSettings(api_key="s3cret"), no_model)
    return TestClient(create_app(service), base_url="http://localhost")


def test_people_get_the_page_and_programs_a_line(client: TestClient) -> None:
    page = client.get("/", headers=HTML)
    assert page.headers["Content-Type"].startswith("text/html") and b"<!doctype html>" in page.content
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    line = client.get("/", headers={"Accept": "*/*"})
    assert line.headers["Content-Type"].startswith("text/plain") and line.text.count("\n") == 1


def test_files_refer_to_files_that_there_are_and_to_no_other_host(client: TestClient) -> None:
    assets = read_assets()
    for name, asset in assets.items():
        text = asset.content.decode()
        assert len(text.splitlines()) <= MOST_LINES, name
        outside = set(
            re.findall(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
        )
        assert outside <= {"http://www.w3.org"}, name  # the name of SVG, which nobody fetches
        named = re.findall(r"/static/([\w.-]+)", text) + re.findall(r'from "\./([\w.-]+)"', text)
        assert set(named) <= assets.keys(), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    for name in assets.keys() - {INDEX}:
        found = client.get(f"/static/{name}")
        assert found.content == assets[name].content and found.headers["Content-Type"] == assets[name].type
        again = client.get(f"/static/{name}", headers={"If-None-Match": found.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "../app.py",
        "%2e%2e%2fapp.py",
        "..%5capp.py",
        "index.html",
        "app.js/",
        "APP.JS",
        "%00",
        "a" * 4096,
    ],
)
def test_there_are_no_other_files(client: TestClient, name: str) -> None:
    answer = client.get(f"/static/{name}")
    assert (
        answer.status_code in (401, 404) and b"create_app" not in answer.content
    )  # 401: it left the open folder
