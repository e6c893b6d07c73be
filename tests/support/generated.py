"""hypothesis, which generates the cases of a test; where it is not installed, these tests skip."""

import pytest

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError:

    class Anything:
        """Stands for what hypothesis would give: strategies are built, and never used."""

        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **options):
            return self

        def __or__(self, other):
            return self

    HealthCheck = Phase = st = Anything()

    def given(*strategies, **named):
        return pytest.mark.skip(reason="could not import 'hypothesis'")

    def settings(*options, **named):
        return lambda test: test


__all__ = ['HealthCheck', 'Phase', 'given', 'settings', 'st']
