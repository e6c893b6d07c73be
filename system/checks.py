"""Range checks of a script's settings."""

from system.errors import fail


def check_at_least(least, config, keys):
    """Fail where one of the settings `keys` (names in one string) is below `least`."""
    for key in keys.split():
        if config[key] < least:
            fail(f"{key}={config[key]} must be at least {least}")


def check_at_most(most, config, keys):
    """Fail where one of the settings `keys` (names in one string) is above `most`."""
    for key in keys.split():
        if config[key] > most:
            fail(f"{key}={config[key]} must be at most {most}")


def check_between(least, most, config, keys):
    """Fail where one of the settings `keys` (names in one string) is below `least` or above
    `most`."""
    check_at_least(least, config, keys)
    check_at_most(most, config, keys)
