"""The lint check for reasons finds what it is there to find, and nothing else."""

from __future__ import annotations

import pytest

from tests.check_reasons import main, problems

WITHOUT = {
    "a noqa without code": "import os  # noqa\n",
    "a noqa without reason": "import os  # noqa: F401\n",
    "a noqa with one word": "import os  # noqa: F401 - needed\n",
    "a file noqa without reason": "# ruff: noqa: F401, F811\nimport os\n",
    "an ignore without code": "x = 1  # type: ignore  # the stub is wrong\n",
    "an ignore without reason": "x = 1  # type: ignore[assignment]\n",
    "two directives and no reason": "x = 1  # type: ignore[assignment]  # noqa: E501\n",
    "a bare except": "try:\n    f()\nexcept:\n    pass\n",
    "except Exception": "try:\n    f()\nexcept Exception:\n    pass\n",
    "a tuple with BaseException": "try:\n    f()\nexcept (OSError, BaseException):\n    pass\n",
    "a dotted builtins.Exception": "try:\n    f()\nexcept builtins.Exception:\n    pass\n",
    "an except with nothing but a directive": "try:\n    f()\nexcept Exception:  # noqa: BLE001\n    pass\n",
    "suppress(Exception)": "with contextlib.suppress(Exception):\n    f()\n",
}

WITH = {
    "a noqa with reason": "import os  # noqa: F401 - imported for its effect\n",
    "an ignore with reason": "x = 1  # type: ignore[assignment]  # the stub is wrong\n",
    "a reason on the except": "try:\n    f()\nexcept Exception:  # noqa: BLE001 - plugins raise anything\n    pass\n",
    "a reason below the except": "try:\n    f()\nexcept Exception:\n    # a plugin may raise anything\n    pass\n",
    "a reason above the except": "try:\n    f()\n# a plugin may raise anything\nexcept Exception:\n    pass\n",
    "a typed except": "try:\n    f()\nexcept OSError:\n    pass\n",
    "the word in a string": "text = 'x  # noqa'\n",
}


@pytest.mark.parametrize("source", WITHOUT.values(), ids=WITHOUT.keys())
def test_reports(source):
    assert list(problems(source))


@pytest.mark.parametrize("source", WITH.values(), ids=WITH.keys())
def test_accepts(source):
    assert list(problems(source)) == []


def test_names_file_and_line_and_counts_what_it_found(tmp_path, capsys):
    (tmp_path / "module.py").write_text("x = 1\nimport os  # noqa\n")
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path}/module.py:2: `noqa` names no code" in capsys.readouterr().out
