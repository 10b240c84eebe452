"""Failed assertions in `wrong.py` show what was compared."""

import pytest

pytest.register_assert_rewrite("tests.cli.wrong")
