"""The README shows how a method is added by the diff of the smallest one: it must be what the files hold."""

import re

import conftest

from ffl_jax.methods import METHODS


def test_the_smallest_method_is_shown_as_it_is():
    (diff,) = re.findall(r"```diff\n(.*?)```", (conftest.ROOT / "README.md").read_text(), re.S)
    added = {}
    for line in diff.splitlines():
        if line.startswith("+++ "):
            lines = added.setdefault(line.removeprefix("+++ b/"), [])
        elif line.startswith("+"):
            lines.append(line[1:])
    assert list(added) == ["ffl_jax/methods/__init__.py", "ffl_jax/methods/independent.py"]
    package, method = (conftest.ROOT / path for path in added)
    assert added["ffl_jax/methods/independent.py"] == method.read_text().splitlines()
    (line,) = added["ffl_jax/methods/__init__.py"]
    assert line in package.read_text().splitlines()
    sizes = {name: len((method.parent / f"{name}.py").read_text()) for name in METHODS}
    assert min(sizes, key=sizes.get) == "independent"
