"""Which compiled programs a family keeps when it may not keep all."""

from flax_skd.run.family import _Programs


def test_the_program_not_used_for_longest_goes_first_however_old_the_others_are():
    programs, built = _Programs(2), []

    def use(name):
        assert programs.get(name, lambda: built.append(name) or name) == name

    for name in ("old", "newer", "old", "newest"):
        use(name)
    assert built == ["old", "newer", "newest"] and len(programs) == 2
    use("old")  # used since, so that it was kept
    assert len(built) == 3
    use("newer")
    assert built[3:] == ["newer"] and programs.built == 4
