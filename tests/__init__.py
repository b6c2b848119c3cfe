"""What the tests of ssepush stand on, and those that need more than redis and pytest."""

import pytest

pytest.register_assert_rewrite("tests.kit")
