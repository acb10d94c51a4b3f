"""Every input the fuzzers found worth keeping, through the build that is shipped. See tests/fuzz/README.md."""

from __future__ import annotations

import pytest

from fuzz import corpus, fuzz_targets, run


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_inputs_that_are_kept(target: str) -> None:
    inputs = corpus.packed(target)
    assert len(inputs) >= 20, "the packed corpus is missing or cut"
    take = fuzz_targets.TARGETS[target]
    for one in inputs:
        try:
            take(memoryview(one))
        except BaseException:
            print(f"{target}: {one.hex()}")
            raise


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target in fuzz_targets.TARGETS for name in corpus.findings(target)]
)
def test_findings(target: str, name: str) -> None:
    fuzz_targets.TARGETS[target](memoryview(corpus.findings(target)[name]))


def test_every_target_is_run_and_has_its_words() -> None:
    assert set(run.TARGETS) == set(fuzz_targets.TARGETS)
    assert {path.stem for path in run.HERE.glob("*.dict")} <= set(run.TARGETS)
