"""The generator of partition keys draws a seed now and then, and in a child before its first key."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from typing import TYPE_CHECKING

import pytest

from support.running import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process

# The system's random source is counted, and fails when told so.
PROGRAM = r"""
#include <stddef.h>
#include <stdint.h>
static int drawn = 0, failing = 0;
static int counted(void *out, size_t length) {
    if (failing) return -1;
    drawn++;
    for (size_t i = 0; i < length; i++) ((uint8_t *)out)[i] = (uint8_t)(drawn * 31 + i);
    return 0;
}
#define getentropy counted
#include "codec/random.h"
#include <stdio.h>
#include <sys/wait.h>

#define CHECK(what) do { if (!(what)) { printf("line %d: %s\n", __LINE__, #what); return 1; } } while (0)

int main(void) {
    char first[FK_UUID_LENGTH], key[FK_UUID_LENGTH];
    CHECK(fk_random_init() == 0);
    failing = 1;
    CHECK(fk_random_ready() == -1); /* no seed at all */
    failing = 0;
    CHECK(fk_random_ready() == 0 && drawn == 1);
    fk_uuid4(first);
    for (int i = 0; i < FK_RESEED; i++) CHECK(fk_random_ready() == 0 && drawn == 1);
    CHECK(fk_random_ready() == 0 && drawn == 2);
    fk_uuid4(key);
    CHECK(memcmp(first, key, sizeof key) != 0);
    failing = 1; /* the seed there is goes on */
    for (int i = 0; i < 3 * FK_RESEED; i++) CHECK(fk_random_ready() == 0);
    failing = 0;
    pid_t child = fork();
    if (child == 0) {
        CHECK(fk_random_ready() == 0 && drawn == 3);
        return 0;
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(drawn == 2);
    return 0;
}
"""


def test_a_seed_is_drawn_now_and_then_and_in_a_child(tmp_path: Path) -> None:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = shutil.which(compiler) or "cc"  # the one that built Python may not be here
    source = tmp_path / "random.c"
    source.write_text(PROGRAM)
    built = tmp_path / "random"
    command = [compiler, "-O1", "-Wall", "-Werror", "-pthread", f"-I{ROOT}/src/fastkin", str(source), "-o", str(built)]
    subprocess.run(command, check=True)
    done = subprocess.run([built], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
