"""What a file of records is called: a prefix with the time in it, and a name that no other file has. Pure."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime

# Of the time at which a file began, in UTC. Others of strftime depend on the locale, or hold blanks and slashes.
DIRECTIVES = "YmdHMj"
MOST_BYTES = 512  # of a prefix; a key of S3 has at most 1,024
MOST_NAME = 255  # bytes of a folder or file: NAME_MAX of every file system in use

_DIRECTIVE = re.compile(r"%(.?)", re.DOTALL)
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


# Every time has as many digits as this one.
_SOME_TIME = datetime(2000, 1, 1, tzinfo=UTC)
_LEAST_OWN = len("-20000101T000000-") + 32  # bytes of a name beside pipeline and extension
_BEHIND = len(".gz") + len(".part.new")


def wrong(prefix: str, owner: str = "p", extension: str = "") -> str | None:
    """What is wrong with a prefix, or None. With pipeline and extension: also whether the whole name fits."""
    if unknown := [found for found in _DIRECTIVE.findall(prefix) if found not in {*DIRECTIVES, "%"}]:
        return f"has %{unknown[0]} in it, which is no time of a file"
    made = expanded(prefix, _SOME_TIME) if "%" in prefix else prefix
    if max(len(prefix.encode()), len(made.encode())) > MOST_BYTES:
        return f"is longer than {MOST_BYTES} bytes"
    if not prefix.isprintable():
        return "has a character in it that does not print"
    *made_folders, begin = made.split("/")
    if any(len(each.encode()) > MOST_NAME for each in made_folders):
        return f"has a folder in it whose name is longer than {MOST_NAME} bytes"
    most = MOST_NAME - len(owner.encode()) - _LEAST_OWN - len(extension) - _BEHIND
    if len(begin.encode()) > most:
        return f"has more than {most} bytes behind its last slash, and a name of a file has {MOST_NAME} at most"
    folders = prefix.split("/")[:-1]
    # It is a path below the directory as well as a key of S3. Hidden folders are our own.
    if any(not each or each.startswith(".") for each in folders) or prefix.rpartition("/")[2].startswith("."):
        return "has a folder in it without a name, or one that begins with a dot"
    return None


def expanded(prefix: str, when: datetime) -> str:
    """The prefix of a file that began at that time."""
    return _DIRECTIVE.sub(lambda found: "%" if found[1] == "%" else when.strftime(found[0]), prefix)


def path_of(prefix: str, owner: str, extension: str, when: datetime, *, gzip: bool) -> str:
    """The path of a new file below its directory, which is its key in S3 too. `owner`: the pipeline."""
    # The time first, so that a listing is in order. The UUID, because several processes may write at one time.
    name = f"{_UNFIT.sub('-', owner)}-{when:%Y%m%dT%H%M%S}-{uuid.uuid4().hex}{extension}"
    return expanded(prefix, when) + name + (".gz" if gzip and not extension.endswith(".gz") else "")
