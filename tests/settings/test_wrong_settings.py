"""`fastkin check` finds every mistake of tests/wrong_settings in one run, one line each: key, place, cure.

In each file the lines that are wrong end with `# wrong`; expected.txt has what `fastkin check` says, file by file.
`PYTHONPATH=tests python tests/settings/test_wrong_settings.py` writes expected.txt
anew: read what it says before it is kept.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import trustme

from fastkin import settings
from fastkin.commands import check
from fastkin.errors import ConfigError
from fastkin.settings import SettingsError, toml_lines
from support.servers import free_port

HERE = Path(__file__).resolve().parent.parent / "wrong_settings"
EXPECTED = HERE / "expected.txt"
FILES = sorted(path.name for path in HERE.iterdir() if path.suffix in {".toml", ".env"})
# what is missing, or cannot be read at all, stands in no line
NO_LINE = {"no_pipeline", "empty", "only_a_comment", "env_missing", "utf16"}


def findings(name: str) -> list[str]:
    """What is wrong with a file, read in its own directory."""
    try:
        if name.endswith(".env"):
            settings.load(env={}, env_file=name)
        else:
            settings.load(name, env={})
    except SettingsError as error:
        return [line.replace(str(HERE), "HERE") for line in str(error).splitlines()]
    return []


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def expected() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in EXPECTED.read_text().splitlines():
        found.setdefault(re.split(r"[: ]", line, maxsplit=1)[0], []).append(line)
    return found


def test_there_are_enough() -> None:
    assert len(FILES) >= 60
    assert sum(map(len, expected().values())) >= 120


@pytest.mark.parametrize("name", FILES)
def test_every_mistake_is_found_in_one_run(name: str) -> None:
    found = findings(name)
    if name == "env_missing.env":  # nothing of the file is to blame
        assert all(line.startswith("environment: ") for line in found)
        found = [f"{name}: {line}" for line in found]  # as it is kept
    assert found == expected()[name]
    assert all("; " in line for line in found), "a cure"
    assert not re.search("topsecret|othersecret", "".join(found))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("name", [name for name in FILES if Path(name).stem not in NO_LINE])
def test_each_is_found_where_it_is(name: str) -> None:
    text = Path(name).read_bytes().decode(errors="replace")
    marked = {number for number, line in enumerate(text.splitlines(), 1) if "# wrong" in line}
    told = {int(re.match(rf"{re.escape(name)}(?: line |:)(\d+)", line)[1]) for line in findings(name)}  # type: ignore[index]
    assert marked == told


@pytest.mark.parametrize("name", [name for name in FILES if Path(name).stem not in NO_LINE])
def test_each_wrong_line_is_told_once_but_for_several_in_one(name: str) -> None:
    several = {"missing_everything": 3, "topics_over_lines": 3}
    marked = Path(name).read_bytes().count(b"# wrong")
    assert len(findings(name)) == several.get(Path(name).stem, marked)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"# " + b"x" * (1 << 20))
    (line,) = findings(str(path))
    assert "larger than 1 MiB" in line
    (line,) = findings("/dev/zero")
    assert "larger than 1 MiB" in line


def test_a_byte_order_mark_and_windows_lines_are_no_mistake(tmp_path: Path) -> None:
    text = '[broker]\nclient_id = "c"\n[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream = "s"\n'
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert settings.load(path, env={}).pipelines[0].id == "a"
    path.write_bytes((text + "qos = 5\n").replace("\n", "\r\n").encode())
    (line,) = findings(str(path))
    assert f"{path}:7:" in line


def test_real_certificates_are_taken(tmp_path: Path) -> None:
    authority = trustme.CA()
    pair = authority.issue_cert("client.example")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pair.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    toml = tmp_path / "x.toml"
    text = f'[broker]\nclient_id = "c"\n[broker.tls]\nca = "{tmp_path}/ca.pem"\ncert = "{tmp_path}/both.pem"\n'
    toml.write_text(text + '[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream = "s"\n')
    assert findings(str(toml)) == []


def test_check_finds_a_key_of_another_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    one, other = authority.issue_cert("one.example"), authority.issue_cert("two.example")
    one.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    other.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    toml = tmp_path / "x.toml"
    text = f'[broker]\nclient_id = "c"\n[broker.tls]\ncert = "{tmp_path}/cert.pem"\nkey = "{tmp_path}/key.pem"\n'
    toml.write_text(text + '[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream = "s"\nregion = "eu-west-1"\n')
    with pytest.raises(SettingsError, match=r"broker tls cert, key: .*do they belong together") as wrong:
        check.check(settings.load(toml, env={}), connect=False, quiet=True)
    assert len(wrong.value.problems) == 1


def test_connect_names_every_party_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "x.toml"
    (tmp_path / "letters").mkdir()
    toml.write_text(
        f'[broker]\nclient_id = "c"\nport = {free_port()}\nconnect_timeout_s = 2\n'
        '[[pipeline]]\nid = "a"\ntopics = ["t"]\nstream = "s"\nregion = "eu-west-1"\n'
        'access_key = "a"\nsecret_key = "b"\n'
        f'endpoint_url = "http://127.0.0.1:{free_port()}"\ndead_letter = "{tmp_path}/letters/x.jsonl"\n'
        f'on_full = "spool"\nspool = "{tmp_path}/spool.db"\n'
    )
    assert check.check(settings.load(toml, env={}), connect=True, quiet=True) == 1
    out, err = capsys.readouterr()
    failed = [line.split(":")[1].split()[0] for line in err.splitlines() if line.startswith("failed: ")]
    assert failed == ["broker", "stream"]
    assert f"ok: dead letter file {tmp_path}/letters/x.jsonl: can be written" in out
    assert f"ok: spool {tmp_path}/spool.db: can be written" in out
    assert not list((tmp_path / "letters").iterdir()), "nothing is left behind"


@pytest.mark.parametrize(("number", "cure"), [(errno.ENOSPC, "free space there"), (errno.EROFS, "let this user write")])
def test_connect_says_why_a_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cure: str
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=f"spool: cannot be written: .*; {cure}.*, or set another spool"):
        check._try_to_write(tmp_path / "x", "spool")


def test_the_locator_knows_where_things_are() -> None:
    text = '''a = """
[x]
b = 1 # \\"""
"""
[broker] # [no]
"quoted" = 'it # is' # b = 2
tls.ca = "x"
list = [ # [
  "]", '[',
  { k = 1 },
]
after = 1
[[pipeline]]
id = 1
  [[ pipeline ]]
  id = 2
[pipeline.sub]
k = 3
'''
    assert toml_lines.lines(text) == {
        ("a",): 1, ("broker",): 5, ("broker", "quoted"): 6, ("broker", "tls"): 7, ("broker", "tls", "ca"): 7,
        ("broker", "list"): 8, ("broker", "after"): 12, ("pipeline",): 13, ("pipeline", 1): 13,
        ("pipeline", 1, "id"): 14, ("pipeline", 2): 15, ("pipeline", 2, "id"): 16, ("pipeline", 2, "sub"): 17,
        ("pipeline", 2, "sub", "k"): 18,
    }  # fmt: skip
    assert toml_lines.nearest(toml_lines.lines(text), ("broker", "tls", "no")) == 7
    assert toml_lines.nearest({}, ("x",)) is None


if __name__ == "__main__":
    os.chdir(HERE)
    out = []
    for name in FILES:
        out += [line if line.startswith(name) else f"{name}: {line}" for line in findings(name)]
    EXPECTED.write_text("\n".join(out) + "\n")
