"""What several test files need; fixtures are in conftest.py."""
