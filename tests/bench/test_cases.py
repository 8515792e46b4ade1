"""The cases are data: complete, named, and small when asked."""

from bench.cases import BLOCKS, FUNCTIONALS, LIMITS, LINEARS, NETWORKS, SHAPES, mask_cases


def test_the_promised_cases_are_there():
    assert SHAPES == ((64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7))
    assert len(BLOCKS) == 8 * 2 * 5
    assert {(case.batch, case.kept) for case in NETWORKS} == {(1, 0.3), (1, 1.0), (16, 0.3), (16, 1.0)}
    assert {case.operation for case in FUNCTIONALS} == {"gated_conv2d", "gated_block"}


def test_names_tell_cases_apart():
    for cases in (BLOCKS, NETWORKS, FUNCTIONALS, LINEARS, mask_cases([])):
        assert len({str(case) for case in cases}) == len(cases)
    assert str(BLOCKS[0]) == "64-32-1-0.2-exact"


def test_small_ones_are_small():
    for case in (*BLOCKS, *FUNCTIONALS):
        small = case.small()
        assert small.channels <= 64 and small.size <= 6 and small.batch <= 3
        assert small.density == case.density


def test_limits_speak_of_groups_and_facts_that_exist():
    groups = {"block": BLOCKS, "network": NETWORKS, "functional": FUNCTIONALS, "linear": LINEARS}
    facts = {group: cases[0].facts() for group, cases in groups.items()}
    for limit in LIMITS:
        assert {name for name, _ in limit.only} <= facts[limit.group].keys()
