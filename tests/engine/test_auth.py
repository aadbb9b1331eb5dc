from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine.admission import RateLimit
from engine.auth import KEY, ApiKeys, KeyFile, KeyFileError, create_key, presented_key, remove_key


def test_a_key_is_found_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "made" / "keys.json"
    shop = create_key(path, "storefront 🎉")
    page_key = create_key(path, "page", role="reader", rate_limit=RateLimit(5, 10))
    keys = ApiKeys.load(path)
    assert len(keys) == 2
    found, page = keys.find(shop), keys.find(page_key)
    assert found is not None
    assert page is not None
    assert (found.name, found.role, found.rate_limit) == ("storefront 🎉", "client", None)
    assert (page.name, page.role, page.rate_limit) == ("page", "reader", RateLimit(5, 10))
    assert [key.may(role) for key in (found, page) for role in ("client", "reader")] == [
        True,
        True,
        False,
        True,
    ]
    shop_id, shop_secret = shop.split("_", 2)[1:]
    page_secret = page_key.split("_", 2)[2]
    other = "A" if shop_secret[-1] != "A" else "B"
    for wrong in (
        None,
        "",
        "trk",
        shop[:-1],
        shop + "x",
        shop[:-1] + other,
        shop.lower(),
        f"trk_{shop_id}_{page_secret}",
        f"trk_22222222_{shop_secret}",
        found.sha256,
        "ü" * 60,
    ):
        assert keys.find(wrong) is None, wrong


def test_the_file_does_not_hold_the_key_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = create_key(path, "x", now=datetime(2026, 1, 2, tzinfo=UTC))
    text = path.read_text()
    secret = KEY.fullmatch(key)[2]  # type: ignore[index]
    assert secret not in text
    (entry,) = json.loads(text)["keys"]
    assert entry == {
        "id": key[4:12],
        "name": "x",
        "role": "client",
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "created": "2026-01-02T00:00:00+00:00",
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_keys_differ(tmp_path: Path) -> None:
    keys = [create_key(tmp_path / "keys.json", "x") for _ in range(20)]
    assert len(set(keys)) == len({key[4:12] for key in keys}) == 20


def test_a_removed_key_is_not_found(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    gone, kept = create_key(path, "a"), create_key(path, "b")
    remove_key(path, gone[4:12])
    keys = ApiKeys.load(path)
    assert keys.find(gone) is None
    assert keys.find(kept) is not None
    with pytest.raises(KeyFileError, match=f"has no key '{gone[4:12]}'; it has {kept[4:12]}"):
        remove_key(path, gone[4:12])


GOOD = {"id": "22222222", "name": "x", "role": "client", "sha256": "0" * 64, "created": "now"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "no list `keys`"),
        ({"keys": [GOOD, GOOD]}, "two keys of one id"),
        ({"keys": [GOOD | {"role": "root"}]}, r"keys\[0\]: role is 'root'; expected one of reader, client"),
        ({"keys": [GOOD | {"sha256": "secret"}]}, "sha256 is 'secret'; expected 64 hexadecimal digits"),
        ({"keys": [GOOD | {"id": "x"}]}, "id is 'x'"),
        ({"keys": [GOOD | {"burst": 3.0}]}, "expected both or neither"),
        ({"keys": [GOOD | {"burst": 3.0, "requests_per_s": -1.0}]}, "per_s is -1.0"),
        ({"keys": [GOOD | {"rolle": "x"}]}, r"unknown fields \['rolle'\]"),
        ({"keys": [{"id": "22222222"}]}, "missing 4 required"),
        ({"keys": ["x"]}, r"keys\[0\]"),
    ],
)
def test_bad_files(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(KeyFileError, match=message):
        ApiKeys.load(path)
    with pytest.raises(KeyFileError, match="cannot be read"):
        ApiKeys.load(tmp_path / "missing.json")


def test_a_changed_file_can_be_read_by_who_could_before(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = create_key(file, "a")
    file.chmod(0o640)
    create_key(file, "b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    remove_key(file, key.split("_")[1])
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_file_that_could_not_be_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key(tmp_path / "keys.json", "a")
    keys = KeyFile(tmp_path / "keys.json")
    with monkeypatch.context() as patch:

        def refused(path: Path, **options: object) -> str:
            raise PermissionError(f"not {path.name}")

        patch.setattr(Path, "read_text", refused)
        with pytest.raises(KeyFileError, match=r"not keys\.json"):
            keys.load()
        assert keys.changed()
    assert len(keys.load()) == 1
    assert not keys.changed()
    keys.path.chmod(0o640)  # what stands between the server and the file, as a rule
    assert keys.changed()
    keys.path.write_text("{")
    with pytest.raises(KeyFileError, match="cannot be read"):
        keys.load()
    assert not keys.changed()  # it is wrong until somebody changes it


def test_a_bad_role_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="role is 'root'"):
        create_key(tmp_path / "keys.json", "x", role="root")
    assert not list(tmp_path.iterdir())


def test_where_the_key_stands() -> None:
    assert presented_key([("authorization", "Bearer abc")]) == "abc"
    assert presented_key([("Authorization", "bearer  abc ")]) == "abc"
    assert presented_key([("other", "x"), ("x-api-key", " abc")]) == "abc"
    assert presented_key([("authorization", "Basic abc"), ("x-api-key", "d")]) == "d"
    assert presented_key([("x-api-key", b"abc"), ("authorization", "Basic abc")]) is None
    assert presented_key([]) is None


def test_the_work_is_the_same_for_a_known_and_an_unknown_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One digest is made and compared, whatever is presented."""
    key = create_key(tmp_path / "keys.json", "x")
    keys = ApiKeys.load(tmp_path / "keys.json")
    compared: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "engine.auth.hmac.compare_digest", lambda a, b: bool(compared.append((len(a), len(b)))) or a == b
    )
    for presented in (key, key[:-1] + "~", "trk_22222222_" + "x" * 43, "", None):
        keys.find(presented)
    assert compared == [(64, 64)] * 5


def test_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.json"
    script = (
        "import sys; from engine.auth import create_key; [create_key(sys.argv[1], 'x') for _ in range(5)]"
    )
    makers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(4)]
    assert [maker.wait() for maker in makers] == [0] * 4
    assert len(json.loads(path.read_text())["keys"]) == 20
    assert [file.name for file in path.parent.iterdir()] == ["keys.json"]
