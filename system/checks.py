"""Range checks of a script's settings. A value out of range ends the script with one line."""

from system.errors import fail


def check_at_least(least, config, keys):
    """End the script if a setting in `keys`, names separated by spaces, is below `least`."""
    for key in keys.split():
        if config[key] < least:
            fail(f"{key}={config[key]} must be at least {least}")


def check_at_most(most, config, keys):
    """End the script if a setting in `keys`, names separated by spaces, is above `most`."""
    for key in keys.split():
        if config[key] > most:
            fail(f"{key}={config[key]} must be at most {most}")


def check_between(least, most, config, keys):
    """End the script if a setting in `keys` is below `least` or above `most`."""
    check_at_least(least, config, keys)
    check_at_most(most, config, keys)
